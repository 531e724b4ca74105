"""Depthwise convolutions with a weights' gradient of our own give what torch gives."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from searchspaces.depthwise import depthwise
from searchspaces.graph import INPUT, GraphBuilder
from searchspaces.network import GraphNetwork


@pytest.mark.parametrize("kernel", [3, 5, 7, 9])
@pytest.mark.parametrize("sides", [(8, 8), (9, 13), (4, 8)])
def test_output_and_gradients_are_torchs(kernel: int, sides: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(kernel)
    x = torch.randn(3, 20, *sides, generator=generator).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(20, 1, kernel, kernel, generator=generator, requires_grad=True)
    slope = torch.randn(3, 20, *sides, generator=generator)
    ours, theirs = depthwise(x, weight), F.conv2d(x, weight, padding=kernel // 2, groups=20)
    assert torch.equal(ours, theirs)
    assert ("_Depthwise" in type(ours.grad_fn).__name__) == (kernel > 3 and min(sides) >= 8)
    gradients = [torch.autograd.grad(output, (x, weight), slope) for output in (ours, theirs)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_network_trains_with_it() -> None:
    builder = GraphBuilder(16, 8)
    builder.begin_block("body", 0, "convolution")
    builder.linear(builder.flatten(builder.conv(INPUT, "depthwise", 16, 5, 1, groups=16), "flat"), "linear", 2)
    network = GraphNetwork(builder.build()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    seen = []
    network.get_submodule("depthwise").register_forward_hook(lambda module, inputs, output: seen.append(output.grad_fn))
    network(images).sum().backward()
    assert [type(node).__name__ for node in seen] == ["_DepthwiseBackward"]
    with torch.no_grad():
        network(images)
    assert seen[1] is None
