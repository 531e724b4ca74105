"""Shared weights and mixtures of the factorised cell (specifications the specification 5.4, unas.md 8)."""
from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from searchspaces.darts.mixture import duplicate_penalty, edge_weights, pair_weights
from searchspaces.darts.skeleton import AVG, OPERATIONS, SEP3, SEP7, SKIP
from searchspaces.darts.space import Darts
from searchspaces.darts.supernet import Cell, DartsSupernet, Edge, Value
from searchspaces.network import GraphNetwork
from searchspaces.space import Tokens

SPACE = Darts(cells=3, width=2, resolution=8)


@pytest.fixture(scope="module")
def trained() -> DartsSupernet:
    torch.manual_seed(0)
    supernet = SPACE.make_supernet()
    assert isinstance(supernet, DartsSupernet)
    with torch.no_grad():
        for _ in range(10):  # statistics of batch norms that are not the initial ones
            supernet.forward_mixture(torch.randn(8, 3, 8, 8), random_mixture())
    return supernet.eval()


@pytest.fixture
def supernet(trained: DartsSupernet) -> DartsSupernet:
    torch.manual_seed(1)
    return copy.deepcopy(trained)


def random_mixture(gradients: bool = False) -> list[Tensor]:
    return [torch.randn(len(choice.values)).softmax(0).requires_grad_(gradients) for choice in SPACE.choices]


def onehots(tokens_T: Tokens, gradients: bool = False) -> list[Tensor]:
    return [F.one_hot(torch.tensor(int(token)), len(choice.values)).float().requires_grad_(gradients)
            for token, choice in zip(tokens_T, SPACE.choices)]


def rows(n: int) -> Tokens:
    return SPACE.sample_uniform(np.random.default_rng(1), n)


def test_edge_weights_by_hand() -> None:
    mixture = onehots(rows(1)[0])
    mixture[4:8] = [torch.tensor([0.5, 0.2, 0.3]), torch.tensor([0.1, 0.9] + [0.0] * 5),
                    torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0, 0.0, 0.0])]
    weights = edge_weights(mixture)
    assert [tuple(w.shape) for w in weights] == [(2, 7), (3, 7), (4, 7), (5, 7)] * 2
    expected = [[0.05, 0.45, 0, 0, 0, 0, 0], [0.02, 0.18, 0, 0, 0, 0, 0], [0.03, 0.27 + 0.25, 0, 0.75, 0, 0, 0]]
    assert torch.allclose(weights[1], torch.tensor(expected))
    assert all(float(w.sum()) == pytest.approx(2) for w in weights)  # two pairs per node
    assert sum(product.numel() for both in pair_weights(mixture) for product in both) == 2 * 196


def test_duplicate_penalty_by_hand() -> None:
    uniform = [torch.full((len(choice.values),), 1 / len(choice.values)) for choice in SPACE.choices]
    assert float(duplicate_penalty(uniform)) == pytest.approx(2 * sum(1 / (7 * inputs) for inputs in (2, 3, 4, 5)))
    pairs = SPACE.by_pair(rows(1)).copy()
    pairs[0, 0, :, :, 0], pairs[0, 1, :, :, 0] = (0, 1), (0, 1)
    assert float(duplicate_penalty(onehots(pairs.reshape(-1)))) == 0  # other inputs everywhere
    pairs[0, 0, 2], pairs[0, 1, 3] = ((1, SEP3), (1, SEP3)), ((0, AVG), (0, AVG))
    pairs[0, 1, 0] = ((1, SEP3), (1, SEP7))
    assert float(duplicate_penalty(onehots(pairs.reshape(-1)))) == 2
    # <i (x) o, i' (x) o'> = <i, i'> <o, o'>, so its derivative for i is i' <o, o'>
    mixture = random_mixture(gradients=True)
    duplicate_penalty(mixture).backward()
    in_a, op_a, in_b, op_b = mixture[:4]
    assert in_a.grad is not None and torch.allclose(in_a.grad, in_b.detach() * float(op_a.detach() @ op_b.detach()))
    batch = [torch.stack([a, b]) for a, b in zip(onehots(pairs.reshape(-1)), uniform)]
    assert torch.allclose(duplicate_penalty(batch), torch.stack([torch.tensor(2.0), duplicate_penalty(uniform)]))


def test_supernet_hands_the_penalty_to_whoever_trains_it(supernet: DartsSupernet) -> None:
    mixture = random_mixture()
    assert float(supernet.mixture_penalty(mixture)) == float(duplicate_penalty(mixture)) > 0


def test_a_node_is_the_weighted_sum_of_all_its_operations(supernet: DartsSupernet) -> None:
    cell = supernet.get_submodule("cell1")  # a reduction cell
    assert isinstance(cell, Cell)
    mixture = random_mixture()
    weights = edge_weights(mixture)[4:]
    older, previous = torch.randn(2, 6, 8, 8), torch.randn(2, 8, 8, 8)
    terms = [[(m, k, z[m, k]) for m in range(len(z)) for k in range(7)] for z in weights]
    nodes = cell(older, previous, terms).split(4, dim=1)
    values = [cell.preprocess0(F.relu(older)), cell.preprocess1(F.relu(previous)), *nodes]
    for node, (z, value) in enumerate(zip(weights, nodes)):
        total = torch.zeros_like(value)
        for m in range(node + 2):
            edge = cell.get_submodule(f"node{node}.input{m}")
            assert isinstance(edge, Edge)
            total += sum(z[m, k] * edge(Value(values[m]), k) for k in range(7))
        assert torch.allclose(value, total, atol=1e-5)


def test_gradients_of_a_mixture_are_right_at_a_vertex(supernet: DartsSupernet) -> None:
    """Against differences in float64: also values of weight zero have a gradient, so none may be left out."""
    supernet.double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    mixture = [weights.detach().double().requires_grad_() for weights in onehots(rows(1)[0])]

    def loss() -> Tensor:
        return supernet.forward_mixture(images, mixture).square().sum()

    loss().backward()
    for position, weights in enumerate(mixture):
        assert weights.grad is not None and bool((weights.grad != 0).any())
        if position % 5:
            continue
        for value in range(len(weights)):
            ends = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    weights[value] += step
                    ends.append(float(loss()))
                    weights[value] -= step
            assert float(weights.grad[value]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-3, abs=1e-5)


def test_weights_of_zero_are_left_out_exactly(supernet: DartsSupernet) -> None:
    images, row = torch.randn(2, 3, 8, 8), rows(1)[0]
    ran: list[int] = []
    for module in supernet.modules():
        if isinstance(module, Edge):
            module.register_forward_hook(lambda edge, inputs, output: ran.append(inputs[1]))

    def run(mixture: list[Tensor]) -> tuple[Tensor, int]:
        ran.clear()
        return supernet.forward_mixture(images, mixture), len(ran)

    supernet.set_active(row)
    expected, active = supernet(images), len(ran)
    sparse, few = run(onehots(row))
    dense, every = run(onehots(row, gradients=True))
    assert few == active <= 3 * 8 and every == 3 * 7 * (2 + 3 + 4 + 5)
    assert torch.allclose(sparse, expected, atol=1e-5) and torch.allclose(dense, expected, atol=1e-5)
    with torch.no_grad():
        assert run(onehots(row, gradients=True))[1] == few  # nobody asks for a gradient


def test_one_mixture_per_image(supernet: DartsSupernet) -> None:
    images, some = torch.randn(3, 3, 8, 8), rows(3)
    separate = [onehots(row) for row in some[:2]] + [random_mixture()]
    together = [torch.stack(weights) for weights in zip(*separate)]
    logits = supernet.forward_mixture(images, together)
    for index, mixture in enumerate(separate):
        assert torch.allclose(logits[index], supernet.forward_mixture(images[index:index + 1], mixture)[0], atol=1e-5)


def test_coinciding_pairs_become_two_copies(supernet: DartsSupernet) -> None:
    pairs = SPACE.by_pair(rows(1)).copy()
    pairs[0, 0, 1] = ((1, SEP3), (1, SEP3))
    pairs[0, 1, 0] = ((0, SKIP), (0, SKIP))
    row = pairs.reshape(-1)
    network = supernet.extract(row)
    assert isinstance(network, GraphNetwork)
    state = network.state_dict()
    for role in ("node1.a.depthwise1.weight", "node1.a.bn2.running_var"):
        copies = [state[f"cell0.{name}"] for name in (role, role.replace(".a.", ".b."))]
        assert torch.equal(*copies) and copies[0].data_ptr() != copies[1].data_ptr()
        shared = role.replace(".a.", f".input1.{OPERATIONS[SEP3]}.")
        assert torch.equal(copies[0], supernet.state_dict()[f"cell0.{shared}"])
    images = torch.randn(4, 3, 8, 8)
    supernet.set_active(row)
    assert torch.allclose(network(images), supernet(images), atol=1e-5)
    assert sum(p.numel() for p in network.parameters()) == int(SPACE.cost(row[None])[1][0])


def test_no_affine_parameters_while_sharing(supernet: DartsSupernet) -> None:
    norms = {name: module for name, module in supernet.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert [name for name, norm in norms.items() if norm.affine] == ["stem.bn"]
    state = supernet.extract(rows(1)[0]).state_dict()
    assert all(bool((state[f"cell{i}.preprocess1.bn.weight"] == 1).all()) for i in range(3))
    assert all(not bool(state[f"cell{i}.preprocess1.bn.bias"].any()) for i in range(3))
