"""Training budgets and how any other budget is expressed by them (specification 5; paper 3.1.1, 3.1.2).

The networks never see a budget as a number, only as a soft one-hot over the K training budgets, so costs and budgets
stay in native units (ms).

Shape legend: K training budgets, B budgets asked for.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class TrainingBudgets:
    """B_1 < ... < B_K, in ms."""

    values_ms: tuple[float, ...]

    @classmethod
    def spread(cls, low_ms: float, high_ms: float, count: int) -> TrainingBudgets:
        """B_k = B_min + (k-1)(B_max-B_min)/(K-1); the midpoint for K = 1 or an empty range."""
        if count == 1 or high_ms <= low_ms:
            return cls(((low_ms + high_ms) / 2,))
        return cls(tuple(float(value) for value in np.linspace(low_ms, high_ms, count)))

    def __len__(self) -> int:
        return len(self.values_ms)

    def draw(self, count: int, p_interp: float, noise: torch.Generator) -> NDArray[np.float64]:
        """float64[min(count, K)]: distinct training budgets, each replaced with probability p_interp by a uniform one
        of the range, so that interpolated budgets are trained and not only hoped for (section 5.2)."""
        values_B = np.array(self.values_ms)
        if count < len(values_B):
            values_B = values_B[torch.randperm(len(values_B), generator=noise)[:count].numpy()]
        share_B, place_B = torch.rand(2, len(values_B), generator=noise, dtype=torch.float64).numpy()
        between_B = self.values_ms[0] + place_B * (self.values_ms[-1] - self.values_ms[0])
        return np.where(share_B < p_interp, between_B, values_B)

    def clamped(self, budgets_ms: Sequence[float] | NDArray[np.float64]) -> NDArray[np.bool_]:
        """bool[B]: does the budget lie outside the trained range?"""
        asked = np.asarray(budgets_ms, dtype=np.float64)
        return (asked < self.values_ms[0]) | (asked > self.values_ms[-1])

    def soft_onehot(self, budgets_ms: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float32]:
        """float32[B, K]: xi = (B_{j+1}-B)/(B_{j+1}-B_j) at j and 1-xi at j+1; an end outside the range.

        A linear layer on this row is exactly the interpolated embedding g(B) = xi g(B_j) + (1-xi) g(B_{j+1}).
        """
        known = np.array(self.values_ms)
        asked = np.clip(np.asarray(budgets_ms, dtype=np.float64), known[0], known[-1])
        if len(known) == 1:
            return np.ones((len(asked), 1), dtype=np.float32)
        lower = np.clip(np.searchsorted(known, asked, side="right") - 1, 0, len(known) - 2)
        xi = (known[lower + 1] - asked) / (known[lower + 1] - known[lower])
        weights_BK = np.zeros((len(asked), len(known)), dtype=np.float32)
        rows = np.arange(len(asked))
        weights_BK[rows, lower] = xi
        weights_BK[rows, lower + 1] = 1 - xi
        return weights_BK
