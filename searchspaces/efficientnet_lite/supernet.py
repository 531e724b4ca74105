"""The weight-shared network of the EfficientNet-Lite space. Its tensors carry the names of the graph.

Kernels by centre crops with learned matrices, expand ratios by leading channels, depth by leading layers, resolution by
resizing the images (searchspaces/blocks.py has the first two).
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from searchspaces.blocks import ElasticMBConv, batch_norm, extracted, mixed_resolutions
from searchspaces.efficientnet_lite.skeleton import EPS, KERNELS, STAGES, EfficientNetLiteSkeleton
from searchspaces.network import BatchNorm, GraphNetwork, initialise, resize, same_conv
from searchspaces.space import Tokens
from searchspaces.supernet import Supernet


class EfficientNetLiteSupernet(Supernet):
    """See `Supernet`. Starts with the largest architecture active. `dropout` (0 unless set) acts before the classifier
    while training."""

    def __init__(self, space: EfficientNetLiteSkeleton) -> None:
        super().__init__()
        self.space: EfficientNetLiteSkeleton = space
        stem, first, final = space.stem_channels, space.first_channels, space.final_channels
        self.stem = nn.ModuleDict({"conv": nn.Conv2d(space.channels, stem, 3, space.stem_stride, bias=False),
                                   "conv_bn": BatchNorm(stem, EPS)})
        self.first = nn.ModuleDict({
            "depthwise": nn.Conv2d(stem, stem, 3, groups=stem, bias=False), "depthwise_bn": BatchNorm(stem, EPS),
            "project": nn.Conv2d(stem, first, 1, bias=False), "project_bn": BatchNorm(first, EPS)})
        for stage in range(len(STAGES)):
            self.add_module(f"stage{stage}", nn.ModuleDict({f"layer{spec.index}": ElasticMBConv(
                spec.in_channels, spec.out_channels, spec.mids, spec.kernels, spec.stride, "relu6", None, spec.shortcut,
                eps=EPS, same=True) for spec in space.layers if spec.stage == stage}))
        self.final = nn.ModuleDict({"conv": nn.Conv2d(space.layers[-1].out_channels, final, 1, bias=False),
                                    "conv_bn": BatchNorm(final, EPS)})
        self.head = nn.ModuleDict({"linear": nn.Linear(final, space.classes)})
        self.dropout = nn.Dropout(0.0)
        initialise(self)
        self.set_active(space.extremes()[1])

    def layer(self, stage: int, index: int) -> ElasticMBConv:
        layer = self.get_submodule(f"stage{stage}.layer{index}")
        assert isinstance(layer, ElasticMBConv)
        return layer

    def set_active(self, tokens_T: Tokens) -> None:
        row = self.space.check_tokens(np.asarray(tokens_T)[None])
        _, expand_L, kernel_L, resolution = (part[0] for part in self.space.split(row))
        live = self.space.live_layers(row)[0]
        self._active = [(self.layer(spec.stage, spec.index), KERNELS[kernel_L[i]], int(expand_L[i]))
                        for i, spec in enumerate(self.space.layers) if live[i]]
        self._resolution = self.space.resolutions[resolution]

    def forward(self, images: Tensor) -> Tensor:
        x = self._stem(resize(images, self._resolution))
        for layer, kernel, expand in self._active:
            x = layer(x, kernel, expand)
        return self._head(x)

    def forward_mixture(self, images: Tensor, mixture: Sequence[Tensor]) -> Tensor:
        """Depth mixes the outputs of the stage's prefixes, a searched resolution the logits."""
        return mixed_resolutions(lambda x: self._mixture_at(x, mixture), images, self.space.resolutions, mixture[-1])

    def _mixture_at(self, images: Tensor, mixture: Sequence[Tensor]) -> Tensor:
        x = self._stem(images)
        depth_at, expand_at, kernel_at, _ = self.space.positions
        certain = x.new_ones(1)     # the weight of a choice of one value
        prefixes: list[Tensor] = []
        for spec, expand, kernel in zip(self.space.layers, expand_at, kernel_at):
            weights_K = mixture[kernel] if kernel >= 0 else certain
            x = self.layer(spec.stage, spec.index).mixture(x, weights_K=weights_K, weights_E=mixture[expand])
            prefixes.append(x)
            if len(prefixes) == self.space.depths[spec.stage]:
                depth = mixture[depth_at[spec.stage]] if depth_at[spec.stage] >= 0 else certain
                x = torch.stack([weight * prefix for weight, prefix in zip(depth, prefixes)]).sum(dim=0)
                prefixes = []
        return self._head(x)

    def _stem(self, images: Tensor) -> Tensor:
        x = F.relu6(_conv_bn(self.stem, "conv", images, self.space.stem_stride))
        y = F.relu6(_conv_bn(self.first, "depthwise", x))
        y = _conv_bn(self.first, "project", y)
        return x + y if x.shape == y.shape else y

    def _head(self, x: Tensor) -> Tensor:
        x = F.relu6(_conv_bn(self.final, "conv", x))
        return self.head["linear"](self.dropout(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)))

    def extract(self, tokens_T: Tokens) -> GraphNetwork:
        return extracted(self, self.space.graph(tokens_T))

    def sort_channels(self) -> None:
        """Sorts every layer's channels by importance; the largest network computes the same function as before."""
        for spec in self.space.layers:
            self.layer(spec.stage, spec.index).sort_channels()


def _conv_bn(scope: nn.ModuleDict, name: str, x: Tensor, stride: int = 1) -> Tensor:
    conv, norm = scope[name], scope[f"{name}_bn"]
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, BatchNorm)
    return batch_norm(norm, same_conv(x, conv.weight, stride, conv.groups))
