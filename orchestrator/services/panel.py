"""The controllers of a run: one per goal over one log of trials, so that what one has trained teaches all of them.

A trial's accuracy is the same for every goal, its latency is the goal's own. Proposals take turns. What two controllers
propose at once is evaluated once: both observe it.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.controllers.controller import Answer, Controller, Observation, Proposal
from orchestrator.record.goals import Goal, trial_latencies
from orchestrator.record.store import Trial
from searchspaces.space import Tokens

Array = NDArray[np.float64]


class Panel:
    """`controllers` in the order of `goals`; `labels` of all targets of the run, in its order."""

    def __init__(self, goals: Sequence[Goal], controllers: Sequence[Controller], labels: Sequence[str]) -> None:
        self.goals, self.controllers, self._labels = list(goals), list(controllers), list(labels)
        self._pending: set[bytes] = set()
        self._turn = 0

    def propose(self, n: int) -> list[tuple[str, Proposal]]:
        """At most n proposals with the label of their goal, all different and none under evaluation."""
        wanted: list[tuple[str, Proposal]] = []
        for turn in range(len(self.goals)):
            left = len(self.goals) - turn
            at = (self._turn + turn) % len(self.goals)
            for proposal in self.controllers[at].propose(math.ceil((n - len(wanted)) / left)):
                if proposal.tokens.tobytes() not in self._pending:
                    self._pending.add(proposal.tokens.tobytes())
                    wanted.append((self.goals[at].label, self._numbered(proposal, at)))
        self._turn = (self._turn + 1) % len(self.goals)
        return wanted

    def _numbered(self, proposal: Proposal, at: int) -> Proposal:
        """Batches of different controllers are different ones."""
        if proposal.batch is None:
            return proposal
        return replace(proposal, batch=proposal.batch * len(self.goals) + at)

    def observe(self, trials: Sequence[Trial]) -> None:
        """Recorded trials in the order of the log."""
        self._pending -= {np.array(trial.tokens, dtype=np.int8).tobytes() for trial in trials}
        if not trials:
            return
        by_trial = [trial_latencies(trial, self._labels) for trial in trials]
        by_target = {label: np.array([row[label] for row in by_trial]) for label in self._labels}
        for goal, controller in zip(self.goals, self.controllers):
            controller.observe([observation(trial, float(ms))
                                for trial, ms in zip(trials, goal.latency_ms(by_target))])

    def generate(self, goal: Goal, budgets_ms: Sequence[float], alternatives: int = 1) -> list[list[Answer]]:
        """The answers of the goal's controller."""
        return self.controllers[self.goals.index(goal)].generate(budgets_ms, alternatives)

    def rewards(self, purposes: Sequence[str | None], tokens_NT: Tokens, accuracy_N: Array,
                by_target: Mapping[str, Array]) -> Array:
        """float64[N]: what each is worth to the goal it was proposed for; nan without a goal or a scalar reward."""
        reward_N = np.full(len(tokens_NT), math.nan)
        for goal, controller in zip(self.goals, self.controllers):
            mine = np.array([purpose == goal.label for purpose in purposes])
            if mine.any():
                latency_N = goal.latency_ms(by_target)[mine]
                found = controller.reward(tokens_NT[mine], accuracy_N[mine], latency_N)
                reward_N[mine] = math.nan if found is None else found
        return reward_N

    def metrics(self) -> dict[str, float]:
        """Of several controllers with the goal's label in front."""
        if len(self.goals) == 1:
            return self.controllers[0].metrics()
        return {f"{goal.label}/{name}": value for goal, controller in zip(self.goals, self.controllers)
                for name, value in controller.metrics().items()}

    def close(self) -> None:
        for controller in self.controllers:
            controller.close()

    def state_dicts(self) -> dict[str, dict[str, Any]]:
        """By label of the goal."""
        return {goal.label: controller.state_dict() for goal, controller in zip(self.goals, self.controllers)}


def observation(trial: Trial, latency_ms: float) -> Observation:
    """What a controller sees of a trial."""
    return Observation(np.array(trial.tokens, dtype=np.int8), nan_for_none(trial.accuracy), latency_ms, trial.error)


def nan_for_none(value: float | None) -> float:
    return math.nan if value is None else value
