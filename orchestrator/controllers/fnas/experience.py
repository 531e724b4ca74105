"""Architecture Experience Buffer (FNAS section 5): a tiny replay memory of measured architectures.

Legend: N entries of the buffer, n of them drawn, T token positions.

A good architecture that the policy once found is shown to it again, with two corrections: its priority in the draw
(importance weights, Eq. 5) and the age of the policy that made it (`staleness`). Only measured rewards come in.
"""
from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from searchspaces.space import Tokens

Floats = NDArray[np.float64]
Eviction = Literal["quantiles", "top"]


@dataclass(frozen=True, eq=False)
class Experience:
    """One measured architecture: tokens as they were sampled, its reward, and the log-probabilities float64[T] that
    the policy gave these tokens at the time (the behaviour policy mu). With many budgets the reward is for
    `budget_ms`, whatever the policy drew for."""

    tokens_T: Tokens
    reward: float
    log_mu_T: Floats
    order: int  # how many came before it
    budget_ms: float | None = None


def priorities(rewards_N: Floats, temperature: float = 1.0) -> Floats:
    """P_i = exp(r_i / T) / sum_j exp(r_j / T); T = 1 is Eq. 5 as printed."""
    scaled = np.asarray(rewards_N, dtype=np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


def importance_weights(priorities_N: Floats, beta: float) -> Floats:
    """S_i = (N P_i)^-beta (Eq. 5): what undoes the preference of the draw, fully at beta = 1."""
    return np.asarray((len(priorities_N) * priorities_N) ** -beta)


def staleness(log_new_NT: Floats, log_mu_NT: Floats, low: float, high: float) -> Floats:
    """Product over tokens of pi_old(a_t) / mu(a_t), in log space, clipped to [low, high]."""
    log_ratio_N = (log_new_NT - log_mu_NT).sum(axis=1)
    return np.clip(np.exp(np.minimum(log_ratio_N, 50.0)), low, high)


class ExperienceBuffer:
    """Holds at most `size` entries with different rewards.

    Eviction `quantiles` keeps the best, then the newest entry of each quantile of all rewards ever seen, then the
    newest; `top` keeps the best ones. `temperature` None: the standard deviation of the buffer's rewards.
    """

    def __init__(self, size: int, eviction: Eviction = "quantiles", temperature: float | None = 1.0) -> None:
        self._size, self._eviction, self._temperature = size, eviction, temperature
        self.entries: list[Experience] = []
        self._seen: list[float] = []  # every reward, ascending

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, tokens_T: Tokens, reward: float, log_mu_T: Floats) -> None:
        """A newly measured architecture; an older entry of the same tokens is replaced."""
        entry = Experience(np.asarray(tokens_T, dtype=np.int8), float(reward), np.asarray(log_mu_T), len(self._seen))
        insort(self._seen, entry.reward)
        kept = [e for e in self.entries if not np.array_equal(e.tokens_T, entry.tokens_T)]
        self.entries = self._evict([*kept, entry]) if self._size else []

    def fill(self, entries: list[Experience]) -> None:
        """What stays of these, all seen at once."""
        self._seen = sorted(entry.reward for entry in entries)
        self.entries = self._evict(entries) if self._size else []

    def scale(self) -> float:
        """The temperature of the priorities."""
        if self._temperature is not None:
            return self._temperature
        return max(float(np.std([entry.reward for entry in self.entries])), 1e-3)

    def _evict(self, entries: list[Experience]) -> list[Experience]:
        if len(entries) <= self._size:
            return entries
        by_reward = sorted(entries, key=lambda e: (-e.reward, -e.order))
        if self._eviction == "top":
            return by_reward[:self._size]
        newest_first = sorted(entries, key=lambda e: -e.order)
        slots: dict[int, Experience] = {}
        for entry in newest_first:
            slots.setdefault(self._slot(entry.reward), entry)
        wanted = [by_reward[0], *sorted(slots.values(), key=lambda e: -e.order), *newest_first]
        chosen = list(dict.fromkeys(wanted))[:self._size]
        return sorted(chosen, key=lambda e: e.order)

    def _slot(self, reward: float) -> int:
        """Which of `size` equal quantiles of all rewards seen this one falls into."""
        return min(self._size - 1, (bisect_right(self._seen, reward) - 1) * self._size // len(self._seen))

    def draw(self, rng: np.random.Generator, n: int, beta: float) -> tuple[Sequence[Experience], Floats]:
        """n distinct entries drawn by priority, and their weights S_i / max_j S_j over the drawn ones: float64[n]."""
        if n == 0:
            return [], np.zeros(0)
        rewards_N = np.array([entry.reward for entry in self.entries])
        p_N = priorities(rewards_N, self.scale())
        rows = rng.choice(len(p_N), size=n, replace=False, p=p_N)
        s_n = importance_weights(p_N, beta)[rows]
        return [self.entries[row] for row in rows], s_n / s_n.max()
