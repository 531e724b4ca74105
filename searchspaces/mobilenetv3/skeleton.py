"""The skeleton of the MobileNetV3 space: its options, its tokens and the network of one architecture (specification 2.1
and 2.2; OFA ofa_mbv3.py, PNAG ofa_mbv3.py).

Legend: U = 5 units, L = 20 layers (4 per unit), R resolutions; suffixes N, T, D, F as in searchspaces/space.py.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from searchspaces.errors import ConfigError, SpaceError
from searchspaces.graph import Graph, GraphBuilder, Op, make_divisible
from searchspaces.space import Choice, FreeSpace, Tokens

UNITS, UNIT_LAYERS = 5, 4
UNIT_TOKENS = 1 + 2 * UNIT_LAYERS
DEPTHS, EXPANDS, KERNELS = (2, 3, 4), (3, 4, 6), (3, 5, 7)
# Table 2.1 at width 1.0: stem, first block and units; 1x1 conv before and after pooling.
STEM_CHANNELS, UNIT_CHANNELS = 16, (24, 40, 80, 112, 160)
FINAL_CHANNELS, HEAD_CHANNELS = 960, 1280
UNIT_ACTIVATIONS: tuple[Op, ...] = ("relu", "relu", "h_swish", "h_swish", "h_swish")
UNIT_SE = (False, True, False, True, True)


@dataclass(frozen=True)
class LayerSpec:
    """What is fixed about one of the 20 searched layers; `mids` and `se_mids` per expand ratio."""

    unit: int
    index: int
    in_channels: int
    out_channels: int
    stride: int
    activation: Op
    se: bool
    mids: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"unit{self.unit}.layer{self.index}"

    @property
    def se_mids(self) -> tuple[int, ...]:
        return tuple(make_divisible(mid // 4) for mid in self.mids)

    @property
    def shortcut(self) -> bool:
        return self.stride == 1 and self.in_channels == self.out_channels


class MobileNetV3Skeleton(FreeSpace):
    """`resolution` is one number, or a list that becomes a searched token. `width` scales every channel count."""

    def __init__(self, classes: int = 10, channels: int = 3, width: float = 1.0,
                 resolution: int | Sequence[int] = 224, stem_stride: int = 2,
                 unit_strides: Sequence[int] = (2, 2, 2, 1, 2)) -> None:
        super().__init__(classes, channels)
        self.width = float(width)
        self.resolutions = (resolution,) if isinstance(resolution, int) else tuple(resolution)
        self.stem_stride = stem_stride
        self.unit_strides = tuple(unit_strides)
        self._check_options()

    def _check_options(self) -> None:
        if not 0.1 <= self.width <= 4:
            raise ConfigError(f"width of mobilenetv3 is {self.width}; it must lie between 0.1 and 4")
        if len(self.unit_strides) != UNITS or any(s not in (1, 2) for s in (self.stem_stride, *self.unit_strides)):
            raise ConfigError(f"strides of mobilenetv3 are stem {self.stem_stride}, units {list(self.unit_strides)}; "
                              f"give one stem stride and {UNITS} unit strides, each 1 or 2")
        if not self.resolutions or list(self.resolutions) != sorted(set(self.resolutions)):
            raise ConfigError(f"resolution of mobilenetv3 is {list(self.resolutions)}; give one number or an ascending "
                              "list without repetitions")
        if self.resolutions[0] < 4:
            raise ConfigError(f"resolution of mobilenetv3 is {self.resolutions[0]}; it must be at least 4")

    @property
    def space_id(self) -> str:
        strides = "".join(str(s) for s in (self.stem_stride, *self.unit_strides))
        resolution = "-".join(str(r) for r in self.resolutions)
        return (f"mobilenetv3(width={self.width:g},resolution={resolution},strides={strides},channels={self.channels},"
                f"classes={self.classes})")

    # --- tokens ----------------------------------------------------------------------------------------------------

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        rows: list[Choice] = []
        for u in range(UNITS):
            rows.append(Choice(f"depth{u}", "depth", DEPTHS))
            for layer in range(UNIT_LAYERS):
                rows.append(Choice(f"expand{u}.{layer}", "expand", EXPANDS))
                rows.append(Choice(f"kernel{u}.{layer}", "kernel", KERNELS))
        if len(self.resolutions) > 1:
            rows.append(Choice("resolution", "resolution", self.resolutions))
        return tuple(rows)

    def split(self, tokens_NT: Tokens) -> tuple[Tokens, Tokens, Tokens, Tokens]:
        """(depth[N, U], expand[N, L], kernel[N, L], resolution[N]) as indices into the vocabularies."""
        rows = np.asarray(tokens_NT)
        units = rows[:, :UNITS * UNIT_TOKENS].reshape(len(rows), UNITS, UNIT_TOKENS)
        layers = units[:, :, 1:].reshape(len(rows), UNITS * UNIT_LAYERS, 2)
        resolution = rows[:, -1] if len(self.resolutions) > 1 else np.zeros(len(rows), dtype=rows.dtype)
        return units[:, :, 0], layers[:, :, 0], layers[:, :, 1], resolution

    def live_layers(self, tokens_NT: Tokens) -> NDArray[np.bool_]:
        """bool[N, L]: layer l of unit u is live iff l < depth_u."""
        depth_NU = np.array(DEPTHS)[self.split(tokens_NT)[0]]
        return (np.arange(UNIT_LAYERS) < depth_NU[:, :, None]).reshape(len(depth_NU), -1)

    def live_mask(self, tokens_NT: Tokens) -> NDArray[np.bool_]:
        layers = self.live_layers(tokens_NT).reshape(len(tokens_NT), UNITS, UNIT_LAYERS)
        live = np.ones((len(tokens_NT), len(self.choices)), dtype=bool)
        units = live[:, :UNITS * UNIT_TOKENS].reshape(len(live), UNITS, UNIT_TOKENS)
        units[:, :, 1:] = np.repeat(layers, 2, axis=2)
        live[:, :UNITS * UNIT_TOKENS] = units.reshape(len(live), -1)
        return live

    def text(self, tokens_T: Tokens) -> str:
        """`d0,..,d4:k00,..,k43:e00,..,e43`, zeros for dead layers; `:r224` follows where resolution is searched."""
        row = np.asarray(tokens_T)[None]
        depth, expand, kernel, resolution = (part[0] for part in self.split(row))
        live = self.live_layers(row)[0]
        parts = [np.array(DEPTHS)[depth], np.array(KERNELS)[kernel] * live, np.array(EXPANDS)[expand] * live]
        tail = f":r{self.resolutions[resolution]}" if len(self.resolutions) > 1 else ""
        return ":".join(",".join(str(value) for value in part) for part in parts) + tail

    def parse(self, text: str) -> Tokens:
        """The canonical tokens of `text`; dead layers may hold 0 or any allowed value."""
        try:
            depths, kernels, expands, *rest = text.strip().split(":")
            depth = [DEPTHS.index(int(value)) for value in depths.split(",")]
            kernel = [(0, *KERNELS).index(int(value)) - 1 for value in kernels.split(",")]
            expand = [(0, *EXPANDS).index(int(value)) - 1 for value in expands.split(",")]
            tail = [self.resolutions.index(int(value.removeprefix("r"))) for value in rest]
            layers = np.stack([expand, kernel], axis=1).reshape(UNITS, 2 * UNIT_LAYERS)
            row = np.array([*np.column_stack([depth, layers]).ravel(), *tail])
            dead = ~self.live_mask(row[None])[0]
            return self.check_tokens(np.where(dead, 0, row)[None])[0]
        except (ValueError, IndexError) as error:
            raise SpaceError(f"'{text}' is not an architecture of {self.space_id}; write depths:kernels:expands, for "
                             f"example {self.text(np.zeros(len(self.choices), dtype=np.int8))}") from error

    # --- networks --------------------------------------------------------------------------------------------------

    @cached_property
    def stem_channels(self) -> int:
        return make_divisible(STEM_CHANNELS * self.width)

    @cached_property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The 20 layers at full depth."""
        specs, channels = [], self.stem_channels
        for u in range(UNITS):
            out = make_divisible(UNIT_CHANNELS[u] * self.width)
            for index in range(UNIT_LAYERS):
                mids = tuple(make_divisible(round(channels * expand)) for expand in EXPANDS)
                stride = self.unit_strides[u] if index == 0 else 1
                specs.append(LayerSpec(u, index, channels, out, stride, UNIT_ACTIVATIONS[u], UNIT_SE[u], mids))
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
                x = _layer(builder, x, spec, expand[position], KERNELS[kernel[position]], DEPTHS[depth[spec.unit]])
        self._head(builder, x)
        return builder.build()

    def _stem(self, builder: GraphBuilder) -> str:
        c = self.stem_channels
        builder.begin_block("stem", -1, f"conv 3x3 {c}", kernel=3, channels=c, stride=self.stem_stride)
        x = _conv_bn(builder, "input", "stem.conv", c, 3, self.stem_stride)
        x = builder.activation(x, "stem.act", "h_swish")
        builder.begin_block("first", -1, f"depthwise 3x3 {c}", kernel=3, expand=1, channels=c, stride=1, se=False)
        y = _conv_bn(builder, x, "first.depthwise", c, 3, groups=c)
        y = builder.activation(y, "first.act", "relu")
        return builder.add((x, _conv_bn(builder, y, "first.project", c, 1)), "first.add")

    def _head(self, builder: GraphBuilder, x: str) -> None:
        final, hidden = (make_divisible(c * self.width) for c in (FINAL_CHANNELS, HEAD_CHANNELS))
        builder.begin_block("final", -1, f"conv 1x1 {final}", kernel=1, channels=final, stride=1)
        x = builder.activation(_conv_bn(builder, x, "final.conv", final, 1), "final.act", "h_swish")
        builder.begin_block("head", -1, f"classifier {hidden}", channels=hidden, classes=self.classes)
        x = builder.conv(builder.global_pool(x, "head.pool"), "head.conv", hidden, 1)
        x = builder.flatten(builder.activation(x, "head.act", "h_swish"), "head.flatten")
        builder.linear(x, "head.linear", self.classes)


def _conv_bn(builder: GraphBuilder, x: str, name: str, out: int, kernel: int, stride: int = 1, groups: int = 1) -> str:
    return builder.batch_norm(builder.conv(x, name, out, kernel, stride, groups=groups), f"{name}_bn")


def _layer(builder: GraphBuilder, x: str, spec: LayerSpec, expand: int, kernel: int, depth: int) -> str:
    """1x1 expand, depthwise kxk, [SE], 1x1 project; batch norm after each convolution (specification 2.1)."""
    name, mid = spec.name, spec.mids[expand]
    builder.begin_block(name, spec.unit, f"MBConv {kernel}x{kernel} e{EXPANDS[expand]}", kernel=kernel,
                        expand=EXPANDS[expand], depth=depth, channels=spec.out_channels, stride=spec.stride, se=spec.se)
    y = builder.activation(_conv_bn(builder, x, f"{name}.expand", mid, 1), f"{name}.expand_act", spec.activation)
    y = _conv_bn(builder, y, f"{name}.depthwise", mid, kernel, spec.stride, groups=mid)
    y = builder.activation(y, f"{name}.depthwise_act", spec.activation)
    if spec.se:
        gate = builder.global_pool(y, f"{name}.se.pool")
        gate = builder.conv(gate, f"{name}.se.reduce", spec.se_mids[expand], 1, bias=True)
        gate = builder.activation(gate, f"{name}.se.relu", "relu")
        gate = builder.conv(gate, f"{name}.se.expand", mid, 1, bias=True)
        y = builder.mul(y, builder.activation(gate, f"{name}.se.gate", "h_sigmoid"), f"{name}.se.mul")
    y = _conv_bn(builder, y, f"{name}.project", spec.out_channels, 1)
    return builder.add((x, y), f"{name}.add") if spec.shortcut else y
