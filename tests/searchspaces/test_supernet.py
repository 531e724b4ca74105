"""Weight sharing: slices, kernel transforms, mixtures, extraction, channel sorting (specification 2.4)."""
from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from searchspaces.mobilenetv3.space import MobileNetV3S16
from searchspaces.mobilenetv3.supernet import MobileNetV3Supernet
from searchspaces.network import input_of
from searchspaces.space import Tokens

SPACE = MobileNetV3S16(width=0.25, resolution=[10, 16], classes=5)


@pytest.fixture
def supernet() -> MobileNetV3Supernet:
    """With every tensor away from its initial value, so that a wrong slice cannot hide."""
    torch.manual_seed(0)
    supernet = SPACE.make_supernet()
    assert isinstance(supernet, MobileNetV3Supernet)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in supernet.named_buffers():
            if "running" in name:
                buffer.add_(0.3 * torch.rand_like(buffer))
    return supernet


def onehots(row: Tokens) -> list[Tensor]:
    return [F.one_hot(torch.tensor(int(t)), len(c.values)).double() for t, c in zip(row, SPACE.choices)]


def rows(n: int) -> Tokens:
    return np.concatenate([SPACE.extremes(), SPACE.sample_uniform(np.random.default_rng(0), n)])


@pytest.mark.parametrize("training", [True, False])
def test_extraction_and_one_hot_mixture_equal_the_active_subnet(supernet: MobileNetV3Supernet, training: bool) -> None:
    supernet.train(training).double()  # batch statistics amplify float32 rounding; in float64 equal means equal
    images = torch.randn(6, 1, 16, 16, dtype=torch.double)
    state = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    outputs = []
    for row in rows(6):
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
        outputs.append(active)
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in zip(outputs, outputs[1:]))


def test_extraction_copies(supernet: MobileNetV3Supernet) -> None:
    supernet.eval().set_active(SPACE.extremes()[1])
    images = torch.randn(2, 1, 16, 16)
    before = supernet(images).detach()
    for parameter in supernet.extract(SPACE.extremes()[1]).parameters():
        parameter.data.zero_()
    assert torch.equal(supernet(images), before)


def test_dead_tokens_have_no_influence(supernet: MobileNetV3Supernet) -> None:
    supernet.eval()
    shallow = SPACE.extremes()[0]
    other = np.where(SPACE.live_mask(shallow[None])[0], shallow, 2).astype(np.int8)
    images = torch.randn(2, 1, 16, 16)
    supernet.set_active(shallow)
    expected = supernet(images)
    supernet.set_active(other)
    assert torch.equal(supernet(images), expected)


def test_kernels_are_chained_transforms_of_centre_crops(supernet: MobileNetV3Supernet) -> None:
    """5x5 = centre of the 7x7 times a 25x25 matrix; 3x3 = centre of that 5x5 times a 9x9 matrix; 706 numbers."""
    depthwise = supernet.layer(0, 1).depthwise
    seven, to_5, to_3 = depthwise.weight[:8], depthwise.matrices["to_5"], depthwise.matrices["to_3"]
    five = torch.stack([(to_5 @ w[0, 1:6, 1:6].flatten()).view(1, 5, 5) for w in seven])
    three = torch.stack([(to_3 @ w[0, 1:4, 1:4].flatten()).view(1, 3, 3) for w in five])
    assert torch.allclose(depthwise.filters(7, 8), seven)
    assert torch.allclose(depthwise.filters(5, 8), five, atol=1e-6)
    assert torch.allclose(depthwise.filters(3, 8), three, atol=1e-6)
    assert sum(matrix.numel() for matrix in depthwise.matrices.values()) == 706
    fresh = SPACE.make_supernet().layer(0, 1).depthwise
    assert torch.equal(fresh.filters(3, 8), fresh.weight[:8, :, 2:5, 2:5])


def test_a_subnet_uses_the_leading_channels(supernet: MobileNetV3Supernet) -> None:
    row = SPACE.extremes()[0]
    network, layer = supernet.extract(row), supernet.layer(1, 0)
    state, m = network.state_dict(), layer.mids[0]
    assert torch.equal(state["unit1.layer0.expand.weight"], layer.expand.weight[:m])
    assert torch.equal(state["unit1.layer0.project.weight"], layer.project.weight[:, :m])
    assert torch.equal(state["unit1.layer0.depthwise_bn.running_var"], layer.depthwise_bn.running_var[:m])
    assert layer.se is not None
    assert torch.equal(state["unit1.layer0.se.reduce.weight"], layer.se.reduce.weight[:layer.se.inners[0], :m])


def test_training_a_subnet_leaves_the_rest_alone(supernet: MobileNetV3Supernet) -> None:
    supernet.train().set_active(SPACE.extremes()[0])
    state = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    supernet(torch.randn(4, 1, 16, 16)).square().sum().backward()
    layer, m = supernet.layer(2, 1), supernet.layer(2, 1).mids[0]
    assert layer.expand.weight.grad is not None
    assert layer.expand.weight.grad[:m].abs().sum() > 0 and layer.expand.weight.grad[m:].abs().sum() == 0
    assert supernet.layer(2, 2).expand.weight.grad is None  # beyond the depth
    name = "unit2.layer1.expand_bn.running_mean"
    moved = supernet.state_dict()[name] != state[name]
    assert moved[:m].all() and not moved[m:].any()


def test_mixture_gradients_agree_with_finite_differences(supernet: MobileNetV3Supernet) -> None:
    supernet.eval().double()
    torch.manual_seed(1)
    images = torch.randn(2, 1, 16, 16, dtype=torch.double)
    mixture = [torch.rand(size, dtype=torch.double).softmax(0).requires_grad_() for size in SPACE.vocabulary_sizes]
    supernet.forward_mixture(images, mixture).sin().sum().backward()
    step = 1e-6
    for position in (0, 1, 2, 8, 9, 20, 44, 45):  # depth, expand, kernel, ..., resolution
        weight = mixture[position]
        assert weight.grad is not None
        numeric = []
        for value in range(len(weight)):
            ends = []
            for sign in (1, -1):
                moved = [w.detach().clone() for w in mixture]
                moved[position][value] += sign * step
                with torch.no_grad():
                    ends.append(float(supernet.forward_mixture(images, moved).sin().sum()))
            numeric.append((ends[0] - ends[1]) / (2 * step))
        assert torch.allclose(weight.grad, torch.tensor(numeric, dtype=torch.double), rtol=1e-4, atol=1e-7)


def test_sorting_channels_keeps_the_largest_network(supernet: MobileNetV3Supernet) -> None:
    supernet.eval().set_active(SPACE.extremes()[1])
    images = torch.randn(4, 1, 16, 16)
    largest = supernet(images).detach()
    supernet.set_active(SPACE.extremes()[0])
    smallest = supernet(images).detach()
    importance = supernet.layer(3, 1).project.weight.abs().sum((0, 2, 3)).detach()
    supernet.sort_channels()
    sorted_importance = supernet.layer(3, 1).project.weight.abs().sum((0, 2, 3)).detach()
    assert torch.allclose(sorted_importance, importance.sort(descending=True).values)
    inner = supernet.layer(3, 1).se
    assert inner is not None
    inner_importance = inner.expand.weight.abs().sum((0, 2, 3))
    assert (inner_importance[:-1] >= inner_importance[1:] - 1e-6).all()
    assert not torch.allclose(supernet(images), smallest, atol=1e-3)
    supernet.set_active(SPACE.extremes()[1])
    assert torch.allclose(supernet(images), largest, atol=1e-5)
