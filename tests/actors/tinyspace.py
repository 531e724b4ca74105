"""A complete search space in one small file: one convolution whose width and kernel are searched. Fast for tests."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from searchspaces.graph import INPUT, Graph, GraphBuilder
from searchspaces.network import BatchNorm, GraphNetwork
from searchspaces.space import Choice, SearchSpace, Tokens
from searchspaces.supernet import Supernet

WIDTHS, KERNELS = (4, 8, 16), (1, 3)


class TinySpace(SearchSpace):
    """`norm` False leaves batch norm out: then a batch may be cut in parts without changing its gradients."""

    def __init__(self, classes: int = 10, channels: int = 1, resolution: int = 8, norm: bool = True) -> None:
        super().__init__(classes, channels)
        self.resolution, self.norm = resolution, norm

    @property
    def space_id(self) -> str:
        return f"tiny(classes={self.classes},channels={self.channels},resolution={self.resolution},norm={self.norm})"

    @property
    def choices(self) -> tuple[Choice, ...]:
        return Choice("width", "width", WIDTHS), Choice("kernel", "kernel", KERNELS)

    def graph(self, tokens_T: Tokens) -> Graph:
        builder = GraphBuilder(self.channels, self.resolution)
        builder.begin_block("body", 0, "convolution")
        x = builder.conv(INPUT, "conv", WIDTHS[tokens_T[0]], KERNELS[tokens_T[1]])
        x = builder.batch_norm(x, "norm") if self.norm else x
        x = builder.pool(builder.activation(x, "relu", "relu"), "pool", "avg_pool", 2, 2, padding=0)
        x = builder.flatten(x, "flat")
        builder.linear(x, "linear", self.classes)
        return builder.build()

    def make_supernet(self) -> TinySupernet:
        return TinySupernet(self)


class TinyWithMean(TinySpace):
    """Knows its mean cost in closed form: all six networks, weighed."""

    def mean_madds(self, probabilities: Sequence[Tensor]) -> Tensor:
        widths, kernels = probabilities
        rows = np.array(list(np.ndindex(len(WIDTHS), len(KERNELS))), dtype=np.int8)
        madds = torch.from_numpy(self.cost(rows)[0].reshape(len(WIDTHS), len(KERNELS)))
        return widths @ madds.to(widths) @ kernels


class TinySupernet(Supernet):
    def __init__(self, space: TinySpace) -> None:
        super().__init__()
        self.space: TinySpace = space
        self.conv = nn.Conv2d(space.channels, WIDTHS[-1], KERNELS[-1], bias=False)
        if space.norm:
            self.norm = BatchNorm(WIDTHS[-1])
        self.linear = nn.Linear(WIDTHS[-1] * (space.resolution // 2) ** 2, space.classes)
        self.set_active(space.extremes()[1])

    def set_active(self, tokens_T: Tokens) -> None:
        self._width, self._kernel = WIDTHS[tokens_T[0]], KERNELS[tokens_T[1]]

    def _filters(self, kernel: int, width: int) -> Tensor:
        weight = self.conv.weight[:width]
        return weight if kernel == 3 else weight[:, :, 1:2, 1:2]

    def _run(self, images: Tensor, filters: Tensor, mask: Tensor) -> Tensor:
        width = len(mask)
        x = F.conv2d(images, filters, padding=filters.shape[-1] // 2)
        if self.space.norm:
            n = self.norm
            assert n.running_mean is not None and n.running_var is not None and n.momentum is not None
            x = F.batch_norm(x, n.running_mean[:width], n.running_var[:width], n.weight[:width], n.bias[:width],
                             n.training, n.momentum, n.eps)
        x = (F.avg_pool2d(F.relu(x), 2) * mask[:, None, None]).flatten(1)
        return F.linear(x, self.linear.weight[:, :x.shape[1]], self.linear.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self._run(images, self._filters(self._kernel, self._width), torch.ones(self._width))

    def forward_mixture(self, images: Tensor, mixture: Sequence[Tensor]) -> Tensor:
        widths, kernels = mixture
        filters = kernels[1] * self.conv.weight + kernels[0] * F.pad(self._filters(1, WIDTHS[-1]), (1, 1, 1, 1))
        mask = sum(w * (torch.arange(WIDTHS[-1]) < width) for w, width in zip(widths, WIDTHS))
        assert isinstance(mask, Tensor)
        return self._run(images, filters, mask)

    def extract(self, tokens_T: Tokens) -> GraphNetwork:
        network = GraphNetwork(self.space.graph(tokens_T))
        shared = {**self.state_dict(), "conv.weight": self._filters(KERNELS[tokens_T[1]], WIDTHS[-1])}
        network.load_state_dict({name: shared[name][tuple(slice(size) for size in tensor.shape)].detach().clone()
                                 for name, tensor in network.state_dict().items()})
        return network.train(self.training)
