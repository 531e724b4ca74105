"""Fronts against brute force: the definition of dominance, and areas counted cell by cell."""
from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from orchestrator.frontier import RunningFront, best_under, hypervolume, hypervolume_history, pareto_mask

nan, inf = float("nan"), float("inf")


def random_trials(seed: int, n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Small integers, so that ties and exact duplicates are common, and one in ten failed."""
    rng = np.random.default_rng(seed)
    latency, accuracy = rng.integers(1, 13, n).astype(float), rng.integers(0, 11, n) / 10
    accuracy[rng.random(n) < 0.1] = nan
    return latency, accuracy


def brute_mask(latency: NDArray[np.float64], accuracy: NDArray[np.float64]) -> list[bool]:
    points = list(zip(latency, accuracy))
    return [not np.isnan(y) and not any(a <= x and b >= y and (a < x or b > y) for a, b in points) for x, y in points]


def brute_hypervolume(latency: NDArray[np.float64], accuracy: NDArray[np.float64], reference: float) -> float:
    """Counts the cells of the integer grid (1 ms wide, 0.1 high) that some trial dominates."""
    cells = [(x, k) for x in range(int(reference)) for k in range(10)]
    return sum(0.1 for x, k in cells if any(a <= x and round(b * 10) >= k + 1 for a, b in zip(latency, accuracy)
                                            if not np.isnan(b)))


@pytest.mark.parametrize("seed", range(20))
def test_mask_is_the_definition_of_dominance(seed: int) -> None:
    latency, accuracy = random_trials(seed, 60)
    assert pareto_mask(latency, accuracy).tolist() == brute_mask(latency, accuracy)


def test_mask_keeps_equal_trials_and_drops_weakly_dominated_ones() -> None:
    assert pareto_mask([1, 1, 1, 2, 2], [0.5, 0.5, 0.4, 0.5, 0.6]).tolist() == [True, True, False, False, True]


def test_failed_trials_are_nowhere() -> None:
    assert pareto_mask([0.1, 5, 1, nan], [nan, 0.3, inf, 0.9]).tolist() == [False, True, False, False]
    assert best_under(10, [0.1, 5, nan], [nan, 0.3, 0.9]) == 1
    assert hypervolume([0.1, nan], [nan, 0.9], 10) == 0
    assert hypervolume_history([nan, 5, 4], [0.9, 0.5, nan], 10).tolist() == [0, 2.5, 2.5]


def test_nothing_in_nothing_out() -> None:
    assert pareto_mask([], []).tolist() == []
    assert hypervolume([], [], 1) == 0
    assert hypervolume_history([], [], 1).tolist() == []
    assert best_under(1, [], []) == -1


@pytest.mark.parametrize("seed", range(20))
def test_hypervolume_counts_dominated_cells(seed: int) -> None:
    latency, accuracy = random_trials(seed, 12)
    assert hypervolume(latency, accuracy, 8) == pytest.approx(brute_hypervolume(latency, accuracy, 8))


def test_hypervolume_of_a_staircase_in_closed_form() -> None:
    # (10-1)*0.2 + (10-3)*(0.5-0.2) + (10-6)*(0.9-0.5), above a reference accuracy of 0
    assert hypervolume([1, 3, 6], [0.2, 0.5, 0.9], 10) == pytest.approx(1.8 + 2.1 + 1.6)
    assert hypervolume([1, 3, 6], [0.2, 0.5, 0.9], 10, 0.2) == pytest.approx(2.1 + 1.6)
    assert hypervolume([10, 12, 3], [0.9, 1.0, 0.2], 10, 0.2) == 0, "on or behind the reference"


@pytest.mark.parametrize("seed", range(10))
def test_history_equals_hypervolume_of_every_prefix(seed: int) -> None:
    latency, accuracy = random_trials(seed, 50)
    history = hypervolume_history(latency, accuracy, 8, 0.1)
    assert history.tolist() == pytest.approx([hypervolume(latency[:i + 1], accuracy[:i + 1], 8, 0.1)
                                              for i in range(50)])
    assert (np.diff(history) >= 0).all()


@pytest.mark.parametrize("seed", range(10))
def test_running_front_holds_each_distinct_front_point_once(seed: int) -> None:
    latency, accuracy = random_trials(seed, 80)
    front = RunningFront(12)
    entered = [front.add(x, y) for x, y in zip(latency, accuracy)]
    mask = pareto_mask(latency, accuracy)
    assert list(zip(front.latency_ms, front.accuracy)) == sorted(set(zip(latency[mask], accuracy[mask])))
    assert any(entered) and not all(entered)


def test_history_of_a_hundred_thousand_trials_ends_at_their_hypervolume() -> None:
    rng = np.random.default_rng(0)
    latency = rng.uniform(1, 10, 100_000)
    accuracy = 1 - np.exp(-latency) - rng.exponential(0.1, 100_000)
    assert hypervolume_history(latency, accuracy, 10)[-1] == pytest.approx(hypervolume(latency, accuracy, 10))


@pytest.mark.parametrize("seed", range(10))
def test_best_under_every_budget(seed: int) -> None:
    latency, accuracy = random_trials(seed, 40)
    for budget in np.arange(0, 14, 0.5):
        index = best_under(budget, latency, accuracy)
        allowed = [(-accuracy[i], latency[i], i) for i in range(40) if latency[i] <= budget and accuracy[i] >= 0]
        assert index == (min(allowed)[2] if allowed else -1)
