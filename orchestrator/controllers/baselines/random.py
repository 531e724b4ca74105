"""Uniform random search: the baseline that every other controller has to beat."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from orchestrator.controllers.controller import Answer, Controller, Observation, Proposal
from searchspaces.space import Tokens

BLOCK = 256            # architectures drawn at a time; block b is a function of (seed, b)
EMPTY_BLOCKS = 20      # in a row, without a single new architecture: the space is exhausted


class RandomSearch(Controller):
    """Proposes distinct uniform samples; answers with the best trial under the budget. Nothing is learnt."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._taken: set[bytes] = set()
        self._trials: list[Observation] = []

    def propose(self, n: int) -> list[Proposal]:
        proposals: list[Proposal] = []
        block = empty = 0
        while len(proposals) < n and empty < EMPTY_BLOCKS:
            fresh = [row for row in self._block(block) if row.tobytes() not in self._taken]
            empty = 0 if fresh else empty + 1
            for row in fresh:
                if len(proposals) < n and row.tobytes() not in self._taken:
                    self._taken.add(row.tobytes())
                    proposals.append(Proposal(row))
            block += 1
        return proposals

    def _block(self, index: int) -> Tokens:
        rows_NT = self.space.sample_uniform(np.random.default_rng([self.task.seed, index]), BLOCK)
        if self.task.latency is None:
            return rows_NT
        return rows_NT[self.task.latency.predict(rows_NT) <= max(self.task.budgets_ms)]

    def observe(self, trials: Sequence[Observation]) -> None:
        for trial in trials:
            tokens_T = self.space.canonical(np.asarray(trial.tokens, dtype=np.int8)[None])[0]
            self._taken.add(tokens_T.tobytes())
            if np.isfinite(trial.accuracy) and np.isfinite(trial.latency_ms):
                self._trials.append(Observation(tokens_T, trial.accuracy, trial.latency_ms))

    def generate(self, budgets_ms: Sequence[float], alternatives: int = 1) -> list[list[Answer]]:
        return [self._answers(float(budget_ms), alternatives) for budget_ms in budgets_ms]

    def _answers(self, budget_ms: float, alternatives: int) -> list[Answer]:
        if not self._trials:
            tokens_T = self.space.canonical(self.space.extremes())[0]
            return [Answer(budget_ms, tokens_T, float("nan"), float("nan"), float("nan"), False, False)]
        under = sorted((t for t in self._trials if t.latency_ms <= budget_ms), key=lambda t: -t.accuracy)[:alternatives]
        chosen = under or [min(self._trials, key=lambda t: t.latency_ms)]
        return [Answer(budget_ms, t.tokens, t.latency_ms, t.accuracy, t.accuracy, True, bool(under)) for t in chosen]

    def state_dict(self) -> dict[str, Any]:
        if not self._trials:
            return {"trials": 0}
        return {"trials": len(self._trials), "tokens": np.stack([t.tokens for t in self._trials]),
                "accuracy": np.array([t.accuracy for t in self._trials]),
                "latency_ms": np.array([t.latency_ms for t in self._trials])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not int(state["trials"]):
            self._trials = []
            return
        columns = (np.asarray(state["tokens"], dtype=np.int8), np.asarray(state["accuracy"], dtype=np.float64),
                   np.asarray(state["latency_ms"], dtype=np.float64))
        self._trials = [Observation(tokens, float(a), float(ms)) for tokens, a, ms in zip(*columns, strict=True)]
