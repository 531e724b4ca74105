"""The weights of the ProxylessNAS space (specification 3.3), in one of two ways.

Shared (ours): one 7x7, e6 layer per position; kernels are centre crops with learned matrices, e3 takes the leading
channels. Not shared (UNAS): each layer holds each of its operations. Either way a mixture is the weighted sum of the
outputs of a layer's operations, and `skip` is the identity.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from searchspaces.blocks import ElasticMBConv, batch_norm
from searchspaces.graph import tensor_shapes
from searchspaces.network import BatchNorm, GraphNetwork, initialise
from searchspaces.proxylessnas.skeleton import (
    EPS,
    EXPANDS,
    KERNELS,
    KINDS,
    OPERATIONS,
    SKIP,
    LayerSpec,
    ProxylessNasSkeleton,
)
from searchspaces.space import Tokens
from searchspaces.supernet import Supernet

ALL = "all"  # name of the block of a layer whose operations share weights


class Layer(nn.Module):
    """The operations of one position, called by their names. Batch norms have eps 1e-3, like the graph's."""

    def __init__(self, spec: LayerSpec, shared: bool) -> None:
        super().__init__()
        self.spec, self.shared = spec, shared
        if shared:
            self.add_module(ALL, self._block(KERNELS, spec.mids))
        else:
            for name, (kernel, expand) in zip(OPERATIONS[1:], KINDS):
                self.add_module(name, self._block((kernel,), (spec.mids[EXPANDS.index(expand)],)))

    def _block(self, kernels: Sequence[int], mids: Sequence[int]) -> ElasticMBConv:
        spec = self.spec
        return ElasticMBConv(spec.in_channels, spec.out_channels, mids, kernels, spec.stride, "relu6", None,
                             spec.shortcut, eps=EPS)

    def block(self, operation: str) -> tuple[str, ElasticMBConv]:
        """The block that holds an operation, with its name."""
        name = ALL if self.shared else operation
        block = self.get_submodule(name)
        assert isinstance(block, ElasticMBConv)
        return name, block

    def forward(self, x: Tensor, operation: str) -> Tensor:
        if operation == SKIP:
            return x
        kernel, expand = KINDS[OPERATIONS.index(operation) - 1]
        return self.block(operation)[1](x, kernel, EXPANDS.index(expand) if self.shared else 0)

    def mixture(self, x: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of the operations' outputs, weights float[V] or float[B, V]. An operation of weight exactly
        zero is not run, unless somebody asks for the weight's gradient, which needs the operation's output."""
        terms = [weights[..., index].reshape(-1, 1, 1, 1) * self(x, operation)
                 for index, operation in enumerate(self.spec.operations)
                 if weights.requires_grad or bool(weights[..., index].any())]
        return torch.stack(terms).sum(dim=0)


class ProxylessNasSupernet(Supernet):
    """See `Supernet`. Starts with the largest architecture active. A mixture may also hold float[B, V] per position:
    one mixture per image. `dropout` (0 unless set) acts before the classifier while training."""

    def __init__(self, space: ProxylessNasSkeleton) -> None:
        super().__init__()
        self.space: ProxylessNasSkeleton = space
        stem, first, *_, final = space.widths
        self.stem = nn.ModuleDict({"conv": nn.Conv2d(space.channels, stem, 3, space.stem_stride, 1, bias=False),
                                   "conv_bn": BatchNorm(stem, EPS)})
        self.first = nn.ModuleDict({
            "depthwise": nn.Conv2d(stem, stem, 3, 1, 1, groups=stem, bias=False),
            "depthwise_bn": BatchNorm(stem, EPS),
            "project": nn.Conv2d(stem, first, 1, bias=False), "project_bn": BatchNorm(first, EPS)})
        for spec in space.layers:
            self.add_module(spec.name, Layer(spec, space.shared))
        self.final = nn.ModuleDict({"conv": nn.Conv2d(space.widths[-2], final, 1, bias=False),
                                    "conv_bn": BatchNorm(final, EPS)})
        self.head = nn.ModuleDict({"linear": nn.Linear(final, space.classes)})
        self.dropout = nn.Dropout(0.0)
        initialise(self)
        self.set_active(space.extremes()[1])

    def layer(self, name: str) -> Layer:
        layer = self.get_submodule(name)
        assert isinstance(layer, Layer)
        return layer

    def set_active(self, tokens_T: Tokens) -> None:
        self._active = list(self._operations_of(tokens_T).items())

    def forward(self, images: Tensor) -> Tensor:
        x = self._stem(images)
        for name, operation in self._active:
            x = self.layer(name)(x, operation)
        return self._head(x)

    def forward_mixture(self, images: Tensor, mixture: Sequence[Tensor]) -> Tensor:
        x = self._stem(images)
        for spec, weights in zip(self.space.layers, mixture, strict=True):
            x = self.layer(spec.name).mixture(x, weights)
        return self._head(x)

    def _stem(self, images: Tensor) -> Tensor:
        x = F.relu6(_conv_bn(self.stem, "conv", images))
        x = F.relu6(_conv_bn(self.first, "depthwise", x))
        return _conv_bn(self.first, "project", x)

    def _head(self, x: Tensor) -> Tensor:
        x = F.relu6(_conv_bn(self.final, "conv", x))
        return self.head["linear"](self.dropout(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)))

    def extract(self, tokens_T: Tokens) -> GraphNetwork:
        graph, held, operations = self.space.graph(tokens_T), self.state_dict(), self._operations_of(tokens_T)
        inputs = {node.name: node.shape for node in graph.nodes}
        weights = {}
        for node in graph.nodes[1:]:
            scope, _, leaf = node.name.rpartition(".")
            for suffix, shape in tensor_shapes(node, inputs[node.inputs[0]]).items():
                source = f"{node.name}.{suffix}"
                if scope in operations:
                    name, block = self.layer(scope).block(operations[scope])
                    source = f"{scope}.{name}.{leaf}.{suffix}"
                if scope in operations and leaf == "depthwise":
                    tensor = block.depthwise.filters(shape[-1], shape[0]).detach()
                else:
                    tensor = held[source][tuple(slice(size) for size in shape)]
                weights[f"{node.name}.{suffix}"] = tensor.clone()
        network = GraphNetwork(graph, weights).train(self.training)
        # Depthwise layers run about 1.5 times as fast; copies made with `.contiguous()` are plain again.
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _operations_of(self, tokens_T: Tokens) -> dict[str, str]:
        """Names of the layers, in order, with the names of their operations."""
        row = self.space.check_tokens(np.asarray(tokens_T)[None])[0]
        return {spec.name: spec.operations[token] for spec, token in zip(self.space.layers, row)}


def _conv_bn(scope: nn.ModuleDict, name: str, x: Tensor) -> Tensor:
    norm = scope[f"{name}_bn"]
    assert isinstance(norm, BatchNorm)
    return batch_norm(norm, scope[name](x))
