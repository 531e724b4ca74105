"""A `Graph` as a torch module, and exact batch-norm statistics for any module.

Tensor names are those of the graph: node `unit0.layer1.expand` owns the state-dict key `unit0.layer1.expand.weight`, so
weights move between supernet, stand-alone network and ONNX file by name. Batch norms keep no step counter.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from searchspaces.depthwise import depthwise
from searchspaces.graph import INPUT, Graph, Node, conv_pads, same_pads


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm2d without `num_batches_tracked`, whose state dict is exactly what a graph's node owns."""

    def __init__(self, channels: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(channels, eps=eps, affine=affine)
        self.num_batches_tracked = None

    def _load_from_state_dict(self, *args: Any) -> None:
        # BatchNorm2d would insert the missing counter and then call it unexpected; the plain rule is right here.
        nn.Module._load_from_state_dict(self, *args)


class _Conv(nn.Conv2d):
    def reset_parameters(self) -> None:
        """Nothing: `initialise` or a copy of trained weights fills the tensors, once."""

    def forward(self, x: Tensor) -> Tensor:
        if self._depthwise:
            return depthwise(x, self.weight)
        return super().forward(x)

    @property
    def _depthwise(self) -> bool:
        return (self.groups == self.in_channels == self.out_channels and self.bias is None and self.stride == (1, 1)
                and self.dilation == (1, 1) and self.padding == tuple(side // 2 for side in self.kernel_size))


class _PaddedConv(_Conv):
    """`pads`: zeros left, right, above and below, where those of a convolution of torch would not be equal."""

    def __init__(self, *args: Any, pads: Sequence[int]) -> None:
        super().__init__(*args)
        self.pads = tuple(pads)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.pads))


class _Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Nothing, as above."""


def initialise(module: nn.Module) -> None:
    """He initialisation (fan out) of convolutions, uniform 1/sqrt(fan in) of linear layers, zero biases (as OFA)."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, mode="fan_out")
        elif isinstance(child, nn.Linear):
            bound = child.in_features ** -0.5
            nn.init.uniform_(child.weight, -bound, bound)
        else:
            continue
        if child.bias is not None:
            nn.init.zeros_(child.bias)


def same_conv(x: Tensor, weight: Tensor, stride: int, groups: int = 1) -> Tensor:
    """A convolution with TensorFlow's "SAME" padding, which depends on the size of x."""
    (top, bottom), (left, right) = (same_pads(side, weight.shape[-1], stride) for side in x.shape[2:])
    if (top, left) == (bottom, right):
        return F.conv2d(x, weight, stride=stride, padding=(top, left), groups=groups)
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, stride=stride, groups=groups)


def _layer(node: Node, input_shape: tuple[int, ...]) -> nn.Module | None:
    """The module of a node that owns tensors, None for all others."""
    a, in_channels = node.attributes, input_shape[0]
    if node.op == "conv":
        top, left, bottom, right = conv_pads(node, input_shape)
        before = (in_channels, node.shape[0], int(a["kernel"]), int(a["stride"]))
        after = (int(a["dilation"]), int(a["groups"]), bool(a["bias"]))
        if (top, left) == (bottom, right):
            return _Conv(*before, (top, left), *after)
        return _PaddedConv(*before, 0, *after, pads=(left, right, top, bottom))
    if node.op == "batch_norm":
        return BatchNorm(in_channels, float(a["eps"]), bool(a["affine"]))
    if node.op == "linear":
        return _Linear(in_channels, node.shape[0], bool(a["bias"]))
    return None


def _avg_pool(node: Node, xs: Sequence[Tensor]) -> Tensor:
    kernel, stride, padding = (int(node.attributes[name]) for name in ("kernel", "stride", "padding"))
    return F.avg_pool2d(xs[0], kernel, stride, padding, count_include_pad=False)


def _max_pool(node: Node, xs: Sequence[Tensor]) -> Tensor:
    kernel, stride, padding = (int(node.attributes[name]) for name in ("kernel", "stride", "padding"))
    return F.max_pool2d(xs[0], kernel, stride, padding)


def _add(node: Node, xs: Sequence[Tensor]) -> Tensor:
    total = xs[0]
    for x in xs[1:]:
        total = total + x
    return total


# Nodes without tensors. Average pooling leaves padding out of the mean (DARTS, NAS-Bench-201; ONNX's default).
OPERATORS: dict[str, Callable[[Node, Sequence[Tensor]], Tensor]] = {
    "relu": lambda node, xs: F.relu(xs[0]),
    "relu6": lambda node, xs: F.relu6(xs[0]),
    "h_swish": lambda node, xs: F.hardswish(xs[0]),
    "sigmoid": lambda node, xs: torch.sigmoid(xs[0]),
    "h_sigmoid": lambda node, xs: F.hardsigmoid(xs[0]),
    "add": _add,
    "mul": lambda node, xs: xs[0] * xs[1],
    "concat": lambda node, xs: torch.cat(list(xs), dim=1),
    "shift": lambda node, xs: xs[0][:, :, 1:, 1:],
    "avg_pool": _avg_pool,
    "max_pool": _max_pool,
    "global_pool": lambda node, xs: F.adaptive_avg_pool2d(xs[0], 1),
    "flatten": lambda node, xs: torch.flatten(xs[0], 1),
    "zeros": lambda node, xs: xs[0].new_zeros((xs[0].shape[0], *node.shape)),
}


class _Scope(nn.Module):
    """One dotted part of a node name; holds the parts below it."""


class GraphNetwork(nn.Module):
    """Runs `graph`: images float[B, C, H, W] to logits float[B, classes]. State-dict keys are node name + suffix.

    `weights` are used as they are (not copied) and must be complete; without them the network is freshly initialised.
    """

    def __init__(self, graph: Graph, weights: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.graph = graph
        shapes = {node.name: node.shape for node in graph.nodes}
        self._layers: dict[str, nn.Module] = {}
        for node in graph.nodes[1:]:
            layer = _layer(node, shapes[node.inputs[0]])
            if layer is not None:
                self._layers[node.name] = layer
                self._attach(node.name, layer)
        last_use = {name: node.name for node in graph.nodes for name in node.inputs}
        self._free_after: dict[str, list[str]] = {}
        for name, user in last_use.items():
            self._free_after.setdefault(user, []).append(name)
        if weights is None:
            initialise(self)
        else:
            self.load_state_dict(weights, assign=True)

    def _attach(self, name: str, layer: nn.Module) -> None:
        # Straight into `_modules`, because add_module refuses names such as "half" and a node may be another's prefix.
        scope: nn.Module = self
        *path, leaf = name.split(".")
        for part in path:
            scope = scope._modules.setdefault(part, _Scope())  # type: ignore[assignment]
        previous = scope._modules.get(leaf)
        if previous is not None:
            layer._modules.update(previous._modules)
        scope._modules[leaf] = layer

    def forward(self, images: Tensor) -> Tensor:
        values = {INPUT: images}
        for node in self.graph.nodes[1:]:
            inputs = [values[name] for name in node.inputs]
            layer = self._layers.get(node.name)
            values[node.name] = layer(inputs[0]) if layer is not None else OPERATORS[node.op](node, inputs)
            for name in self._free_after.get(node.name, ()):
                del values[name]
        return values[self.graph.nodes[-1].name]


def resize(images: Tensor, resolution: int) -> Tensor:
    """Square images at another resolution (bilinear, antialiased); unchanged if they already have it."""
    if images.shape[-2:] == (resolution, resolution):
        return images
    return F.interpolate(images, size=(resolution, resolution), mode="bilinear", antialias=True)


def input_of(module: nn.Module, images: Tensor) -> Tensor:
    """The images at the resolution that a stand-alone network was built for; unchanged for other modules."""
    return resize(images, module.graph.input_shape[-1]) if isinstance(module, GraphNetwork) else images


def recalibrate_batch_norm(module: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replaces running statistics by the exact mean and variance over all batches together (specification 2.4).

    Every batch is normalised by its own statistics on the way, as in training; other layers (dropout) run in evaluation
    mode. A batch needs more than one value per channel. The training flags are restored.
    """
    norms = [child for child in module.modules() if isinstance(child, nn.BatchNorm2d)]
    training = {child: child.training for child in module.modules()}
    momentum = {norm: norm.momentum for norm in norms}
    sums: dict[nn.Module, tuple[float, Tensor | float, Tensor | float]] = dict.fromkeys(norms, (0.0, 0.0, 0.0))

    def accumulate(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
        n = output.numel() / output.shape[1]
        mean = norm.running_mean.double()
        second_moment = norm.running_var.double() * ((n - 1) / n) + mean ** 2  # running_var is the unbiased estimate
        total, first, second = sums[norm]
        sums[norm] = (total + n, first + n * mean, second + n * second_moment)

    hooks = [norm.register_forward_hook(accumulate) for norm in norms]
    try:
        module.eval()
        for norm in norms:
            norm.train()
            norm.momentum = 1.0  # running statistics are then exactly those of the last batch
        with torch.no_grad():
            for images in batches:
                module(input_of(module, images))
            _write_statistics(sums)
    finally:
        for hook in hooks:
            hook.remove()
        for norm in norms:
            norm.momentum = momentum[norm]
        for child, flag in training.items():
            child.training = flag


def _write_statistics(sums: dict[nn.Module, tuple[float, Tensor | float, Tensor | float]]) -> None:
    for norm, (total, first, second) in sums.items():
        if total:
            assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
            mean = torch.as_tensor(first) / total
            norm.running_mean.copy_(mean)
            norm.running_var.copy_((torch.as_tensor(second) / total - mean ** 2).clamp_(min=0.0))
