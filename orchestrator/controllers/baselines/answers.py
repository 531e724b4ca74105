"""Controllers that answer a budget with the best trial under it, and what they share: the log and what is pending.

What they propose must depend on the seed, the observed trials and what is pending alone, so that a controller that
observes a recorded log goes on where the original stood (see Controller).
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.controllers.controller import Answer, Controller, LatencyModel, Observation, Proposal, Task
from searchspaces.space import SearchSpace, Tokens


class ObservedTrials:
    """The log of a search as far as answers need it. `successful` keeps the order of the log; tokens are canonical."""

    def __init__(self, space: SearchSpace, latency: LatencyModel | None = None) -> None:
        self.space = space
        self.latency = latency
        self.count = 0  # failed ones too
        self.successful: list[Observation] = []

    def add(self, trials: Sequence[Observation]) -> Tokens:
        """int8[N, T]: their canonical tokens."""
        if not trials:
            return np.empty((0, len(self.space.choices)), dtype=np.int8)
        tokens_NT = self.space.canonical(np.stack([np.asarray(trial.tokens, dtype=np.int8) for trial in trials]))
        self.count += len(trials)
        self.successful += [Observation(tokens_T, trial.accuracy, trial.latency_ms)
                            for tokens_T, trial in zip(tokens_NT, trials)
                            if math.isfinite(trial.accuracy) and math.isfinite(trial.latency_ms)]
        return tokens_NT

    def answers(self, budgets_ms: Sequence[float], alternatives: int = 1) -> list[list[Answer]]:
        """As Controller.generate: the most accurate trials at or under each budget, the fastest if there is none."""
        if not self.successful:
            return [[self._uninformed(float(budget_ms))] for budget_ms in budgets_ms]
        return [best_trials(self.successful, float(budget_ms), alternatives) for budget_ms in budgets_ms]

    def _uninformed(self, budget_ms: float) -> Answer:
        """Before any trial: the architecture that the space says is the fastest."""
        tokens_T = self.space.canonical(self.space.extremes())[0]
        latency_ms = math.nan if self.latency is None else float(self.latency.predict(tokens_T[None])[0])
        return Answer(budget_ms, tokens_T, latency_ms, math.nan, math.nan, False, latency_ms <= budget_ms)

    def state_dict(self) -> dict[str, Any]:
        if not self.successful:
            return {"trials": 0}
        return {"trials": len(self.successful), "tokens": np.stack([t.tokens for t in self.successful]),
                "accuracy": np.array([t.accuracy for t in self.successful]),
                "latency_ms": np.array([t.latency_ms for t in self.successful])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not int(state["trials"]):
            self.successful = []
            return
        columns = (np.asarray(state["tokens"], dtype=np.int8), np.asarray(state["accuracy"], dtype=np.float64),
                   np.asarray(state["latency_ms"], dtype=np.float64))
        self.successful = [Observation(tokens_T, float(a), float(ms))
                           for tokens_T, a, ms in zip(*columns, strict=True)]


def best_trials(trials: Sequence[Observation], budget_ms: float, alternatives: int) -> list[Answer]:
    """The most accurate trials at or under the budget, ties to the faster; the fastest of all where there is none."""
    under = sorted((t for t in trials if t.latency_ms <= budget_ms), key=lambda t: (-t.accuracy, t.latency_ms))
    chosen = under[:alternatives] or [min(trials, key=lambda t: t.latency_ms)]
    return [Answer(budget_ms, t.tokens, t.latency_ms, t.accuracy, t.accuracy, True, bool(under)) for t in chosen]


class TrialAnswers(Controller):
    """A controller that only decides what is proposed next: subclasses write `propose`."""

    def __init__(self, space: SearchSpace, settings: Any, task: Task) -> None:
        super().__init__(space, settings, task)
        self._log = ObservedTrials(space, task.latency)
        self._pending: set[bytes] = set()
        self._taken: set[bytes] = set()  # observed or pending

    @property
    def trials(self) -> list[Observation]:
        """The successful ones, in the order of the log."""
        return self._log.successful

    @property
    def observed(self) -> int:
        """Trials in the log, failed ones too."""
        return self._log.count

    @property
    def pending(self) -> int:
        return len(self._pending)

    def is_new(self, tokens_T: Tokens) -> bool:
        """Neither observed nor pending."""
        return tokens_T.tobytes() not in self._taken

    def take(self, tokens_T: Tokens, budget_ms: float | None = None) -> Proposal:
        """The architecture as a proposal, pending until it is observed."""
        self._pending.add(tokens_T.tobytes())
        self._taken.add(tokens_T.tobytes())
        return Proposal(tokens_T, budget_ms)

    def observe(self, trials: Sequence[Observation]) -> None:
        keys = {row.tobytes() for row in self._log.add(trials)}
        self._taken |= keys
        self._pending -= keys

    def generate(self, budgets_ms: Sequence[float], alternatives: int = 1) -> list[list[Answer]]:
        return self._log.answers(budgets_ms, alternatives)

    def state_dict(self) -> dict[str, Any]:
        return self._log.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._log.load_state_dict(state)


def within(task: Task, tokens_NT: Tokens, budget_ms: float) -> NDArray[np.bool_]:
    """bool[N]: predicted at or under the budget; all where latency is known only through trials."""
    if task.latency is None or not len(tokens_NT):
        return np.ones(len(tokens_NT), dtype=bool)
    return task.latency.predict(tokens_NT) <= budget_ms
