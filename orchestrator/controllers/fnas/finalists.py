"""Which trained architectures answer a budget, and in which order they are retrained [S4 6.2].

Accuracies of short trainings are single noisy runs, and the largest of many is large by luck too. With many budgets the
choice is made by the smoothed accuracy, where a model of accuracy predicts networks that it did not see better than
their mean does.
"""
from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from orchestrator.controllers.controller import Answer
from orchestrator.prediction.posterior import Posterior, PosteriorSettings
from searchspaces.space import Tokens

Floats = NDArray[np.float64]
FOLDS = 5
LEAST_TRAINED = 20      # below, five folds say nothing


def smoothed(features_MD: NDArray[np.float32], accuracy_M: Floats, seed: int) -> Floats:
    """float64[M]: posterior mean of each trained network; what was measured where the posterior is of no use."""
    if len(accuracy_M) < LEAST_TRAINED or accuracy_M.std() == 0:
        return accuracy_M
    with threadpool_limits(1):
        held_M = np.empty(len(accuracy_M))
        fold_M = np.random.default_rng(seed).permutation(len(accuracy_M)) % FOLDS
        for fold in range(FOLDS):
            held = fold_M == fold
            held_M[held] = _believe(features_MD[~held], accuracy_M[~held], features_MD[held], seed)
        if np.mean((held_M - accuracy_M) ** 2) >= accuracy_M.var():
            return accuracy_M
        return _believe(features_MD, accuracy_M, features_MD, seed)


def _believe(known_MD: NDArray[np.float32], accuracy_M: Floats, asked_ND: NDArray[np.float32], seed: int) -> Floats:
    return Posterior.fit(known_MD, accuracy_M, PosteriorSettings(), seed).believe(asked_ND).mean_N


def finalists(tokens_MT: Tokens, accuracy_M: Floats, latency_ms_M: Floats, score_M: Floats, budget_ms: float,
              alternatives: int) -> list[Answer]:
    """The networks at or under the budget by their score, best first; the fastest where there is none."""
    order = np.lexsort((latency_ms_M, -score_M))
    under = order[latency_ms_M[order] <= budget_ms][:alternatives]
    rows = under if len(under) else [int(latency_ms_M.argmin())]
    return [Answer(budget_ms, tokens_MT[i], float(latency_ms_M[i]), float(accuracy_M[i]), float(score_M[i]),
                   observed=True, feasible=bool(len(under))) for i in rows]
