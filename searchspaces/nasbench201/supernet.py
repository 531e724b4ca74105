"""The weight-shared network of NAS-Bench-201 (specification 7.4): every edge of every cell holds all five operations.

Operations share no weights. Batch norms inside cells have no affine parameters, so that an operation's share in a
mixture is its weight alone; the extracted network carries scale 1 and shift 0 in their place.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from searchspaces.nasbench201.skeleton import (
    CONV1,
    CONV3,
    EDGES,
    NONE,
    OPERATIONS,
    POOL,
    SKIP,
    STAGES,
    NasBench201Skeleton,
)
from searchspaces.network import BatchNorm, GraphNetwork, initialise
from searchspaces.space import Tokens
from searchspaces.supernet import Supernet


class Edge(nn.Module):
    """All operations of one edge."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleDict({OPERATIONS[token]: nn.ModuleDict({
            "conv": nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False),
            "bn": BatchNorm(channels, affine=False)}) for token, kernel in ((CONV1, 1), (CONV3, 3))})

    def forward(self, x: Tensor, token: int) -> Tensor:
        """Any operation but `none`."""
        if token == SKIP:
            return x
        if token == POOL:
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return _conv_bn(self.convolutions[OPERATIONS[token]], F.relu(x))

    def mixture(self, x: Tensor, weights: Tensor) -> Tensor:
        parts = [weights[token] * self(x, token) for token in (SKIP, CONV1, CONV3, POOL)]
        return torch.stack([weights[NONE] * torch.zeros_like(x), *parts]).sum(dim=0)


class Cell(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        for a, b in EDGES:
            self.add_module(f"{a}_{b}", Edge(channels))

    def edge(self, a: int, b: int) -> Edge:
        edge = self.get_submodule(f"{a}_{b}")
        assert isinstance(edge, Edge)
        return edge

    def forward(self, x: Tensor, tokens: Sequence[int]) -> Tensor:
        return self._run(x, lambda index, value: self.edge(*EDGES[index])(value, tokens[index]),
                         [index for index, token in enumerate(tokens) if token != NONE])

    def mixture(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        return self._run(x, lambda index, value: self.edge(*EDGES[index]).mixture(value, weights[index]),
                         list(range(len(EDGES))))

    def _run(self, x: Tensor, operation: Callable[[int, Tensor], Tensor], edges: list[int]) -> Tensor:
        """A node's value is the sum of its incoming edges; nothing comes in: zeros."""
        values = [x]
        for node in (1, 2, 3):
            incoming = [operation(index, values[EDGES[index][0]]) for index in edges if EDGES[index][1] == node]
            total = incoming[0] if incoming else torch.zeros_like(x)
            for value in incoming[1:]:
                total = total + value
            values.append(total)
        return values[3]


class NasBench201Supernet(Supernet):
    """See `Supernet`. Starts with 3x3 convolutions everywhere."""

    def __init__(self, space: NasBench201Skeleton) -> None:
        super().__init__()
        self.space: NasBench201Skeleton = space
        width = space.width
        self.stem = _scope(space.channels, width, 3)
        for stage in range(STAGES):
            channels = width * 2 ** stage
            if stage:
                self.add_module(f"reduction{stage}", nn.ModuleDict({
                    "a": _scope(channels // 2, channels, 3, stride=2), "b": _scope(channels, channels, 3),
                    "shortcut": nn.Conv2d(channels // 2, channels, 1, bias=False)}))
            self.add_module(f"stage{stage}", nn.ModuleDict({f"cell{i}": Cell(channels) for i in range(space.cells)}))
        last = width * 2 ** (STAGES - 1)
        self.head = nn.ModuleDict({"bn": BatchNorm(last), "linear": nn.Linear(last, space.classes)})
        initialise(self)
        self.set_active(space.extremes()[1])

    def set_active(self, tokens_T: Tokens) -> None:
        self._active = [int(token) for token in self.space.check_tokens(np.asarray(tokens_T)[None])[0]]

    def forward(self, images: Tensor) -> Tensor:
        return self._run(images, lambda cell, x: cell(x, self._active))

    def forward_mixture(self, images: Tensor, mixture: Sequence[Tensor]) -> Tensor:
        return self._run(images, lambda cell, x: cell.mixture(x, mixture))

    def _run(self, images: Tensor, run_cell: Callable[[Cell, Tensor], Tensor]) -> Tensor:
        x = _conv_bn(self.stem, images)
        for stage in range(STAGES):
            if stage:
                x = _reduce(self.get_submodule(f"reduction{stage}"), x)
            for index in range(self.space.cells):
                cell = self.get_submodule(f"stage{stage}.cell{index}")
                assert isinstance(cell, Cell)
                x = run_cell(cell, x)
        x = F.relu(self.head["bn"](x))
        return self.head["linear"](torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))

    def extract(self, tokens_T: Tokens) -> GraphNetwork:
        network = GraphNetwork(self.space.graph(tokens_T))
        shared, row = self.state_dict(), [int(token) for token in tokens_T]
        operation = {f"{a}_{b}": OPERATIONS[token] for (a, b), token in zip(EDGES, row)}
        weights = {}
        for name, tensor in network.state_dict().items():
            *scope, leaf, suffix = name.split(".")
            if scope and scope[-1] in operation:  # stage0.cell1.0_2.bn.weight
                name_shared = ".".join([*scope, "convolutions", operation[scope[-1]], leaf, suffix])
            else:
                name_shared = name
            missing = torch.ones_like(tensor) if suffix == "weight" else torch.zeros_like(tensor)
            weights[name] = shared.get(name_shared, missing).clone()
        network.load_state_dict(weights)
        return network.train(self.training).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _scope(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.ModuleDict:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return nn.ModuleDict({"conv": conv, "bn": BatchNorm(out_channels)})


def _conv_bn(scope: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(scope, nn.ModuleDict)
    return scope["bn"](scope["conv"](x))


def _reduce(scope: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(scope, nn.ModuleDict)
    y = _conv_bn(scope["b"], F.relu(_conv_bn(scope["a"], F.relu(x))))
    return y + scope["shortcut"](F.avg_pool2d(x, 2, 2))
