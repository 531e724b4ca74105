"""A once-for-all checkpoint with the names and shapes of the class OFAMobileNetV3, and what its subnets compute."""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Stem, first block, five units; before and after pooling.
CHANNELS = {0.25: (8, 8, 8, 16, 24, 32, 40, 240, 320), 1.0: (16, 16, 24, 40, 80, 112, 160, 960, 1280),
            1.2: (24, 24, 32, 48, 96, 136, 192, 1152, 1536)}
STRIDES, SE = (2, 2, 2, 1, 2), (False, True, False, True, True)
ACTIVATIONS = (F.relu, F.relu, F.hardswish, F.hardswish, F.hardswish)
EPS = 1e-5


def divisible(value: float) -> int:
    """A multiple of 8 near it, not below 90 %."""
    near = max(8, int(value + 4) // 8 * 8)
    return near if near >= 0.9 * value else near + 8


def checkpoint(width: float, classes: int = 1000, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors; statistics, biases and matrices are not at their defaults, so that none can be left out."""
    torch.manual_seed(seed)
    stem, first, *units, final, hidden = CHANNELS[width]
    state: dict[str, Tensor] = {}

    def conv(name: str, *shape: int) -> None:
        state[f"{name}.weight"] = torch.randn(shape) * (2 / torch.Size(shape[1:]).numel()) ** 0.5

    def norm(name: str, channels: int) -> None:
        state.update({f"{name}.weight": torch.rand(channels) + 0.5, f"{name}.bias": 0.1 * torch.randn(channels),
                      f"{name}.running_mean": 0.1 * torch.randn(channels),
                      f"{name}.running_var": torch.rand(channels) + 0.5,
                      f"{name}.num_batches_tracked": torch.tensor(7)})

    conv("first_conv.conv", stem, 3, 3, 3), norm("first_conv.bn", stem)
    conv("blocks.0.conv.depth_conv.conv", stem, 1, 3, 3), norm("blocks.0.conv.depth_conv.bn", stem)
    conv("blocks.0.conv.point_linear.conv", first, stem, 1, 1), norm("blocks.0.conv.point_linear.bn", first)
    before = first
    for number in range(1, 21):
        unit, block = (number - 1) // 4, f"blocks.{number}.conv"
        mid, after = divisible(6 * before), units[unit]
        conv(f"{block}.inverted_bottleneck.conv.conv", mid, before, 1, 1)
        norm(f"{block}.inverted_bottleneck.bn.bn", mid)
        state[f"{block}.depth_conv.conv.5to3_matrix"] = torch.eye(9) + 0.1 * torch.randn(9, 9)
        state[f"{block}.depth_conv.conv.7to5_matrix"] = torch.eye(25) + 0.1 * torch.randn(25, 25)
        conv(f"{block}.depth_conv.conv.conv", mid, 1, 7, 7), norm(f"{block}.depth_conv.bn.bn", mid)
        if SE[unit]:
            inner = divisible(mid // 4)
            for name, out, into in (("reduce", inner, mid), ("expand", mid, inner)):
                conv(f"{block}.depth_conv.se.fc.{name}", out, into, 1, 1)
                state[f"{block}.depth_conv.se.fc.{name}.bias"] = torch.randn(out)
        conv(f"{block}.point_linear.conv.conv", after, mid, 1, 1), norm(f"{block}.point_linear.bn.bn", after)
        before = after
    conv("final_expand_layer.conv", final, before, 1, 1), norm("final_expand_layer.bn", final)
    conv("feature_mix_layer.conv", hidden, final, 1, 1)
    conv("classifier.linear", classes, hidden)
    state["classifier.linear.bias"] = 0.1 * torch.randn(classes)
    return state


def logits(state: dict[str, Tensor], images: Tensor, depths: Sequence[int], kernels: Sequence[int],
           expands: Sequence[int]) -> Tensor:
    """Of the subnet with these depths of five units and kernels and expand ratios of twenty layers."""
    def norm(name: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (state[f"{name}.{part}"][:x.shape[1], None, None]
                                   for part in ("running_mean", "running_var", "weight", "bias"))
        return (x - mean) / (var + EPS).sqrt() * weight + bias

    x = F.hardswish(norm("first_conv.bn", F.conv2d(images, state["first_conv.conv.weight"], stride=2, padding=1)))
    block = "blocks.0.conv"
    y = F.conv2d(x, state[f"{block}.depth_conv.conv.weight"], padding=1, groups=x.shape[1])
    y = F.conv2d(F.relu(norm(f"{block}.depth_conv.bn", y)), state[f"{block}.point_linear.conv.weight"])
    x = x + norm(f"{block}.point_linear.bn", y)
    for number in range(1, 21):
        unit, index = divmod(number - 1, 4)
        if index >= depths[unit]:
            continue
        block, act, kernel = f"blocks.{number}.conv", ACTIVATIONS[unit], kernels[number - 1]
        mid, stride = divisible(expands[number - 1] * x.shape[1]), STRIDES[unit] if index == 0 else 1
        y = F.conv2d(x, state[f"{block}.inverted_bottleneck.conv.conv.weight"][:mid])
        y = act(norm(f"{block}.inverted_bottleneck.bn.bn", y))
        filters = state[f"{block}.depth_conv.conv.conv.weight"][:mid, 0]
        if kernel < 7:
            matrix = state[f"{block}.depth_conv.conv.7to5_matrix"]
            filters = torch.einsum("ij,mj->mi", matrix, filters[:, 1:6, 1:6].reshape(mid, 25)).reshape(mid, 5, 5)
        if kernel < 5:
            matrix = state[f"{block}.depth_conv.conv.5to3_matrix"]
            filters = torch.einsum("ij,mj->mi", matrix, filters[:, 1:4, 1:4].reshape(mid, 9)).reshape(mid, 3, 3)
        y = F.conv2d(y, filters[:, None], stride=stride, padding=kernel // 2, groups=mid)
        y = act(norm(f"{block}.depth_conv.bn.bn", y))
        if SE[unit]:
            inner, se = divisible(mid // 4), f"{block}.depth_conv.se.fc"
            gate = F.conv2d(y.mean((2, 3), keepdim=True), state[f"{se}.reduce.weight"][:inner, :mid],
                            state[f"{se}.reduce.bias"][:inner])
            gate = F.conv2d(F.relu(gate), state[f"{se}.expand.weight"][:mid, :inner], state[f"{se}.expand.bias"][:mid])
            y = y * F.relu6(gate + 3) / 6
        y = norm(f"{block}.point_linear.bn.bn", F.conv2d(y, state[f"{block}.point_linear.conv.conv.weight"][:, :mid]))
        x = x + y if stride == 1 and x.shape == y.shape else y
    x = F.hardswish(norm("final_expand_layer.bn", F.conv2d(x, state["final_expand_layer.conv.weight"])))
    x = F.hardswish(F.conv2d(x.mean((2, 3), keepdim=True), state["feature_mix_layer.conv.weight"]))
    return F.linear(x.flatten(1), state["classifier.linear.weight"], state["classifier.linear.bias"])
