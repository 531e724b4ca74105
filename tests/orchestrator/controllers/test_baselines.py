"""Random search, regularised evolution and NSGA-II: their rules by hand and brute force, and that they search."""
from __future__ import annotations

import math
import random
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from orchestrator.controllers.baselines.answers import TrialAnswers
from orchestrator.controllers.baselines.evolution import RegularisedEvolution, tournament
from orchestrator.controllers.baselines.nsga2 import Nsga2
from orchestrator.controllers.catalogue import check_controller_options, make_controller
from orchestrator.controllers.conformance import SyntheticLatency, check_controller, synthetic_trials
from orchestrator.controllers.controller import EarlierRun, Observation, Proposal, Task
from searchspaces.errors import ConfigError
from searchspaces.nasbench201.space import NasBench201
from searchspaces.space import SearchSpace
from tests.benchmarks.nasbench201_regret import one_run
from tests.orchestrator.controllers.toy import ToyLatency, ToySpace, toy_trials

SPACE, CELLS = ToySpace(), NasBench201()
BUDGETS = (3.0, 5.0, 8.0)
BASELINES = ("random", "evolution", "nsga2")
SMALL: dict[str, dict[str, Any]] = {"random": {}, "evolution": {"population": 8, "sample": 3},
                                    "nsga2": {"population": 6}}


def baseline(name: str, space: SearchSpace = SPACE, task: Task | None = None, **options: Any) -> Any:
    controller = make_controller(name, space, task or Task(BUDGETS, 60, 0), options)
    assert isinstance(controller, TrialAnswers)
    return controller


def rows(proposals: list[Proposal]) -> list[tuple[int, ...]]:
    return [tuple(int(token) for token in proposal.tokens) for proposal in proposals]


def evaluated(proposals: list[Proposal]) -> list[Observation]:
    return toy_trials(SPACE, np.stack([proposal.tokens for proposal in proposals]))


# --- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
def test_conformance(name: str) -> None:
    assert check_controller(name) == check_controller(name, SMALL[name]) == []


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("latency", [None, ToyLatency(SPACE)])
def test_replay_after_asynchronous_work(name: str, latency: ToyLatency | None) -> None:
    """Up to nine in flight, finished in random order, some failing: the log alone decides what comes next."""
    task, rng = Task(BUDGETS, 80, 5, latency), np.random.default_rng(1)
    controller, log, in_flight = baseline(name, task=task, **SMALL[name]), [], []
    for _ in range(30):
        in_flight += controller.propose(9 - len(in_flight))
        assert len(in_flight) == 9, "a worker was left without work"
        for _ in range(int(rng.integers(1, 5))):
            trial, = evaluated([in_flight.pop(int(rng.integers(len(in_flight))))])
            log.append(trial if rng.random() < 0.9 else Observation(trial.tokens, math.nan, math.nan, "failed"))
            controller.observe(log[-1:])
    log += evaluated(in_flight)
    controller.observe(log[-len(in_flight):])
    for step in range(12):  # through more than a whole generation
        replayed = baseline(name, task=task, **SMALL[name])
        replayed.observe(log)
        proposals = controller.propose(1 + step % 3)
        assert rows(proposals) == rows(replayed.propose(1 + step % 3))
        log += evaluated(proposals)
        controller.observe(log[-len(proposals):])
    assert len({trial.tokens.tobytes() for trial in log}) == len(log)


@pytest.mark.parametrize("name", BASELINES)
def test_global_random_state_is_neither_read_nor_written(name: str) -> None:
    def after_seeding(seed: int) -> list[tuple[int, ...]]:
        np.random.seed(seed)
        random.seed(seed)
        before = (np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[union-attr]
        controller = baseline(name, **SMALL[name])
        controller.observe(evaluated(controller.propose(20)))
        proposals = rows(controller.propose(10))
        assert before == (np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[union-attr]
        return proposals

    assert after_seeding(1) == after_seeding(2)


@pytest.mark.parametrize("name", BASELINES)
def test_many_workers_are_never_without_work(name: str) -> None:
    controller = baseline(name, CELLS)
    assert len(set(rows(controller.propose(100)))) == 100
    controller = baseline(name, CELLS)
    controller.observe(synthetic_trials(CELLS, CELLS.sample_uniform(np.random.default_rng(0), 80)))
    assert len(set(rows(controller.propose(150)))) == 150


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("latency", [None, ToyLatency(SPACE)])
def test_a_space_is_searched_to_its_end(name: str, latency: ToyLatency | None) -> None:
    everything = SPACE.everything()
    if latency is not None:
        everything = everything[latency.predict(everything) <= max(BUDGETS)]
    controller = baseline(name, task=Task(BUDGETS, 1000, 0, latency), **SMALL[name])
    seen: list[tuple[int, ...]] = []
    while proposals := controller.propose(40):
        controller.observe(evaluated(proposals))
        seen += rows(proposals)
    assert len(seen) == len(set(seen))
    assert set(seen) == {tuple(int(token) for token in row) for row in everything}


@pytest.mark.parametrize("name", BASELINES)
def test_a_budget_that_uniform_samples_never_meet(name: str) -> None:
    """Seven of 15,625 cells lie at or under 1.5 ms: the fastest and its six cheapest neighbours."""
    controller = baseline(name, CELLS, Task((1.5,), 60, 0, SyntheticLatency()))
    proposals = controller.propose(7)
    assert set(rows(proposals)) == {tuple(row.tolist()) for row in CELLS.all_tokens() if row.sum() <= 1}


def test_random_search_goes_on_for_thousands_and_replays() -> None:
    controller, replayed = baseline("random", CELLS), baseline("random", CELLS)
    first = controller.propose(8000)
    assert len(set(rows(first))) == 8000
    replayed.observe([Observation(p.tokens, 0.5, 1.0) for p in first])
    assert rows(replayed.propose(5)) == rows(controller.propose(5))


@pytest.mark.parametrize(("name", "options", "message"), [
    ("evolution", {"populations": 5}, "did you mean 'population'"), ("evolution", {"sample": 0}, "greater than"),
    ("nsga2", {"crossover": 1.5}, "less than or equal to 1"), ("random", {"population": 5}, "allowed: none")])
def test_bad_options_are_one_sentence(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        check_controller_options(name, options)
    assert "\n" not in str(error.value)


def test_libraries_of_a_controller_are_imported_when_it_is_named() -> None:
    program = ("import sys, orchestrator.controllers.catalogue as c; heavy = {'pymoo', 'sklearn', 'ray', 'torch'}; "
               "assert not heavy & set(sys.modules), heavy & set(sys.modules); c.controller_class('nsga2'); "
               "assert 'pymoo' in sys.modules and 'sklearn' not in sys.modules")
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=Path(__file__).parents[3])


# --- answers ---------------------------------------------------------------------------------------------------------


def test_answers_are_the_best_trials_under_the_budget() -> None:
    controller = baseline("random", CELLS)
    tokens = CELLS.sample_uniform(np.random.default_rng(0), 5)
    figures = [(0.7, 4.0), (0.7, 3.0), (0.6, 2.0), (0.9, 9.0), (math.nan, 1.0)]
    controller.observe([Observation(row, *figure) for row, figure in zip(tokens, figures, strict=True)])
    under, over = controller.generate([4.0, 1.5], alternatives=3)
    assert [(a.accuracy, a.latency_ms) for a in under] == [(0.7, 3.0), (0.7, 4.0), (0.6, 2.0)]
    assert all(a.feasible and a.observed for a in under)
    assert [(a.latency_ms, a.feasible) for a in over] == [(2.0, False)]


def test_before_any_trial_the_fastest_architecture_answers() -> None:
    answer = baseline("evolution", CELLS, Task((4.0,), 9, 0, SyntheticLatency())).generate([4.0])[0][0]
    assert answer.tokens.tolist() == [0] * 6 and answer.latency_ms == 1.0 and answer.feasible and not answer.observed
    assert not baseline("evolution", CELLS).generate([4.0])[0][0].feasible  # a table: its latency is not known


# --- regularised evolution -------------------------------------------------------------------------------------------


def members(*figures: tuple[float, float]) -> list[Observation]:
    tokens = CELLS.sample_uniform(np.random.default_rng(3), len(figures))
    return [Observation(row, accuracy, ms) for row, (accuracy, ms) in zip(tokens, figures, strict=True)]


@pytest.mark.parametrize(("budget_ms", "sample", "winner"), [
    (9.0, (0, 1, 2, 3), 3), (5.0, (0, 1, 2, 3), 2), (4.0, (0, 1, 2, 3), 1), (0.5, (1, 2, 3), 1), (0.5, (3, 2), 2),
    (9.0, (0, 0, 0), 0)])
def test_tournament_is_won_by_the_best_under_the_budget(budget_ms: float, sample: tuple[int, ...], winner: int) -> None:
    """Accuracy rises with latency: the slowest that is allowed wins; nobody meets 0.5 ms, so the fastest wins."""
    population = members((0.5, 2.0), (0.6, 4.0), (0.7, 5.0), (0.8, 8.0))
    assert tournament(population, sample, budget_ms) == winner


def test_ties_go_to_the_faster() -> None:
    assert tournament(members((0.7, 5.0), (0.7, 4.0), (0.7, 4.5)), (0, 1, 2), 9.0) == 1


def test_the_oldest_dies_however_good_it_is() -> None:
    """P = 4, S large: every tournament sees everyone, so children are mutants of the best living member."""
    controller = baseline("evolution", CELLS, Task((9.0,), 60, 0), population=4, sample=200)
    assert isinstance(controller, RegularisedEvolution)
    champion, *others = trials = members((0.9, 5.0), (0.5, 5.0), (0.6, 5.0), (0.4, 5.0))
    controller.observe(trials)
    assert changed(controller.propose(10), champion) == {1}
    newcomer = Observation(np.array([4, 4, 4, 4, 4, 4], dtype=np.int8), 0.3, 5.0)
    controller.observe([newcomer])
    assert [t.accuracy for t in controller.population] == [0.5, 0.6, 0.4, 0.3]
    assert changed(controller.propose(10), others[1]) == {1}


def test_budgets_take_turns_and_foreign_trials_are_members() -> None:
    """Each child is one mutation away from the best member under the budget that it is proposed for."""
    controller = baseline("evolution", CELLS, Task(BUDGETS, 60, 0), population=4, sample=200)
    trials = members((0.5, 2.0), (0.6, 4.0), (0.7, 7.0), (0.8, 20.0))
    best = dict(zip(BUDGETS, trials, strict=False))
    controller.observe(trials)
    proposals = controller.propose(9)
    aims = [proposal.budget_ms for proposal in proposals]
    assert aims == [BUDGETS[(4 + i) % 3] for i in range(9)]
    for proposal in proposals:
        assert changed([proposal], best[proposal.budget_ms]) == {1}


def changed(proposals: list[Proposal], parent: Observation) -> set[int]:
    """In how many tokens the proposals differ from the parent."""
    return {int((proposal.tokens != parent.tokens).sum()) for proposal in proposals}


def test_where_latency_is_known_children_meet_the_budget_they_are_made_for() -> None:
    """A mutation of the only parent changes 13 ms by 0.5 to 2 ms: 12 ms can be met, of 3 ms the fastest is nearest."""
    controller = baseline("evolution", CELLS, Task((12.0, 3.0, 13.0), 60, 0, SyntheticLatency()), population=2)
    parent = np.full(6, 4, dtype=np.int8)
    controller.observe([Observation(parent, 0.9, 13.0), Observation(parent, 0.9, 13.0)])
    latencies = {p.budget_ms: float(SyntheticLatency().predict(p.tokens[None])[0]) for p in controller.propose(3)}
    assert latencies[12.0] <= 12.0 and latencies[3.0] == 11.0


def test_a_tight_budget_is_approached_step_by_step() -> None:
    """No member of the random start meets 1.5 ms, which seven of 15,625 cells meet."""
    controller = baseline("evolution", CELLS, Task((1.5, 8.0), 80, 0, SyntheticLatency()), population=20)
    for _ in range(10):
        trials = synthetic_trials(CELLS, np.stack([p.tokens for p in controller.propose(8)]), fail_every=10**9)
        controller.observe(trials)
        assert len(controller.trials) > 20 or min(t.latency_ms for t in controller.trials) > 1.5
    assert controller.generate([1.5])[0][0].feasible


# --- NSGA-II ---------------------------------------------------------------------------------------------------------


def survivors_by_hand(points: NDArray[np.float64], largest_ms: float, count: int) -> set[int]:
    """Deb et al. 2002 word for word: constrained domination, front after front, the last by crowding distance."""
    violation = np.maximum(points[:, 1] - largest_ms, 0)

    def dominates(i: int, j: int) -> bool:
        if violation[i] or violation[j]:
            return bool(violation[i] < violation[j])
        return bool((points[i] <= points[j]).all() and (points[i] < points[j]).any())

    left, chosen = set(range(len(points))), set[int]()
    while len(chosen) < count:
        front = sorted(i for i in left if not any(dominates(j, i) for j in left))
        if len(chosen) + len(front) > count:
            front = sorted(front, key=lambda i: -crowding(points[front])[front.index(i)])[:count - len(chosen)]
        chosen |= set(front)
        left -= set(front)
    return chosen


def crowding(points: NDArray[np.float64]) -> NDArray[np.float64]:
    distance = np.zeros(len(points))
    for column in points.T:
        order = column.argsort()
        distance[order[[0, -1]]] = np.inf
        for k, i in enumerate(order[1:-1], start=1):
            distance[i] += (column[order[k + 1]] - column[order[k - 1]]) / (column.max() - column.min())
    return distance


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("largest_ms", [5.0, 100.0])
def test_survivors_are_those_of_the_paper(seed: int, largest_ms: float) -> None:
    """Three generations of random figures; at 5 ms many violate the constraint, at 100 ms none."""
    rng, size = np.random.default_rng(seed), 12
    tokens = CELLS.all_tokens()[rng.permutation(15625)[:3 * size]]
    latency = rng.uniform(1, 10, 3 * size)
    accuracy = np.clip(0.1 * latency * rng.uniform(0.9, 1.1, 3 * size), 0, 1)
    trials = [Observation(row, float(a), float(ms)) for row, a, ms in zip(tokens, accuracy, latency, strict=True)]
    controller = baseline("nsga2", CELLS, Task((1.0, largest_ms), 90, seed), population=size)
    assert isinstance(controller, Nsga2)
    controller.observe(trials)
    controller.propose(1)
    points, alive = np.column_stack([1 - accuracy, latency]), set(range(size))
    for generation in (1, 2):
        pool = sorted(alive | set(range(generation * size, (generation + 1) * size)))
        alive = {pool[i] for i in survivors_by_hand(points[pool], largest_ms, size)}
    assert controller.generation == 3
    assert {row.tobytes() for row in controller.algorithm.pop.get("X")} == {tokens[i].tobytes() for i in alive}


def test_the_first_population_is_what_was_best_before() -> None:
    """By brute force: budgets spread over the task's, two earlier runs in turn; afterwards as without earlier runs."""
    parts = [SPACE.everything()[first::5] for first in (0, 1)]
    known = [evaluated([Proposal(row) for row in part]) for part in parts]
    earlier = tuple(EarlierRun(str(index), False, part, np.array([t.accuracy for t in trials]),
                               np.array([t.latency_ms if i % 7 else math.nan for i, t in enumerate(trials)]))
                    for index, (part, trials) in enumerate(zip(parts, known)))
    task = Task(BUDGETS, 60, 0, None, earlier)
    expected: list[tuple[int, ...]] = []
    for position, budget_ms in enumerate(np.linspace(3.0, 8.0, 6)):
        left = [t for i, t in enumerate(known[position % 2]) if i % 7 and t.latency_ms <= budget_ms
                and tuple(int(v) for v in t.tokens) not in expected]
        if left:
            expected.append(tuple(int(v) for v in max(left, key=lambda t: t.accuracy).tokens))
    proposals = baseline("nsga2", task=task, population=6).propose(12)
    assert rows(proposals)[:len(expected)] == expected and len(expected) >= 5
    plain = rows(baseline("nsga2", population=6, task=Task(BUDGETS, 60, 0)).propose(12))
    assert rows(proposals)[len(expected):] == [row for row in plain if row not in expected][:12 - len(expected)]
    known = baseline("nsga2", task=Task(BUDGETS, 60, 0, ToyLatency(SPACE), earlier), population=6).propose(6)
    assert ToyLatency(SPACE).predict(np.stack([p.tokens for p in known])).max() <= 8.0


def test_children_come_from_the_population() -> None:
    """Two parents without a common token: a child without mutation would mix them; one token may mutate."""
    controller = baseline("nsga2", CELLS, Task((50.0,), 60, 0), population=2, crossover=1.0)
    parents = np.array([[0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=np.int8)
    controller.observe([Observation(parents[0], 0.1, 1.0), Observation(parents[1], 0.9, 9.0)])
    children = np.array(rows(controller.propose(12)))
    assert ((children > 1).sum(axis=1) <= 1).all() and (children > 1).any()
    assert len({tuple(row) for row in (children == 0).tolist()}) > 3


def test_failed_trials_wait_for_a_full_generation() -> None:
    controller = baseline("nsga2", population=6)
    proposals = controller.propose(6)
    trials = evaluated(proposals)
    controller.observe([*trials[:5], Observation(trials[5].tokens, math.nan, math.nan, "failed")])
    controller.propose(1)
    assert controller.generation == 0 and controller.metrics() == {}
    controller.observe(evaluated([Proposal(SPACE.everything()[-1])]))  # a foreign trial fills the gap
    controller.propose(1)
    assert controller.metrics()["generation"] == 1
    assert len(controller.algorithm.pop) == 6


# --- they search -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["evolution", "nsga2"])
def test_better_than_random_on_the_published_table(shared_data: Path, name: str) -> None:
    """200 evaluations of CIFAR-100 on two devices, three seeds: about 1.1 against 2.2 percentage points of regret."""
    table, budget = str(shared_data / "nasbench201.parquet"), 200
    runs = list(product(("pixel3", "gold_6226"), (50, 51, 52)))
    ours, uniform = ([one_run(table, "cifar100", device, budget, seed, which)[0] for device, seed in runs]
                     for which in (name, "random"))
    assert np.mean(ours) < np.mean(uniform) - 0.4
