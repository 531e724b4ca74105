"""How probable it is that a network whose latency was predicted meets a budget.

Student's t in the logarithm of the latency, because errors are small for most and large for the few that features do
not explain.
"""
from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from orchestrator.controllers.controller import LatencyModel
from orchestrator.prediction.predictor import LatencyPredictor
from searchspaces.space import Tokens

LEAST_ERROR = 0.007
TAILS = 3                 # degrees of freedom of the latency errors
TYPICAL = student.ppf(0.75, TAILS)   # median of |t|


def typical_error(model: LatencyModel, tokens_MT: Tokens, latency_M: NDArray[np.float64]) -> float:
    """Median of |log(true / predicted)|: held out where the model was fitted to trials, else of these; at least
    LEAST_ERROR."""
    if isinstance(model, LatencyPredictor):
        return max(LEAST_ERROR, model.typical_error)
    return max(LEAST_ERROR, float(np.median(np.abs(np.log(latency_M / model.predict(tokens_MT))))))


def chance_under(latency_N: NDArray[np.float64], limit_ms: float, error: float) -> NDArray[np.float64]:
    """float64[N]: P(latency <= limit) of predicted latencies with this typical error."""
    return np.asarray(student.cdf((np.log(limit_ms) - np.log(latency_N)) / error * TYPICAL, TAILS))
