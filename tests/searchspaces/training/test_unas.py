"""UNAS' training: its gradient against enumeration, latency in the loop, parts and ranks, and that it finds optima."""
from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from searchspaces.errors import ConfigError, EvaluationError
from searchspaces.training.latencyterm import Aim, LatencySettings, spread
from searchspaces.training.training import Batch, Schedule
from searchspaces.training.unas import UnasSettings, UnasTraining
from searchspaces.training.weights import WeightSettings
from tests.actors.tinyspace import KERNELS, WIDTHS, TinySpace

SPACE = TinySpace(classes=3, norm=False)
FROZEN = WeightSettings(lr=1e-30, weight_decay=0.0)
ROWS = np.array(list(itertools.product(range(len(WIDTHS)), range(len(KERNELS)))), dtype=np.int8)
MS = np.array([3.0, 1.5, 2.0, 4.5, 1.0, 2.5])       # of ROWS, in no way additive
LOGITS = (torch.tensor([0.3, -0.4, 0.2], dtype=torch.float64), torch.tensor([0.5, -0.1], dtype=torch.float64))


def images(n: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.arange(n) % 3


TRAIN, HELD_OUT = images(12, 0), images(12, 1)


def table_ms(rows_NT: np.ndarray) -> np.ndarray:
    return MS[[int(np.flatnonzero((row == ROWS).all(axis=1))[0]) for row in rows_NT]]


def started(epochs: int = 1, steps: int = 1, seed: int = 0, rank: int = 0, ranks: int = 1,
            **options: Any) -> UnasTraining:
    """With the same weights whatever the seed, at LOGITS."""
    settings = UnasSettings(**({"aims": (Aim("cpu", 2.0),), "weights": FROZEN, "learning_rate": 1e-30, "warm_up": 0.0}
                               | options))
    torch.manual_seed(7)
    training = settings.start(SPACE.make_supernet(), Schedule(epochs, steps, seed, rank, ranks))
    with torch.no_grad():
        for phi in training.phi:
            for logits, start in zip(phi, LOGITS):
                logits.copy_(start)
    return training


def gradients(training: UnasTraining, steps: int, train: Batch = TRAIN, held_out: Batch = HELD_OUT) -> np.ndarray:
    """float64[steps, 5]: of phi, each step's."""
    found: list[np.ndarray] = []

    def record(parameters: Iterable[nn.Parameter]) -> None:
        grads = [p.grad for p in parameters]
        if grads[0].dtype == torch.float64:        # phi's, not the weights'
            found.append(torch.cat(grads).numpy().copy())

    training.reduce_gradients = record
    wishes = training.begin_epoch()
    training.give({label: table_ms(rows) for label, rows in wishes.items()})
    for _ in range(steps):
        training.step(train, held_out)
    return np.stack(found)


def enumerated(objective_N: Tensor) -> np.ndarray:
    """Gradient of the expectation of a value per architecture (in the order of ROWS) at LOGITS."""
    phi = [logits.clone().requires_grad_() for logits in LOGITS]
    p_N = torch.outer(phi[0].softmax(-1), phi[1].softmax(-1)).ravel()
    return torch.cat(torch.autograd.grad((p_N * objective_N).sum(), phi)).numpy()


def losses(training: UnasTraining, batch: Batch) -> Tensor:
    """float64[6]: of every architecture."""
    found = []
    for row in ROWS:
        training.supernet.set_active(row)
        found.append(F.cross_entropy(training.supernet(batch[0]), batch[1]).detach().double())
    return torch.stack(found)


def standard_errors(rows: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return np.abs(rows.mean(axis=0) - expected) / (rows.std(axis=0) / np.sqrt(len(rows)))


STEPS = 2000


@pytest.mark.parametrize("estimator", ["rebar", pytest.param("reinforce", marks=pytest.mark.soak)])
def test_the_step_estimates_the_gradient_of_the_generalisation_loss(estimator: str) -> None:
    training = started(steps=STEPS, estimator=estimator, latency=LatencySettings(weight=0.0))
    train_N, validation_N = losses(training, TRAIN), losses(training, HELD_OUT)
    expected = enumerated(train_N + 0.5 * (validation_N - train_N).abs())
    assert (standard_errors(gradients(training, STEPS), expected) < 4).all()


def test_rebar_has_less_variance_than_the_score_function() -> None:
    spread_of = {name: gradients(started(steps=400, estimator=name, latency=LatencySettings(weight=0.0)), 400).var(0)
                 for name in ("rebar", "reinforce")}
    assert spread_of["rebar"].sum() < 0.5 * spread_of["reinforce"].sum()


def latency_gradients(samples: int, networks: int, mode: str = "hinge",
                      phi: list[nn.Parameter] | None = None) -> np.ndarray:
    """float64[STEPS, 5]: what latency adds to each step's gradient at LOGITS, or at `phi`; drawn at LOGITS."""
    training = started(steps=STEPS, latency=LatencySettings(mode, 1.0, 0.0, samples, networks))  # type: ignore[arg-type]
    training.give({label: table_ms(rows) for label, rows in training.begin_epoch().items()})
    phi, found = phi or training.phi[0], []
    for step in range(STEPS):
        training.steps_done = step
        term = training._latency.term(step, 0, 0, phi, 1.0, training._noise(0, 1), training._noise(0, 2))
        found.append(torch.cat(torch.autograd.grad(term.surrogate, phi)).numpy())
    return np.stack(found)


@pytest.mark.parametrize("mode", ["hinge", "linear"])
def test_measured_latency_is_unbiased_however_wrong_the_surrogate(mode: str) -> None:
    """Latencies of the table are not additive, so a linear surrogate cannot be right."""
    share_N = torch.tensor(MS / 2.0)
    expected = enumerated((share_N - 1).clamp(min=0) if mode == "hinge" else share_N)
    assert (standard_errors(latency_gradients(STEPS, 6, mode), expected) < 4).all()


def test_a_latency_in_every_third_step_counts_for_three() -> None:
    rows = latency_gradients(STEPS // 3, 6)
    expected = enumerated((torch.tensor(MS / 2.0) - 1).clamp(min=0))
    assert (standard_errors(rows, expected) < 4).all()
    assert rows.var(axis=0).sum() > 1.5 * latency_gradients(STEPS, 6).var(axis=0).sum()


def test_latencies_measured_while_phi_moves_keep_the_expectation() -> None:
    """Samples drawn at LOGITS, used where phi has moved on: the mean is the gradient there, not at LOGITS."""
    moved = [nn.Parameter(logits + shift) for logits, shift in zip(LOGITS, (torch.tensor([-0.6, 0.5, 0.3]),
                                                                            torch.tensor([-0.7, 0.6])))]
    found = latency_gradients(STEPS, 6, phi=moved)
    p_N = torch.outer(moved[0].softmax(-1), moved[1].softmax(-1)).ravel()
    value_N = (torch.tensor(MS / 2.0) - 1).clamp(min=0)
    there = torch.cat(torch.autograd.grad((p_N * value_N).sum(), moved)).numpy()
    assert (standard_errors(found, there) < 4).all()
    assert (standard_errors(found, enumerated(value_N)) > 5).any()


def test_the_surrogate_does_not_see_the_samples_it_is_used_with() -> None:
    """Two answers that differ in this epoch's samples alone give the same surrogate, hence the same other terms."""
    terms = []
    for factor in (1.0, 3.0):
        training = started(epochs=2, steps=4, latency=LatencySettings("linear", 1.0, 0.0, 2, 6))
        (rows,) = training.begin_epoch().values()
        assert len(rows) == 6 + 2
        answer = table_ms(rows)
        answer[6:] *= factor
        training.give({"cpu": answer})
        unmeasured = next(step for step in range(4) if (step, 0) not in training._latency._samples)
        terms.append(training._latency.term(unmeasured, 0, 0, training.phi[0], 1.0, training._noise(0, 1),
                                            training._noise(0, 2)).surrogate.detach())
    assert torch.equal(*terms)


def test_failed_measurements_leave_the_step_without_a_sample() -> None:
    training = started(epochs=2, steps=3, latency=LatencySettings("linear", 1.0, 0.0, 3, 6))
    (rows,) = training.begin_epoch().values()
    training.give({"cpu": np.concatenate([table_ms(rows[:6]), np.full(3, np.nan)])})
    assert all(np.isfinite(list(training.step(TRAIN, HELD_OUT).values())).all() for _ in range(3))
    dead = started(latency=LatencySettings(networks=6))
    (rows,) = dead.begin_epoch().values()
    with pytest.raises(ConfigError, match="none of 6 networks"):
        dead.give({"cpu": np.full(len(rows), np.nan)})


# --- parts and ranks -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_variance_falls_with_the_architectures_of_a_step() -> None:
    same = tuple(torch.cat([tensor] * 4) for tensor in images(3, 0))     # every part sees the same images

    def total(a: int) -> float:
        training = started(steps=600, architectures=a, latency=LatencySettings(weight=0.0))
        return float(gradients(training, 600, same, same).var(axis=0).sum())  # type: ignore[arg-type]

    assert total(4) < 0.32 * total(1)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_step_means_the_same_on_any_number_of_ranks(ranks: int) -> None:
    """Each rank sees its part of the batches; the mean of their gradients is the single process'."""
    options: dict[str, Any] = {"architectures": 4, "latency": LatencySettings("hinge", 1.0, 0.0, 8, 6), "steps": 3}
    alone = started(**options)
    parts = [started(**options, rank=rank, ranks=ranks) for rank in range(ranks)]
    seen: dict[int, list[Tensor]] = {}
    for number, training in enumerate([alone, *parts]):
        seen[number] = []

        def record(parameters: Iterable[nn.Parameter], number: int = number) -> None:
            seen[number] += [p.grad.clone().double() for p in parameters if p.grad is not None]

        training.reduce_gradients = record
        training.give({label: table_ms(rows) for label, rows in training.begin_epoch().items()})
        cut = slice(None) if number == 0 else slice((number - 1) * 12 // ranks, number * 12 // ranks)
        training.step((TRAIN[0][cut], TRAIN[1][cut]), (HELD_OUT[0][cut], HELD_OUT[1][cut]))
    means = [torch.stack(grads).mean(0) for grads in zip(*(seen[rank + 1] for rank in range(ranks)), strict=True)]
    assert all(torch.allclose(one, mean, atol=1e-6) for one, mean in zip(seen[0], means, strict=True))


# --- it finds what it should ------------------------------------------------------------------------------------------


def test_budgets_share_weights_and_each_finds_its_own_optimum() -> None:
    """With L_d nearly flat, the hinge decides: under 1.2 ms only one of the six architectures fits."""
    training = started(epochs=12, steps=20, aims=(Aim("cpu", 1.2), Aim("cpu", 9.0)), learning_rate=0.1,
                       latency=LatencySettings("hinge", 20.0, 0.1, 20, 6), generalisation=0.0)
    for _ in range(12):
        training.give({label: table_ms(rows) for label, rows in training.begin_epoch().items()})
        for _ in range(20):
            numbers = training.step(TRAIN, HELD_OUT)
    tight = [int(logits.detach().argmax()) for logits in training.phi[0]]
    assert tight == ROWS[int(MS.argmin())].tolist()
    assert numbers["surrogate_error"] > 0
    p = training.distribution()
    assert set(p) == {"0.0", "0.1", "1.0", "1.1"} and np.exp(p["0.0"]).max() / np.exp(p["0.0"]).sum() > 0.6


def test_warm_up_trains_weights_at_uniform_samples_and_leaves_phi_alone() -> None:
    training = started(epochs=4, steps=2, warm_up=0.5, learning_rate=0.5, weights=WeightSettings())
    weights = training.supernet.conv.weight.detach().clone()
    for epoch in range(4):
        wishes = training.begin_epoch()
        assert bool(wishes) == (epoch >= 2)
        training.give({label: table_ms(rows) for label, rows in wishes.items()})
        for _ in range(2):
            training.step(TRAIN, HELD_OUT)
        assert torch.equal(training.phi[0][0].detach(), LOGITS[0]) == (epoch < 2)
    assert not torch.equal(weights, training.supernet.conv.weight)


def test_weights_never_learn_from_validation_images() -> None:
    """Other held-out images change phi, not the weights of the same step."""
    after = []
    for held_out in (HELD_OUT, images(12, 5)):
        training = started(weights=WeightSettings(), learning_rate=0.1, latency=LatencySettings(weight=0.0))
        training.step(TRAIN, held_out)
        after.append((training.supernet.conv.weight.detach().clone(), training.phi[0][0].detach().clone()))
    assert torch.equal(after[0][0], after[1][0]) and not torch.equal(after[0][1], after[1][1])


@pytest.mark.parametrize("objective", ["generalisation", "validation", "training"])
def test_one_backward_pass_for_both_gives_what_two_give(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def after() -> list[Tensor]:
        found: list[Tensor] = []
        training = started(weights=WeightSettings(), objective=objective, latency=LatencySettings(weight=0.0))
        training.reduce_gradients = lambda parameters: found.extend(p.grad.clone() for p in parameters)
        training.step(TRAIN, HELD_OUT)
        return found

    shared = after()
    monkeypatch.setattr(UnasTraining, "_one_gap", False)
    apart = after()
    assert len(shared) == len(apart) > 2
    assert all(torch.allclose(one, other, atol=1e-7) for one, other in zip(shared, apart))


def test_slots_are_spread_over_the_epoch() -> None:
    slots = [(step, part) for step in range(10) for part in range(2)]
    chosen = spread(slots, 5)
    assert [slot for slot, _ in chosen] == [(0, 0), (2, 0), (4, 0), (6, 0), (8, 0)]
    assert sum(copies for _, copies in chosen) == 20
    assert spread(slots[:3], 8) == [(slot, 1.0) for slot in slots[:3]]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "words"), [
    ({"temperature": 0.0}, "temperature"), ({"generalisation": -0.1}, "at least 0"), ({"aims": ()}, "at least one"),
    ({"warm_up": 1.0}, "share of the epochs"), ({"held_out_share": 0.0}, "share of the training images"),
    ({"learning_rate": 0.0}, "above 0"), ({"architectures": 0}, "at least 1"), ({"softening": -1.0}, "at least 0")])
def test_impossible_settings_name_what_is_allowed(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(UnasSettings((Aim("cpu", 1.0),)), **options)


def test_divergence_names_step_and_setting() -> None:
    training = started(weights=WeightSettings())
    training.give({label: table_ms(rows) for label, rows in training.begin_epoch().items()})
    with pytest.raises(EvaluationError, match="step 0.*learning.?rate"):
        training.step((TRAIN[0] * float("nan"), TRAIN[1]), HELD_OUT)
