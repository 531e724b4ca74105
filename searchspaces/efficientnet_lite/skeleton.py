"""The skeleton of the EfficientNet-Lite space: its options, its tokens and the network of one row (TensorFlow's
efficientnet/lite; the package efficientnet-lite-pytorch).

A stem, a fixed block of expansion 1, five stages of inverted residual layers whose depth is searched, a last stage of
one layer, a head. No squeeze and excitation, ReLU6, TensorFlow's "SAME" padding. The largest architecture at width 1
and depth 1 is EfficientNet-Lite0, at (1, 1.1) Lite1, at (1.1, 1.2) Lite2. A kernel is never larger than there, so that
weights from ImageNet are those of the largest: 3x3 layers keep theirs, 5x5 layers may shrink.

Legend: S = 6 stages, L = 15 searched layers at depth 1, R resolutions; suffixes N, T as in searchspaces/space.py.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil

import numpy as np
from numpy.typing import NDArray

from searchspaces.errors import ConfigError
from searchspaces.graph import INPUT, Graph, GraphBuilder, make_divisible
from searchspaces.space import Choice, FreeSpace, Tokens

EXPANDS, KERNELS = (3, 4, 6), (3, 5)
RESOLUTIONS = (32, 48, 64, 80, 96, 112, 128)
STEM_CHANNELS, FIRST_CHANNELS, FINAL_CHANNELS = 32, 16, 1280
EPS = 1e-3


@dataclass(frozen=True)
class StageSpec:
    layers: int
    kernel: int
    stride: int
    channels: int


# Of Lite0, without its first block; Lite scaling keeps the depth of the last.
STAGES = (StageSpec(2, 3, 2, 24), StageSpec(2, 5, 2, 40), StageSpec(3, 3, 2, 80), StageSpec(3, 5, 1, 112),
          StageSpec(4, 5, 2, 192), StageSpec(1, 3, 1, 320))


@dataclass(frozen=True)
class LayerSpec:
    """What is fixed about one of the searched layers."""

    stage: int
    index: int
    in_channels: int
    out_channels: int
    stride: int
    kernels: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"stage{self.stage}.layer{self.index}"

    @property
    def mids(self) -> tuple[int, ...]:
        """Middle channels per expand ratio."""
        return tuple(self.in_channels * expand for expand in EXPANDS)

    @property
    def shortcut(self) -> bool:
        return self.stride == 1 and self.in_channels == self.out_channels


class EfficientNetLiteSkeleton(FreeSpace):
    """`resolution` is one number, or a list that becomes a searched token. `width` and `depth` are EfficientNet's:
    stem and head never grow, they only shrink. Weights from ImageNet fit width 1 and depth 1 (Lite0)."""

    def __init__(self, classes: int = 10, channels: int = 3, width: float = 1.0, depth: float = 1.0,
                 resolution: int | Sequence[int] = RESOLUTIONS, stem_stride: int = 2) -> None:
        super().__init__(classes, channels)
        self.width, self.depth = float(width), float(depth)
        self.resolutions = (resolution,) if isinstance(resolution, int) else tuple(resolution)
        self.stem_stride = stem_stride
        self._check_options()

    def _check_options(self) -> None:
        for name, value in (("width", self.width), ("depth", self.depth)):
            if not 0.1 <= value <= 4:
                raise ConfigError(f"{name} of efficientnet_lite is {value:g}; it must lie between 0.1 and 4")
        if self.stem_stride not in (1, 2):
            raise ConfigError(f"stem_stride of efficientnet_lite is {self.stem_stride}; it must be 1 or 2")
        if not self.resolutions or list(self.resolutions) != sorted(set(self.resolutions)):
            raise ConfigError(f"resolution of efficientnet_lite is {list(self.resolutions)}; give one number or an "
                              "ascending list without repetitions")
        if self.resolutions[0] < 4:
            raise ConfigError(f"resolution of efficientnet_lite is {self.resolutions[0]}; it must be at least 4")

    @property
    def space_id(self) -> str:
        resolution = "-".join(str(r) for r in self.resolutions)
        return (f"efficientnet_lite(width={self.width:g},depth={self.depth:g},resolution={resolution},"
                f"stem_stride={self.stem_stride},channels={self.channels},classes={self.classes})")

    # --- tokens ----------------------------------------------------------------------------------------------------

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """Stage by stage the depth, then the expand ratio of each layer and its kernel where that is 5x5; resolution
        last. What has one value is no token."""
        rows: list[Choice] = []
        for stage, count in enumerate(self.depths):
            if count > 1:
                rows.append(Choice(f"depth{stage}", f"depth up to {count}", tuple(range(1, count + 1))))
            for spec in (spec for spec in self.layers if spec.stage == stage):
                rows.append(Choice(f"expand{stage}.{spec.index}", "expand", EXPANDS))
                if len(spec.kernels) > 1:
                    rows.append(Choice(f"kernel{stage}.{spec.index}", "kernel", spec.kernels))
        if len(self.resolutions) > 1:
            rows.append(Choice("resolution", "resolution", self.resolutions))
        return tuple(rows)

    @cached_property
    def positions(self) -> tuple[list[int], list[int], list[int], int]:
        """Of the tokens: depth[S], expand[L], kernel[L], resolution; -1 where there is none."""
        at = {choice.name: position for position, choice in enumerate(self.choices)}
        return ([at.get(f"depth{stage}", -1) for stage in range(len(STAGES))],
                [at[f"expand{spec.stage}.{spec.index}"] for spec in self.layers],
                [at.get(f"kernel{spec.stage}.{spec.index}", -1) for spec in self.layers], at.get("resolution", -1))

    def split(self, tokens_NT: Tokens) -> tuple[Tokens, Tokens, Tokens, Tokens]:
        """(depth[N, S], expand[N, L], kernel[N, L], resolution[N]) as indices into the vocabularies."""
        rows = np.asarray(tokens_NT)
        padded = np.concatenate([rows, np.zeros((len(rows), 1), dtype=rows.dtype)], axis=1)  # -1 reads a zero
        depth, expand, kernel, resolution = self.positions
        return padded[:, depth], padded[:, expand], padded[:, kernel], padded[:, resolution]

    def live_layers(self, tokens_NT: Tokens) -> NDArray[np.bool_]:
        """bool[N, L]: layer l of a stage is live iff l < depth."""
        depth_NS = self.split(tokens_NT)[0].astype(int) + 1
        stage_L, index_L = np.array([(spec.stage, spec.index) for spec in self.layers]).T
        return index_L < depth_NS[:, stage_L]

    def live_mask(self, tokens_NT: Tokens) -> NDArray[np.bool_]:
        live = np.ones((len(tokens_NT), len(self.choices) + 1), dtype=bool)
        _, expand, kernel, _ = self.positions
        live[:, expand] = live[:, kernel] = self.live_layers(tokens_NT)
        return live[:, :-1]

    # --- networks --------------------------------------------------------------------------------------------------

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Layers of each stage at most."""
        scaled = [max(1, ceil(self.depth * stage.layers)) for stage in STAGES[:-1]]
        return (*scaled, STAGES[-1].layers)

    @cached_property
    def stem_channels(self) -> int:
        return make_divisible(STEM_CHANNELS * min(self.width, 1.0))

    @cached_property
    def first_channels(self) -> int:
        return make_divisible(FIRST_CHANNELS * self.width)

    @cached_property
    def final_channels(self) -> int:
        return make_divisible(FINAL_CHANNELS * min(self.width, 1.0))

    @cached_property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The searched layers at full depth."""
        specs, channels = [], self.first_channels
        for number, stage in enumerate(STAGES):
            out = make_divisible(stage.channels * self.width)
            kernels = tuple(kernel for kernel in KERNELS if kernel <= stage.kernel)
            for index in range(self.depths[number]):
                specs.append(LayerSpec(number, index, channels, out, stage.stride if index == 0 else 1, kernels))
                channels = out
        return tuple(specs)

    def graph(self, tokens_T: Tokens) -> Graph:
        row = self.check_tokens(np.asarray(tokens_T)[None])
        depth, expand, kernel, resolution = (part[0] for part in self.split(row))
        live = self.live_layers(row)[0]
        builder = GraphBuilder(self.channels, self.resolutions[resolution])
        x = self._stem(builder)
        for position, spec in enumerate(self.layers):
            if live[position]:
                x = _layer(builder, x, spec, EXPANDS[expand[position]], KERNELS[kernel[position]],
                           int(depth[spec.stage]) + 1)
        self._head(builder, x)
        return builder.build()

    def _stem(self, builder: GraphBuilder) -> str:
        stem, first = self.stem_channels, self.first_channels
        builder.begin_block("stem", -1, f"conv 3x3 {stem}", kernel=3, channels=stem, stride=self.stem_stride)
        x = _conv_bn_relu6(builder, INPUT, "stem.conv", stem, 3, self.stem_stride)
        builder.begin_block("first", -1, "MBConv 3x3 e1", kernel=3, expand=1, channels=first, stride=1)
        y = _conv_bn_relu6(builder, x, "first.depthwise", stem, 3, groups=stem)
        y = _conv_bn(builder, y, "first.project", first, 1)
        return builder.add((x, y), "first.add") if stem == first else y

    def _head(self, builder: GraphBuilder, x: str) -> None:
        final = self.final_channels
        builder.begin_block("final", -1, f"conv 1x1 {final}", kernel=1, channels=final, stride=1)
        x = _conv_bn_relu6(builder, x, "final.conv", final, 1)
        builder.begin_block("head", -1, "classifier", classes=self.classes)
        x = builder.flatten(builder.global_pool(x, "head.pool"), "head.flatten")
        builder.linear(x, "head.linear", self.classes)


def _conv_bn(builder: GraphBuilder, x: str, name: str, out: int, kernel: int, stride: int = 1, groups: int = 1) -> str:
    x = builder.conv(x, name, out, kernel, stride, groups=groups, same=True)
    return builder.batch_norm(x, f"{name}_bn", eps=EPS)


def _conv_bn_relu6(builder: GraphBuilder, x: str, name: str, out: int, kernel: int, stride: int = 1,
                   groups: int = 1) -> str:
    return builder.activation(_conv_bn(builder, x, name, out, kernel, stride, groups), f"{name}_act", "relu6")


def _layer(builder: GraphBuilder, x: str, spec: LayerSpec, expand: int, kernel: int, depth: int) -> str:
    """1x1 expand, depthwise kxk, 1x1 project; batch norm after each convolution."""
    name, mid = spec.name, spec.in_channels * expand
    builder.begin_block(name, spec.stage, f"MBConv {kernel}x{kernel} e{expand}", kernel=kernel, expand=expand,
                        depth=depth, channels=spec.out_channels, stride=spec.stride)
    y = _conv_bn_relu6(builder, x, f"{name}.expand", mid, 1)
    y = _conv_bn_relu6(builder, y, f"{name}.depthwise", mid, kernel, spec.stride, groups=mid)
    y = _conv_bn(builder, y, f"{name}.project", spec.out_channels, 1)
    return builder.add((x, y), f"{name}.add") if spec.shortcut else y
