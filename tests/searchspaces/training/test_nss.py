"""NSS' training: who learns from what, the gradient of theta by differences, and that spaces come to cost what they
should."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from searchspaces.errors import ConfigError, EvaluationError, StoreError
from searchspaces.mobilenetv3.space import MobileNetV3S16
from searchspaces.space import Tokens
from searchspaces.training.nss import NssSettings, NssTraining, SpaceAim, madds_of, warm_up_epochs
from searchspaces.training.spaces import SpaceOfSpaces
from searchspaces.training.training import Batch, Schedule
from searchspaces.training.weights import WeightSettings
from tests.actors.tinyspace import TinySpace, TinyWithMean

FROZEN = WeightSettings(lr=1e-30, weight_decay=0.0)
THETA = (torch.tensor([0.3, -0.4], dtype=torch.float64), torch.tensor([0.5, -0.1], dtype=torch.float64))


SPACE = TinyWithMean(classes=3, norm=False)
MADDS = madds_of(SPACE)(SPACE.extremes())


def images(n: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.arange(n) % 3


TRAIN, HELD_OUT = images(12, 0), images(12, 1)


def started(schedule: Schedule | None = None, space: TinySpace = SPACE, theta: Sequence[Tensor] = THETA,
            **options: Any) -> NssTraining:
    """With the same weights whatever the seed, every aim at `theta`."""
    defaults: dict[str, Any] = {"aims": (SpaceAim(float(MADDS.mean())),), "weights": FROZEN, "warm_up": 0.0,
                                "learning_rate": 1e-30, "weight_decay": 0.0}
    torch.manual_seed(7)
    training = NssSettings(**(defaults | options)).start(space.make_supernet(), schedule or Schedule(1, 1, 0))
    with torch.no_grad():
        for of_aim in training.theta:
            for logits, start in zip(of_aim, theta):
                logits.copy_(start)
    return training


def thetas(training: NssTraining, aim: int = 0) -> Tensor:
    return torch.cat([logits.detach() for logits in training.theta[aim]]).clone()


def weights_of(training: NssTraining) -> Tensor:
    return torch.cat([p.detach().flatten() for p in training.supernet.parameters()]).clone()


def slow_wide(rows_NT: Tokens) -> np.ndarray:
    return 1.0 + rows_NT[:, 0]


def slow_slim(rows_NT: Tokens) -> np.ndarray:
    return 3.0 - rows_NT[:, 0]


# --- warm-up ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [True, False])
def test_warm_up_trains_the_largest_values_less_and_less(full: bool) -> None:
    """P(largest) = p + (1 - p) q, q by a uniform bin and member; the coins of the groups are independent."""
    training, n = started(Schedule(2, 4000, 0), warm_up=0.5, full=full), 1000
    for quarter in range(4):
        rows = np.stack([training.warm_up_row(quarter * n + step) for step in range(n)])
        p = 0.875 - 0.25 * quarter if full else 0.0
        width, kernel = (p + (1 - p) * q for q in (1 / 4, 1 / 2))     # 16 is one of two values of one of two bins
        for found, expected in ((rows[:, 0] == 2, width), (rows[:, 1] == 1, kernel),
                                ((rows == [2, 1]).all(axis=1), width * kernel)):
            assert abs(found.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / n) + 0.25 * p / 4


def test_warm_up_trains_the_weights_and_leaves_theta_alone() -> None:
    training = started(Schedule(4, 3, 0), warm_up=0.5, learning_rate=0.5, weights=WeightSettings())
    for epoch in range(4):
        before = weights_of(training)
        for _ in range(3):
            numbers = training.step(TRAIN, HELD_OUT)
        assert torch.equal(thetas(training), torch.cat(THETA)) == (epoch < 2)
        assert not torch.equal(before, weights_of(training))
        assert (numbers["validation_loss"] == numbers["cost_loss"] == 0) == (epoch < 2) and numbers["loss"] > 0
    counts = training.update_counts()
    assert set(counts) == {"width", "kernel"} and sum(counts["kernel"]) == 12


def test_one_epoch_is_left_for_the_distribution() -> None:
    assert [warm_up_epochs(0.3, epochs) for epochs in (50, 10, 2, 1)] == [15, 3, 1, 0]
    assert warm_up_epochs(0.99, 10) == 9


# --- who learns from what ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hard", [False, True])
def test_theta_learns_from_held_out_images_and_weights_from_the_others(hard: bool) -> None:
    def after(train: Batch, held_out: Batch) -> tuple[Tensor, Tensor]:
        training = started(weights=WeightSettings(), hard=hard, cost_weight=0.0)    # theta moves by nothing visible
        training.step(train, held_out)
        gradients = torch.cat([logits.grad for logits in training.theta[0] if logits.grad is not None])
        return weights_of(training), gradients

    (weights, theta), (other_weights, same_theta), (same_weights, other_theta) = (
        after(TRAIN, HELD_OUT), after(images(12, 5), HELD_OUT), after(TRAIN, images(12, 5)))
    assert torch.equal(weights, same_weights) and not torch.equal(weights, other_weights)
    assert torch.equal(theta, same_theta) and not torch.equal(theta, other_theta)


@pytest.mark.parametrize("step", range(3))
def test_gradient_of_theta_is_that_of_loss_and_cost(step: int) -> None:
    """Soft draws, the noise of the step fixed: against differences of what the step says it lost."""
    options: dict[str, Any] = {"cost_weight": 0.7, "task_weight": 1.3, "schedule": Schedule(1, 3, 0),
                               "aims": (SpaceAim(0.4 * float(MADDS[1])),)}

    def lost(theta: Sequence[Tensor]) -> tuple[float, NssTraining]:
        training = started(theta=theta, **options)
        training.steps_done = step
        numbers = training.step(TRAIN, HELD_OUT)
        return 0.7 * numbers["cost_loss"] + 1.3 * numbers["validation_loss"], training

    found = [logits.grad for logits in lost(THETA)[1].theta[0]]
    for k, start in enumerate(THETA):
        for b in range(len(start)):
            shift = [torch.zeros_like(logits) for logits in THETA]
            shift[k][b] = 0.05
            above, below = (lost([logits + sign * by for logits, by in zip(THETA, shift)])[0] for sign in (1, -1))
            gradient = found[k]
            assert gradient is not None and float(gradient[b]) == pytest.approx((above - below) / 0.1, abs=2e-4)
    assert any(float(gradient.abs().max()) > 5e-3 for gradient in found if gradient is not None)


def test_cost_loss_is_the_deviation_of_the_drawn_space() -> None:
    """A kernel of 1 takes 1 ms, one of 3 takes 3 ms whatever else; a hinge asks nothing of a space that is cheap
    enough. The other aims' models are not asked."""
    asked: list[Tokens] = []

    def by_kernel(rows_NT: Tokens) -> np.ndarray:
        asked.append(rows_NT)
        return 1.0 + 2 * rows_NT[:, 1]

    models = {"given": by_kernel, "other": lambda rows_NT: np.full(len(rows_NT), np.nan)}
    for dear, target, hinge, expected in ((True, 2.0, False, 0.5), (False, 2.0, False, 0.5), (False, 2.0, True, 0.0),
                                          (True, 2.0, True, 0.5), (True, 2.4, False, 0.25)):
        sure = torch.tensor([-90.0, 90.0] if dear else [90.0, -90.0], dtype=torch.float64)
        training = started(theta=(THETA[0], sure), aims=(SpaceAim(target, "given"),), latency=models, hinge=hinge,
                           samples=5)
        asked.clear()
        assert training.step(TRAIN, HELD_OUT)["cost_loss"] == pytest.approx(expected)
        (rows,) = asked
        assert len(rows) == 5 * 4       # four bins in all
        assert np.array_equal(SPACE.canonical(SPACE.check_tokens(rows)), rows)


def test_draws_harden_over_the_epochs_and_are_hard_at_once_where_asked() -> None:
    schedule = Schedule(10, 1, 0)
    soft, hard = started(schedule), started(schedule, hard=True)
    for training, first in ((soft, False), (hard, True)):
        for epoch, whole in ((0, first), (9, True)):
            training.steps_done = epoch
            for purpose in ("architecture", "weights"):
                largest = [float(g.detach().max()) for g in training._draw(0, purpose)]
                assert all((value > 0.999) == whole for value in largest)
    soft.steps_done = 0
    one, other = soft._draw(0, "architecture"), soft._draw(0, "weights")
    assert not torch.equal(one[0], other[0])        # a fresh draw for the weights


def test_aims_take_turns_and_their_own_models_pull_them_apart() -> None:
    training = started(Schedule(1, 60, 0), space=SPACE, theta=[torch.zeros(2).double()] * 2, learning_rate=0.1,
                       task_weight=0.0, first_temperature=1.0, last_temperature=1.0,
                       aims=(SpaceAim(0.1, "wide"), SpaceAim(0.1, "slim")),
                       latency={"wide": slow_wide, "slim": slow_slim})
    for step in range(60):
        before = [thetas(training, aim) for aim in range(2)]
        training.step(TRAIN, HELD_OUT)
        moved = [not torch.equal(old, thetas(training, aim)) for aim, old in enumerate(before)]
        assert moved == [step % 2 == 0, step % 2 == 1]
    p = {name: np.exp(logits) / np.exp(logits).sum() for name, logits in training.distribution().items()}
    assert set(p) == {"0.0", "0.1", "1.0", "1.1"}
    assert p["0.0"][0] > 0.8 and p["1.0"][1] > 0.8      # slim widths for the one, wide ones for the other


def test_a_group_that_costs_nothing_gets_no_gradient() -> None:
    class WidthAlone(TinyWithMean):
        def mean_madds(self, probabilities: Sequence[Tensor]) -> Tensor:
            return probabilities[0] @ torch.tensor([1.0, 2.0, 3.0]).double()

    training = started(space=WidthAlone(classes=3, norm=False), task_weight=0.0, learning_rate=0.1,
                       aims=(SpaceAim(1.0),))
    training.step(TRAIN, HELD_OUT)
    assert not torch.equal(training.theta[0][0].detach(), THETA[0])
    assert torch.equal(training.theta[0][1].detach(), THETA[1])


# --- it finds what it should ------------------------------------------------------------------------------------------


def test_spaces_come_to_cost_what_they_should() -> None:
    """Of 2^15 spaces few lie within 10 % of a target at either end; of those that the distribution draws most do, and
    of five one does. Cost alone, so the supernet need not run."""
    space = MobileNetV3S16(classes=3)
    cost, rng = madds_of(space), np.random.default_rng(0)
    spaces = SpaceOfSpaces(space)

    def means(bins_MK: np.ndarray) -> np.ndarray:
        return np.array([cost(space.canonical(spaces.sample(rng, np.tile(bins_K, (100, 1))))).mean()
                         for bins_K in bins_MK])

    uniform = means(np.stack([rng.integers(len(group), size=150) for group in spaces.groups], axis=1))
    targets = [float(target) for target in (0.75 * np.median(uniform), 1.35 * np.median(uniform))]
    schedule = Schedule(20, 20, 0)
    torch.manual_seed(0)
    training = NssSettings(tuple(SpaceAim(target) for target in targets), task_weight=0.0, warm_up=0.0,
                           ).start(space.make_supernet(), schedule)
    for step in range(schedule.steps):
        training.steps_done = step
        training._space_step(step % 2, HELD_OUT)
    for target, theta in zip(targets, training.theta):
        p = [logits.detach().softmax(0).numpy() for logits in theta]
        drawn = means(np.stack([rng.choice(len(of_one), size=50, p=of_one) for of_one in p], axis=1))
        near = np.abs(drawn / target - 1) < 0.1
        assert np.mean(np.abs(uniform / target - 1) < 0.1) < 0.1 and near.mean() > 0.5 and near[:5].any()


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm_up", [0.0, 0.5])
def test_a_step_means_the_same_on_any_number_of_ranks(warm_up: float) -> None:
    """Each rank sees its part of the batches; the mean of their gradients, theta's and the weights', is the single
    process'."""
    seen: list[list[Tensor]] = []
    for rank, ranks in ((0, 1), (0, 2), (1, 2)):
        training = started(Schedule(2, 1, 0, rank, ranks), warm_up=warm_up, aims=(SpaceAim(2.0, "wide"),),
                           latency={"wide": slow_wide})
        grads: list[Tensor] = []

        def record(parameters: Iterable[nn.Parameter], grads: list[Tensor] = grads) -> None:
            grads += [p.grad.clone().double() for p in parameters if p.grad is not None]

        training.reduce_gradients = record
        cut = slice(rank * 12 // ranks, (rank + 1) * 12 // ranks)
        training.step((TRAIN[0][cut], TRAIN[1][cut]), (HELD_OUT[0][cut], HELD_OUT[1][cut]))
        seen.append(grads)
    assert len(seen[0]) == (3 if warm_up else 5)        # the convolution, the linear layer's two; two groups
    means = [torch.stack(pair).mean(0) for pair in zip(seen[1], seen[2], strict=True)]
    assert all(torch.allclose(one, mean, atol=1e-6) for one, mean in zip(seen[0], means, strict=True))


def test_theta_steps_with_the_reduced_gradient() -> None:
    def turned(parameters: Iterable[nn.Parameter]) -> None:
        for p in parameters:
            assert p.grad is not None
            p.grad = -p.grad

    plain, reduced = (started(learning_rate=0.1) for _ in range(2))
    reduced.reduce_gradients = turned
    for training in (plain, reduced):
        training.step(TRAIN, HELD_OUT)
    there, back = (thetas(training) - torch.cat(THETA) for training in (plain, reduced))
    assert float(there.abs().max()) > 0.05 and torch.allclose(there, -back)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "words"), [
    ({"aims": ()}, "number of aims of nss is 0; give at least one"), ({"aims": (SpaceAim(0.0),)}, "target.*above 0"),
    ({"cost_weight": -0.1}, "cost_weight of nss is -0.1.*at least 0"), ({"task_weight": -1.0}, "task_weight.*at least"),
    ({"learning_rate": 0.0}, "learning_rate.*above 0"), ({"last_temperature": 0.0}, "last_temperature.*above 0"),
    ({"last_temperature": 6.0}, "at most first_temperature, 5"), ({"warm_up": 1.0}, "warm_up.*share of the epochs"),
    ({"samples": 0}, "samples.*at least 1"), ({"held_out_share": 1.0}, "held_out_share.*between 0 and 1")])
def test_impossible_settings_name_what_is_allowed(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(NssSettings((SpaceAim(1.0),)), **options)


def test_divergence_names_step_and_setting() -> None:
    broken = HELD_OUT[0] * float("nan"), HELD_OUT[1]
    with pytest.raises(EvaluationError, match="space distribution are not finite at step 0; lower controller"):
        started().step(TRAIN, broken)
    with pytest.raises(EvaluationError, match="diverged at step 0.*learning rate"):
        started().step(broken, HELD_OUT)
    with pytest.raises(EvaluationError, match="not finite at step 0"):
        started(aims=(SpaceAim(1.0, "cpu"),), latency={"cpu": lambda rows: np.full(len(rows), np.nan)},
                task_weight=0.0).step(TRAIN, HELD_OUT)


def test_a_state_of_other_aims_is_refused() -> None:
    one, two = started(), started(aims=(SpaceAim(2e3), SpaceAim(3e3)))
    for training, state in ((one, two.state_dict()), (two, one.state_dict())):
        with pytest.raises(StoreError, match="another number of aims.*options it was trained with"):
            training.load_state_dict(state)


# --- members of a space -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [1, 4, 8])
def test_a_space_is_judged_by_the_lower_quartile_of_its_members(members: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of the losses that is, and that its gradient and no other's moves theta."""
    training = started(members=members, learning_rate=0.1, cost_weight=0.0)
    supernet, seen = training.supernet, []

    def recording(images: Tensor, mixture: Sequence[Tensor], run: Any = supernet.forward_mixture) -> Tensor:
        logits = run(images, mixture)
        seen.append((float(torch.nn.functional.cross_entropy(logits, HELD_OUT[1]).detach()), logits.requires_grad))
        return logits

    monkeypatch.setattr(supernet, "forward_mixture", recording)
    found = training.step(TRAIN, HELD_OUT)["validation_loss"]
    losses = [loss for loss, _ in seen[:members]]
    assert len(set(losses)) >= min(members, 3) and found == pytest.approx(sorted(losses)[max(members // 4, 1) - 1])
    assert [learns for _, learns in seen] == ([True, True] if members == 1 else [False] * members + [True, True])
    assert (thetas(training) - torch.cat(THETA)).abs().max() > 0.05
