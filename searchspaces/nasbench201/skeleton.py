"""The skeleton of the NAS-Bench-201 space: its options, its tokens and the network of one cell (specification 7.1)."""
from __future__ import annotations

from functools import cached_property

import numpy as np

from searchspaces.errors import ConfigError
from searchspaces.graph import Graph, GraphBuilder
from searchspaces.space import Choice, SearchSpace, Tokens

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
NONE, SKIP, CONV1, CONV3, POOL = range(5)
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))  # (from, to), the order of tokens
STAGES = 3


class NasBench201Skeleton(SearchSpace):
    """`width` channels in the first stage, doubled in the next two; `cells` per stage."""

    def __init__(self, classes: int = 10, channels: int = 3, width: int = 16, cells: int = 5,
                 resolution: int = 32) -> None:
        super().__init__(classes, channels)
        self.width, self.cells, self.resolution = width, cells, resolution
        for name, value, least in (("width", width, 1), ("cells", cells, 1), ("resolution", resolution, 4)):
            if value < least:
                raise ConfigError(f"{name} of nasbench201 is {value}; it must be at least {least}")

    @property
    def space_id(self) -> str:
        return (f"nasbench201(width={self.width},cells={self.cells},resolution={self.resolution},"
                f"channels={self.channels},classes={self.classes})")

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        return tuple(Choice(f"{a}->{b}", "op", OPERATIONS) for a, b in EDGES)

    # --- networks --------------------------------------------------------------------------------------------------

    def graph(self, tokens_T: Tokens) -> Graph:
        row = self.check_tokens(np.asarray(tokens_T)[None])[0]
        builder = GraphBuilder(self.channels, self.resolution)
        builder.begin_block("stem", -1, f"conv 3x3 {self.width}", kernel=3, channels=self.width, stride=1)
        x = builder.batch_norm(builder.conv("input", "stem.conv", self.width, 3), "stem.bn")
        for stage in range(STAGES):
            if stage:
                x = self._reduction(builder, x, stage)
            for index in range(self.cells):
                x = self._cell(builder, x, stage, index, row)
        builder.begin_block("head", -1, "classifier", classes=self.classes)
        x = builder.activation(builder.batch_norm(x, "head.bn"), "head.act", "relu")
        x = builder.flatten(builder.global_pool(x, "head.pool"), "head.flatten")
        builder.linear(x, "head.linear", self.classes)
        return builder.build()

    def _reduction(self, builder: GraphBuilder, x: str, stage: int) -> str:
        """Residual block: two ReLU-conv3x3-BN, shortcut of 2x2 average pool and 1x1 conv without batch norm."""
        name, channels = f"reduction{stage}", self.width * 2 ** stage
        builder.begin_block(name, -1, f"residual 3x3 {channels}", kernel=3, channels=channels, stride=2)
        y = _relu_conv_bn(builder, x, f"{name}.a", channels, 3, stride=2)
        y = _relu_conv_bn(builder, y, f"{name}.b", channels, 3)
        pooled = builder.pool(x, f"{name}.pool", "avg_pool", 2, 2, padding=0)
        return builder.add((y, builder.conv(pooled, f"{name}.shortcut", channels, 1)), f"{name}.add")

    def _cell(self, builder: GraphBuilder, x: str, stage: int, index: int, row: Tokens) -> str:
        name, channels = f"stage{stage}.cell{index}", self.width * 2 ** stage
        settings = {f"{a}->{b}": OPERATIONS[token] for (a, b), token in zip(EDGES, row)}
        builder.begin_block(name, stage, "cell", tuple(int(token) for token in row), channels=channels, **settings)
        values = {0: x}
        for node in (1, 2, 3):
            incoming = []
            for (a, b), token in zip(EDGES, row):
                if b == node and token != NONE:
                    incoming.append(_operation(builder, values[a], f"{name}.{a}_{b}", int(token), channels))
            if not incoming:
                values[node] = builder.zeros(x, f"{name}.node{node}", builder.shape(x))
            else:
                values[node] = incoming[0] if len(incoming) == 1 else builder.add(tuple(incoming), f"{name}.node{node}")
        return values[3]


def _relu_conv_bn(builder: GraphBuilder, x: str, name: str, out: int, kernel: int, stride: int = 1) -> str:
    x = builder.activation(x, f"{name}.act", "relu")
    return builder.batch_norm(builder.conv(x, f"{name}.conv", out, kernel, stride), f"{name}.bn")


def _operation(builder: GraphBuilder, x: str, name: str, token: int, channels: int) -> str:
    if token == SKIP:
        return x
    if token == POOL:
        return builder.pool(x, f"{name}.pool", "avg_pool", 3)
    return _relu_conv_bn(builder, x, name, channels, 1 if token == CONV1 else 3)
