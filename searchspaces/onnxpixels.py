"""Preprocessing inside an ONNX file: from uint8 images as a user has them to what a network sees, and back to classes.

    images uint8[batch, H, W, C] -> float32 -> NCHW -> Resize to R x R -> times 1 / 255 / std, minus mean / std
    -> the network -> Softmax -> probabilities float32[batch, classes]

H and W are free. The numbers are those of `actors.data.Preprocessing` (a test holds that): `Resize` with `antialias` is
bilinear with half-pixel centres and, when shrinking, a filter as wide as the shrinkage; `exclude_outside` gives the
pixels at the border the weights that torch and Pillow give them. Scaling comes after resizing, where pixels are fewer.
"""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

RESIZE_OPSET = 18     # the first whose Resize has antialias; no other operator that is written here changed since 17
HEIGHT, WIDTH = "height", "width"   # the free dimensions
TIMED_SIZE = "timed_size"           # key of the metadata: JSON of the sizes of free dimensions when a file is timed


@dataclass(frozen=True)
class Pixels:
    """What uint8 images become: (resize(image * scale) - mean) / std per channel. `size`: height and width of the
    images with which a file is timed; larger ones take longer."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1 / 255

    @staticmethod
    def neutral(size: tuple[int, int], channels: int) -> Pixels:
        """For timing only, which does not depend on values."""
        return Pixels(size, (0.0,) * channels, (1.0,) * channels)

    @property
    def metadata(self) -> dict[str, str]:
        return {TIMED_SIZE: json.dumps(dict(zip((HEIGHT, WIDTH), self.size)))}


def timed_size(metadata: Mapping[str, str]) -> dict[str, int]:
    """Sizes of a file's free dimensions, by name, from its metadata; {} where it has none."""
    return {str(name): int(size) for name, size in json.loads(metadata.get(TIMED_SIZE, "{}")).items()}


def from_pixels(pixels: Pixels, resolution: int, source: str,
                target: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes and constants from uint8[batch, H, W, C] to float32[batch, C, resolution, resolution]."""
    shape = (1, len(pixels.mean), 1, 1)
    mean, std = np.array(pixels.mean).reshape(shape), np.array(pixels.std).reshape(shape)
    constants = {"size": np.array([resolution, resolution], np.int64),
                 "factor": (pixels.scale / std).astype(np.float32), "offset": (-mean / std).astype(np.float32)}
    name = {key: f"pixels.{key}" for key in ("float", "channels_first", "resized", "scaled", *constants)}
    nodes = [
        helper.make_node("Cast", [source], [name["float"]], name=name["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", [name["float"]], [name["channels_first"]], name=name["channels_first"],
                         perm=[0, 3, 1, 2]),
        helper.make_node("Resize", [name["channels_first"], "", "", name["size"]], [name["resized"]],
                         name=name["resized"], mode="linear", coordinate_transformation_mode="half_pixel",
                         antialias=1, exclude_outside=1, axes=[2, 3]),
        helper.make_node("Mul", [name["resized"], name["factor"]], [name["scaled"]], name=name["scaled"]),
        helper.make_node("Add", [name["scaled"], name["offset"]], [target], name=target)]
    return nodes, [onnx.numpy_helper.from_array(array, name[key]) for key, array in constants.items()]
