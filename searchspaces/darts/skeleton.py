"""The skeleton of the DARTS space: its options, its tokens and the network of one row (specification 5.1 to 5.3).

A network is a stem and a chain of cells of two types, normal and reduction; all cells of a type are alike. A cell reads
the outputs of the two cells before it (inputs 0 and 1) and has four nodes (2 to 5), each the sum of two operations on
earlier values; its output is the concatenation of the nodes. Reduction cells stand at a third and two thirds of the
chain: channels double, and operations on inputs 0 and 1 have stride 2.

Legend: K = 2 cell types, M = 4 nodes, S = 2 pairs (input, operation) of a node; suffixes N, T as in space.py.
"""
from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from searchspaces.errors import ConfigError
from searchspaces.graph import INPUT, Graph, GraphBuilder
from searchspaces.space import Choice, FreeSpace, Tokens

OPERATIONS = ("skip_connect", "sep_conv_3x3", "max_pool_3x3", "dil_conv_3x3", "sep_conv_5x5", "avg_pool_3x3",
              "sep_conv_7x7")
SKIP, SEP3, MAX, DIL3, SEP5, AVG, SEP7 = range(7)
SEPARABLE = {SEP3: 3, SEP5: 5, SEP7: 7}  # operation -> kernel
CELL_TYPES = ("normal", "reduction")
NORMAL, REDUCTION = range(2)
NODES = 4
INPUTS = tuple(node + 2 for node in range(NODES))  # how many values a node may read
SLOTS = ("a", "b")  # the two pairs of a node
STEM_FACTOR = 3


@dataclass(frozen=True)
class CellSpec:
    """One cell of the chain: channels of each of its nodes, and of the two outputs it reads (the older one first)."""

    name: str
    kind: int
    stage: int
    channels: int
    in_channels: tuple[int, int]
    after_reduction: bool  # the older output then is twice as large as the other

    def stride(self, source: int) -> int:
        return 2 if self.kind == REDUCTION and source < 2 else 1


class DartsSkeleton(FreeSpace):
    """`width` channels per node in the first stage; `cells` in all, of which two are reduction cells."""

    def __init__(self, classes: int = 10, channels: int = 3, width: int = 36, cells: int = 20,
                 resolution: int = 32) -> None:
        super().__init__(classes, channels)
        self.width, self.cells, self.resolution = width, cells, resolution
        for name, value, least in (("width", width, 1), ("cells", cells, 3), ("resolution", resolution, 4)):
            if value < least:
                raise ConfigError(f"{name} of darts is {value}; it must be at least {least}")
        if resolution % 4:
            raise ConfigError(f"resolution of darts is {resolution}; it is halved twice, so give a multiple of 4")

    @property
    def space_id(self) -> str:
        return (f"darts(width={self.width},cells={self.cells},resolution={self.resolution},"
                f"channels={self.channels},classes={self.classes})")

    # --- tokens ----------------------------------------------------------------------------------------------------

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """Cell type by cell type, node by node: input and operation of the pair a, then of b."""
        choices = []
        for cell, (node, inputs), slot in itertools.product(CELL_TYPES, enumerate(INPUTS), SLOTS):
            choices.append(Choice(f"{cell}{node}.in_{slot}", f"input of {inputs}", tuple(range(inputs))))
            choices.append(Choice(f"{cell}{node}.op_{slot}", "op", OPERATIONS))
        return tuple(choices)

    def by_pair(self, tokens_NT: Tokens) -> Tokens:
        """int8[N, K, M, S, 2]: (input, operation)."""
        rows = np.asarray(tokens_NT)
        return rows.reshape(len(rows), len(CELL_TYPES), NODES, len(SLOTS), 2)

    def canonical(self, tokens_NT: Tokens) -> Tokens:
        """The two pairs of each node ascending, because the node is their sum. No token is dead."""
        pairs = self.by_pair(tokens_NT)
        codes = np.sort(pairs[..., 0] * len(OPERATIONS) + pairs[..., 1], axis=-1)
        rows = np.stack(np.divmod(codes, len(OPERATIONS)), axis=-1)
        return rows.reshape(len(rows), -1).astype(np.int8)

    # --- networks --------------------------------------------------------------------------------------------------

    @cached_property
    def layout(self) -> tuple[CellSpec, ...]:
        """The cells in order."""
        reductions = (self.cells // 3, 2 * self.cells // 3)
        older = previous = STEM_FACTOR * self.width
        specs = []
        for index in range(self.cells):
            stage = sum(index >= reduction for reduction in reductions)
            channels = self.width * 2 ** stage
            specs.append(CellSpec(f"cell{index}", REDUCTION if index in reductions else NORMAL, stage, channels,
                                  (older, previous), index - 1 in reductions))
            older, previous = previous, NODES * channels
        return tuple(specs)

    def graph(self, tokens_T: Tokens) -> Graph:
        pairs_KMS2 = self.by_pair(self.canonical(self.check_tokens(np.asarray(tokens_T)[None])))[0]
        builder, channels = GraphBuilder(self.channels, self.resolution), STEM_FACTOR * self.width
        builder.begin_block("stem", -1, f"conv 3x3 {channels}", kernel=3, channels=channels, stride=1)
        previous = builder.batch_norm(builder.conv(INPUT, "stem.conv", channels, 3), "stem.bn")
        older = previous
        for spec in self.layout:
            older, previous = previous, _cell(builder, older, previous, spec, pairs_KMS2[spec.kind])
        builder.begin_block("head", -1, "classifier", classes=self.classes)
        x = builder.flatten(builder.global_pool(previous, "head.pool"), "head.flatten")
        builder.linear(x, "head.linear", self.classes)
        return builder.build()


def _cell(builder: GraphBuilder, older: str, previous: str, spec: CellSpec, pairs_MS2: NDArray[np.int8]) -> str:
    pairs = [[(int(source), int(op)) for source, op in pairs_S2] for pairs_S2 in pairs_MS2]
    settings = {f"node{node}{slot} from {source}": OPERATIONS[op]
                for node, both in enumerate(pairs) for slot, (source, op) in zip(SLOTS, both)}
    builder.begin_block(spec.name, spec.stage, f"{CELL_TYPES[spec.kind]} cell", (spec.kind, *map(int, pairs_MS2.flat)),
                        channels=spec.channels, **settings)
    relus: dict[str, str] = {}

    def relu(x: str) -> str:
        """Once per value, however many operations begin with it."""
        if x not in relus:
            relus[x] = builder.activation(x, f"{spec.name}.relu{len(relus)}", "relu")
        return relus[x]

    preprocess = _factorized_reduce if spec.after_reduction else _conv_bn
    values = [preprocess(builder, relu(older), f"{spec.name}.preprocess0", spec.channels),
              _conv_bn(builder, relu(previous), f"{spec.name}.preprocess1", spec.channels)]
    for node, both in enumerate(pairs):
        terms = []
        for slot, (source, op) in zip(SLOTS, both):
            stride, x = spec.stride(source), values[source]
            if op in SEPARABLE or op == DIL3 or (op == SKIP and stride == 2):
                x = relu(x)
            terms.append(_operation(builder, x, f"{spec.name}.node{node}.{slot}", op, stride))
        values.append(builder.add(tuple(terms), f"{spec.name}.node{node}.sum"))
    return builder.concat(tuple(values[2:]), f"{spec.name}.concat")


def _operation(builder: GraphBuilder, x: str, name: str, op: int, stride: int) -> str:
    """x is rectified where the operation begins with a ReLU. Pools have no batch norm."""
    channels = builder.shape(x)[0]
    if op == SKIP:
        return x if stride == 1 else _factorized_reduce(builder, x, name, channels)
    if op in (MAX, AVG):
        return builder.pool(x, f"{name}.pool", "max_pool" if op == MAX else "avg_pool", 3, stride)
    if op == DIL3:
        return _depthwise_separable(builder, x, name, "1", 3, stride, dilation=2)
    x = _depthwise_separable(builder, x, name, "1", SEPARABLE[op], stride)
    x = builder.activation(x, f"{name}.relu", "relu")
    return _depthwise_separable(builder, x, name, "2", SEPARABLE[op])


def _depthwise_separable(builder: GraphBuilder, x: str, name: str, turn: str, kernel: int, stride: int = 1,
                         dilation: int = 1) -> str:
    channels = builder.shape(x)[0]
    x = builder.conv(x, f"{name}.depthwise{turn}", channels, kernel, stride, groups=channels, dilation=dilation)
    return builder.batch_norm(builder.conv(x, f"{name}.pointwise{turn}", channels, 1), f"{name}.bn{turn}")


def _conv_bn(builder: GraphBuilder, x: str, name: str, out: int) -> str:
    return builder.batch_norm(builder.conv(x, f"{name}.conv", out, 1), f"{name}.bn")


def _factorized_reduce(builder: GraphBuilder, x: str, name: str, out: int) -> str:
    """Two 1x1 convolutions of stride 2, on x and on x shifted by a pixel. Batch norm acts on each channel by itself, so
    it can come before the concatenation, where it folds into the convolution."""
    shifted = builder.shift(x, f"{name}.shift")
    halves = [builder.batch_norm(builder.conv(y, f"{name}.conv{turn}", out // 2, 1, 2), f"{name}.bn{turn}")
              for turn, y in ((1, x), (2, shifted))]
    return builder.concat(tuple(halves), f"{name}.concat")
