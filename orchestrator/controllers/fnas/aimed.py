"""Drawing a batch for many budgets: which of the policy's samples are trained, for which T (section 7, step 2; ours).

As in batch.py the policy proposes and the critic picks, but V predicts the accuracy, which is the same for all T, and
the latency is known or predicted: any sample has a promise for any T. Every training of a batch has a T of its own and
takes the sample that promises it most: the optimistic improvement on the best network known under T, times the chance
to be under T. The rest is trusted or known, up to the shares of batch.py, with the T that it was drawn for.

Shape legend: N samples, S trainings of a batch, M trained networks.
"""
from __future__ import annotations

from collections.abc import Callable, Set

import numpy as np
from numpy.typing import NDArray

from orchestrator.controllers.controller import LatencyModel
from orchestrator.controllers.fnas.batch import OPTIMISM, RANDOM_TRIES, Batch, Gate, Sample, judged
from orchestrator.controllers.fnas.budgets import Budgets
from orchestrator.controllers.fnas.critic import Critic
from orchestrator.controllers.fnas.hindsight import Hindsight, RewardAt
from orchestrator.controllers.fnas.policy import LstmPolicy
from orchestrator.controllers.fnas.settings import CriticSettings
from orchestrator.prediction.chance import LEAST_ERROR, chance_under, typical_error
from orchestrator.prediction.predictor import LEAST_NETWORKS, predictor_of_trials
from searchspaces.space import SearchSpace, Tokens

Floats = NDArray[np.float64]
LEAST_GAIN = 1e-3       # share of the reward, so that samples are ordered also where none promises an improvement
GROWTH = 1.1            # trained networks grow by this factor between two fits of a latency model


class Latencies:
    """Latency of any network: the task's model, or one that is fitted to the trials."""

    def __init__(self, space: SearchSpace, model: LatencyModel | None, trained: Hindsight) -> None:
        self._space, self._given, self._trained = space, model, trained
        self._model, self._fitted = model, 0
        self._error = LEAST_ERROR

    @property
    def known(self) -> bool:
        return self._given is not None or len(self._trained) >= LEAST_NETWORKS

    def refit(self) -> None:
        """Does nothing while little was trained since the last time."""
        if not self.known or len(self._trained) < max(LEAST_NETWORKS, GROWTH * self._fitted):
            return
        self._fitted = len(self._trained)
        tokens_MT, latency_M = self._trained.tokens_MT, self._trained.latency_ms_M
        self._model = self._given or predictor_of_trials(self._space, tokens_MT, latency_M)
        self._error = typical_error(self._model, tokens_MT, latency_M)

    def predict(self, tokens_NT: Tokens) -> Floats:
        """float64[N] in ms, nan where nothing is known."""
        return np.full(len(tokens_NT), np.nan) if self._model is None else self._model.predict(tokens_NT)

    def chance(self, latency_N: Floats, limit_ms: float) -> Floats:
        """P(latency <= limit) of predicted latencies."""
        return chance_under(latency_N, limit_ms, self._error)


class AimedSampler:
    """Draws batches; pure given the order of calls and of what is trained."""

    def __init__(self, space: SearchSpace, settings: CriticSettings, critic: Critic, budgets: Budgets,
                 trained: Hindsight, reward_at: RewardAt, latency: LatencyModel | None,
                 allowed: Callable[[Tokens], NDArray[np.bool_]], largest_ms: float) -> None:
        self._space, self._settings, self._critic, self._budgets = space, settings, critic, budgets
        self._trained, self._reward_at, self._allowed = trained, reward_at, allowed
        self._largest_ms = largest_ms
        self._latencies = Latencies(space, latency, trained)
        self.gate = Gate(settings, critic)

    def draw(self, policy: LstmPolicy, version: int, taken: Set[bytes], size: int, rng: np.random.Generator) -> Batch:
        """A batch of `size` fresh samples; `taken` are keys in flight or failed."""
        self._latencies.refit()
        budget_N = self._budgets.draw(size + self._settings.extra_draws, rng)
        drawn = policy.sample(len(budget_N), rng, self._budgets.weights(budget_N))
        samples = self._samples(drawn.tokens_NT, drawn.log_probs_NT, budget_N, version)
        batch, picking = Batch(), self.gate.open and self._latencies.known
        new = list({s.key: s for s in reversed(samples) if self._trained.row(s.key) is None and s.key not in taken}
                   .values())[::-1]
        if picking and new:
            self._pick(batch, new, policy, size, rng)
        else:
            batch.to_train += new[:size]
        if not batch.to_train:
            self._add_random(batch, policy, version, taken, rng)
        return batch

    def _samples(self, tokens_NT: Tokens, log_mu_NT: Floats, budget_N: Floats, version: int) -> list[Sample]:
        """The rows that are allowed (under the largest budget), with V and U of their accuracy."""
        samples, rows, _, _ = judged(self._space, self._critic, self._allowed, tokens_NT, log_mu_NT, version)
        if not samples:
            return []
        latency_N = self._latencies.predict(self._space.canonical(tokens_NT[rows]))
        for sample, row, latency_ms in zip(samples, rows, latency_N, strict=True):
            sample.budget_ms, sample.latency_ms = float(budget_N[row]), float(latency_ms)
        return samples

    def _pick(self, batch: Batch, new: list[Sample], policy: LstmPolicy, size: int, rng: np.random.Generator) -> None:
        """Trains the most promising sample for each T, and trusts the first of those that no T would rather train."""
        most_trusted = min(int(self._settings.trusted_share * size), size - 1)
        slots_S = self._budgets.draw(size - most_trusted, rng)
        score_NS = self._scores(new, slots_S)
        doubtful_N = (score_NS > np.quantile(score_NS, self._settings.quantile, axis=0)).any(axis=1)
        free_N = np.ones(len(new), dtype=bool)
        for slot, budget_ms in enumerate(slots_S[:len(new)]):
            index = int(np.where(free_N, score_NS[:, slot], -np.inf).argmax())
            free_N[index] = False
            new[index].budget_ms = float(budget_ms)
            batch.to_train.append(new[index])
        self._as_drawn_for_their_budgets(batch.to_train, policy)
        for index in np.flatnonzero(free_N & ~doubtful_N)[:most_trusted]:
            self._trust(batch, new[index])

    def _scores(self, new: list[Sample], slots_S: Floats) -> Floats:
        """float64[N, S]: what decides; U as printed, or the promise for each T."""
        doubt_N = np.array([s.doubt for s in new])
        if self._settings.decision == "uncertainty":
            return np.repeat(doubt_N[:, None], len(slots_S), axis=1)
        tokens_NT = np.stack([np.frombuffer(s.key, dtype=np.int8) for s in new])
        upper_N = np.array([s.predicted for s in new]) + OPTIMISM * doubt_N
        latency_N = np.array([s.latency_ms for s in new])
        trained_MT, known_ms_M = self._trained.tokens_MT, self._trained.latency_ms_M
        known_M = self._critic.predict(self._trained.features_MD)[0]
        scores = []
        for budget_ms in slots_S:
            limit_ms = budget_ms if self._budgets.many else self._largest_ms     # one T alone is an aim, no budget
            under = known_ms_M <= limit_ms
            best = self._reward_at(trained_MT, known_M, known_ms_M, budget_ms)[under].max(initial=0.0)
            hoped_N = self._reward_at(tokens_NT, upper_N, np.minimum(latency_N, limit_ms), budget_ms)
            gain_N = np.maximum(hoped_N - best, 0.0) + LEAST_GAIN * hoped_N
            scores.append(self._latencies.chance(latency_N, limit_ms) * gain_N)
        return np.stack(scores, axis=1)

    def _as_drawn_for_their_budgets(self, samples: list[Sample], policy: LstmPolicy) -> None:
        weights_NK = self._budgets.weights(np.array([s.budget_ms for s in samples]))
        log_mu_NT = policy.evaluate(np.stack([s.tokens_T for s in samples]), weights_NK)[0]
        for sample, log_mu_T in zip(samples, log_mu_NT, strict=True):
            sample.log_mu_T = log_mu_T

    def _trust(self, batch: Batch, sample: Sample) -> None:
        tokens_1T = np.frombuffer(sample.key, dtype=np.int8)[None]
        assert sample.predicted is not None and sample.budget_ms is not None
        sample.kind = "trusted"
        sample.reward = float(self._reward_at(tokens_1T, np.array([sample.predicted]), np.array([sample.latency_ms]),
                                              sample.budget_ms)[0])
        batch.settled.append(sample)

    def _add_random(self, batch: Batch, policy: LstmPolicy, version: int, taken: Set[bytes],
                    rng: np.random.Generator) -> None:
        rows_NT = self._space.sample_uniform(rng, RANDOM_TRIES)
        rows_NT = rows_NT[self._allowed(rows_NT)]
        for row_T in rows_NT:
            if self._trained.row(row_T.tobytes()) is None and row_T.tobytes() not in taken:
                budget_1 = self._budgets.draw(1, rng)
                log_mu_1T = policy.evaluate(row_T[None], self._budgets.weights(budget_1))[0]
                batch.to_train += self._samples(row_T[None], log_mu_1T, budget_1, version)
                return
