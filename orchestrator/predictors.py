"""Latency of architectures that nobody measured, learnt from a few that were (latency.md section 6).

Shape legend: N architectures, T token positions, F latency features of the space, M measured architectures.

    linear:     y(x) = sum_f w_f x_f,  w >= 0,  minimising sum_i ((X w)_i / y_i - 1)^2    (non-negative least squares)
    corrected:  y(x) = linear(x) * (1 + g(x)),  g a Gaussian process on the relative residuals

Features are non-negative sums per stage, so a non-negative w never predicts that a larger network is faster, and needs
few measurements. What is not additive (cache sizes, layouts) is left to g, which is used only where cross-validation
says that it helps. Errors are relative because devices' noise is: `heldout_error` is the mean absolute percentage error
in cross-validation (as a share, 0.02 is 2 %), `typical_error` the median of |log(predicted / true)| there, which a few
architectures that nothing explains do not change, and `noise_floor` what a perfect predictor would show on the same
noisy measurements: for normal errors the mean of sqrt(2 / pi) * stderr_i / y_i.
"""
from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from math import pi, sqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import nnls
from scipy.spatial.distance import cdist
from threadpoolctl import threadpool_limits  # comes with scikit-learn

from searchspaces.errors import DataError, StoreError
from searchspaces.space import SearchSpace, Tokens

log = logging.getLogger(__name__)
Array = NDArray[np.float64]

FOLDS = 10
LEAST_NETWORKS = 4
CORRECTION_GAIN = 0.97      # the correction must lower the held-out error by at least this factor to be used
LENGTH_SCALES = (2.0, 4.0, 8.0, 16.0)       # of the correction, in standard deviations of all features together
NOISE_SHARES = (0.1, 0.3, 1.0, 3.0)         # noise variance over signal variance of the correction


@dataclass(frozen=True)
class Linear:
    """Weights per feature, in ms."""

    weights_F: Array

    def predict(self, features_NF: Array) -> Array:
        return features_NF @ self.weights_F


@dataclass(frozen=True)
class Correction:
    """g(x) = k(x, X) alpha with k a squared exponential over standardised features."""

    mean_F: Array
    scale_F: Array
    centres_MF: Array       # standardised
    alpha_M: Array
    length: float

    def predict(self, features_NF: Array) -> Array:
        return _kernel((features_NF - self.mean_F) / self.scale_F, self.centres_MF, self.length) @ self.alpha_M


@dataclass(frozen=True)
class LatencyPredictor:
    """Immutable; refit when more is measured. `n` is the number of networks it was fitted on."""

    space: SearchSpace
    linear: Linear
    correction: Correction | None
    n: int
    heldout_error: float
    typical_error: float
    noise_floor: float
    fastest_ms: float       # half of what was measured is the least that is ever predicted

    @classmethod
    def fit(cls, space: SearchSpace, tokens_NT: Tokens, latency_ms_N: ArrayLike,
            stderr_ms_N: ArrayLike | None = None, seed: int = 0) -> LatencyPredictor:
        """DataError with fewer than four networks or with latencies that are not positive numbers."""
        latency_N = np.asarray(latency_ms_N, dtype=np.float64)
        if len(latency_N) < LEAST_NETWORKS:
            raise DataError(f"a latency predictor needs at least {LEAST_NETWORKS} measured networks, got "
                            f"{len(latency_N)}; measure more")
        if not (np.isfinite(latency_N).all() and (latency_N > 0).all()):
            raise DataError("latencies to fit a predictor on must be positive numbers of ms; leave failed ones out")
        stderr_N = np.zeros_like(latency_N) if stderr_ms_N is None else np.asarray(stderr_ms_N, dtype=np.float64)
        features_NF = _features(space, tokens_NT)
        with threadpool_limits(1):   # matrices this small are slower on many threads, a hundredfold on a busy machine
            linear, correction, heldout_N = _choose(features_NF, latency_N, seed)
        fastest_ms, floor = float(latency_N.min()), float(np.mean(sqrt(2.0 / pi) * stderr_N / latency_N))
        typical = float(np.median(np.abs(np.log(np.maximum(heldout_N, 0.5 * fastest_ms) / latency_N))))
        return cls(space, linear, correction, len(latency_N), _error(heldout_N, latency_N), typical, floor, fastest_ms)

    def predict(self, tokens_NT: Tokens) -> Array:
        """float64[N] in ms, positive."""
        features_NF = _features(self.space, tokens_NT)
        latency_N = self.linear.predict(features_NF)
        if self.correction is not None:
            latency_N = latency_N * (1.0 + self.correction.predict(features_NF))
        return np.maximum(latency_N, 0.5 * self.fastest_ms)

    def state_dict(self) -> dict[str, Any]:
        """A flat dictionary of arrays, numbers and strings."""
        state: dict[str, Any] = {
            "space_id": self.space.space_id, "n": self.n, "heldout_error": self.heldout_error,
            "typical_error": self.typical_error, "noise_floor": self.noise_floor, "fastest_ms": self.fastest_ms,
            "weights": self.linear.weights_F}
        if self.correction is not None:
            c = self.correction
            state |= {"correction_mean": c.mean_F, "correction_scale": c.scale_F, "correction_centres": c.centres_MF,
                      "correction_alpha": c.alpha_M, "correction_length": c.length}
        return state

    @classmethod
    def from_state(cls, space: SearchSpace, state: Mapping[str, Any]) -> LatencyPredictor:
        """Predicts exactly as the one that wrote `state`. StoreError for a state of another space."""
        if state["space_id"] != space.space_id:
            raise StoreError(f"the stored latency predictor is for {state['space_id']}, not for {space.space_id}; "
                             "measure this space")
        correction = None
        if "correction_alpha" in state:
            mean, scale, centres, alpha = (np.asarray(state[f"correction_{name}"], dtype=np.float64)
                                           for name in ("mean", "scale", "centres", "alpha"))
            correction = Correction(mean, scale, centres, alpha, float(state["correction_length"]))
        return cls(space, Linear(np.asarray(state["weights"], dtype=np.float64)), correction, int(state["n"]),
                   float(state["heldout_error"]), float(state.get("typical_error", state["heldout_error"])),
                   float(state["noise_floor"]), float(state["fastest_ms"]))


def _choose(features_NF: Array, latency_N: Array, seed: int) -> tuple[Linear, Correction | None, Array]:
    """The linear model, with the correction that cross-validation likes best if it helps, and its held-out
    predictions."""
    folds_N = np.random.default_rng(seed).permutation(len(latency_N)) % min(FOLDS, len(latency_N))
    plain_N = _heldout_linear(features_NF, latency_N, folds_N)
    tried = [(_heldout_corrected(features_NF, latency_N, folds_N, length, noise), length, noise)
             for length in LENGTH_SCALES for noise in NOISE_SHARES]
    corrected_N, length, noise = min(tried, key=lambda option: (_error(option[0], latency_N), *option[1:]))
    linear = fit_linear(features_NF, latency_N)
    if _error(corrected_N, latency_N) >= CORRECTION_GAIN * _error(plain_N, latency_N):
        return linear, None, plain_N
    residual_N = latency_N / linear.predict(features_NF) - 1.0
    return linear, fit_correction(features_NF, residual_N, length, noise), corrected_N


def fit_linear(features_MF: Array, latency_M: Array) -> Linear:
    """Non-negative least squares on relative residuals; columns are scaled alike for its tolerance."""
    relative_MF = features_MF / latency_M[:, None]
    norm_F = np.linalg.norm(relative_MF, axis=0)
    norm_F[norm_F == 0] = 1.0
    weights_F, _ = nnls(relative_MF / norm_F, np.ones(len(latency_M)), maxiter=30 * len(norm_F))
    return Linear(weights_F / norm_F)


def fit_correction(features_MF: Array, residual_M: Array, length: float, noise: float) -> Correction:
    """Gaussian-process mean of the relative residuals: alpha = (K + noise I)^-1 residual."""
    mean_F, scale_F = features_MF.mean(axis=0), features_MF.std(axis=0)
    scale_F = np.where(scale_F > 0, scale_F, 1.0) * sqrt(features_MF.shape[1])
    centres_MF = (features_MF - mean_F) / scale_F
    gram_MM = _kernel(centres_MF, centres_MF, length) + noise * np.eye(len(residual_M))
    return Correction(mean_F, scale_F, centres_MF, cho_solve(cho_factor(gram_MM), residual_M), length)


def _kernel(a_NF: Array, b_MF: Array, length: float) -> Array:
    return np.exp(-0.5 * cdist(a_NF, b_MF, "sqeuclidean") / length**2)


def _features(space: SearchSpace, tokens_NT: Tokens) -> Array:
    """The space's features and a constant, without which nothing explains the stem."""
    features_NF = np.asarray(space.latency_features(np.asarray(tokens_NT, dtype=np.int8)), dtype=np.float64)
    return np.concatenate([features_NF, np.ones((len(features_NF), 1))], axis=1)


def _heldout_linear(features_NF: Array, latency_N: Array, folds_N: NDArray[np.int64]) -> Array:
    """Predictions of every network by a fit on the other folds."""
    predicted_N = np.empty_like(latency_N)
    for fold in range(folds_N.max() + 1):
        held = folds_N == fold
        predicted_N[held] = fit_linear(features_NF[~held], latency_N[~held]).predict(features_NF[held])
    return predicted_N


def _heldout_corrected(features_NF: Array, latency_N: Array, folds_N: NDArray[np.int64], length: float,
                       noise: float) -> Array:
    predicted_N = np.empty_like(latency_N)
    for fold in range(folds_N.max() + 1):
        held = folds_N == fold
        linear = fit_linear(features_NF[~held], latency_N[~held])
        residual = latency_N[~held] / linear.predict(features_NF[~held]) - 1.0
        correction = fit_correction(features_NF[~held], residual, length, noise)
        predicted_N[held] = linear.predict(features_NF[held]) * (1.0 + correction.predict(features_NF[held]))
    return predicted_N


def _error(predicted_N: Array, latency_N: Array) -> float:
    """Mean absolute percentage error, as a share."""
    return float(np.mean(np.abs(predicted_N / latency_N - 1.0)))
