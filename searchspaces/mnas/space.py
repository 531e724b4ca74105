"""The block-level space of MnasNet on the skeleton of MobileNetV2, searched by FNAS (specification 4).

Seven blocks of one to five equal layers; six tokens say what all layers of a block are, 42 in all:

    op       conv (k x k), sep (depthwise, 1x1), mb3 and mb6 (1x1 to 3 or 6 times the channels, depthwise, 1x1)
    kernel   3, 5
    se       ratio of squeeze and excitation, 0 is without
    skip     none, identity, pool (3x3 average): beside every layer that keeps its shape
    filters  0.75, 1.0, 1.25 of the block's base channels
    layers   -1, 0, +1 more than the block's base repeats

A block cannot lose its only layer, so `layers` of -1 is invalid where the base is one. `skip` is dead in a block whose
single layer changes its shape. 432^5 * 288^2 = 1.248e18 valid rows, 4.314e17 networks at the standard settings.

Legend: B = 7 blocks, q = 6 tokens per block; suffixes N, T, F as in space.py. Blocks and layers count from 0.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, reduce

import numpy as np
from numpy.typing import NDArray

from searchspaces.errors import ConfigError, SpaceError
from searchspaces.graph import INPUT, Graph, GraphBuilder, conv_out, make_divisible
from searchspaces.space import Choice, SearchSpace, Tokens
from searchspaces.vectorfeatures import VECTOR_FEATURES, vector_features

BLOCKS = 7
OPS, KERNELS, SE_RATIOS, SKIPS = ("conv", "sep", "mb3", "mb6"), (3, 5), (0, 0.25), ("none", "identity", "pool")
FILTERS, LAYERS = (0.75, 1.0, 1.25), (-1, 0, 1)
VOCABULARIES: dict[str, tuple[int | float | str, ...]] = {
    "op": OPS, "kernel": KERNELS, "se": SE_RATIOS, "skip": SKIPS, "filters": FILTERS, "layers": LAYERS}
OP, KERNEL, SE, SKIP, FILTER, LAYER = range(len(VOCABULARIES))
BLOCK_TOKENS = len(VOCABULARIES)
EXPANSION = {"sep": 1, "mb3": 3, "mb6": 6}
# MobileNetV2 at width 1.0
STEM_CHANNELS, BLOCK_CHANNELS, HEAD_CHANNELS = 32, (16, 24, 32, 64, 96, 160, 320), 1280
LEAST_CHANNELS = 16
EPS = 1e-3


class Mnas(SearchSpace):
    """`width` scales every channel count, `repeats` are the base repeats of the blocks.

    Channels are multiples of 4, of a base of at least 16: with multiples of 8, or a smaller base, 0.75 and 1.0 of it
    would be the same network, and with other numbers runtimes leave their vectorised layouts.
    """

    def __init__(self, classes: int = 10, channels: int = 3, width: float = 1.0, resolution: int = 224,
                 stem_stride: int = 2, block_strides: Sequence[int] = (1, 2, 2, 2, 1, 2, 1),
                 repeats: Sequence[int] = (1, 2, 3, 4, 3, 3, 1)) -> None:
        super().__init__(classes, channels)
        self.width = float(width)
        self.resolution, self.stem_stride = resolution, stem_stride
        self.block_strides, self.repeats = tuple(block_strides), tuple(repeats)
        self._check_options()

    def _check_options(self) -> None:
        if not 0.25 <= self.width <= 4:
            raise ConfigError(f"width of mnas is {self.width:g}; it must lie between 0.25 and 4")
        if self.resolution < 4:
            raise ConfigError(f"resolution of mnas is {self.resolution}; it must be at least 4")
        if len(self.block_strides) != BLOCKS or any(s not in (1, 2) for s in (self.stem_stride, *self.block_strides)):
            raise ConfigError(f"strides of mnas are stem {self.stem_stride}, blocks {list(self.block_strides)}; give "
                              f"one stem stride and {BLOCKS} block strides, each 1 or 2")
        if len(self.repeats) != BLOCKS or any(not 1 <= n <= 8 for n in self.repeats):
            raise ConfigError(f"repeats of mnas are {list(self.repeats)}; give {BLOCKS} numbers from 1 to 8")

    @property
    def space_id(self) -> str:
        strides = "".join(str(s) for s in (self.stem_stride, *self.block_strides))
        repeats = "".join(str(n) for n in self.repeats)
        return (f"mnas(width={self.width:g},resolution={self.resolution},strides={strides},repeats={repeats},"
                f"channels={self.channels},classes={self.classes})")

    # --- tokens ----------------------------------------------------------------------------------------------------

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        return tuple(Choice(f"{kind}{b}", kind, values) for b in range(BLOCKS) for kind, values in VOCABULARIES.items())

    def valid(self, prefix: Sequence[int] | Tokens) -> NDArray[np.bool_]:
        block, kind = divmod(len(prefix), BLOCK_TOKENS)
        mask = np.ones(len(self.choices[len(prefix)].values), dtype=bool)
        if kind == LAYER and self.repeats[block] == 1:
            mask[LAYERS.index(-1)] = False
        return mask

    def check_tokens(self, tokens_NT: Tokens) -> Tokens:
        rows = super().check_tokens(tokens_NT)
        empty = np.argwhere(self.layer_counts(rows) < 1)
        if len(empty):
            raise SpaceError(f"row {empty[0][0]} takes away the only layer of block {empty[0][1]}; token layers"
                             f"{empty[0][1]} of {self.space_id} must be 1 or 2 (0 or +1 layers)")
        return rows

    def by_block(self, tokens_NT: Tokens) -> Tokens:
        """int8[N, B, q]."""
        rows = np.asarray(tokens_NT)
        return rows.reshape(len(rows), BLOCKS, BLOCK_TOKENS)

    def layer_counts(self, tokens_NT: Tokens) -> NDArray[np.int64]:
        """int64[N, B]."""
        return np.array(self.repeats) + np.array(LAYERS)[self.by_block(tokens_NT)[:, :, LAYER]]

    def live_mask(self, tokens_NT: Tokens) -> NDArray[np.bool_]:
        """`skip` needs a layer that keeps its shape: any but the first, or the first if nothing changes there."""
        out_NB = self.block_channels[np.arange(BLOCKS), self.by_block(tokens_NT)[:, :, FILTER]]
        in_NB = np.insert(out_NB[:, :-1], 0, self.stem_channels, axis=1)
        first_keeps = (in_NB == out_NB) & (np.array(self.block_strides) == 1)
        live = np.ones((len(out_NB), BLOCKS, BLOCK_TOKENS), dtype=bool)
        live[:, :, SKIP] = first_keeps | (self.layer_counts(tokens_NT) > 1)
        return live.reshape(len(live), -1)

    def size(self) -> int:
        """Networks: the valid rows, less those that differ in dead skips only.

        Counted block by block over the output channels, because a skip of one layer depends on the channels before.
        """
        free = len(OPS) * len(KERNELS) * len(SE_RATIOS)
        counts = {self.stem_channels: 1}    # channels so far -> networks so far
        for b in range(BLOCKS):
            after: dict[int, int] = {}
            for channels, networks in counts.items():
                for out in map(int, self.block_channels[b]):
                    keeps = channels == out and self.block_strides[b] == 1
                    skips = sum(len(SKIPS) if keeps or self.repeats[b] + more > 1 else 1
                                for more in LAYERS if self.repeats[b] + more > 0)
                    after[out] = after.get(out, 0) + networks * free * skips
            counts = after
        return sum(counts.values())

    def sample_uniform(self, rng: np.random.Generator, n: int) -> Tokens:
        rows = rng.integers(0, self.vocabulary_sizes, size=(n, len(self.choices)))
        return self.repair(rng, rows.astype(np.int8))

    def repair(self, rng: np.random.Generator, rows: Tokens) -> Tokens:
        empty_NB = self.layer_counts(rows) < 1
        blocks_NBq = self.by_block(rows).copy()
        blocks_NBq[:, :, LAYER][empty_NB] = rng.integers(1, len(LAYERS), size=int(empty_NB.sum()))
        return self.canonical(blocks_NBq.reshape(rows.shape))

    def extremes(self) -> Tokens:
        """The slimmest 3x3 separable convolutions, and the widest and deepest dense 5x5 ones."""
        fastest, slowest = np.zeros((BLOCKS, BLOCK_TOKENS), dtype=np.int8), np.zeros((BLOCKS, BLOCK_TOKENS), np.int8)
        fastest[:, OP], slowest[:, OP] = OPS.index("sep"), OPS.index("conv")
        fastest[:, LAYER] = np.array(self.repeats) == 1
        slowest[:, KERNEL], slowest[:, SE], slowest[:, SKIP] = 1, 1, SKIPS.index("pool")
        slowest[:, FILTER], slowest[:, LAYER] = len(FILTERS) - 1, len(LAYERS) - 1
        return self.canonical(np.stack([fastest.ravel(), slowest.ravel()]))

    def text(self, tokens_T: Tokens) -> str:
        """Per block op, k and kernel, c and channels, x and layers, s for SE, i or p for the skip: `mb6k3c24x2si`."""
        row = self.canonical(np.asarray(tokens_T)[None])
        layers = self.layer_counts(row)[0]
        parts = []
        for b, (op, kernel, se, skip, filters, _) in enumerate(self.by_block(row)[0]):
            tail = ("s" if se else "") + ("", "i", "p")[skip]
            parts.append(f"{OPS[op]}k{KERNELS[kernel]}c{self.block_channels[b, filters]}x{layers[b]}{tail}")
        return ":".join(parts)

    # --- networks --------------------------------------------------------------------------------------------------

    @cached_property
    def block_channels(self) -> NDArray[np.int64]:
        """int64[B, 3]: output channels by `filters` token."""
        return np.array([[make_divisible(self._scaled(base) * f, 4) for f in FILTERS] for base in BLOCK_CHANNELS])

    @cached_property
    def stem_channels(self) -> int:
        return self._scaled(STEM_CHANNELS)

    def _scaled(self, channels: int) -> int:
        return make_divisible(max(LEAST_CHANNELS, channels * self.width), 4)

    def graph(self, tokens_T: Tokens) -> Graph:
        row = self.canonical(self.check_tokens(np.asarray(tokens_T)[None]))
        builder = GraphBuilder(self.channels, self.resolution)
        x = self._stem(builder, INPUT)
        for b, tokens in enumerate(self.by_block(row)[0].tolist()):
            x = self._block(builder, x, b, tuple(tokens))
        self._head(builder, x)
        return builder.build()

    def _stem(self, builder: GraphBuilder, x: str) -> str:
        c = self.stem_channels
        builder.begin_block("stem", -1, f"conv 3x3 {c}", kernel=3, channels=c, stride=self.stem_stride)
        return _conv_bn_relu(builder, x, "stem.conv", c, 3, self.stem_stride)

    def _block(self, builder: GraphBuilder, x: str, b: int, tokens: tuple[int, ...]) -> str:
        op, kernel, se = OPS[tokens[OP]], KERNELS[tokens[KERNEL]], SE_RATIOS[tokens[SE]]
        channels, layers = int(self.block_channels[b, tokens[FILTER]]), self.repeats[b] + LAYERS[tokens[LAYER]]
        stride, expand = self.block_strides[b], {"expand": EXPANSION[op]} if op in EXPANSION else {}
        builder.begin_block(f"block{b}", b, f"{op} {kernel}x{kernel}", tokens, op=op, kernel=kernel, **expand,
                            se=bool(se), skip=SKIPS[tokens[SKIP]], channels=channels, layers=layers, stride=stride)
        for layer in range(layers):
            x = _layer(builder, x, f"block{b}.layer{layer}", op, kernel, se, SKIPS[tokens[SKIP]], channels,
                       stride if layer == 0 else 1)
        return x

    def _head(self, builder: GraphBuilder, x: str) -> None:
        c = self._scaled(HEAD_CHANNELS)
        builder.begin_block("final", -1, f"conv 1x1 {c}", kernel=1, channels=c, stride=1)
        x = _conv_bn_relu(builder, x, "final.conv", c, 1)
        builder.begin_block("head", -1, "classifier", classes=self.classes)
        x = builder.flatten(builder.global_pool(x, "head.pool"), "head.flatten")
        builder.linear(x, "head.linear", self.classes)

    # --- look-ups --------------------------------------------------------------------------------------------------

    def cost(self, tokens_NT: Tokens) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        sums = self._sums(tokens_NT)
        return sums[:, 0].astype(np.int64), sums[:, 1].astype(np.int64)

    def latency_features(self, tokens_NT: Tokens) -> NDArray[np.float32]:
        """float32[N, 5]: see `vector_features`. Summed over the network, because what an operator costs depends on its
        kind and size much more than on its place, and few networks are measured."""
        return self._sums(tokens_NT)[:, 2:].astype(np.float32)

    def _sums(self, tokens_NT: Tokens) -> NDArray[np.float64]:
        """float64[N, 2 + F]: multiply-adds, parameters and latency features, added up over stem, blocks and head."""
        rows = self.canonical(self.check_tokens(tokens_NT))
        sums = np.zeros((len(rows), 2 + len(VECTOR_FEATURES)))
        for total, blocks in zip(sums, self.by_block(rows).tolist()):
            total += self._part(-1, self.channels, ())
            channels = self.stem_channels
            for b, tokens in enumerate(blocks):
                total += self._part(b, channels, tuple(tokens))
                channels = int(self.block_channels[b, tokens[FILTER]])
            total += self._part(BLOCKS, channels, ())
        return sums

    def _part(self, b: int, channels: int, tokens: tuple[int, ...]) -> NDArray[np.float64]:
        """One row of `_sums` for a block alone, -1 the stem, 7 the head; counted once, then remembered."""
        key = (b, channels, *tokens)
        if key not in self._parts:
            strides = (self.stem_stride, *self.block_strides)[:b + 1]
            size = reduce(lambda size, stride: conv_out(size, 3, stride), strides, self.resolution)
            builder = GraphBuilder(channels, size)
            if b == -1:
                self._stem(builder, INPUT)
            elif b == BLOCKS:
                self._head(builder, INPUT)
            else:
                self._block(builder, INPUT, b, tokens)
            graph = builder.build()
            self._parts[key] = np.array([graph.madds, graph.params, *vector_features(graph)], dtype=np.float64)
        return self._parts[key]

    @cached_property
    def _parts(self) -> dict[tuple[int, ...], NDArray[np.float64]]:
        return {}


def _conv_bn(builder: GraphBuilder, x: str, name: str, out: int, kernel: int, stride: int = 1, groups: int = 1) -> str:
    return builder.batch_norm(builder.conv(x, name, out, kernel, stride, groups=groups), f"{name}_bn", eps=EPS)


def _conv_bn_relu(builder: GraphBuilder, x: str, name: str, out: int, kernel: int, stride: int = 1,
                  groups: int = 1) -> str:
    return builder.activation(_conv_bn(builder, x, name, out, kernel, stride, groups), f"{name}_act", "relu")


def _layer(builder: GraphBuilder, x: str, name: str, op: str, kernel: int, se: float, skip: str, out: int,
           stride: int) -> str:
    """One layer; a tensor's role (conv, expand, depthwise, se.*, project) is the last part of its name.

    Squeeze and excitation follows the k x k convolution, its inner width is a share of the layer's input channels
    (MnasNet mnasnet_model.py). The 1x1 project is linear.
    """
    channels = builder.shape(x)[0]
    if op == "conv":
        y = _conv_bn_relu(builder, x, f"{name}.conv", out, kernel, stride)
    else:
        mid = EXPANSION[op] * channels
        y = _conv_bn_relu(builder, x, f"{name}.expand", mid, 1) if mid > channels else x
        y = _conv_bn_relu(builder, y, f"{name}.depthwise", mid, kernel, stride, groups=mid)
    if se:
        y = _squeeze_excite(builder, y, f"{name}.se", max(1, int(se * channels)))
    if op != "conv":
        y = _conv_bn(builder, y, f"{name}.project", out, 1)
    if skip == "none" or builder.shape(x) != builder.shape(y):
        return y
    if skip == "pool":
        x = builder.pool(x, f"{name}.skip_pool", "avg_pool", 3)
    return builder.add((x, y), f"{name}.add")


def _squeeze_excite(builder: GraphBuilder, x: str, name: str, inner: int) -> str:
    gate = builder.conv(builder.global_pool(x, f"{name}.pool"), f"{name}.reduce", inner, 1, bias=True)
    gate = builder.activation(gate, f"{name}.relu", "relu")
    gate = builder.conv(gate, f"{name}.expand", builder.shape(x)[0], 1, bias=True)
    return builder.mul(x, builder.activation(gate, f"{name}.gate", "sigmoid"), f"{name}.mul")


class MnasS32(Mnas):
    """For 32x32 images such as CIFAR-10: width 0.5, final map 4x4."""

    def __init__(self, classes: int = 10, channels: int = 3, width: float = 0.5, resolution: int = 32,
                 stem_stride: int = 1, block_strides: Sequence[int] = (2, 1, 2, 1, 1, 2, 1),
                 repeats: Sequence[int] = (1, 2, 3, 4, 3, 3, 1)) -> None:
        super().__init__(classes, channels, width, resolution, stem_stride, block_strides, repeats)


class MnasS16(Mnas):
    """For very small images such as scikit-learn's 8x8 digits; 1,000 images are an epoch of a second on one core."""

    def __init__(self, classes: int = 10, channels: int = 1, width: float = 0.25, resolution: int = 16,
                 stem_stride: int = 1, block_strides: Sequence[int] = (2, 1, 2, 1, 1, 2, 1),
                 repeats: Sequence[int] = (1, 2, 2, 2, 2, 2, 1)) -> None:
        super().__init__(classes, channels, width, resolution, stem_stride, block_strides, repeats)
