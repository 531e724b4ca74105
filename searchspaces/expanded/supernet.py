"""The weights of the expanded space (specification 6.3; nss 4 and 13): leading channels of the widest convolution, the
first blocks of the deepest stage.

`set_active` slices. A mixture multiplies by masks instead and mixes the outputs of a stage's prefixes, so that one
forward pass of the deepest architecture stands for all depths and widths. Channels are normalised each on its own, so
those that are masked afterwards disturb nobody.

Legend: B images, W widths of a stage, V values of a position.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from searchspaces.blocks import batch_norm, prefix_masks
from searchspaces.expanded.skeleton import STAGE_TOKENS, STAGES, ExpandedSkeleton
from searchspaces.graph import tensor_shapes
from searchspaces.network import BatchNorm, GraphNetwork, initialise
from searchspaces.space import Tokens
from searchspaces.supernet import Supernet


class ResidualBlock(nn.Module):
    """Called with as many channels as came out before, and how many should come out; tensors named as in the graph."""

    def __init__(self, in_channels: int, channels: int, stride: int, projects: bool) -> None:
        super().__init__()
        self.projects = projects
        self.conv1, self.conv1_bn = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False), BatchNorm(channels)
        self.conv2, self.conv2_bn = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), BatchNorm(channels)
        if projects:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut_bn = BatchNorm(channels)

    def forward(self, x: Tensor, width: int, mask: Tensor | None = None) -> Tensor:
        """`mask` float[1 or B, width, 1, 1] multiplies what follows each ReLU; masked channels of x must be zero."""
        y = F.relu(_conv_bn(self.conv1, self.conv1_bn, x, width))
        y = _conv_bn(self.conv2, self.conv2_bn, y if mask is None else y * mask, width)
        y = F.relu(y + (_conv_bn(self.shortcut, self.shortcut_bn, x, width) if self.projects else x))
        return y if mask is None else y * mask


class ExpandedSupernet(Supernet):
    """See `Supernet`. Starts with the largest architecture active. A mixture may also hold float[B, V] per position:
    one mixture per image. `dropout` (0 unless set) acts before the classifier while training."""

    _prefixes: Tensor

    def __init__(self, space: ExpandedSkeleton) -> None:
        super().__init__()
        self.space: ExpandedSkeleton = space
        self.stem = nn.ModuleDict({"conv": nn.Conv2d(space.channels, space.stem, 3, 1, 1, bias=False),
                                   "conv_bn": BatchNorm(space.stem)})
        for stage in range(STAGES):
            before = space.width if stage else space.stem
            self.add_module(f"stage{stage}", nn.ModuleDict({f"block{index}": ResidualBlock(
                space.width if index else before, space.width, 1 if index else space.strides[stage], index == 0)
                for index in range(space.depth)}))
        self.head = nn.ModuleDict({"linear": nn.Linear(space.width, space.classes)})
        self.dropout = nn.Dropout(0.0)
        self.register_buffer("_prefixes", prefix_masks(range(1, space.width + 1)), persistent=False)
        initialise(self)
        self.set_active(space.extremes()[1])

    def block(self, stage: int, index: int) -> ResidualBlock:
        block = self.get_submodule(f"stage{stage}.block{index}")
        assert isinstance(block, ResidualBlock)
        return block

    def set_active(self, tokens_T: Tokens) -> None:
        row = self.space.check_tokens(np.asarray(tokens_T)[None])
        self._active = list(zip(self.space.depths(row)[0].tolist(), self.space.widths(row)[0].tolist()))

    def forward(self, images: Tensor) -> Tensor:
        x = self._stem(images)
        for stage, (depth, width) in enumerate(self._active):
            for index in range(depth):
                x = self.block(stage, index)(x, width)
        return self._head(x)

    def forward_mixture(self, images: Tensor, mixture: Sequence[Tensor]) -> Tensor:
        """Nothing runs deeper or wider than the largest value of weight other than zero, unless somebody asks for the
        weights' gradient, which needs all values."""
        x = self._stem(images)
        for stage in range(STAGES):
            depth, ranges, places = mixture[stage * STAGE_TOKENS:(stage + 1) * STAGE_TOKENS]
            widths = (ranges[..., :, None] * places[..., None, :]).flatten(-2)
            x = self._stage_mixture(x, stage, depth, widths)
        return self._head(x)

    def _stage_mixture(self, x: Tensor, stage: int, weights_depth: Tensor, weights_width: Tensor) -> Tensor:
        """M_c = sum of the weights of the widths beyond c; the output is sum over d of p_d x^(d) (nss 4)."""
        width, needed = _needed(weights_width)[-1] + 1, _needed(weights_depth)
        mask = (weights_width @ self._prefixes[:, :width].to(weights_width)).reshape(-1, width, 1, 1)
        terms = []
        for index in range(needed[-1] + 1):
            x = self.block(stage, index)(x, width, mask)
            if index in needed:
                terms.append(weights_depth[..., index].reshape(-1, 1, 1, 1) * x)
        return sum(terms[1:], start=terms[0])

    def _stem(self, images: Tensor) -> Tensor:
        norm = self.stem["conv_bn"]
        assert isinstance(norm, BatchNorm)
        return F.relu(batch_norm(norm, self.stem["conv"](images)))

    def _head(self, x: Tensor) -> Tensor:
        linear = self.head["linear"]
        assert isinstance(linear, nn.Linear)
        pooled = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return F.linear(self.dropout(pooled), linear.weight[:, :pooled.shape[1]], linear.bias)

    def extract(self, tokens_T: Tokens) -> GraphNetwork:
        graph, shared = self.space.graph(tokens_T), self.state_dict()
        inputs = {node.name: node.shape for node in graph.nodes}
        weights = {}
        for node in graph.nodes[1:]:
            for suffix, shape in tensor_shapes(node, inputs[node.inputs[0]]).items():
                name = f"{node.name}.{suffix}"
                weights[name] = shared[name][tuple(slice(size) for size in shape)].clone()
        network = GraphNetwork(graph, weights).train(self.training)
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _conv_bn(conv: nn.Conv2d, norm: BatchNorm, x: Tensor, width: int) -> Tensor:
    """The leading channels: as many as x has to `width`."""
    stride, padding = conv.stride[0], conv.kernel_size[0] // 2
    return batch_norm(norm, F.conv2d(x, conv.weight[:width, :x.shape[1]], None, stride, padding))


def _needed(weights: Tensor) -> list[int]:
    """Indices of the values that matter to the output or to the gradient that is asked for; at least one."""
    values = weights.shape[-1]
    if weights.requires_grad:
        return list(range(values))
    return torch.nonzero(weights.reshape(-1, values).any(dim=0)).flatten().tolist() or [0]
