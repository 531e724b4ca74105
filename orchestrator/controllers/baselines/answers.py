"""What the baselines share: they remember the trials and answer a budget with the best trial under it.

A baseline only decides what is proposed next. It must decide from the seed, the observed trials and what is pending
alone, so that a controller that observes a recorded log goes on where the original stood (see Controller).
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.controllers.controller import Answer, Controller, Observation, Proposal, Task
from searchspaces.space import SearchSpace, Tokens


class TrialAnswers(Controller):
    """Subclasses write `propose`. `trials` are the successful ones in the order of the log, tokens canonical."""

    def __init__(self, space: SearchSpace, settings: Any, task: Task) -> None:
        super().__init__(space, settings, task)
        self.trials: list[Observation] = []
        self.observed = 0                      # trials in the log, failed ones too
        self._pending: set[bytes] = set()
        self._taken: set[bytes] = set()        # observed or pending

    def is_new(self, tokens_T: Tokens) -> bool:
        """Neither observed nor pending."""
        return tokens_T.tobytes() not in self._taken

    def take(self, tokens_T: Tokens, budget_ms: float | None = None) -> Proposal:
        """The architecture as a proposal, pending until it is observed."""
        self._pending.add(tokens_T.tobytes())
        self._taken.add(tokens_T.tobytes())
        return Proposal(tokens_T, budget_ms)

    @property
    def pending(self) -> int:
        return len(self._pending)

    def observe(self, trials: Sequence[Observation]) -> None:
        for trial in trials:
            tokens_T = self.space.canonical(np.asarray(trial.tokens, dtype=np.int8)[None])[0]
            self.observed += 1
            self._taken.add(tokens_T.tobytes())
            self._pending.discard(tokens_T.tobytes())
            if np.isfinite(trial.accuracy) and np.isfinite(trial.latency_ms):
                self.trials.append(Observation(tokens_T, trial.accuracy, trial.latency_ms))

    def generate(self, budgets_ms: Sequence[float], alternatives: int = 1) -> list[list[Answer]]:
        if not self.trials:
            return [[uninformed(self.space, self.task, float(budget_ms))] for budget_ms in budgets_ms]
        return [best_trials(self.trials, float(budget_ms), alternatives) for budget_ms in budgets_ms]

    def state_dict(self) -> dict[str, Any]:
        if not self.trials:
            return {"trials": 0}
        return {"trials": len(self.trials), "tokens": np.stack([t.tokens for t in self.trials]),
                "accuracy": np.array([t.accuracy for t in self.trials]),
                "latency_ms": np.array([t.latency_ms for t in self.trials])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not int(state["trials"]):
            self.trials = []
            return
        columns = (np.asarray(state["tokens"], dtype=np.int8), np.asarray(state["accuracy"], dtype=np.float64),
                   np.asarray(state["latency_ms"], dtype=np.float64))
        self.trials = [Observation(tokens_T, float(a), float(ms)) for tokens_T, a, ms in zip(*columns, strict=True)]


def best_trials(trials: Iterable[Observation], budget_ms: float, alternatives: int) -> list[Answer]:
    """The most accurate trials at or under the budget, ties to the faster; the fastest of all where there is none."""
    trials = list(trials)
    under = sorted((t for t in trials if t.latency_ms <= budget_ms), key=lambda t: (-t.accuracy, t.latency_ms))
    chosen = under[:alternatives] or [min(trials, key=lambda t: t.latency_ms)]
    return [Answer(budget_ms, t.tokens, t.latency_ms, t.accuracy, t.accuracy, True, bool(under)) for t in chosen]


def uninformed(space: SearchSpace, task: Task, budget_ms: float) -> Answer:
    """Before any trial: the architecture that the space says is the fastest."""
    tokens_T = space.canonical(space.extremes())[0]
    latency_ms = float("nan") if task.latency is None else float(task.latency.predict(tokens_T[None])[0])
    return Answer(budget_ms, tokens_T, latency_ms, float("nan"), float("nan"), False, latency_ms <= budget_ms)


def within(task: Task, tokens_NT: Tokens, budget_ms: float) -> NDArray[np.bool_]:
    """bool[N]: predicted at or under the budget; all where latency is known only through trials."""
    if task.latency is None or not len(tokens_NT):
        return np.ones(len(tokens_NT), dtype=bool)
    return task.latency.predict(tokens_NT) <= budget_ms
