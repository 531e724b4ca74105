"""A run as each of its goals sees it, and how well its devices agree. With one goal the one view is the run itself."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.stats import kendalltau, spearmanr

from orchestrator.record.goals import Goal
from orchestrator.report.data import RunView, column_numbers

LEAST_SHARED = 3    # networks measured on both devices before their rankings are compared


@dataclass(frozen=True)
class Agreement:
    """Rank correlations between two targets over the networks that both measured."""

    first: str
    second: str
    networks: int
    kendall: float
    spearman: float


def goals(run: RunView) -> list[Goal]:
    """Of the run's state; [] before it has measured, and for a run of an earlier version."""
    found = run.state.get("goals")
    try:
        return [Goal.from_json(goal) for goal in found or []]
    except (TypeError, KeyError):
        return []


def views(run: RunView) -> list[tuple[str, RunView]]:
    """(label, what the goal sees of the run), the whole run where it has one goal."""
    found = goals(run)
    if len(found) < 2 and not any(goal.tuples_ms for goal in found):
        return [(found[0].label if found else "", run)]
    return [(goal.label, _view(run, goal)) for goal in found]


def _view(run: RunView, goal: Goal) -> RunView:
    latency_N = goal.latency_ms(_latencies(run, goal.targets))
    trials = run.trials.set_column(run.trials.column_names.index("latency_ms"), "latency_ms",
                                   pa.array(latency_N, mask=np.isnan(latency_N)))
    device = _target_ids(run).get(goal.targets[0], "")
    measured = run.latency.filter(pc.fill_null(pc.equal(run.latency.column("target_id"), device), False))
    prefix = f"{goal.label}/"
    events = [_unprefixed(event, prefix) for event in run.events
              if event.get("kind") != "predictor" or event.get("target") == goal.targets[0]]
    return replace(run, trials=trials, latency=measured, events=events,
                   generated=[row for row in run.generated if row.get("target") == goal.label],
                   compared=[row for row in run.compared if row.get("target") == goal.label])


def _unprefixed(event: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A controller's metrics under their own names."""
    own = {key.removeprefix(prefix): value for key, value in event.items() if key.startswith(prefix)}
    return {key: value for key, value in event.items() if "/" not in key} | own


def _latencies(run: RunView, labels: tuple[str, ...]) -> dict[str, NDArray[np.float64]]:
    """float64[N] in ms by target, nan where unknown."""
    found = {label: np.full(run.trials.num_rows, np.nan) for label in labels}
    for number, entries in enumerate(run.trials.column("latencies").to_pylist()):
        for entry in entries or []:
            if entry["target"] in found and entry["latency_ms"] is not None:
                found[entry["target"]][number] = entry["latency_ms"]
    return found


def _target_ids(run: RunView) -> dict[str, str]:
    targets = run.state.get("targets")
    return {label: str(state.get("target_id")) for label, state in targets.items()} if isinstance(targets, dict) else {}


def agreements(run: RunView) -> list[Agreement]:
    """Of every pair of targets, in the order of the configuration."""
    measured = {label: _by_arch(run, target_id) for label, target_id in _target_ids(run).items()}
    return [_agreement(first, second, measured[first], measured[second])
            for first, second in combinations(measured, 2)]


def _agreement(first: str, second: str, of_first: Mapping[str, float], of_second: Mapping[str, float]) -> Agreement:
    shared = sorted(of_first.keys() & of_second.keys())
    if len(shared) < LEAST_SHARED:
        return Agreement(first, second, len(shared), float("nan"), float("nan"))
    x, y = [of_first[a] for a in shared], [of_second[a] for a in shared]
    return Agreement(first, second, len(shared), float(kendalltau(x, y).statistic), float(spearmanr(x, y).statistic))


def _by_arch(run: RunView, target_id: str) -> dict[str, float]:
    rows = run.latency.filter(pc.fill_null(pc.equal(run.latency.column("target_id"), target_id), False))
    latency_ms = column_numbers(rows, "latency_ms")
    return {arch_id: float(ms) for arch_id, ms in zip(rows.column("arch_id").to_pylist(), latency_ms)
            if np.isfinite(ms)}
