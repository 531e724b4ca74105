"""UNAS on observed trials: an unbiased gradient whatever the surrogate says, and a search that finds what is best."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from orchestrator.controllers.catalogue import make_controller
from orchestrator.controllers.conformance import check_controller
from orchestrator.controllers.controller import EarlierRun, Observation, Proposal, Task
from orchestrator.controllers.unas import beliefs as module
from orchestrator.controllers.unas.beliefs import Beliefs, fit_surrogate, follow
from orchestrator.controllers.unas.blackbox import BlackBoxUnas
from orchestrator.controllers.unas.settings import BlackBoxOptions
from searchspaces.nasbench201.space import NasBench201
from searchspaces.space import Tokens
from searchspaces.training import estimators
from tests.orchestrator.controllers.toy import ToyLatency, ToySpace, toy_accuracy, toy_trials

SPACE = ToySpace()
EVERYTHING = SPACE.everything()
OPTIONS = {"steps": 20, "draws": 8, "warm_up": 12, "posterior": {"trees": 10}}
QUICK = {"black_box": OPTIONS}


class TableOfLosses:
    """Stands in for what trials make one believe: a loss per architecture and budget, brute force knows the best."""

    def __init__(self, loss: NDArray[np.float64], options: BlackBoxOptions) -> None:
        self.space, self.options, self.budgets_B = NasBench201(), options, np.ones(loss.shape[1])
        self.table = loss

    def losses(self, tokens_NT: Tokens) -> NDArray[np.float64]:
        return self.table[np.asarray(tokens_NT, dtype=np.int64) @ 5 ** np.arange(5, -1, -1)]


def test_losses_by_hand() -> None:
    trials = toy_trials(SPACE, EVERYTHING[::7])
    options = BlackBoxOptions(over=2.0, slope=10.0)
    believed = Beliefs(SPACE, trials, ToyLatency(SPACE), [3.0, 100.0], options, seed=0)
    rows = EVERYTHING[:40]
    upper = believed.posterior.believe(SPACE.features(rows)).upper_N(1.0)
    spread = believed.posterior.believe(SPACE.features(EVERYTHING[::7])).mean_N.std()
    for row, loss_B, mean in zip(rows, believed.losses(rows), upper):
        ms = float(ToyLatency(SPACE).predict(row[None])[0])
        late = 2.0 + 10.0 * (ms / 3.0 - 1) if ms > 3.0 else 0.0
        assert loss_B == pytest.approx([late - mean / spread, -mean / spread])
    assert np.array_equal(believed.losses(rows[::-1]), believed.losses(rows)[::-1])   # remembered under the right name


def test_distributions_settle_at_the_minimiser_where_the_surrogate_cannot_see_it() -> None:
    """Two edges that are good only together (an exclusive or, for which a linear g is flat), another pair per budget;
    the four other edges are additive."""
    rng = np.random.default_rng(0)
    digits = np.stack(np.unravel_index(np.arange(5**6), (5,) * 6), axis=1)
    additive = rng.permuted(np.tile(np.linspace(0, 0.5, 5), (6, 1)), axis=1)
    loss = np.stack([additive[np.arange(6), digits].sum(1)] * 2, axis=1)
    for budget, (a, b) in enumerate(((1, 3), (4, 2))):
        loss[(digits[:, 0] == a) & (digits[:, 5] == b), budget] -= 3.0
    believed = TableOfLosses(loss, BlackBoxOptions(steps=300, draws=32))
    logits = follow(believed, seed=0)   # type: ignore[arg-type]
    for budget in range(2):
        assert [int(phi[budget].argmax()) for phi in logits] == digits[loss[:, budget].argmin()].tolist()


def test_estimate_is_unbiased_with_the_fitted_surrogate() -> None:
    """Against enumeration of all cells, for two budgets at once; the surrogate is fitted to something else."""
    rng = np.random.default_rng(1)
    digits = np.stack(np.unravel_index(np.arange(5**6), (5,) * 6), axis=1)
    loss = rng.normal(size=(5**6, 2)) + 2 * (digits[:, :1] == digits[:, 1:2])
    surrogate = fit_surrogate(TableOfLosses(rng.normal(size=(5**6, 2)), BlackBoxOptions()), rng)  # type: ignore[arg-type]
    believed = TableOfLosses(loss, BlackBoxOptions())
    phi = [torch.tensor(rng.normal(0, 0.5, (2, 5)), requires_grad=True) for _ in range(6)]
    log_p = torch.stack([lp[:, digits[:, e]] for e, lp in enumerate(estimators.log_probabilities(phi))]).sum(0)
    (log_p.exp() * torch.from_numpy(loss.T)).sum().backward()
    exact = torch.cat([p.grad.flatten() for p in phi if p.grad is not None])
    generator, estimates = torch.Generator().manual_seed(0), []
    for _ in range(400):
        logits = [p.detach().expand(64, 2, 5).clone().requires_grad_() for p in phi]
        drawn = estimators.draw(logits, 0.4, estimators.uniform(logits, generator))
        at_z = module._at_vertices(believed, drawn.z)   # type: ignore[arg-type]
        estimators.one_pass(at_z, surrogate(drawn.zeta_hat), drawn).sum().backward()
        estimates.append(torch.cat([p.grad.mean(0).flatten() for p in logits if p.grad is not None]))
    mean, error = torch.stack(estimates).mean(0), torch.stack(estimates).std(0) / math.sqrt(len(estimates))
    assert (((mean - exact) / error).abs() < 4.5).all()
    assert ((exact / error).abs() > 4.5).any()      # there is something to be seen


def controller(evaluations: int = 60, latency: ToyLatency | None = None) -> BlackBoxUnas:
    return BlackBoxUnas(SPACE, BlackBoxOptions.model_validate(OPTIONS), Task((3.0, 5.0, 8.0), evaluations, 0, latency))


def test_conformance() -> None:
    assert check_controller("unas", QUICK) == []


@pytest.mark.parametrize("latency", [None, ToyLatency(SPACE)])
def test_replay_after_asynchronous_work(latency: ToyLatency | None) -> None:
    """Several in flight, finished in random order, some failed: the log alone decides what comes next."""
    rng = np.random.default_rng(1)
    log: list[Observation] = []
    in_flight: list[Proposal] = []
    original = controller(latency=latency)
    for _ in range(12):
        in_flight += original.propose(7 - len(in_flight))
        assert len(in_flight) == 7, "a worker was left without work"
        for _ in range(int(rng.integers(1, 5))):
            trial, = toy_trials(SPACE, in_flight.pop(int(rng.integers(len(in_flight)))).tokens[None])
            log.append(trial if rng.random() < 0.8 else Observation(trial.tokens, math.nan, math.nan, "failed"))
            original.observe(log[-1:])
    rest = [toy_trials(SPACE, proposal.tokens[None])[0] for proposal in in_flight]
    original.observe(rest)
    again = controller(latency=latency)
    again.observe(log + rest)
    assert [p.tokens.tolist() for p in again.propose(5)] == [p.tokens.tolist() for p in original.propose(5)]


def test_finds_more_than_chance_would() -> None:
    """Sixty of the space's architectures: the best under every budget, which uniform sampling mostly misses."""
    search = make_controller("unas", SPACE, Task((3.0, 5.0, 8.0), 60, 0), QUICK)
    for _ in range(15):
        search.observe(toy_trials(SPACE, np.stack([p.tokens for p in search.propose(4)])))
    accuracy, latency = toy_accuracy(SPACE, EVERYTHING), ToyLatency(SPACE).predict(EVERYTHING)
    for answer, budget_ms in zip(search.generate([3.0, 5.0, 8.0]), (3.0, 5.0, 8.0)):
        best = accuracy[latency <= budget_ms].max()
        assert answer[0].latency_ms <= budget_ms and answer[0].accuracy >= best - 0.02
    assert set(search.metrics()) == {"entropy", "settled"}


@pytest.mark.parametrize("same_task", [False, True])
def test_earlier_runs_lead_the_distributions(same_task: bool) -> None:
    """From the start where the task is the same: every second architecture is theirs, better than the random ones. A
    log replays; a state answers."""
    rows = EVERYTHING[::3]
    earlier = EarlierRun("first", same_task, rows, toy_accuracy(SPACE, rows) ** (1 if same_task else 2),
                         ToyLatency(SPACE).predict(rows))
    task = Task((3.0, 5.0, 8.0), 60, 0, ToyLatency(SPACE), (earlier,))
    search, again = (make_controller("unas", SPACE, task, QUICK) for _ in range(2))
    start = search.propose(12)
    assert [proposal.budget_ms is None for proposal in start] == [not same_task, True] * 6
    first = toy_accuracy(SPACE, np.stack([p.tokens for p in start]))
    assert not same_task or first[::2].mean() > first[1::2].mean()
    log = toy_trials(SPACE, np.stack([p.tokens for p in start]))
    for searching in (search, again):
        searching.observe(log)
    assert [p.tokens.tolist() for p in again.propose(5)] == [p.tokens.tolist() for p in search.propose(5)]
    restored = make_controller("unas", SPACE, Task((3.0, 5.0, 8.0), 60, 0, ToyLatency(SPACE)), QUICK)
    restored.load_state_dict(search.state_dict())
    for answer, (expected,) in zip(restored.generate([3.0, 8.0]), search.generate([3.0, 8.0])):
        assert answer[0].tokens.tolist() == expected.tokens.tolist() and answer[0].score == expected.score


def test_noisy_trials_are_answered_by_what_all_of_them_say() -> None:
    """One lucky training of a poor architecture is not the answer while its neighbours say otherwise."""
    search, rows = controller(), EVERYTHING[::5]
    trials = toy_trials(SPACE, rows)
    poor = int(np.argsort([trial.accuracy for trial in trials])[len(trials) // 3])
    trials[poor] = Observation(rows[poor], max(t.accuracy for t in trials) + 0.01, trials[poor].latency_ms)
    search.observe(trials)
    assert not np.array_equal(search.generate([100.0])[0][0].tokens, rows[poor])
