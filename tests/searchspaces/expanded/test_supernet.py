"""Masks and depth mixtures of the expanded space against sums by hand, slices and extracted networks (nss 4, 14)."""
from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from searchspaces.expanded.space import Expanded, ExpandedS16
from searchspaces.expanded.supernet import ExpandedSupernet, ResidualBlock
from searchspaces.network import BatchNorm
from searchspaces.space import Tokens

SMALL = ExpandedS16()


def supernet_of(space: Expanded = SMALL) -> ExpandedSupernet:
    """Away from its initial values, so that a wrong slice or statistic cannot hide."""
    torch.manual_seed(0)
    supernet = space.make_supernet()
    assert isinstance(supernet, ExpandedSupernet)
    for module in supernet.modules():
        if isinstance(module, BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return supernet


def onehots(supernet: ExpandedSupernet, row: Tokens) -> list[Tensor]:
    return [F.one_hot(torch.tensor(int(token)), len(choice.values)).float()
            for token, choice in zip(row, supernet.space.choices)]


def test_the_full_size_has_the_specified_parameters() -> None:
    with torch.device("meta"):
        supernet = Expanded().make_supernet()
    params = sum(parameter.numel() for parameter in supernet.parameters())
    assert params == Expanded().cost(Expanded().extremes())[1][1]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_onehot_mixture_is_the_sliced_and_the_extracted_network(training: bool) -> None:
    """Also where the whole stage runs because the weights' gradient is asked for."""
    supernet = supernet_of().train(training)
    images, row = torch.randn(8, 1, 16, 16), SMALL.row((2, 1, 3), (9, 24, 5))
    state = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    network = supernet.extract(row)
    supernet.set_active(row)
    expected = supernet(images)
    bound = 1e-5 * float(expected.detach().abs().max())
    assert torch.allclose(network(images), expected, atol=bound)
    for needs_gradient in (False, True):
        supernet.load_state_dict(state)
        mixture = [weights.requires_grad_(needs_gradient) for weights in onehots(supernet, row)]
        logits = supernet.forward_mixture(images, mixture)
        assert torch.allclose(logits, expected, atol=bound)
        for name, tensor in network.state_dict().items():  # statistics move as the extracted network's do
            shared = supernet.state_dict()[name][tuple(slice(size) for size in tensor.shape)]
            assert torch.allclose(shared, tensor, atol=1e-5)
    logits.square().sum().backward()
    assert all(weights.grad is not None and bool((weights.grad != 0).all()) for weights in mixture)


def test_masks_and_depths_add_up_as_in_the_worked_example() -> None:
    """Two widths of weights .7 and .3 leave their common channels alone and the wider one's others at .3; a stage is
    .25 x1 + .75 x2."""
    supernet = supernet_of().eval()
    mixture = onehots(supernet, SMALL.row((1, 1, 1), (2, 1, 1)))
    mixture[2] = torch.tensor([0.0, 0.7, 0.0, 0.3, 0.0, 0.0, 0.0, 0.0])
    mixture[0] = torch.tensor([0.25, 0.75, 0.0, 0.0])
    mask = torch.tensor([1.0, 1.0, 0.3, 0.3]).reshape(1, 4, 1, 1)
    outputs: list[Tensor] = []
    hook = supernet.block(1, 0).register_forward_pre_hook(lambda module, inputs: outputs.append(inputs[0]))
    images = torch.randn(2, 1, 16, 16)
    supernet.forward_mixture(images, mixture)
    hook.remove()

    def normed(name: str, x: Tensor) -> Tensor:
        conv, norm = supernet.get_submodule(f"stage0.{name}"), supernet.get_submodule(f"stage0.{name}_bn")
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, BatchNorm)
        padded = F.pad(x, (0, 0, 0, 0, 0, conv.in_channels - x.shape[1]))  # all 32 channels, masked ones zero
        return norm(conv(padded))[:, :4]

    stem = F.relu(supernet.stem["conv_bn"](supernet.stem["conv"](images)))
    x1 = F.relu(normed("block0.conv2", F.relu(normed("block0.conv1", stem)) * mask)
                + normed("block0.shortcut", stem)) * mask
    x2 = F.relu(normed("block1.conv2", F.relu(normed("block1.conv1", x1)) * mask) + x1) * mask
    assert torch.allclose(outputs[0], 0.25 * x1 + 0.75 * x2, atol=1e-4)


def test_nothing_runs_deeper_or_wider_than_the_weights_ask() -> None:
    supernet = supernet_of().eval()
    ran: list[tuple[int, int]] = []

    def note(block: nn.Module, inputs: tuple[Tensor, int, Tensor]) -> None:
        ran.append((inputs[0].shape[1], inputs[1]))

    for module in supernet.modules():
        if isinstance(module, ResidualBlock):
            module.register_forward_pre_hook(note)
    mixture = onehots(supernet, SMALL.row((2, 1, 3), (9, 24, 5)))
    supernet.forward_mixture(torch.randn(1, 1, 16, 16), mixture)
    assert ran == [(8, 9), (9, 9), (9, 24), (24, 5), (5, 5), (5, 5)]
    ran.clear()
    mixture[1] = torch.tensor([0.5, 0.0, 0.5, 0.0])     # widths 1 and 17
    supernet.forward_mixture(torch.randn(1, 1, 16, 16), mixture)
    assert ran[:2] == [(8, 17), (17, 17)]


def test_a_mixture_per_image_mixes_every_image_on_its_own() -> None:
    supernet = supernet_of().eval()
    images = torch.randn(2, 1, 16, 16)
    rows = SMALL.sample_uniform(np.random.default_rng(1), 2)
    both = [torch.stack(pair) for pair in zip(*(onehots(supernet, row) for row in rows))]
    logits = supernet.forward_mixture(images, both)
    for index, row in enumerate(rows):
        supernet.set_active(row)
        assert torch.allclose(logits[index], supernet(images)[index], atol=1e-4)
