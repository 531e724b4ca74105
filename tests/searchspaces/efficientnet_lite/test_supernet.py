"""Weight sharing of the EfficientNet-Lite space: slices, mixtures, extraction, channel sorting."""
from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from searchspaces.efficientnet_lite.space import EfficientNetLite
from searchspaces.efficientnet_lite.supernet import EfficientNetLiteSupernet
from searchspaces.network import input_of
from searchspaces.space import Tokens

SPACE = EfficientNetLite(channels=1, width=0.25, resolution=[20, 32], stem_stride=1, classes=5)     # maps odd and even


@pytest.fixture
def supernet() -> EfficientNetLiteSupernet:
    """With every tensor away from its initial value, so that a wrong slice cannot hide."""
    torch.manual_seed(0)
    supernet = SPACE.make_supernet()
    assert isinstance(supernet, EfficientNetLiteSupernet)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in supernet.named_buffers():
            if "running" in name:
                buffer.add_(0.3 * torch.rand_like(buffer))
    return supernet


def onehots(row: Tokens) -> list[Tensor]:
    return [F.one_hot(torch.tensor(int(t)), len(c.values)).double() for t, c in zip(row, SPACE.choices)]


@pytest.mark.parametrize("training", [True, False])
def test_extraction_and_one_hot_mixture_equal_the_active_subnet(supernet: EfficientNetLiteSupernet,
                                                                training: bool) -> None:
    supernet.train(training).double()  # batch statistics amplify float32 rounding; in float64 equal means equal
    images = torch.randn(6, 1, 32, 32, dtype=torch.double)
    state = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    for row in np.concatenate([SPACE.extremes(), SPACE.sample_uniform(np.random.default_rng(0), 3)]):
        supernet.set_active(row)
        with torch.no_grad():
            active = supernet(images)
            supernet.load_state_dict(state)
            network = supernet.extract(row)
            extracted = network(input_of(network, images))
            mixed = supernet.forward_mixture(images, onehots(row))
            supernet.load_state_dict(state)
        assert torch.allclose(active, extracted, atol=1e-9)
        assert torch.allclose(active, mixed, atol=1e-9)


def test_mixture_gradients_agree_with_finite_differences(supernet: EfficientNetLiteSupernet) -> None:
    supernet.eval().double()
    torch.manual_seed(1)
    images = torch.randn(2, 1, 32, 32, dtype=torch.double)
    mixture = [torch.rand(size, dtype=torch.double).softmax(0).requires_grad_() for size in SPACE.vocabulary_sizes]
    supernet.forward_mixture(images, mixture).sin().sum().backward()
    step = 1e-6
    for position in (0, 1, 5, 29):  # depth, expand, kernel, resolution
        weight = mixture[position]
        assert weight.grad is not None
        ends = []
        for sign in (1, -1):
            moved = [w.detach().clone() for w in mixture]
            moved[position][0] += sign * step
            with torch.no_grad():
                ends.append(float(supernet.forward_mixture(images, moved).sin().sum()))
        assert float(weight.grad[0]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4, abs=1e-7)


def test_a_subnet_uses_the_leading_channels_and_the_centre(supernet: EfficientNetLiteSupernet) -> None:
    row = SPACE.extremes()[0]
    state, layer = supernet.extract(row).state_dict(), supernet.layer(1, 0)
    m = layer.mids[0]
    assert torch.equal(state["stage1.layer0.expand.weight"], layer.expand.weight[:m])
    assert torch.equal(state["stage1.layer0.depthwise_bn.running_var"], layer.depthwise_bn.running_var[:m])
    fresh = SPACE.make_supernet()
    assert isinstance(fresh, EfficientNetLiteSupernet)
    assert torch.equal(fresh.layer(1, 0).depthwise.filters(3, m), fresh.layer(1, 0).depthwise.weight[:m, :, 1:4, 1:4])
    assert not any("matrices" in name for name, _ in fresh.layer(0, 0).named_parameters())  # 3x3 only


def test_sorting_channels_keeps_the_largest_network(supernet: EfficientNetLiteSupernet) -> None:
    supernet.eval()
    images = torch.randn(4, 1, 32, 32)
    outputs = []
    for _ in range(2):
        for row in SPACE.extremes():
            supernet.set_active(row)
            outputs.append(supernet(images).detach())
        supernet.sort_channels()
    importance = supernet.layer(3, 1).project.weight.abs().sum((0, 2, 3))
    assert (importance[:-1] >= importance[1:] - 1e-6).all()
    assert torch.allclose(outputs[1], outputs[3], atol=1e-4)
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)
