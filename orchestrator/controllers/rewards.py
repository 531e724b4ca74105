"""Hand-written rewards of accuracy and latency that the learned dominance score is compared with (pnag.md 11).

Arrays broadcast; accuracies in 0..1, latencies and budgets in the same unit.
"""
from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def multiplicative(accuracy: Array, latency: Array, budget: Array | float, exponent: float = -0.07,
                   pay_below_budget: bool = True) -> Array:
    """Acc * (c/B)^exponent (MnasNet, NAS-MO). Without `pay_below_budget`, c/B counts as at least 1: spaces with
    architectures of almost no cost otherwise collapse to them (pnag.md 15)."""
    ratio = np.maximum(latency / budget, 1e-6 if pay_below_budget else 1.0)
    return accuracy * ratio ** exponent


def absolute(accuracy: Array, latency: Array, budget: Array | float, coefficient: float = 0.07) -> Array:
    """Acc - coefficient * |c/B - 1| (TuNAS)."""
    return accuracy - coefficient * np.abs(latency / budget - 1)


def mnasnet(accuracy: Array, cost: Array, target: float, under: float = -0.07, over: float = -0.07,
            floor: float = 0.0) -> Array:
    """Acc * (c/T)^w, w = `under` where c <= T and `over` elsewhere (FNAS Eq. 2). Soft: both -0.07, hard: 0 and -1.
    c/T counts as at least `floor`."""
    exponent = np.where(cost <= target, under, over)
    return accuracy * np.maximum(cost / target, floor) ** exponent
