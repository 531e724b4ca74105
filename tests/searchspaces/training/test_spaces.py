"""Distributions over spaces: worked numbers of the specification (nss 4, 5 and 14), enumeration, frequencies."""
from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from searchspaces.bins import BinGroup, group_of
from searchspaces.mobilenetv3.space import MobileNetV3S16
from searchspaces.nasbench201.space import NasBench201
from searchspaces.space import Choice, SearchSpace, Tokens
from searchspaces.training.spaces import (
    SpaceOfSpaces,
    deviation,
    exact_madds,
    full_probability,
    relaxed,
    sampled_mean,
    straight_through,
    temperature,
)
from tests.actors.tinyspace import TinySpace

CHOICES = (Choice("depth", "depth", (1, 2, 3, 4)), Choice("width0", "width", (4, 8, 16)),
           Choice("free", "free", (0, 1)), Choice("width1", "width", (4, 8, 16)))


class Four(TinySpace):
    """Tokens alone: a depth in two bins; in three, a width and one that they have in common; a position of no group."""

    @property
    def choices(self) -> tuple[Choice, ...]:
        return CHOICES

    def bin_groups(self) -> tuple[BinGroup, ...]:
        widths = (((0, 1, 2), (0, 1)), ((0, 1, 2), (1, 2)), ((0, 1, 2), (2,)))
        return group_of("depth", (0,), CHOICES), BinGroup("width", (3, 1), widths, ("a", "b", "c"))


SPACES = SpaceOfSpaces(Four())
WEIGHTS = [torch.tensor([0.7, 0.3], dtype=torch.float64), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)]
THETA = [torch.tensor([0.4, -0.3], dtype=torch.float64), torch.tensor([0.5, -0.6, 0.1], dtype=torch.float64)]


def onehots(bins: Sequence[int]) -> list[Tensor]:
    return [torch.eye(len(group), dtype=torch.float64)[b] for group, b in zip(SPACES.groups, bins)]


def standard_errors(rows: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return np.abs(rows.mean(axis=0) - expected) / (rows.std(axis=0) / np.sqrt(len(rows)) + 1e-12)


def members_of(spaces: SpaceOfSpaces, bins: Sequence[int]) -> list[tuple[int, ...]]:
    """Every row of one space, by brute force."""
    left: dict[int, tuple[int, ...]] = {}
    for group, b in zip(spaces.groups, bins):
        left |= dict(zip(group.positions, group.bins[b]))
    return list(itertools.product(*(left.get(position, tuple(range(len(choice.values))))
                                    for position, choice in enumerate(spaces.space.choices))))


def every_space(spaces: SpaceOfSpaces) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(len(group)) for group in spaces.groups)))


def enumerated_mean(spaces: SpaceOfSpaces, weights: Sequence[Tensor], costs: dict[tuple[int, ...], float]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for bins in every_space(spaces):
        chance = torch.stack([g[b] for g, b in zip(weights, bins)]).prod()
        total = total + chance * float(np.mean([costs[row] for row in members_of(spaces, bins)]))
    return total


# --- schedules --------------------------------------------------------------------------------------------------------


def test_temperature_of_the_paper() -> None:
    at = [temperature(epoch, 50, 5.0, 0.001) for epoch in (0, 15, 25, 49)]
    assert at == pytest.approx([5.0, 3.46969, 2.44949, 0.001], abs=5e-6)
    assert temperature(0, 1, 5.0, 0.001) == 5.0


def test_warm_up_starts_at_the_full_values_and_ends_without() -> None:
    assert [full_probability(step, 100) for step in (0, 25, 50, 100, 130)] == [1.0, 0.75, 0.5, 0.0, 0.0]
    assert full_probability(0, 0) == 0.0


# --- relaxed draws ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.001, 1.0, 5.0])
def test_the_heaviest_bin_is_drawn_as_often_as_the_distribution_says(tau: float) -> None:
    """The arg max of a Gumbel-softmax is a draw of the categorical at every temperature."""
    generator, n = torch.Generator().manual_seed(0), 4000
    counts = [np.zeros(len(logits)) for logits in THETA]
    for _ in range(n):
        for count, g in zip(counts, relaxed(THETA, tau, generator)):
            count[int(g.argmax())] += 1
    for count, logits in zip(counts, THETA):
        p = logits.softmax(0).numpy()
        assert (np.abs(count / n - p) < 4 * np.sqrt(p * (1 - p) / n)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cold_draws_are_one_hot_and_finite_with_finite_gradients(dtype: torch.dtype) -> None:
    theta = [torch.tensor([0.0, 30.0, -30.0], dtype=dtype, requires_grad=True), torch.zeros(64, dtype=dtype,
                                                                                           requires_grad=True)]
    for seed in range(50):
        drawn = relaxed(theta, 0.001, torch.Generator().manual_seed(seed))
        assert all(bool(torch.isfinite(g).all()) and abs(float(g.detach().sum()) - 1) < 1e-5 for g in drawn)
        assert int(drawn[0].argmax()) == 1 and float(drawn[0].detach().max()) > 0.999
        gradients = torch.autograd.grad(sum((g * g.detach()).sum() for g in drawn), theta)  # type: ignore[arg-type]
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    sharp = [float(relaxed(theta, 0.001, torch.Generator().manual_seed(seed))[1].detach().max()) for seed in range(50)]
    assert np.median(sharp) > 0.999


def test_warm_draws_are_even_and_equal_generators_draw_alike() -> None:
    one = relaxed(THETA, 1e4, torch.Generator().manual_seed(3))
    assert all(torch.allclose(g, torch.full_like(g, 1 / len(g)), atol=1e-3) for g in one)
    again = relaxed(THETA, 1e4, torch.Generator().manual_seed(3))
    assert all(torch.equal(*pair) for pair in zip(one, again))


def test_a_relaxed_draw_is_the_softmax_of_logits_and_gumbel_noise() -> None:
    u = torch.rand(2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = ((THETA[0] - torch.log(-torch.log(u))) / 0.7).softmax(0)
    assert torch.allclose(relaxed(THETA[:1], 0.7, torch.Generator().manual_seed(5))[0], expected)


def test_straight_through_has_the_value_of_the_draw_and_the_gradient_of_the_soft_one() -> None:
    theta = [logits.clone().requires_grad_() for logits in THETA]
    soft = relaxed(theta, 2.0, torch.Generator().manual_seed(1))
    hard = straight_through(soft)
    slopes = [torch.arange(1.0, len(g) + 1).double() for g in soft]
    for g, h in zip(soft, hard):
        assert torch.allclose(h.detach(), torch.eye(len(g), dtype=torch.float64)[int(g.argmax())])
    both = [torch.autograd.grad(sum((g * s).sum() for g, s in zip(weights, slopes)), theta,  # type: ignore[arg-type]
                                retain_graph=True) for weights in (soft, hard)]
    assert all(torch.allclose(a, b) for a, b in zip(*both)) and bool(both[0][1].abs().sum() > 0)


# --- members and mixtures ---------------------------------------------------------------------------------------------


def test_mixture_of_members_weighs_their_values() -> None:
    """Members of depth bins are 2 and 4 layers, weighing .7 and .3; the common position has one member for all bins,
    and where two bins draw the same value their weights add up."""
    members = [[[1], [3]], [[2, 0], [2, 1], [2, 1]]]
    mixture = SPACES.mixture(WEIGHTS, members, {2: 1})
    assert [weight.tolist() for weight in mixture] == [
        [0, 0.7, 0, 0.3], pytest.approx([0.2, 0.8, 0]), [0, 1], pytest.approx([0, 0, 1])]
    assert all(weight.dtype == torch.float64 for weight in mixture)


def test_mixture_carries_the_gradient_of_its_bins() -> None:
    weights = [g.clone().requires_grad_() for g in WEIGHTS]
    mixture = SPACES.mixture(weights, [[[1], [3]], [[2, 0], [2, 1], [2, 1]]], {2: 0})
    slope = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    gradients = torch.autograd.grad((mixture[1] * slope).sum() + 5 * mixture[0][3], weights)
    assert [gradient.tolist() for gradient in gradients] == [[0, 5], [1, 10, 10]]


def test_mixture_of_one_hot_weights_is_the_row() -> None:
    for space in (SPACES, SpaceOfSpaces(MobileNetV3S16()), SpaceOfSpaces(NasBench201())):
        for seed in range(20):
            rng = np.random.default_rng(seed)
            members, free = space.members(rng), space.free_tokens(rng)
            bins = [int(rng.integers(len(group))) for group in space.groups]
            mixture = space.mixture([torch.eye(len(group))[b] for group, b in zip(space.groups, bins)], members, free)
            row = space.row(bins, members, free)
            assert [weight.tolist() for weight in mixture] == [
                torch.eye(int(size))[int(token)].tolist() for size, token in zip(space.space.vocabulary_sizes, row)]
            assert row.dtype == np.int8 and (space is not SPACES or tuple(row) in set(members_of(space, bins)))


def test_members_are_uniform_in_their_bin_and_share_what_is_common() -> None:
    rng, n = np.random.default_rng(0), 3000
    drawn = [SPACES.members(rng) for _ in range(n)]
    assert all(len({of_bin[0] for of_bin in members[1]}) == 1 for members in drawn)
    for k, group in enumerate(SPACES.groups):
        for b in range(len(group)):
            for i, tokens in enumerate(group.bins[b]):
                values = np.array([members[k][b][i] for members in drawn])
                share = np.array([(values == token).mean() for token in tokens])
                p = 1 / len(tokens)
                assert share.sum() == pytest.approx(1) and (abs(share - p) <= 4 * np.sqrt(p * (1 - p) / n)).all()
    second = np.array([[members[1][0][1], members[1][1][1]] for members in drawn])
    assert (second[:, 0] != second[:, 1]).mean() == pytest.approx(0.75, abs=0.04)   # own draws: (0, 1) and (1, 2)


def test_samples_are_uniform_over_their_space() -> None:
    n = 1500
    for bins in every_space(SPACES):
        rows = SPACES.sample(np.random.default_rng(1), np.tile(np.array(bins), (n, 1)))
        found, counts = np.unique(rows, axis=0, return_counts=True)
        expected = members_of(SPACES, bins)
        assert rows.dtype == np.int8 and {tuple(row) for row in found.tolist()} == set(expected)
        p = 1 / len(expected)
        assert (np.abs(counts / n - p) < 4.5 * np.sqrt(p * (1 - p) / n)).all()


def test_every_sample_lies_in_its_own_bins() -> None:
    rng = np.random.default_rng(2)
    bins_MK = np.stack([rng.integers(len(group), size=300) for group in SPACES.groups], axis=1)
    inside = {bins: set(members_of(SPACES, bins)) for bins in every_space(SPACES)}
    rows = SPACES.sample(rng, bins_MK).tolist()
    assert all(tuple(row) in inside[tuple(bins)] for row, bins in zip(rows, bins_MK.tolist()))


def test_probabilities_are_those_of_enumeration() -> None:
    p = SPACES.probabilities(WEIGHTS)
    assert [float(of_one.sum()) for of_one in p] == pytest.approx([1, 1, 1, 1])
    expected = [np.zeros(len(choice.values)) for choice in CHOICES]
    for bins in every_space(SPACES):
        chance = float(np.prod([float(g[b]) for g, b in zip(WEIGHTS, bins)]))
        rows = members_of(SPACES, bins)
        for row in rows:
            for of_one, token in zip(expected, row):
                of_one[token] += chance / len(rows)
    assert all(np.allclose(of_one, right) for of_one, right in zip(p, expected))


def test_tokens_are_independent_where_a_bin_decides_on_one_position() -> None:
    assert SPACES.independent       # of the widths, one is left the same by every bin
    assert SpaceOfSpaces(NasBench201()).independent and not SpaceOfSpaces(MobileNetV3S16()).independent


# --- mean cost --------------------------------------------------------------------------------------------------------

ROWS = [tuple(row) for row in itertools.product(*(range(len(choice.values)) for choice in CHOICES))]
MS = {row: float(ms) for row, ms in zip(ROWS, np.random.default_rng(9).gamma(2.0, 3.0, size=len(ROWS)))}


def table_ms(rows_NT: Tokens) -> np.ndarray:
    """In no way additive."""
    return np.array([MS[tuple(row)] for row in rows_NT.tolist()])


@pytest.mark.parametrize("weights", [WEIGHTS, onehots((1, 0))], ids=["soft", "one-hot"])
def test_sampled_mean_and_its_gradient_are_unbiased(weights: list[Tensor]) -> None:
    """Against enumeration of all spaces and members, in value and in the derivative to every bin's weight."""
    weights = [g.clone().requires_grad_() for g in weights]
    exact = enumerated_mean(SPACES, weights, MS)
    expected = torch.cat(torch.autograd.grad(exact, weights)).numpy()
    values, gradients = [], []
    for seed in range(1500):
        mean = sampled_mean(SPACES, weights, table_ms, 3, np.random.default_rng([7, seed]))
        gradients.append(torch.cat(torch.autograd.grad(mean, weights)).numpy())
        values.append(float(mean.detach()))
    assert standard_errors(np.array(values), np.array(float(exact.detach()))) < 4
    assert (standard_errors(np.stack(gradients), expected) < 4).all()


def test_sampled_mean_of_a_constant_is_exact() -> None:
    mean = sampled_mean(SPACES, WEIGHTS, lambda rows: np.full(len(rows), 2.5), 1, np.random.default_rng(0))
    assert float(mean) == pytest.approx(2.5)


class Additive(NasBench201):
    """Knows the mean of its multiply-adds in closed form: a sum over edges."""

    def mean_madds(self, probabilities: Sequence[Tensor]) -> Tensor:
        fixed, one, three = (int(value) for value in self._cost_terms[0])
        return fixed + sum((one * p[2] + three * p[3] for p in probabilities), start=torch.zeros(()).double())


def test_sampled_mean_meets_the_closed_form_of_an_additive_cost() -> None:
    space = Additive(width=4, cells=1, resolution=8)
    spaces = SpaceOfSpaces(space)
    theta = [torch.tensor([0.3 * k, -0.2 * k], dtype=torch.float64, requires_grad=True) for k in range(6)]
    weights = [logits.softmax(0) for logits in theta]
    exact = exact_madds(spaces, weights)
    assert exact is not None
    by_hand = [np.mean([space.cost(np.array([[t] * 6], dtype=np.int8))[0] for t in tokens]) for tokens in
               ((0, 1), (2, 3, 4))]
    ends = [exact_madds(spaces, [torch.eye(2, dtype=torch.float64)[b]] * 6) for b in (0, 1)]
    assert [float(end) for end in ends if end is not None] == pytest.approx(by_hand)
    expected = torch.cat(torch.autograd.grad(exact, theta, retain_graph=True)).numpy()
    values, gradients = [], []
    for seed in range(300):
        mean = sampled_mean(spaces, weights, lambda rows: space.cost(rows)[0].astype(float), 4,
                            np.random.default_rng([1, seed]))
        gradients.append(torch.cat(torch.autograd.grad(mean, theta, retain_graph=True)).numpy())
        values.append(float(mean.detach()))
    assert standard_errors(np.array(values), np.array(float(exact.detach()))) < 4
    assert (standard_errors(np.stack(gradients), expected) < 4).all()


def test_without_a_closed_form_there_is_none() -> None:
    class Coupled(Additive):
        def bin_groups(self) -> tuple[BinGroup, ...]:
            return (group_of("pair", (0, 1), self.choices),)    # equal bins on two edges: not independent

    coupled: SearchSpace = Coupled()
    for space in (NasBench201(), coupled):
        spaces = SpaceOfSpaces(space)
        assert exact_madds(spaces, [torch.full((len(group),), 0.5) for group in spaces.groups]) is None


def test_deviation_of_the_paper() -> None:
    """571 and 658 MF for 600 (specification 14); a hinge asks nothing of what is cheaper."""
    means = [torch.tensor(mean, dtype=torch.float64, requires_grad=True) for mean in (571.0, 658.0)]
    for hinge, expected in ((False, [0.0483333, 0.0966667]), (True, [0.0, 0.0966667])):
        found = [float(deviation(mean, 600, hinge).detach()) for mean in means]
        assert found == pytest.approx(expected, abs=5e-8)
    slopes = [float(torch.autograd.grad(deviation(mean, 600, hinge), mean)[0]) for hinge in (False, True)
              for mean in means]
    assert slopes == pytest.approx([-1 / 600, 1 / 600, 0, 1 / 600])
