"""The skeleton of the expanded space: its options, its tokens and the network of one row (specification 6.1, 6.2).

A network is a 3x3 stem, three stages of basic residual blocks and a linear classifier. All blocks of a stage have one
width; the first block of every stage has a 1x1 projection on its shortcut, also where shapes agree. Every convolution
is followed by a batch norm; the second ReLU of a block comes after the addition, as in ResNet.

A width is two tokens, because a token is int8: the range it lies in and the place inside that range.

Legend: S = 3 stages, d a depth in blocks, w a width in channels; suffixes N, T as in space.py. Stages count from 0.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from searchspaces.errors import ConfigError, SpaceError
from searchspaces.graph import INPUT, Graph, GraphBuilder, conv_out
from searchspaces.space import Choice, SearchSpace, Tokens

STAGES = 3
STAGE_TOKENS = 3        # depth, range, place
MOST_VALUES = 127       # of one int8 token


class ExpandedSkeleton(SearchSpace):
    """Depths 1..`depth` and widths 1..`width` per stage; `depth_bin` and `width_bin` neighbouring ones make a bin.
    `stem` channels come out of the first convolution; `strides` are those of the stages' first blocks."""

    def __init__(self, classes: int = 10, channels: int = 3, depth: int = 16, width: int = 512, depth_bin: int = 4,
                 width_bin: int = 32, stem: int = 16, resolution: int = 32, strides: Sequence[int] = (1, 2, 2)) -> None:
        super().__init__(classes, channels)
        self.depth, self.width, self.depth_bin, self.width_bin = depth, width, depth_bin, width_bin
        self.stem, self.resolution, self.strides = stem, resolution, tuple(strides)
        self._check_options()

    def _check_options(self) -> None:
        for name, most, size in (("depth", self.depth, self.depth_bin), ("width", self.width, self.width_bin)):
            if size < 1 or most % size or most // size < 2:
                raise ConfigError(f"{name} of expanded is {most} in bins of {size}; {name}_bin must divide {name} into "
                                  "at least two bins")
        for name, values in (("depth", self.depth), ("width_bin", self.width_bin),
                             ("width / width_bin", self.width // self.width_bin)):
            if values > MOST_VALUES:
                raise ConfigError(f"{name} of expanded is {values}, but a token has at most {MOST_VALUES} values; use "
                                  "a smaller one")
        if self.stem < 1 or self.resolution < 1:
            raise ConfigError(f"expanded has {self.stem} channels in its stem and a resolution of {self.resolution}; "
                              "both must be at least 1")
        if len(self.strides) != STAGES or any(stride not in (1, 2) for stride in self.strides):
            raise ConfigError(f"strides of expanded are {list(self.strides)}; give {STAGES}, each 1 or 2")

    @property
    def space_id(self) -> str:
        strides = "".join(str(stride) for stride in self.strides)
        return (f"expanded(depth={self.depth}/{self.depth_bin},width={self.width}/{self.width_bin},stem={self.stem},"
                f"resolution={self.resolution},strides={strides},channels={self.channels},classes={self.classes})")

    # --- tokens ----------------------------------------------------------------------------------------------------

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        starts = range(1, self.width + 1, self.width_bin)
        ranges = tuple(f"{start}-{start + self.width_bin - 1}" for start in starts)
        return tuple(choice for i in range(STAGES) for choice in (
            Choice(f"depth{i}", "depth", tuple(range(1, self.depth + 1))), Choice(f"range{i}", "range", ranges),
            Choice(f"place{i}", "place", tuple(range(1, self.width_bin + 1)))))

    def depths(self, tokens_NT: Tokens) -> NDArray[np.int64]:
        """int64[N, S], in blocks."""
        return np.asarray(tokens_NT, dtype=np.int64)[:, ::STAGE_TOKENS] + 1

    def widths(self, tokens_NT: Tokens) -> NDArray[np.int64]:
        """int64[N, S], in channels."""
        rows = np.asarray(tokens_NT, dtype=np.int64)
        return self.width_bin * rows[:, 1::STAGE_TOKENS] + rows[:, 2::STAGE_TOKENS] + 1

    def rows(self, depths_NS: NDArray[np.int64], widths_NS: NDArray[np.int64]) -> Tokens:
        """int8[N, T]: the opposite of `depths` and `widths`. SpaceError outside the space."""
        depths, widths = np.asarray(depths_NS), np.asarray(widths_NS)
        for name, values, most in (("depths", depths, self.depth), ("widths", widths, self.width)):
            if values.ndim != 2 or values.shape[1] != STAGES or ((values < 1) | (values > most)).any():
                raise SpaceError(f"{name} {values.tolist()} are not of {self.space_id}; give {STAGES} per row, each in "
                                 f"1..{most}")
        ranges, places = np.divmod(widths - 1, self.width_bin)
        return np.stack([depths - 1, ranges, places], axis=2).reshape(len(depths), -1).astype(np.int8)

    def row(self, depths: Sequence[int], widths: Sequence[int]) -> Tokens:
        """int8[T]: the row of one architecture, e.g. `row((2, 2, 2), (16, 32, 64))`."""
        return self.rows(np.array([depths]), np.array([widths]))[0]

    # --- networks --------------------------------------------------------------------------------------------------

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Height and width of the maps of each stage, after its stride."""
        sizes = [self.resolution]
        for stride in self.strides:
            sizes.append(conv_out(sizes[-1], 3, stride))
        return tuple(sizes[1:])

    def graph(self, tokens_T: Tokens) -> Graph:
        row = self.check_tokens(np.asarray(tokens_T)[None])
        builder = GraphBuilder(self.channels, self.resolution)
        builder.begin_block("stem", -1, f"conv 3x3 {self.stem}", kernel=3, channels=self.stem, stride=1)
        x = builder.activation(_conv_bn(builder, INPUT, "stem.conv", self.stem, 3), "stem.act", "relu")
        for stage, (depth, width) in enumerate(zip(self.depths(row)[0].tolist(), self.widths(row)[0].tolist())):
            for index in range(depth):
                x = _block(builder, x, stage, index, width, self.strides[stage] if index == 0 else 1)
        builder.begin_block("head", -1, "classifier", classes=self.classes)
        x = builder.flatten(builder.global_pool(x, "head.pool"), "head.flatten")
        builder.linear(x, "head.linear", self.classes)
        return builder.build()


def _conv_bn(builder: GraphBuilder, x: str, name: str, out: int, kernel: int, stride: int = 1) -> str:
    return builder.batch_norm(builder.conv(x, name, out, kernel, stride), f"{name}_bn")


def _block(builder: GraphBuilder, x: str, stage: int, index: int, width: int, stride: int) -> str:
    """Two 3x3 convolutions beside the shortcut, which the first block of a stage projects."""
    name = f"stage{stage}.block{index}"
    builder.begin_block(name, stage, f"residual 3x3 {width}", kernel=3, width=width, stride=stride)
    y = builder.activation(_conv_bn(builder, x, f"{name}.conv1", width, 3, stride), f"{name}.act1", "relu")
    y = _conv_bn(builder, y, f"{name}.conv2", width, 3)
    if index == 0:
        x = _conv_bn(builder, x, f"{name}.shortcut", width, 1, stride)
    return builder.activation(builder.add((y, x), f"{name}.add"), f"{name}.act2", "relu")
