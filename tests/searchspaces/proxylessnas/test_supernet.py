"""Weights and mixtures of the ProxylessNAS space, shared and separate (specification 3.3)."""
from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from searchspaces.blocks import ElasticMBConv
from searchspaces.network import BatchNorm
from searchspaces.proxylessnas.skeleton import OPERATIONS
from searchspaces.proxylessnas.space import ProxylessNasS16
from searchspaces.proxylessnas.supernet import Layer, ProxylessNasSupernet
from searchspaces.space import Tokens

BOTH = pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])


def supernet_of(shared: bool) -> ProxylessNasSupernet:
    torch.manual_seed(0)
    supernet = ProxylessNasS16(shared=shared).make_supernet()
    assert isinstance(supernet, ProxylessNasSupernet)
    return supernet


def some_rows(supernet: ProxylessNasSupernet, n: int) -> Tokens:
    return supernet.space.sample_uniform(np.random.default_rng(1), n)


def onehots(supernet: ProxylessNasSupernet, row: Tokens) -> list[Tensor]:
    return [F.one_hot(torch.tensor(int(token)), len(choice.values)).float()
            for token, choice in zip(row, supernet.space.choices)]


@BOTH
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_onehot_mixture_is_the_architecture_and_has_gradients_everywhere(shared: bool, training: bool) -> None:
    """Also where every operation runs because its weight's gradient is asked for."""
    supernet = supernet_of(shared).train(training)
    images, row = torch.randn(4, 1, 16, 16), some_rows(supernet, 1)[0]
    mixture = [weights.requires_grad_() for weights in onehots(supernet, row)]
    supernet.set_active(row)
    expected = supernet(images)
    logits = supernet.forward_mixture(images, mixture)
    assert torch.allclose(logits, expected, atol=1e-4 * float(expected.detach().abs().max()))
    logits.square().sum().backward()
    assert all(weights.grad is not None and bool((weights.grad != 0).all()) for weights in mixture)


@BOTH
def test_a_layer_mixes_the_outputs_of_its_operations(shared: bool) -> None:
    supernet = supernet_of(shared).eval()
    layer = supernet.layer("layer2")
    x, weights_BV = torch.randn(3, 10, 8, 8), torch.randn(3, 7)
    outputs = [layer(x, operation) for operation in OPERATIONS]
    assert torch.equal(outputs[0], x)
    expected = torch.zeros_like(x)
    for index, output in enumerate(outputs):
        expected += weights_BV[:, index, None, None, None] * output
    assert torch.allclose(layer.mixture(x, weights_BV), expected, atol=1e-5)
    assert torch.allclose(layer.mixture(x, weights_BV[0])[0], expected[0], atol=1e-5)


def test_shared_operations_are_crops_and_leading_channels_of_one_layer() -> None:
    layer = supernet_of(shared=True).layer("layer2")
    blocks = [module for module in layer.modules() if isinstance(module, ElasticMBConv)]
    assert len(blocks) == 1 and blocks[0].mids == (30, 60)
    assert torch.equal(blocks[0].depthwise.filters(3, 30), blocks[0].depthwise.weight[:30, :, 2:5, 2:5])


def test_separate_operations_share_nothing() -> None:
    supernet = supernet_of(shared=False).train()
    layer = supernet.layer("layer0")  # cannot be skipped
    layer(torch.randn(2, 6, 16, 16), "5x5e3").sum().backward()
    touched = {name.split(".")[0] for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert touched == {"5x5e3"}
    assert [name for name, _ in layer.named_children()] == list(OPERATIONS[1:])


@BOTH
def test_every_batch_norm_has_the_eps_of_the_graph(shared: bool) -> None:
    supernet = supernet_of(shared)
    network = supernet.extract(some_rows(supernet, 1)[0])
    norms = [module for both in (supernet, network) for module in both.modules() if isinstance(module, BatchNorm)]
    assert {norm.eps for norm in norms} == {1e-3}


def test_operations_of_weight_zero_do_not_run() -> None:
    supernet = supernet_of(shared=True).eval()
    ran: list[str] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, str]) -> None:
        ran.append(inputs[1])

    for module in supernet.modules():
        if isinstance(module, Layer):
            module.register_forward_pre_hook(note)
    row = some_rows(supernet, 1)[0]
    supernet.forward_mixture(torch.randn(1, 1, 16, 16), onehots(supernet, row))
    assert ran == supernet.space.text(row).split()
