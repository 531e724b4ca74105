"""The weight-shared network of the DARTS space (specification 5.4): every edge of every cell holds seven operations.

Operations share no weights. A node's two pairs may coincide; in the shared network that is one operation of weight 2,
in the extracted one two copies of it. Batch norms inside cells have no affine parameters, so that an operation's share
in a mixture is its weight alone; the extracted network carries scale 1 and shift 0 in their place.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from searchspaces.darts.mixture import duplicate_penalty, edge_weights
from searchspaces.darts.skeleton import (
    AVG,
    DIL3,
    INPUTS,
    MAX,
    NODES,
    OPERATIONS,
    SEPARABLE,
    SKIP,
    SLOTS,
    STEM_FACTOR,
    CellSpec,
    DartsSkeleton,
)
from searchspaces.network import BatchNorm, GraphNetwork, initialise
from searchspaces.space import Tokens
from searchspaces.supernet import Supernet

Terms = Sequence[Sequence[tuple[int, int, Tensor | int]]]  # per node (input, operation, weight), weights not zero


class Value:
    """What operations read: a map and, once the first of them needs it, its rectified form."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    @cached_property
    def rectified(self) -> Tensor:
        return F.relu(self.x)


class DepthwiseSeparable(nn.Module):
    """(depthwise, 1x1, batch norm) `turns` times with ReLU between them, on a map that is already rectified."""

    def __init__(self, channels: int, kernel: int, stride: int, turns: int, dilation: int = 1) -> None:
        super().__init__()
        self.turns = turns
        for turn in range(1, turns + 1):
            self.add_module(f"depthwise{turn}", nn.Conv2d(
                channels, channels, kernel, stride if turn == 1 else 1, dilation * (kernel // 2), dilation,
                groups=channels, bias=False))
            self.add_module(f"pointwise{turn}", nn.Conv2d(channels, channels, 1, bias=False))
            self.add_module(f"bn{turn}", BatchNorm(channels, affine=False))

    def forward(self, x: Tensor) -> Tensor:
        for turn in range(1, self.turns + 1):
            x = F.relu(x) if turn > 1 else x
            for role in ("depthwise", "pointwise", "bn"):
                x = self.get_submodule(f"{role}{turn}")(x)
        return x


class FactorizedReduce(nn.Module):
    """Half the height and width of a rectified map: half the channels from the first pixel of each 2x2 patch, half from
    the last."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(in_channels, out_channels // 2, 1, 2, bias=False) for _ in range(2))
        self.bn1, self.bn2 = (BatchNorm(out_channels // 2, affine=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.bn1(self.conv1(x)), self.bn2(self.conv2(x[:, :, 1:, 1:]))], dim=1)


class ConvBn(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, kernel: int, affine: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
        self.bn = BatchNorm(out_channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Edge(nn.Module):
    """All operations on one input of one node; those with weights are modules called by their operation."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        for op, kernel in SEPARABLE.items():
            self.add_module(OPERATIONS[op], DepthwiseSeparable(channels, kernel, stride, turns=2))
        self.add_module(OPERATIONS[DIL3], DepthwiseSeparable(channels, 3, stride, turns=1, dilation=2))
        if stride == 2:
            self.add_module(OPERATIONS[SKIP], FactorizedReduce(channels, channels))

    def forward(self, value: Value, op: int) -> Tensor:
        if op == MAX:
            return F.max_pool2d(value.x, 3, self.stride, 1)
        if op == AVG:
            return F.avg_pool2d(value.x, 3, self.stride, 1, count_include_pad=False)
        if op == SKIP and self.stride == 1:
            return value.x
        return self.get_submodule(OPERATIONS[op])(value.rectified)


class Cell(nn.Module):
    def __init__(self, spec: CellSpec) -> None:
        super().__init__()
        older, previous = spec.in_channels
        self.preprocess0 = (FactorizedReduce(older, spec.channels) if spec.after_reduction
                            else ConvBn(older, spec.channels, 1, affine=False))
        self.preprocess1 = ConvBn(previous, spec.channels, 1, affine=False)
        for node, inputs in enumerate(INPUTS):
            self.add_module(f"node{node}", nn.ModuleDict({
                f"input{source}": Edge(spec.channels, spec.stride(source)) for source in range(inputs)}))

    def forward(self, older: Tensor, previous: Tensor, terms: Terms) -> Tensor:
        values = [Value(self.preprocess0(F.relu(older))), Value(self.preprocess1(F.relu(previous)))]
        for node in range(NODES):
            parts = []
            for source, op, weight in terms[node]:
                part = self.get_submodule(f"node{node}.input{source}")(values[source], op)
                parts.append(part if isinstance(weight, int) and weight == 1 else weight * part)
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            values.append(Value(total))
        return torch.cat([value.x for value in values[2:]], dim=1)


class DartsSupernet(Supernet):
    """See `Supernet`. Starts with 7x7 separable convolutions everywhere. A mixture may also hold float[B, V] per
    position: one mixture per image."""

    def __init__(self, space: DartsSkeleton) -> None:
        super().__init__()
        self.space: DartsSkeleton = space
        self.stem = ConvBn(space.channels, STEM_FACTOR * space.width, 3, affine=True)
        for spec in space.layout:
            self.add_module(spec.name, Cell(spec))
        self.head = nn.ModuleDict({"linear": nn.Linear(NODES * space.layout[-1].channels, space.classes)})
        initialise(self)
        self.set_active(space.extremes()[1])

    def set_active(self, tokens_T: Tokens) -> None:
        self._active = [[[(*pair, times) for pair, times in Counter(both).items()] for both in nodes]
                        for nodes in self._pairs_of(tokens_T)]

    def forward(self, images: Tensor) -> Tensor:
        return self._run(images, self._active)

    def forward_mixture(self, images: Tensor, mixture: Sequence[Tensor]) -> Tensor:
        nodes = [_terms(weights) for weights in edge_weights(mixture)]
        return self._run(images, [nodes[:NODES], nodes[NODES:]])

    def mixture_penalty(self, mixture: Sequence[Tensor]) -> Tensor:
        """See `duplicate_penalty`: one edge twice is a second copy of the same operation."""
        return duplicate_penalty(mixture)

    def _run(self, images: Tensor, terms_by_kind: Sequence[Terms]) -> Tensor:
        older = previous = self.stem(images)
        for spec in self.space.layout:
            older, previous = previous, self.get_submodule(spec.name)(older, previous, terms_by_kind[spec.kind])
        return self.head["linear"](torch.flatten(F.adaptive_avg_pool2d(previous, 1), 1))

    def extract(self, tokens_T: Tokens) -> GraphNetwork:
        network = GraphNetwork(self.space.graph(tokens_T))
        shared, pairs = self.state_dict(), self._pairs_of(tokens_T)
        kinds = {spec.name: spec.kind for spec in self.space.layout}
        weights = {}
        for name, tensor in network.state_dict().items():
            cell, _, inner = name.partition(".")
            if inner.startswith("node"):  # cell3.node1.a.bn2.running_mean
                node, slot, role = inner.split(".", 2)
                source, op = pairs[kinds[cell]][int(node.removeprefix("node"))][SLOTS.index(slot)]
                inner = f"{node}.input{source}.{OPERATIONS[op]}.{role}"
            missing = torch.ones_like(tensor) if name.endswith(".weight") else torch.zeros_like(tensor)
            weights[name] = shared.get(f"{cell}.{inner}", missing).clone()
        network.load_state_dict(weights)
        return network.train(self.training).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _pairs_of(self, tokens_T: Tokens) -> list[list[list[tuple[int, int]]]]:
        """[cell type][node][slot] -> (input, operation), in the order of the graph."""
        row = self.space.canonical(self.space.check_tokens(np.asarray(tokens_T)[None]))
        return [[[(source, op) for source, op in both] for both in nodes]
                for nodes in self.space.by_pair(row)[0].tolist()]


def _terms(weights: Tensor) -> list[tuple[int, int, Tensor]]:
    """The terms of a node of edge weights float[..., I, O]. A weight of exactly zero is left out, with its operation,
    unless somebody asks for its gradient, which needs the operation's output."""
    needed = torch.ones_like(weights, dtype=torch.bool) if weights.requires_grad else weights != 0
    kept = needed.reshape(-1, *weights.shape[-2:]).any(dim=0).nonzero().tolist() or [[0, 0]]
    return [(source, op, weights[..., source, op].reshape(-1, 1, 1, 1)) for source, op in kept]
