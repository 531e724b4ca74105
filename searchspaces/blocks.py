"""Elastic blocks: one set of weights for every kernel size and expand ratio (specification 2.4; OFA dynamic_op.py).

A block runs in two ways. `forward` takes one choice and slices the weights. `mixture` takes a weight per choice value
and is differentiable in them: the kernel is the weighted sum of the zero-padded kernels, and the expand ratio a channel
mask, so that one-hot weights compute the same function as the slice. Tensor names follow the graph (network.py), and
every tensor of a subnet except the depthwise filter is a leading slice of the shared one.

Legend: B batch, C middle channels at the largest ratio, m active middle channels, K kernel sizes, E expand ratios.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from searchspaces.depthwise import depthwise
from searchspaces.graph import Graph, tensor_shapes
from searchspaces.network import BatchNorm, GraphNetwork, resize, same_conv

ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "relu6": F.relu6, "h_swish": F.hardswish}


def batch_norm(norm: BatchNorm, x: Tensor) -> Tensor:
    """Batch norm with the leading slice of affine and running statistics that fits x."""
    m = x.shape[1]
    assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
    return F.batch_norm(x, norm.running_mean[:m], norm.running_var[:m], norm.weight[:m], norm.bias[:m],
                        norm.training, norm.momentum, norm.eps)


def prefix_masks(sizes: Sequence[int]) -> Tensor:
    """bool[E, max(sizes)]: row e is true on its first sizes[e] channels. Not floats, which are statistics to others."""
    return torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]


class ElasticDepthwise(nn.Module):
    """One filter of the largest size per channel; each smaller size is the centre of the next larger one, flattened,
    times a learned matrix that all channels share and that starts as the identity. `same`: padding as in TensorFlow."""

    def __init__(self, channels: int, kernels: Sequence[int], stride: int, same: bool = False) -> None:
        super().__init__()
        self.kernels, self.stride, self.same = tuple(kernels), stride, same
        self.weight = nn.Parameter(torch.empty(channels, 1, self.kernels[-1], self.kernels[-1]))
        nn.init.kaiming_normal_(self.weight, mode="fan_out")
        self.matrices = nn.ParameterDict({f"to_{k}": nn.Parameter(torch.eye(k * k)) for k in self.kernels[:-1]})

    def filters(self, kernel: int, channels: int) -> Tensor:
        """float[m, 1, k, k]: the filters of one kernel size."""
        weight = self.weight[:channels]
        for size in reversed(self.kernels[:-1]):
            if size < kernel:
                break
            crop = (weight.shape[-1] - size) // 2
            centre = weight[:, :, crop:crop + size, crop:crop + size].reshape(channels, size * size)
            weight = F.linear(centre, self.matrices[f"to_{size}"]).view(channels, 1, size, size)
        return weight

    def forward(self, x: Tensor, kernel: int) -> Tensor:
        return self._convolve(x, self.filters(kernel, x.shape[1]))

    def mixture(self, x: Tensor, weights_K: Tensor) -> Tensor:
        """Depthwise convolution with the weighted sum of the zero-padded kernels. Either way of padding adds as much
        around a zero-padded kernel as it grew, so the centres stay where they are."""
        largest, m = self.kernels[-1], x.shape[1]
        total = torch.zeros_like(self.weight)
        for weight, kernel in zip(weights_K, self.kernels):
            total = total + weight * F.pad(self.filters(kernel, m), [(largest - kernel) // 2] * 4)
        return self._convolve(x, total)

    def _convolve(self, x: Tensor, filters: Tensor) -> Tensor:
        if self.stride == 1:
            return depthwise(x, filters)
        if self.same:
            return same_conv(x, filters, self.stride, groups=x.shape[1])
        return F.conv2d(x, filters, stride=self.stride, padding=filters.shape[-1] // 2, groups=x.shape[1])


class ElasticSE(nn.Module):
    """Squeeze and excitation; the 1x1 convolutions act on pooled values, so they run as matrix products."""

    def __init__(self, mids: Sequence[int], inners: Sequence[int]) -> None:
        super().__init__()
        self.inners = tuple(inners)
        self.reduce = nn.Conv2d(max(mids), max(inners), 1)
        self.expand = nn.Conv2d(max(inners), max(mids), 1)
        self.inner_masks_EI: Tensor
        self.register_buffer("inner_masks_EI", prefix_masks(inners), persistent=False)

    def forward(self, x: Tensor, inner: int) -> Tensor:
        return x * self._gate(x, inner, None)

    def mixture(self, x: Tensor, weights_E: Tensor) -> Tensor:
        return x * self._gate(x, self.inners[-1], weights_E @ self.inner_masks_EI.to(weights_E.dtype))

    def _gate(self, x: Tensor, inner: int, mask_I: Tensor | None) -> Tensor:
        m = x.shape[1]
        assert self.reduce.bias is not None and self.expand.bias is not None
        hidden = F.relu(F.linear(x.mean((2, 3)), self.reduce.weight[:inner, :m, 0, 0], self.reduce.bias[:inner]))
        if mask_I is not None:
            hidden = hidden * mask_I
        gate = F.linear(hidden, self.expand.weight[:m, :inner, 0, 0], self.expand.bias[:m])
        return F.hardsigmoid(gate)[:, :, None, None]


class ElasticMBConv(nn.Module):
    """Inverted residual layer: 1x1 expand, depthwise, [SE], 1x1 project, batch norm after each (specification 2.1).

    `mids` and `se_inners` hold the middle channels per expand ratio, ascending; no `se_inners`, no SE.
    """

    def __init__(self, in_channels: int, out_channels: int, mids: Sequence[int], kernels: Sequence[int], stride: int,
                 activation: str, se_inners: Sequence[int] | None, shortcut: bool, *, eps: float = 1e-5,
                 same: bool = False) -> None:
        super().__init__()
        self.mids, self.se_inners, self.shortcut = tuple(mids), se_inners, shortcut
        self.activation = ACTIVATION[activation]
        largest = self.mids[-1]
        self.expand = nn.Conv2d(in_channels, largest, 1, bias=False)
        self.expand_bn = BatchNorm(largest, eps)
        self.depthwise = ElasticDepthwise(largest, kernels, stride, same)
        self.depthwise_bn = BatchNorm(largest, eps)
        self.se = ElasticSE(mids, se_inners) if se_inners is not None else None
        self.project = nn.Conv2d(largest, out_channels, 1, bias=False)
        self.project_bn = BatchNorm(out_channels, eps)
        self.masks_EC: Tensor
        self.register_buffer("masks_EC", prefix_masks(mids), persistent=False)

    def forward(self, x: Tensor, kernel: int, expand: int) -> Tensor:
        """`kernel` is a size, `expand` an index into the ratios."""
        m = self.mids[expand]
        y = self.activation(batch_norm(self.expand_bn, F.conv2d(x, self.expand.weight[:m])))
        y = self.activation(batch_norm(self.depthwise_bn, self.depthwise(y, kernel)))
        if self.se is not None:
            y = self.se(y, self.se.inners[expand])
        y = batch_norm(self.project_bn, F.conv2d(y, self.project.weight[:, :m]))
        return x + y if self.shortcut else y

    def mixture(self, x: Tensor, weights_K: Tensor, weights_E: Tensor) -> Tensor:
        y = self.activation(batch_norm(self.expand_bn, self.expand(x)))
        y = self.activation(batch_norm(self.depthwise_bn, self.depthwise.mixture(y, weights_K)))
        mask_C = weights_E @ self.masks_EC.to(weights_E.dtype)
        y = y * mask_C[:, None, None]  # channels beyond the ratio reach neither SE nor project
        if self.se is not None:
            y = self.se.mixture(y, weights_E)
        y = batch_norm(self.project_bn, self.project(y))
        return x + y if self.shortcut else y

    @torch.no_grad()
    def sort_channels(self) -> None:
        """Middle channels by importance, the L1 norm of what project reads from them, descending; the same permutation
        everywhere. Then the inner channels of SE by the L1 norm of what its expand reads from them."""
        order = torch.argsort(self.project.weight.abs().sum((0, 2, 3)), descending=True, stable=True)
        _permute(self.project.weight, order, dim=1)
        for tensor in (self.expand.weight, self.depthwise.weight, *_norm_tensors(self.expand_bn),
                       *_norm_tensors(self.depthwise_bn)):
            _permute(tensor, order)
        if self.se is None:
            return
        assert self.se.reduce.bias is not None and self.se.expand.bias is not None
        _permute(self.se.reduce.weight, order, dim=1)
        _permute(self.se.expand.weight, order)
        _permute(self.se.expand.bias, order)
        inner = torch.argsort(self.se.expand.weight.abs().sum((0, 2, 3)), descending=True, stable=True)
        _permute(self.se.expand.weight, inner, dim=1)
        _permute(self.se.reduce.weight, inner)
        _permute(self.se.reduce.bias, inner)


def mixed_resolutions(logits_at: Callable[[Tensor], Tensor], images: Tensor, resolutions: Sequence[int],
                      weights_R: Tensor) -> Tensor:
    """Sum of the logits at every resolution by its weight; of a single one, which is no choice, as they are."""
    if len(resolutions) == 1:
        return logits_at(resize(images, resolutions[0]))
    logits = [weight * logits_at(resize(images, resolution)) for weight, resolution in zip(weights_R, resolutions)]
    return torch.stack(logits).sum(dim=0)


def extracted(supernet: nn.Module, graph: Graph) -> GraphNetwork:
    """The network of a graph with copies of its weights, in the mode of the supernet, whose tensors carry the graph's
    names."""
    shared = supernet.state_dict()
    inputs = {node.name: node.shape for node in graph.nodes}
    elastic = {name: module for name, module in supernet.named_modules() if isinstance(module, ElasticDepthwise)}
    weights = {}
    for node in graph.nodes[1:]:
        for suffix, shape in tensor_shapes(node, inputs[node.inputs[0]]).items():
            name = f"{node.name}.{suffix}"
            if node.name in elastic:
                weights[name] = elastic[node.name].filters(shape[-1], shape[0]).detach().clone()
            else:
                weights[name] = shared[name][tuple(slice(size) for size in shape)].clone()
    network = GraphNetwork(graph, weights).train(supernet.training)
    # Depthwise layers run about 1.5 times as fast; copies made with `.contiguous()` are plain again.
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _norm_tensors(norm: BatchNorm) -> tuple[Tensor, ...]:
    assert norm.running_mean is not None and norm.running_var is not None
    return norm.weight, norm.bias, norm.running_mean, norm.running_var


def _permute(tensor: Tensor, order: Tensor, dim: int = 0) -> None:
    tensor.copy_(tensor.index_select(dim, order))
