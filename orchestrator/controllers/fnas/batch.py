"""Drawing one batch (FNAS section 7, step 2): which samples of the policy are trained, trusted or known already.

A sample whose score is above the running threshold is trained; below it the critic's V stands in for its reward. At
most `trusted_share` of the batch's fresh part is trusted, and as much again is known from before: what is too many of
either is discarded and others are drawn, at most `extra_draws` of them. If too few are worth training even then (the
policy is close to collapse), the most doubtful of the discarded ones are trained, at last a random one: a batch always
trains something new, or the space is exhausted.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from orchestrator.controllers.fnas.critic import Critic
from orchestrator.controllers.fnas.policy import LstmPolicy
from orchestrator.controllers.fnas.settings import CriticSettings
from searchspaces.space import SearchSpace, Tokens

OPTIMISM = 2.0        # U's in V + 2 U, the score of decision "promise"
WINDOW = 200          # samples whose scores the threshold is taken over (section 4)
RESIDUALS = 50        # prequential residuals that decide whether V is better than a constant
RANDOM_TRIES = 1000   # uniform samples looked at for something new, where the policy finds nothing


@dataclass(eq=False)
class Sample:
    """One architecture of a batch. `tokens_T` as sampled, `key` of the canonical tokens, `log_mu_T` and `version` of
    the policy that sampled it; `predicted` and `doubt` are V and U at that time. `reward` is nan until it is known.
    `batch` is the number of its batch, where it is trained. With many budgets V and U are of the accuracy, and
    `budget_ms` is the T of the reward; `latency_ms` is known or predicted."""

    tokens_T: Tokens
    key: bytes
    log_mu_T: NDArray[np.float64]
    version: int
    features_D: NDArray[np.float32]
    predicted: float | None = None
    doubt: float = 0.0
    reward: float = float("nan")
    kind: Literal["trained", "trusted", "known"] = "trained"
    batch: int | None = None
    budget_ms: float | None = None
    latency_ms: float = float("nan")


class Gate:
    """When the critic may be believed, and from which score on a sample is trained."""

    def __init__(self, settings: CriticSettings, critic: Critic) -> None:
        self._settings, self._critic = settings, critic
        self._scores: deque[float] = deque(maxlen=WINDOW)

    @property
    def open(self) -> bool:
        """Enough trained samples, and V lately better than a constant would have been."""
        residuals = self._critic.recent_residuals(RESIDUALS)
        enough = self._critic.all_samples >= self._settings.least_trained and len(residuals) >= 2
        return self._settings.use and enough and float(residuals.mean()) <= self._critic.reward_deviation()

    def scores(self, values_N: NDArray[np.float64], doubts_N: NDArray[np.float64]) -> NDArray[np.float64]:
        """What decides: U as printed, or the optimistic value V + 2 U."""
        return doubts_N if self._settings.decision == "uncertainty" else values_N + OPTIMISM * doubts_N

    def note(self, score: float) -> None:
        self._scores.append(score)

    @property
    def threshold(self) -> float:
        return float(np.quantile(self._scores, self._settings.quantile)) if self._scores else -np.inf


@dataclass
class Batch:
    """Fresh samples: those to train, and those whose reward stands (trusted or known)."""

    to_train: list[Sample] = field(default_factory=list)
    settled: list[Sample] = field(default_factory=list)
    discarded: list[Sample] = field(default_factory=list)

    @property
    def fresh(self) -> int:
        return len(self.to_train) + len(self.settled)

    def count(self, kind: str) -> int:
        return sum(sample.kind == kind for sample in self.settled)


def judged(space: SearchSpace, critic: Critic, allowed: Callable[[Tokens], NDArray[np.bool_]], tokens_NT: Tokens,
           log_mu_NT: NDArray[np.float64],
           version: int) -> tuple[list[Sample], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """The drawn rows that are allowed (under the largest budget), which they are, and their V and U."""
    canonical_NT = space.canonical(tokens_NT)
    rows = np.flatnonzero(allowed(canonical_NT))
    if not len(rows):
        return [], rows, np.zeros(0), np.zeros(0)
    features_ND = space.features(canonical_NT[rows])
    values_N, doubts_N = critic.predict(features_ND)
    samples = [Sample(tokens_NT[row], canonical_NT[row].tobytes(), log_mu_NT[row], version, features_ND[i],
                      float(values_N[i]) if critic.calibrated else None, float(doubts_N[i]))
               for i, row in enumerate(rows)]
    return samples, rows, values_N, doubts_N


class Sampler:
    """Draws batches; pure given the order of calls."""

    def __init__(self, space: SearchSpace, settings: CriticSettings, critic: Critic,
                 allowed: Callable[[Tokens], NDArray[np.bool_]]) -> None:
        self._space, self._settings, self._critic, self._allowed = space, settings, critic, allowed
        self.gate = Gate(settings, critic)

    def draw(self, policy: LstmPolicy, version: int, rewards: Mapping[bytes, float], taken: Set[bytes], size: int,
             rng: np.random.Generator) -> Batch:
        """A batch of `size` fresh samples. `rewards` are known by key, `taken` are keys in flight or failed."""
        drawn = policy.sample(size + self._settings.extra_draws, rng)
        samples = self._samples(drawn.tokens_NT, drawn.log_probs_NT, version)
        batch, trusting = Batch(), self.gate.open
        most_settled = int(self._settings.trusted_share * size)
        seen: set[bytes] = set()
        for sample, score in samples:
            if batch.fresh >= size and batch.to_train:
                break
            if sample.key in rewards:
                if batch.fresh < size and batch.count("known") < most_settled:
                    sample.kind, sample.reward = "known", rewards[sample.key]
                    batch.settled.append(sample)
            elif sample.key not in taken and sample.key not in seen:
                seen.add(sample.key)
                self._decide(batch, sample, score, trusting, most_settled, size)
        self._fill(batch, policy, version, rewards, taken, size, rng)
        return batch

    def _samples(self, tokens_NT: Tokens, log_mu_NT: NDArray[np.float64],
                 version: int) -> list[tuple[Sample, float]]:
        """The drawn rows that are allowed (under the largest budget), with V, U and their score."""
        samples, _, values_N, doubts_N = judged(self._space, self._critic, self._allowed, tokens_NT, log_mu_NT, version)
        if not samples:
            return []
        return list(zip(samples, self.gate.scores(values_N, doubts_N), strict=True))

    def _decide(self, batch: Batch, sample: Sample, score: float, trusting: bool, most_trusted: int,
                size: int) -> None:
        trusted = trusting and score <= self.gate.threshold
        self.gate.note(score)
        if not trusted:
            batch.to_train.append(sample)
        elif batch.count("trusted") < most_trusted and batch.fresh < size:
            assert sample.predicted is not None
            sample.kind, sample.reward = "trusted", sample.predicted
            batch.settled.append(sample)
        else:
            batch.discarded.append(sample)

    def _fill(self, batch: Batch, policy: LstmPolicy, version: int, rewards: Mapping[bytes, float],
              taken: Set[bytes], size: int, rng: np.random.Generator) -> None:
        """Trains discarded ones, the most doubtful first, up to the size; at last one random architecture."""
        batch.discarded.sort(key=lambda sample: -sample.doubt)
        while batch.discarded and (batch.fresh < size or not batch.to_train):
            batch.to_train.append(batch.discarded.pop(0))
        if not batch.to_train:
            rows_NT = self._space.sample_uniform(rng, RANDOM_TRIES)
            rows_NT = rows_NT[self._allowed(rows_NT)]
            new = [i for i, row in enumerate(rows_NT) if row.tobytes() not in rewards and row.tobytes() not in taken]
            if new:
                row_1T = rows_NT[new[:1]]
                batch.to_train += [s for s, _ in self._samples(row_1T, policy.evaluate(row_1T)[0], version)]
