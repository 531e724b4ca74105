"""The Pareto dominance rule that the evaluator learns to reproduce (specification 6; paper Eq. 4).

The rule is a total preorder with the key (1, accuracy) for architectures within the budget and (0, -cost) for the
others, compared lexicographically, so all labels of M architectures come from one sort per budget.

Shape legend: M architectures, K budgets.
"""
from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Ties = Literal["drop", "printed", "released"]
TIE = 1e-9


def dominance_ranks(cost_M: NDArray[np.float64], accuracy_M: NDArray[np.float64], budget_ms: float,
                    accuracy_constraint: bool = True) -> NDArray[np.int64]:
    """int64[M]: larger is better, equal on ties. Without the accuracy constraint (Table 2) cheaper is better."""
    feasible_M = (cost_M <= budget_ms) if accuracy_constraint else np.zeros(len(cost_M), dtype=bool)
    value_M = np.where(feasible_M, accuracy_M, -cost_M)
    order = np.lexsort((value_M, feasible_M))
    steps = (np.diff(value_M[order]) >= TIE) | np.diff(feasible_M[order])
    ranks_M = np.empty(len(cost_M), dtype=np.int64)
    ranks_M[order] = np.concatenate([[0], np.cumsum(steps)])
    return ranks_M


def pair_labels(cost_M: NDArray[np.float64], accuracy_M: NDArray[np.float64], budgets_K: NDArray[np.float64],
                ties: Ties = "drop", accuracy_constraint: bool = True,
                cost_tie_share: float = 0.0) -> NDArray[np.int8]:
    """int8[K, M, M]: d(i, j, B) in {+1, -1}, 0 where the pair does not count (the diagonal, dropped ties).

    ties: "drop" 0 in both orders; "printed" +1 in both orders, as Eq. 4 with >= and <= reads; "released" -1 on the
    unordered pairs i < j, which are the only ones that count then. `cost_tie_share` is the measurement noise as a share
    of the cost: two costs over the budget that differ by less are a tie (with "drop" only).
    """
    labels = np.empty((len(budgets_K), len(cost_M), len(cost_M)), dtype=np.int8)
    near = np.abs(cost_M[:, None] - cost_M) < cost_tie_share * np.minimum(cost_M[:, None], cost_M)
    for label, budget_ms in zip(labels, budgets_K, strict=True):
        ranks_M = dominance_ranks(cost_M, accuracy_M, budget_ms, accuracy_constraint)
        label[:] = np.sign(ranks_M[:, None] - ranks_M)
        over = (cost_M > budget_ms) | (not accuracy_constraint)
        if ties == "drop":
            label[near & over[:, None] & over] = 0
        else:
            label[label == 0] = 1 if ties == "printed" else -1
    if ties == "released":
        labels[:, ~np.triu(np.ones(labels.shape[1:], dtype=bool), 1)] = 0
    labels[:, np.arange(len(cost_M)), np.arange(len(cost_M))] = 0
    return labels
