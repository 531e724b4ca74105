"""What a run is after: budgets in ms, and the latency that they bound.

With one target there is one goal. With several there is one per target, each with its own controller, which learn from
the same accuracies; or, with `budgets.together`, one goal whose k-th budget is a tuple of one budget per target.

A tuple of budgets becomes a single number without loss. Let B_j(s) be target j's budget at the point s of the polyline
through the K tuples, with s = B_1 the first target's budget; all B_j ascend. A network with latencies c_j meets the
tuple at s exactly if B_j^-1(c_j) <= s for every j, so

    c = max_j B_j^-1(c_j),      B_j^-1(x) = the least s with B_j(s) >= x

is its latency, in the first target's ms: everything that works for one budget works for tuples. Below the first and
above the last tuple the polyline goes on in proportion to it.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from orchestrator.config import Config
from orchestrator.controllers.controller import LatencyModel
from orchestrator.record.store import RunStore, Trial
from searchspaces.errors import BudgetError, StoreError
from searchspaces.space import Tokens

Array = NDArray[np.float64]
TOGETHER = "together"   # label of the goal over all targets


@dataclass(frozen=True)
class Goal:
    """`budgets_ms` are of the first of `targets` (labels). `tuples_ms`: the K tuples of budgets, one number per target,
    where all of them hold at once; otherwise empty, and `targets` has one member."""

    label: str
    targets: tuple[str, ...]
    budgets_ms: tuple[float, ...]
    tuples_ms: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Goal:
        """The inverse of `asdict`, where JSON has made lists of tuples."""
        return cls(str(value["label"]), tuple(value["targets"]), tuple(value["budgets_ms"]),
                   tuple(tuple(row) for row in value["tuples_ms"]))

    def latency_ms(self, by_target: Mapping[str, ArrayLike]) -> Array:
        """float64[N]: what is compared with a budget, from latencies[N] in ms by target; nan where one is nan."""
        columns = [np.asarray(by_target[label], dtype=np.float64) for label in self.targets]
        if not self.tuples_ms:
            return columns[0]
        return np.max([self._inverse(j, column) for j, column in enumerate(columns)], axis=0)

    def budgets_at(self, budget_ms: float) -> dict[str, float]:
        """The budget of every target at this budget of the first."""
        if not self.tuples_ms:
            return {self.targets[0]: budget_ms}
        points = np.array(self.tuples_ms)
        first, last = points[0] * budget_ms / points[0, 0], points[-1] * budget_ms / points[-1, 0]
        if budget_ms <= points[0, 0] or budget_ms >= points[-1, 0]:
            return dict(zip(self.targets, (first if budget_ms <= points[0, 0] else last).tolist()))
        return {label: float(np.interp(budget_ms, points[:, 0], points[:, j])) for j, label in enumerate(self.targets)}

    def _inverse(self, j: int, latency_N: Array) -> Array:
        """B_j^-1. Where equal budgets follow each other B_j is flat, and its inverse jumps from their first s to their
        last."""
        points = np.array(self.tuples_ms)
        knots = np.unique(points[:, j])
        first = np.array([points[points[:, j] == knot, 0].min() for knot in knots])
        last = np.array([points[points[:, j] == knot, 0].max() for knot in knots])
        upper = np.searchsorted(knots, latency_N)           # knots[upper - 1] < latency <= knots[upper]
        at, below = np.clip(upper, 0, len(knots) - 1), np.clip(upper - 1, 0, len(knots) - 1)
        share = (latency_N - knots[below]) / np.where(at > below, knots[at] - knots[below], 1.0)
        within = last[below] + share * (first[at] - last[below])
        beyond = latency_N * points[-1, 0] / points[-1, j]
        before = latency_N * first[0] / knots[0]
        return np.where(latency_N <= knots[0], before, np.where(latency_N > knots[-1], beyond, within))


@dataclass(frozen=True, eq=False)
class GoalLatency:
    """A LatencyModel of a goal over several targets."""

    goal: Goal
    models: Mapping[str, LatencyModel]

    def predict(self, tokens_NT: Tokens) -> Array:
        return self.goal.latency_ms({label: self.models[label].predict(tokens_NT) for label in self.goal.targets})


def goal_model(goal: Goal, models: Mapping[str, LatencyModel]) -> LatencyModel:
    return GoalLatency(goal, models) if goal.tuples_ms else models[goal.targets[0]]


def make_goals(config: Config, budgets_ms: Mapping[str, Sequence[float]]) -> list[Goal]:
    """From the ascending budgets of every target."""
    labels = config.labels
    if config.budgets.together and len(labels) > 1:
        tuples = tuple(zip(*(budgets_ms[label] for label in labels), strict=True))
        return [Goal(TOGETHER, tuple(labels), tuple(t[0] for t in tuples), tuples)]
    return [Goal(label, (label,), tuple(sorted(set(budgets_ms[label])))) for label in labels]


# --- in the run folder -----------------------------------------------------------------------------------------------


def read_state(store: RunStore, label: str) -> dict[str, Any]:
    """state.json; that of an earlier version, which knew one target, in today's form with this label."""
    state = store.state()
    if "target_id" not in state:
        return state
    old = ("target_id", "target", "reference_ms", "fastest_ms", "slowest_ms")
    state["targets"] = {label: {key: state[key] for key in old if key in state}}
    if "budgets_ms" in state:
        state["goals"] = [asdict(Goal(label, (label,), tuple(state["budgets_ms"])))]
    return state


def target_state(store: RunStore, label: str) -> dict[str, Any]:
    """`target_id`, `target` (identity), `reference_ms`; once measured also `fastest_ms` and `slowest_ms`."""
    return dict(read_state(store, label).get("targets", {}).get(label, {}))


def update_target_state(store: RunStore, label: str, **facts: Any) -> None:
    targets = read_state(store, label).get("targets", {})
    store.update_state(targets=targets | {label: targets.get(label, {}) | facts})


def save_goals(store: RunStore, goals: Sequence[Goal]) -> None:
    store.update_state(goals=[asdict(goal) for goal in goals])


def read_goals(store: RunStore, config: Config) -> list[Goal]:
    """StoreError before the run has measured its targets."""
    found = read_state(store, config.labels[0]).get("goals")
    if not found:
        raise StoreError(f"run {store.name} has not measured its target yet; go on with: {store.resume_command}")
    return [Goal.from_json(goal) for goal in found]


def goal_named(goals: Sequence[Goal], label: str | None) -> Goal:
    """BudgetError where the label is unknown, or missing with several goals."""
    labels = [goal.label for goal in goals]
    if label is None and len(goals) == 1:
        return goals[0]
    if label not in labels:
        what = f"'{label}' is not one of them" if label else "a budget needs to say which one it is for"
        raise BudgetError(f"this run has models for {', '.join(labels)}, and {what}; add --target {labels[0]}")
    return goals[labels.index(label)]


def trial_latencies(trial: Trial, labels: Sequence[str]) -> dict[str, float]:
    """Latency in ms by target, nan where unknown; a trial of an earlier version knows the first target's alone."""
    known = {entry["target"]: entry["latency_ms"] for entry in trial.latencies or ()}
    if not known and trial.latency_ms is not None:
        known = {labels[0]: trial.latency_ms}
    return {label: known.get(label, float("nan")) for label in labels}
