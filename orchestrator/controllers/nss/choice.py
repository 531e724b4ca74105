"""The Elite Space of a trained distribution ([S3 3.4 and 4.1]; specification nss 7): of n draws the one whose mean cost
is nearest to the target.

Legend: K groups, B_k bins of one, n draws.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from searchspaces.elite.found import DrawnSpace, FoundSpace
from searchspaces.training.spaces import SpaceCosts


def choose(costs: SpaceCosts, logits: Sequence[NDArray[np.float64]], target: float, unit: str, draws: int,
           seed: int) -> FoundSpace:
    """`draws` spaces from the distribution; the smallest |F(A) / F_t - 1| wins, of equal ones the more probable."""
    aim = costs.nearest(target)
    rng = np.random.default_rng([seed, len(logits)])
    log_p = [row - row.max() - np.log(np.exp(row - row.max()).sum()) for row in logits]
    found = []
    for _ in range(draws):
        bins = tuple(int(rng.choice(len(row), p=np.exp(row) / np.exp(row).sum())) for row in log_p)
        mean = costs.mean(bins)
        found.append(DrawnSpace(bins, mean, mean / target - 1, float(sum(row[b] for row, b in zip(log_p, bins)))))
    best = min(range(draws), key=lambda i: (abs(found[i].mean / aim - 1), -found[i].log_p))
    return FoundSpace(target, aim, unit, tuple(found), best)
