"""What earlier runs give PNAG (`warm_start`): trials where the task is the same, else signals; and a better start.

Trials of the same task count like those of this run, save that nobody evaluated them in it: they are not proposed
again, and an answer among them is not an observed one. Signals of other tasks enter the posterior with as much trust as
this run's trials give them (prediction/earlier.py).

Shape legend: N architectures, T positions, K earlier runs on other tasks.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from itertools import chain, zip_longest

import numpy as np
from numpy.typing import NDArray

from orchestrator.controllers.controller import Proposal, Task
from orchestrator.controllers.pnag.candidates import distinct, initial_design, near_extremes
from orchestrator.controllers.pnag.settings import PnagSettings
from orchestrator.prediction.earlier import Signals, same_task_trials
from orchestrator.prediction.predictor import LEAST_NETWORKS, predictor_of_trials
from searchspaces.space import SearchSpace, Tokens

START_SAMPLES = 2000    # uniform architectures among which the most promising are looked for, beside the earlier trials


class Earlier:
    def __init__(self, space: SearchSpace, settings: PnagSettings, task: Task) -> None:
        self._space, self._settings, self._task = space, settings, task
        self.trials = same_task_trials(space, task.earlier)
        self.keys = {trial.tokens.tobytes() for trial in self.trials}
        others = [(space.canonical(run.tokens_NT), run.latency_ms_N) for run in task.earlier if not run.same_task]
        empty_NT = np.empty((0, len(space.choices)), dtype=np.int8)
        self.tokens_NT = distinct(np.concatenate([empty_NT, *(tokens_NT for tokens_NT, _ in others)]))
        self.known_ms = {tokens_T.tobytes(): float(ms) for tokens_NT, latency_N in others
                         for tokens_T, ms in zip(tokens_NT, latency_N) if np.isfinite(ms)}

    @cached_property
    def signals(self) -> Signals | None:
        return Signals.learn(self._space, self._task.earlier, self._settings.posterior, self._task.seed)

    def warmup(self, planned: int) -> int:
        """Random architectures before the first round: fewer by the trials known, half where signals lead the way."""
        left = max(0, planned - len(self.trials))
        return -(-left // 2) if len(self.tokens_NT) else left

    def start(self, count: int, rng: np.random.Generator) -> list[Proposal]:
        """The random start, every second one replaced by what is most promising under a budget according to the earlier
        runs, all alike; so the first trials also tell whether these mislead."""
        largest_ms = max(self._task.budgets_ms)
        random = initial_design(self._space, self._task.latency, largest_ms, count, rng)
        mixed = chain.from_iterable(zip_longest(self._promising(-(-count // 2), rng), random))
        proposals, seen = [], set(self.keys)
        for proposal in mixed:
            if proposal is not None and proposal.tokens.tobytes() not in seen:
                seen.add(proposal.tokens.tobytes())
                proposals.append(proposal)
        return proposals[:count]

    def _promising(self, count: int, rng: np.random.Generator) -> list[Proposal]:
        """The largest mean signal under each of `count` budgets across the task's range, in random order."""
        latency = self._latency()
        if latency is None or self.signals is None:
            return []
        pool_NT = distinct(np.concatenate([self.tokens_NT, self._space.sample_uniform(rng, START_SAMPLES),
                                           near_extremes(self._space, START_SAMPLES // 2, rng)]))
        latency_N = latency(pool_NT)
        score_N = self.signals.believe(self._space.features(pool_NT)).mean_N
        free_N, proposals = np.ones(len(pool_NT), dtype=bool), []
        for budget_ms in rng.permutation(np.linspace(min(self._task.budgets_ms), max(self._task.budgets_ms), count)):
            under_N = free_N & (latency_N <= budget_ms)
            if under_N.any():
                best = int(np.where(under_N, score_N, -np.inf).argmax())
                free_N[best] = False
                proposals.append(Proposal(pool_NT[best], float(budget_ms)))
        return proposals

    def _latency(self) -> Callable[[Tokens], NDArray[np.float64]] | None:
        """This device's, as the task or the earlier runs' trials know it."""
        if self._task.latency is not None:
            return self._task.latency.predict
        if len(self.known_ms) < LEAST_NETWORKS:
            return None
        known_NT = np.array([np.frombuffer(key, dtype=np.int8) for key in self.known_ms])
        model = predictor_of_trials(self._space, known_NT, np.array(list(self.known_ms.values())))
        return lambda tokens_NT: np.array([self.known_ms.get(row.tobytes(), ms)
                                           for row, ms in zip(tokens_NT, model.predict(tokens_NT))])
