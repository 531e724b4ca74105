"""The skeleton of the ProxylessNAS space: its options, its tokens and the network of one row (specification 3.1, 3.2;
UNAS proxylessnas/model_search.py and genotypes.py).

A network is a stem, a fixed inverted residual layer, 21 searched ones and a head. The first layer of each of six stages
changes the channels, so it cannot be left out; the other 15 keep their shape and may be skipped.

Legend: L = 21 layers, S = 6 stages; suffixes N, T as in space.py. Layers and stages count from 0.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from searchspaces.errors import ConfigError
from searchspaces.graph import INPUT, Graph, GraphBuilder, make_divisible
from searchspaces.space import Choice, SearchSpace, Tokens

KERNELS, EXPANDS = (3, 5, 7), (3, 6)
KINDS = tuple((kernel, expand) for kernel in KERNELS for expand in EXPANDS)  # of a layer that is there
SKIP = "skip"
OPERATIONS = (SKIP, *(f"{kernel}x{kernel}e{expand}" for kernel, expand in KINDS))
STAGE_LAYERS = (4, 4, 4, 4, 4, 1)
STAGES, LAYERS = len(STAGE_LAYERS), sum(STAGE_LAYERS)
# Stem, fixed layer, stages and final 1x1 convolution, and UNAS' narrow alternative.
WIDE, NARROW = (40, 24, 32, 56, 112, 128, 256, 432, 1728), (24, 12, 18, 24, 48, 72, 120, 240, 960)
EPS = 1e-3


@dataclass(frozen=True)
class LayerSpec:
    """What is fixed about one of the 21 searched layers; `mids` per expand ratio."""

    name: str
    stage: int
    in_channels: int
    out_channels: int
    stride: int
    skippable: bool

    @property
    def mids(self) -> tuple[int, ...]:
        return tuple(self.in_channels * expand for expand in EXPANDS)

    @property
    def shortcut(self) -> bool:
        return self.stride == 1 and self.in_channels == self.out_channels

    @property
    def operations(self) -> tuple[str, ...]:
        return OPERATIONS if self.skippable else OPERATIONS[1:]


class ProxylessNasSkeleton(SearchSpace):
    """`narrow` takes UNAS' narrow channels, `width` scales all of them to even numbers. `shared` is for the supernet:
    one set of weights per layer for all its operations, or one per operation as in UNAS; it changes no network."""

    def __init__(self, classes: int = 10, channels: int = 3, width: float = 1.0, narrow: bool = False,
                 resolution: int = 224, stem_stride: int = 2, stage_strides: Sequence[int] = (2, 2, 2, 1, 2, 1),
                 shared: bool = True) -> None:
        super().__init__(classes, channels)
        self.width, self.narrow, self.resolution = float(width), narrow, resolution
        self.stem_stride, self.stage_strides, self.shared = stem_stride, tuple(stage_strides), shared
        self._check_options()

    def _check_options(self) -> None:
        if not 0.1 <= self.width <= 4:
            raise ConfigError(f"width of proxylessnas is {self.width:g}; it must lie between 0.1 and 4")
        if self.resolution < 4:
            raise ConfigError(f"resolution of proxylessnas is {self.resolution}; it must be at least 4")
        if len(self.stage_strides) != STAGES or any(s not in (1, 2) for s in (self.stem_stride, *self.stage_strides)):
            raise ConfigError(f"strides of proxylessnas are stem {self.stem_stride}, stages {list(self.stage_strides)};"
                              f" give one stem stride and {STAGES} stage strides, each 1 or 2")

    @property
    def space_id(self) -> str:
        strides = "".join(str(s) for s in (self.stem_stride, *self.stage_strides))
        return (f"proxylessnas(width={self.width:g},narrow={str(self.narrow).lower()},resolution={self.resolution},"
                f"strides={strides},channels={self.channels},classes={self.classes})")

    # --- tokens ----------------------------------------------------------------------------------------------------

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        return tuple(Choice(spec.name, "op" if spec.skippable else "op without skip", spec.operations)
                     for spec in self.layers)

    def operations(self, tokens_NT: Tokens) -> NDArray[np.int64]:
        """int64[N, L]: indices into OPERATIONS, where the vocabularies of all layers are one."""
        return np.asarray(tokens_NT, dtype=np.int64) + [not spec.skippable for spec in self.layers]

    # --- networks --------------------------------------------------------------------------------------------------

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Channels of stem, fixed layer, six stages and final convolution."""
        return tuple(make_divisible(c * self.width, 2) for c in (NARROW if self.narrow else WIDE))

    @cached_property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The 21 layers, none of them skipped."""
        specs: list[LayerSpec] = []
        channels = self.widths[1]
        for stage, (layers, out) in enumerate(zip(STAGE_LAYERS, self.widths[2:-1], strict=True)):
            for index in range(layers):
                stride = self.stage_strides[stage] if index == 0 else 1
                specs.append(LayerSpec(f"layer{len(specs)}", stage, channels, out, stride, index > 0))
                channels = out
        return tuple(specs)

    def graph(self, tokens_T: Tokens) -> Graph:
        operations = self.operations(self.check_tokens(np.asarray(tokens_T)[None]))[0]
        builder = GraphBuilder(self.channels, self.resolution)
        x = self._stem(builder)
        for spec, operation in zip(self.layers, operations):
            if OPERATIONS[operation] != SKIP:
                x = _layer(builder, x, spec, *KINDS[operation - 1])
        self._head(builder, x)
        return builder.build()

    def _stem(self, builder: GraphBuilder) -> str:
        stem, first = self.widths[:2]
        builder.begin_block("stem", -1, f"conv 3x3 {stem}", kernel=3, channels=stem, stride=self.stem_stride)
        x = _conv_bn_relu6(builder, INPUT, "stem.conv", stem, 3, self.stem_stride)
        builder.begin_block("first", -1, "MBConv 3x3 e1", kernel=3, expand=1, channels=first, stride=1)
        x = _conv_bn_relu6(builder, x, "first.depthwise", stem, 3, groups=stem)
        return _conv_bn(builder, x, "first.project", first, 1)

    def _head(self, builder: GraphBuilder, x: str) -> None:
        final = self.widths[-1]
        builder.begin_block("final", -1, f"conv 1x1 {final}", kernel=1, channels=final, stride=1)
        x = _conv_bn_relu6(builder, x, "final.conv", final, 1)
        builder.begin_block("head", -1, "classifier", classes=self.classes)
        x = builder.flatten(builder.global_pool(x, "head.pool"), "head.flatten")
        builder.linear(x, "head.linear", self.classes)


def _conv_bn(builder: GraphBuilder, x: str, name: str, out: int, kernel: int, stride: int = 1, groups: int = 1) -> str:
    return builder.batch_norm(builder.conv(x, name, out, kernel, stride, groups=groups), f"{name}_bn", eps=EPS)


def _conv_bn_relu6(builder: GraphBuilder, x: str, name: str, out: int, kernel: int, stride: int = 1,
                   groups: int = 1) -> str:
    return builder.activation(_conv_bn(builder, x, name, out, kernel, stride, groups), f"{name}_act", "relu6")


def _layer(builder: GraphBuilder, x: str, spec: LayerSpec, kernel: int, expand: int) -> str:
    """1x1 expand, depthwise kxk, 1x1 project; batch norm after each convolution."""
    name, mid = spec.name, spec.mids[EXPANDS.index(expand)]
    builder.begin_block(name, spec.stage, f"MBConv {kernel}x{kernel} e{expand}", kernel=kernel, expand=expand,
                        channels=spec.out_channels, stride=spec.stride)
    y = _conv_bn_relu6(builder, x, f"{name}.expand", mid, 1)
    y = _conv_bn_relu6(builder, y, f"{name}.depthwise", mid, kernel, spec.stride, groups=mid)
    y = _conv_bn(builder, y, f"{name}.project", spec.out_channels, 1)
    return builder.add((x, y), f"{name}.add") if spec.shortcut else y
