"""UNAS where accuracies come from a table or from training: distributions that follow the trials (ours).

Every `batch` trials the beliefs are fitted anew and one distribution per budget follows them from the uniform one
(beliefs.py). Proposals are samples of the distributions, budgets in turn; answers are the trials under a budget that
are believed to be the most accurate, because one cheap training is a noisy witness.

With earlier runs (`warm_start`) on other tasks their signals are part of the beliefs as far as the trials bear them out
(prediction/earlier.py), their latencies count, too. Trials of the same task count as this run's: distributions follow
them before the first trial, and every second architecture of the start is a sample.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from orchestrator.controllers.baselines.answers import TrialAnswers, within
from orchestrator.controllers.controller import Answer, Observation, Proposal, Task
from orchestrator.controllers.unas.beliefs import Beliefs, Logits, fit_posterior, follow
from orchestrator.controllers.unas.derived import sample, settled, softmax
from orchestrator.controllers.unas.settings import BlackBoxOptions
from orchestrator.prediction.earlier import InformedPosterior, Signals, posterior_from_state, same_task_trials
from orchestrator.prediction.posterior import Posterior
from orchestrator.prediction.predictor import LEAST_NETWORKS
from searchspaces.space import SearchSpace, Tokens

DRAWS = 64      # from a distribution, one of which is proposed
FLATTER = 4     # times that a distribution without new samples is flattened before chance decides


class BlackBoxUnas(TrialAnswers):
    def __init__(self, space: SearchSpace, settings: BlackBoxOptions, task: Task) -> None:
        super().__init__(space, settings, task)
        self._before = same_task_trials(space, task.earlier)
        with threadpool_limits(1):
            self._signals = Signals.learn(space, task.earlier, settings.posterior, task.seed)
        self._successes: list[int] = []         # successful trials among the first so many of the log
        self._round = 0                         # trials of the log that the distributions follow
        self._beliefs: Beliefs | None = None
        self._logits: Logits = []
        self._posterior: tuple[int, Posterior | InformedPosterior | None] = (0, None)  # for answers, of so many trials

    def observe(self, trials: Sequence[Observation]) -> None:
        for trial in trials:
            super().observe([trial])
            self._successes.append(len(self.trials))

    # --- proposals -------------------------------------------------------------------------------------------------

    def propose(self, n: int) -> list[Proposal]:
        self._follow()
        wanted: list[Proposal] = []
        while len(wanted) < n and (proposal := self._sampled() or self._random()) is not None:
            wanted.append(proposal)
        return wanted

    def _follow(self) -> None:
        """A round: how many trials it learns from depends on the length of the log alone."""
        behind = (self.observed - self.settings.warm_up) % self.settings.batch
        length = self.observed - behind
        successes = self._successes[length - 1] if length >= self.settings.warm_up else 0
        trials = self._before + self.trials[:successes]
        if not successes or len(trials) < LEAST_NETWORKS:
            self._follow_earlier()
        elif length != self._round:
            self._learn(trials, length)

    def _follow_earlier(self) -> None:
        """Before the first round: trials of the same task. Those of other tasks might mislead and wait for the first
        trials, which show whether they do."""
        if self._beliefs is None and len(self._before) >= LEAST_NETWORKS:
            self._learn(self._before, 0)

    @cached_property
    def _elsewhere(self) -> list[Observation]:
        """Trials of other tasks whose latency on this device is known."""
        return [Observation(row, float(accuracy), float(ms)) for run in self.task.earlier if not run.same_task
                for row, accuracy, ms in zip(self.space.canonical(run.tokens_NT), run.accuracy_N, run.latency_ms_N)
                if np.isfinite(accuracy) and np.isfinite(ms)]

    def _learn(self, trials: Sequence[Observation], length: int) -> None:
        seed = self._seed(length)
        with threadpool_limits(1):
            self._beliefs = Beliefs(self.space, trials, self.task.latency, self.task.budgets_ms, self.settings, seed,
                                    self._signals, self._elsewhere)
            self._logits = follow(self._beliefs, seed)
        self._round = length

    def _seed(self, length: int) -> int:
        return int(np.random.default_rng([self.task.seed, length]).integers(2**31))

    def _sampled(self) -> Proposal | None:
        """Of new samples for one budget the one with the least believed loss."""
        if self._beliefs is None or (self._round < self.settings.warm_up and len(self._taken) % 2):
            return None
        position, count = len(self._taken), len(self.task.budgets_ms)
        turn = np.random.default_rng([self.task.seed, position // count]).permutation(count)[position % count]
        rng = np.random.default_rng([self.task.seed, position])
        probabilities = [softmax(logits_BK[turn]) for logits_BK in self._logits]
        for attempt in range(FLATTER):
            rows_NT = self._new(self.space.repair(rng, sample(rng, probabilities, DRAWS, attempt / FLATTER)))
            if len(rows_NT):
                best = self._beliefs.losses(rows_NT)[:, turn].argmin()
                return self.take(rows_NT[best], self.task.budgets_ms[turn])
        return None

    def _random(self) -> Proposal | None:
        """Uniform, under the largest budget where that is known and possible."""
        rng = np.random.default_rng([self.task.seed, len(self._taken)])
        rows_NT = self._new(self.space.sample_uniform(rng, DRAWS))
        fitting_NT = rows_NT[within(self.task, rows_NT, max(self.task.budgets_ms))]
        chosen = [*fitting_NT, *rows_NT][:1]
        return self.take(chosen[0]) if chosen else None

    def _new(self, rows_NT: Tokens) -> Tokens:
        return rows_NT[[self.is_new(row) for row in rows_NT]]

    # --- answers ---------------------------------------------------------------------------------------------------

    def generate(self, budgets_ms: Sequence[float], alternatives: int = 1) -> list[list[Answer]]:
        believed_M = self._believed()
        if believed_M is None:
            return super().generate(budgets_ms, alternatives)
        return [self._best(believed_M, float(budget_ms), alternatives) or super(BlackBoxUnas, self).generate(
            [budget_ms])[0] for budget_ms in budgets_ms]

    def _best(self, believed_M: NDArray[np.float64], budget_ms: float, alternatives: int) -> list[Answer]:
        under = [(mean, trial) for mean, trial in zip(believed_M, self.trials) if trial.latency_ms <= budget_ms]
        best = sorted(under, key=lambda pair: (-pair[0], pair[1].latency_ms))[:alternatives]
        return [Answer(budget_ms, trial.tokens, trial.latency_ms, trial.accuracy, float(mean), True, True)
                for mean, trial in best]

    def _believed(self) -> NDArray[np.float64] | None:
        """float64[M]: the accuracy of every successful trial as all of them make it look."""
        count, posterior = self._posterior
        trials = self._before + self.trials
        if count != len(self.trials) and len(trials) >= LEAST_NETWORKS:
            with threadpool_limits(1):
                posterior = fit_posterior(self.space, trials, self.settings, self._seed(len(self.trials)),
                                          self._signals)
            self._posterior = len(self.trials), posterior
        if posterior is None or not self.trials:
            return None
        return posterior.believe(self.space.features(np.stack([trial.tokens for trial in self.trials]))).mean_N

    # --- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        self._believed()
        posterior = self._posterior[1]
        learned = {} if posterior is None else posterior.state_dict()
        return super().state_dict() | {f"posterior.{name}": value for name, value in learned.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        learned = {name.removeprefix("posterior."): value for name, value in state.items()
                   if name.startswith("posterior.")}
        self._posterior = len(self.trials), posterior_from_state(learned) if learned else None

    def metrics(self) -> dict[str, float]:
        if not self._logits:
            return {}
        return settled([softmax(row_K) for logits_BK in self._logits for row_K in logits_BK])
