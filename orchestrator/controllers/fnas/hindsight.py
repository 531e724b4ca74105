"""What was trained, as experience for every budget: a network has a reward for any T, whatever T it was drawn for.

Legend: M trained networks, n experiences drawn, T token positions.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from orchestrator.controllers.fnas.experience import Experience, ExperienceBuffer, importance_weights, priorities
from searchspaces.space import Tokens

Floats = NDArray[np.float64]
RewardAt = Callable[[Tokens, Floats, Floats, float], Floats]   # (tokens, accuracy, latency in ms, T in ms)


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained network: tokens as they were sampled and canonical, what was measured, and log mu of the policy that
    sampled it, for the T that it was sampled for."""

    tokens_T: Tokens
    canonical_T: Tokens
    features_D: NDArray[np.float32]
    accuracy: float
    latency_ms: float
    log_mu_T: Floats


class Hindsight:
    """All trained networks, in the order of the log; pure given the order of calls."""

    def __init__(self, reward_at: RewardAt, buffer: Callable[[], ExperienceBuffer]) -> None:
        self._reward_at, self._buffer = reward_at, buffer
        self._trained: list[Trained] = []
        self._earlier: dict[bytes, Trained] = {}
        self._row_of: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._trained)

    @property
    def lessons(self) -> int:
        """What can be drawn: earlier runs' networks too."""
        return len(self._trained) + len(self._earlier)

    def add(self, trained: Trained) -> None:
        key = trained.canonical_T.tobytes()
        self._earlier.pop(key, None)
        self._row_of[key] = len(self._trained)
        self._trained.append(trained)

    def add_earlier(self, trained: Trained) -> None:
        """Of an earlier run of the same task: a lesson, but not known here, since only trials of this run answer."""
        self._earlier[trained.canonical_T.tobytes()] = trained

    def row(self, key: bytes) -> int | None:
        """Index of the network with these canonical tokens."""
        return self._row_of.get(key)

    @property
    def tokens_MT(self) -> Tokens:
        return np.stack([t.canonical_T for t in self._trained])

    @property
    def features_MD(self) -> NDArray[np.float32]:
        return np.stack([t.features_D for t in self._trained])

    @property
    def latency_ms_M(self) -> Floats:
        return np.array([t.latency_ms for t in self._trained])

    def best(self, budget_ms: float) -> float:
        """The largest reward with this T; nan where nothing was trained."""
        return float(self._rewards(self._trained)(budget_ms).max()) if self._trained else float("nan")

    def draw(self, rng: np.random.Generator, budgets_n: Floats, beta: float) -> tuple[list[Experience], Floats]:
        """One experience for each T: what the buffer would hold if T were the only target, drawn by priority. The
        weights float64[n] are S_i / max_j S_j over the drawn ones (section 6)."""
        drawn, weights = [], []
        if not len(budgets_n):
            return [], np.zeros(0)
        lessons = [*self._earlier.values(), *self._trained]
        rewards_at = self._rewards(lessons)
        for budget_ms in map(float, budgets_n):
            rewards_M = rewards_at(budget_ms)
            buffer = self._buffer()
            buffer.fill([Experience(t.tokens_T, float(reward), t.log_mu_T, order, budget_ms)
                         for order, (t, reward) in enumerate(zip(lessons, rewards_M, strict=True))])
            p_N = priorities(np.array([e.reward for e in buffer.entries]), buffer.scale())
            row = int(rng.choice(len(p_N), p=p_N))
            drawn.append(buffer.entries[row])
            weights.append(float(importance_weights(p_N, beta)[row]))
        return drawn, np.array(weights) / max(weights)

    def _rewards(self, trained: Sequence[Trained]) -> Callable[[float], Floats]:
        """Rewards float64[M] of these for any T."""
        return partial(self._reward_at, np.stack([t.canonical_T for t in trained]),
                       np.array([t.accuracy for t in trained]), np.array([t.latency_ms for t in trained]))
