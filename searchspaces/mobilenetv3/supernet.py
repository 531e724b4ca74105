"""The weight-shared network of the MobileNetV3 space (specification 2.4). Its tensors carry the names of the graph."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from searchspaces.blocks import ElasticMBConv, batch_norm, extracted, mixed_resolutions
from searchspaces.graph import make_divisible
from searchspaces.mobilenetv3.skeleton import (
    DEPTHS,
    FINAL_CHANNELS,
    HEAD_CHANNELS,
    KERNELS,
    UNIT_LAYERS,
    UNIT_TOKENS,
    UNITS,
    MobileNetV3Skeleton,
)
from searchspaces.network import BatchNorm, GraphNetwork, initialise, resize
from searchspaces.space import Tokens
from searchspaces.supernet import Supernet


class MobileNetV3Supernet(Supernet):
    """See `Supernet`. Starts with the largest architecture active. `dropout` (0 unless set) acts before the classifier
    while training, as in specification 2.1."""

    def __init__(self, space: MobileNetV3Skeleton) -> None:
        super().__init__()
        self.space: MobileNetV3Skeleton = space
        stem = space.stem_channels
        final, hidden = (make_divisible(channels * space.width) for channels in (FINAL_CHANNELS, HEAD_CHANNELS))
        self.stem = nn.ModuleDict({
            "conv": nn.Conv2d(space.channels, stem, 3, space.stem_stride, 1, bias=False), "conv_bn": BatchNorm(stem)})
        self.first = nn.ModuleDict({
            "depthwise": nn.Conv2d(stem, stem, 3, 1, 1, groups=stem, bias=False), "depthwise_bn": BatchNorm(stem),
            "project": nn.Conv2d(stem, stem, 1, bias=False), "project_bn": BatchNorm(stem)})
        for u in range(UNITS):
            layers = space.layers[u * UNIT_LAYERS:(u + 1) * UNIT_LAYERS]
            self.add_module(f"unit{u}", nn.ModuleDict({f"layer{spec.index}": ElasticMBConv(
                spec.in_channels, spec.out_channels, spec.mids, KERNELS, spec.stride, spec.activation,
                spec.se_mids if spec.se else None, spec.shortcut) for spec in layers}))
        self.final = nn.ModuleDict({
            "conv": nn.Conv2d(space.layers[-1].out_channels, final, 1, bias=False), "conv_bn": BatchNorm(final)})
        self.head = nn.ModuleDict({
            "conv": nn.Conv2d(final, hidden, 1, bias=False), "linear": nn.Linear(hidden, space.classes)})
        self.dropout = nn.Dropout(0.0)
        initialise(self)
        self.set_active(space.extremes()[1])

    def layer(self, unit: int, index: int) -> ElasticMBConv:
        layer = self.get_submodule(f"unit{unit}.layer{index}")
        assert isinstance(layer, ElasticMBConv)
        return layer

    def set_active(self, tokens_T: Tokens) -> None:
        row = self.space.check_tokens(np.asarray(tokens_T)[None])
        _, expand_L, kernel_L, resolution = (part[0] for part in self.space.split(row))
        live = np.flatnonzero(self.space.live_layers(row)[0])
        self._active = [(self.layer(*divmod(int(i), UNIT_LAYERS)), KERNELS[kernel_L[i]], int(expand_L[i]))
                        for i in live]
        self._resolution = self.space.resolutions[resolution]

    def forward(self, images: Tensor) -> Tensor:
        x = self._stem(resize(images, self._resolution))
        for layer, kernel, expand in self._active:
            x = layer(x, kernel, expand)
        return self._head(x)

    def forward_mixture(self, images: Tensor, mixture: Sequence[Tensor]) -> Tensor:
        """Depth mixes the outputs of the unit's prefixes, a searched resolution the logits."""
        return mixed_resolutions(lambda x: self._mixture_at(x, mixture), images, self.space.resolutions, mixture[-1])

    def _mixture_at(self, images: Tensor, mixture: Sequence[Tensor]) -> Tensor:
        x = self._stem(images)
        for u in range(UNITS):
            depth, *layers = mixture[u * UNIT_TOKENS:(u + 1) * UNIT_TOKENS]
            prefixes: list[Tensor] = []
            for index in range(UNIT_LAYERS):
                x = self.layer(u, index).mixture(x, weights_K=layers[2 * index + 1], weights_E=layers[2 * index])
                prefixes.append(x)
            x = torch.stack([weight * prefixes[d - 1] for weight, d in zip(depth, DEPTHS)]).sum(dim=0)
        return self._head(x)

    def _stem(self, images: Tensor) -> Tensor:
        x = F.hardswish(_conv_bn(self.stem, "conv", images))
        y = F.relu(_conv_bn(self.first, "depthwise", x))
        return x + _conv_bn(self.first, "project", y)

    def _head(self, x: Tensor) -> Tensor:
        x = F.hardswish(_conv_bn(self.final, "conv", x))
        x = torch.flatten(F.hardswish(self.head["conv"](F.adaptive_avg_pool2d(x, 1))), 1)
        return self.head["linear"](self.dropout(x))

    def extract(self, tokens_T: Tokens) -> GraphNetwork:
        return extracted(self, self.space.graph(tokens_T))

    def sort_channels(self) -> None:
        """Sorts every layer's channels by importance; the largest network computes the same function as before."""
        for u in range(UNITS):
            for index in range(UNIT_LAYERS):
                self.layer(u, index).sort_channels()


def _conv_bn(scope: nn.ModuleDict, name: str, x: Tensor) -> Tensor:
    norm = scope[f"{name}_bn"]
    assert isinstance(norm, BatchNorm)
    return batch_norm(norm, scope[name](x))
