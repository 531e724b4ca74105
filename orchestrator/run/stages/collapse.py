"""Telling that a distribution made up its mind before it had seen anything."""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np

EARLY = 0.5     # share of all epochs before which a settled distribution is suspicious
SETTLED = 0.05  # entropy left, as a share of that of the uniform distribution


def collapsed(logits: Mapping[str, np.ndarray], done: float) -> str:
    """A sentence if some budget's distribution is settled early, else empty. `logits` by "BUDGET.DECISION"."""
    if done >= EARLY:
        return ""
    left: dict[str, list[float]] = {}
    for name, row in logits.items():
        p = np.exp(row - row.max())
        p /= p.sum()
        left.setdefault(name.split(".")[0], []).append(float(-(p * np.log(p + 1e-300)).sum() / np.log(len(p))))
    early = [budget for budget, shares in left.items() if np.mean(shares) < SETTLED]
    if not early:
        return ""
    return (f"the distribution of budget {int(early[0]) + 1} is settled after {done:.0%} of the epochs, before the "
            "weights have learned much; lower controller.learning_rate, or raise controller.warm_up or "
            "controller.softening")
