"""The budgets of a search as targets T of its reward (ours; the paper has one T).

With several budgets policy, baseline and buffer are conditioned on T, which every sequence draws for itself. The policy
sees a T as a soft one-hot over a few anchors, so costs and budgets stay in native units (ms).

Shape legend: N sequences, K anchors.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from orchestrator.controllers.fnas.settings import FnasSettings
from searchspaces.errors import ConfigError

Floats = NDArray[np.float64]
ANCHORS = 8         # at most: the policy interpolates between them
ASKED_SHARE = 0.5   # of drawn T are budgets that were asked for


@dataclass(frozen=True)
class Budgets:
    """What was asked for, ascending and distinct. T is as likely between any two neighbours, so it is
    denser where the user asked for more."""

    values_ms: tuple[float, ...]

    @classmethod
    def of(cls, budgets_ms: Sequence[float]) -> Budgets:
        return cls(tuple(sorted({float(budget_ms) for budget_ms in budgets_ms})))

    @property
    def many(self) -> bool:
        return len(self.values_ms) > 1

    @cached_property
    def anchors_ms(self) -> Floats:
        """float64[K], ascending, both ends among them."""
        return self._at(np.linspace(0, 1, min(ANCHORS, len(self.values_ms))))

    def draw(self, count: int, rng: np.random.Generator) -> Floats:
        """float64[count] in ms, one from each of `count` equal parts of the range, in random order. Half of them are
        what was asked for: a T a little above a budget finds networks a little over it."""
        place_N = rng.permutation(np.arange(count) + rng.random(count)) / max(1, count)
        asked_N = np.array(self.values_ms)[(place_N * len(self.values_ms)).astype(np.int64)]
        return np.where(rng.random(count) < ASKED_SHARE, asked_N, self._at(place_N))

    def holding(self, latency_ms: float) -> float:
        """The smallest budget that is at least this, the largest where none is."""
        return next((value for value in self.values_ms if value >= latency_ms), self.values_ms[-1])

    def weights(self, budgets_N: Floats) -> NDArray[np.float32]:
        """float32[N, K]: (b_{k+1} - T) / (b_{k+1} - b_k) at anchor k and the rest at k + 1; outside an end."""
        anchors_ms = self.anchors_ms
        place_N = np.interp(budgets_N, anchors_ms, np.arange(len(anchors_ms)))
        return np.maximum(1.0 - np.abs(place_N[:, None] - np.arange(len(anchors_ms))), 0.0).astype(np.float32)

    def _at(self, places_N: Floats) -> Floats:
        return np.interp(places_N, np.linspace(0, 1, len(self.values_ms)), self.values_ms)


class MovingMeans:
    """PPO's baseline as a function of T: an exponential moving average at every anchor, linear between them."""

    def __init__(self, budgets: Budgets, decay: float) -> None:
        self._budgets, self._decay = budgets, decay
        self.values_K: Floats | None = None

    def at(self, budgets_N: Floats, before: float) -> Floats:
        """float64[N]; `before` anything was added."""
        if self.values_K is None:
            return np.full(len(budgets_N), before)
        return self._budgets.weights(budgets_N).astype(np.float64) @ self.values_K

    def add(self, budgets_N: Floats, rewards_N: Floats) -> None:
        """An anchor moves to its neighbours' mean reward, by 1 - decay per whole reward that is near it; the first ones
        fill all."""
        if self.values_K is None:
            self.values_K = np.full(len(self._budgets.anchors_ms), rewards_N.mean())
        weights_NK = self._budgets.weights(budgets_N).astype(np.float64)
        near_K = weights_NK.sum(axis=0)
        mean_K = (weights_NK * rewards_N[:, None]).sum(axis=0) / np.maximum(near_K, 1e-12)
        self.values_K = mean_K + self._decay ** near_K * (self.values_K - mean_K)


def targets(settings: FnasSettings, budgets_ms: Sequence[float]) -> Budgets | None:
    """The targets T that policy, baseline, buffer and critic tell apart; None: the paper's case, one T and V of its
    reward."""
    r, predicts = settings.reward, settings.critic.predicts
    if r.cost == "madds" or r.form == "accuracy":
        if predicts == "accuracy":
            raise ConfigError("controller option critic.predicts is accuracy, but the reward is not one of latency; "
                              "leave it away, or set reward.cost to latency and reward.form to soft or hard")
        return None
    given = (r.target,) if r.target is not None else budgets_ms
    budgets = Budgets.of(given)
    return budgets if predicts == "accuracy" or (predicts is None and budgets.many) else None
