"""What an exported ONNX file takes, and what it computes, by ONNX Runtime: its parity with torch, and its accuracy."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from actors.data import LabelledImages, Preprocessing, chunks_of
from actors.loading import ahead
from searchspaces.errors import EvaluationError
from searchspaces.onnxgraph import IMAGES
from searchspaces.onnxpixels import Pixels

CHUNK_MB = 256.0         # of images as the network sees them
PARITY_TOLERANCE = 1e-3  # of the largest logit; float32 kernels that differ only in summation order stay below
LEAST_PROBABILITY = np.float32(1e-30)   # smaller ones are near where float32 loses digits


def _session(model: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # warns of every unused operation of a cell otherwise
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def takes_pixels(session: onnxruntime.InferenceSession) -> bool:
    """Does the file hold its own preprocessing, and give probabilities?"""
    return bool(session.get_inputs()[0].type == "tensor(uint8)")


def _scores(session: onnxruntime.InferenceSession, images: NDArray[np.uint8],
            preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Logits, or probabilities, of uint8[N, H, W, C]."""
    feed = images if takes_pixels(session) else preprocessing.numpy(images)
    batch = session.get_inputs()[0].shape[0]
    batch = batch if isinstance(batch, int) else len(feed)
    padded = np.concatenate([feed, np.zeros((-len(feed) % batch, *feed.shape[1:]), feed.dtype)])
    chunks = [session.run(None, {"images": padded[i:i + batch]})[0] for i in range(0, len(padded), batch)]
    return np.concatenate(chunks)[:len(feed)]


def as_pixels(preprocessing: Preprocessing, shape: Sequence[int]) -> Pixels:
    """The preprocessing as a part of a file, which is timed with images of this shape, (H, W, C)."""
    return Pixels((int(shape[0]), int(shape[1])), preprocessing.mean, preprocessing.std, preprocessing.scale)


def described_input(preprocessing: Preprocessing, pixels: Pixels | None) -> dict[str, Any]:
    """For the sidecar: what a file wants to be given, and what it was timed with where that is free."""
    if pixels is None:
        return {"name": IMAGES, "layout": "NCHW float32", "preprocessing": preprocessing.to_dict()}
    return {"name": IMAGES, "layout": "NHWC uint8", "timed_size": list(pixels.size),
            "preprocessing_in_model": preprocessing.to_dict()}


def check_parity(network: torch.nn.Module, model: bytes, images: NDArray[np.uint8],
                 preprocessing: Preprocessing) -> float:
    """Largest difference between ONNX Runtime's logits and torch's; EvaluationError beyond the tolerance.

    Of a file that gives probabilities their logarithms are compared, so that its preprocessing is held to the same.
    """
    with torch.inference_mode():
        logits = network(preprocessing.tensor(images))
    session = _session(model)
    given, expected = _scores(session, images, preprocessing), logits.numpy()
    if takes_pixels(session):
        given = np.log(np.maximum(given, LEAST_PROBABILITY))
        expected = np.maximum(logits.log_softmax(dim=1).numpy(), np.log(LEAST_PROBABILITY))
    difference = float(np.abs(given - expected).max())
    if not difference <= PARITY_TOLERANCE * max(1.0, float(logits.abs().max())):
        raise EvaluationError(f"the exported file differs from torch by {difference:.3g} in a logit; it is not handed "
                              "over")
    return difference


def file_accuracy(model: bytes, images: LabelledImages, preprocessing: Preprocessing, chunk: int = 1000) -> float:
    """Share of images that the exported file itself classifies correctly."""
    return float(file_hits(model, images, preprocessing, chunk).mean())


def file_hits(model: bytes, images: LabelledImages, preprocessing: Preprocessing,
              chunk: int = 1000) -> NDArray[np.bool_]:
    """bool[images]: which of them the exported file itself classifies correctly; at most `chunk` are in memory."""
    session = _session(model)
    chunk = max(1, min(chunk, int(CHUNK_MB / preprocessing.input_mb(1))))
    rows = chunks_of(len(images), chunk)
    hits = [_scores(session, some, preprocessing).argmax(1) == images.labels[these]
            for these, some in zip(rows, ahead(images.read, rows, images.raw_mb * chunk / len(images),
                                               images.memory_mb), strict=True)]
    return np.concatenate(hits)
