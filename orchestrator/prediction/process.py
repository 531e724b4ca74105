"""Gaussian process over standardised features: the smooth half of the accuracy posterior.

    y ~ N(mean, a (K + r I)),   K_ij = exp(-1/2 sum_f w_f (x_if - x_jf)^2)

First one relevance w for all features: an eigendecomposition per w gives the marginal likelihood of every noise ratio
r; the amplitude a that maximises it is closed form (Rasmussen and Williams 2006, 2.2 and 5.4.1). From there a few steps
uphill in the marginal likelihood give each feature its own relevance (there, 5.1), drawn to what they have in common by
a normal prior of log w_f: tens of trials must not decide freely between tens of features.

Shape legend: M observed architectures, N asked about, F features.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, eigh
from scipy.optimize import minimize
from scipy.spatial.distance import cdist

Array = NDArray[np.float64]
LENGTHS = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0)      # in standard deviations of all features together
NOISE_RATIOS = tuple(np.logspace(-3, 0.3, 8))       # noise variance over signal variance
SPREAD = 2.0            # of the prior: standard deviation of log w_f
STEPS = 15              # uphill; more fit the trials rather than the features
LEARNT_FROM = 200       # trials that decide relevances and noise at most; all of them then decide the mean
LOG_BOUNDS = (-14.0, 3.0), (-7.0, 1.0)              # of log w_f and log r


@dataclass(frozen=True)
class GaussianProcess:
    centre_F: Array
    scale_F: Array          # a feature of little relevance has a large one
    inputs_MF: Array        # standardised
    mean: float
    amplitude: float        # variance of the signal
    length: float           # 1 but in states of earlier versions, whose features were all equally relevant
    alpha_M: Array          # (K + r I)^-1 (y - mean)
    whiten_MM: Array        # columns v_i / sqrt(w_i + r) of K's eigenvectors

    @classmethod
    def fit(cls, features_MF: NDArray[np.float32], values_M: Array) -> GaussianProcess:
        """Relevances and noise are learnt from the first LEARNT_FROM rows: give them in random order."""
        features_MF = np.asarray(features_MF, dtype=np.float64)
        spread_F, centre_F = features_MF.std(axis=0), features_MF.mean(axis=0)
        varied_F = spread_F > 0
        inputs_MF = (features_MF - centre_F) / np.where(varied_F, spread_F, 1.0)
        centred_M = values_M - values_M.mean()
        relevance_F = np.ones(len(centre_F))
        ratio = 1.0
        if varied_F.any() and centred_M.any():
            relevance_F[varied_F], ratio = _learn(inputs_MF[:LEARNT_FROM, varied_F], centred_M[:LEARNT_FROM])
        scale_F = np.where(varied_F, spread_F, 1.0) / np.sqrt(np.where(varied_F, relevance_F, 1.0))
        inputs_MF = (features_MF - centre_F) / scale_F
        eigenvalues_M, vectors_MM = eigh(np.exp(-cdist(inputs_MF, inputs_MF, "sqeuclidean") / 2), driver="evd")
        variances_M, rotated_M = np.maximum(eigenvalues_M, 0) + ratio, vectors_MM.T @ centred_M
        amplitude = max(float(np.mean(rotated_M**2 / variances_M)), 1e-12)
        return cls(centre_F, scale_F, inputs_MF, float(values_M.mean()), amplitude, 1.0,
                   vectors_MM @ (rotated_M / variances_M), vectors_MM / np.sqrt(variances_M))

    def predict(self, features_NF: NDArray[np.float32]) -> tuple[Array, Array]:
        """(mean[N], standard deviation[N]) of the smooth signal, without the noise of an observation."""
        inputs_NF = (features_NF - self.centre_F) / self.scale_F
        kernel_NM = np.exp(-cdist(inputs_NF, self.inputs_MF, "sqeuclidean") / (2 * self.length**2))
        variance_N = 1 - ((kernel_NM @ self.whiten_MM) ** 2).sum(axis=1)
        return self.mean + kernel_NM @ self.alpha_M, np.sqrt(self.amplitude * np.maximum(variance_N, 1e-9))


def _learn(inputs_MF: Array, centred_M: Array) -> tuple[Array, float]:
    """Relevance of every feature, and the noise ratio."""
    relevance, ratio = _common(inputs_MF, centred_M)
    features = inputs_MF.shape[1]

    def descend(log_values: Array) -> tuple[float, Array]:
        loss, gradient = negative_evidence(inputs_MF, centred_M, log_values[:-1], log_values[-1])
        away_F = log_values[:-1] - log_values[:-1].mean()
        gradient[:-1] += away_F / SPREAD**2
        return loss + 0.5 * float(away_F @ away_F) / SPREAD**2, gradient

    found = minimize(descend, np.log([relevance] * features + [ratio]), jac=True, method="L-BFGS-B",
                     bounds=[LOG_BOUNDS[0]] * features + [LOG_BOUNDS[1]], options={"maxiter": STEPS})
    return np.exp(found.x[:-1]), float(np.exp(found.x[-1]))


def _common(inputs_MF: Array, centred_M: Array) -> tuple[float, float]:
    """The relevance and noise ratio of the grid that maximise the marginal likelihood."""
    squared_MM = cdist(inputs_MF, inputs_MF, "sqeuclidean")
    best, chosen = -np.inf, (1.0, 1.0)
    for length in LENGTHS:
        relevance = 1 / (length**2 * inputs_MF.shape[1])
        eigenvalues_M, vectors_MM = eigh(np.exp(-0.5 * relevance * squared_MM), driver="evd")
        rotated_M = vectors_MM.T @ centred_M
        for ratio in NOISE_RATIOS:
            variances_M = np.maximum(eigenvalues_M, 0) + ratio
            amplitude = max(float(np.mean(rotated_M**2 / variances_M)), 1e-12)
            evidence = -0.5 * (len(centred_M) * np.log(amplitude) + np.log(variances_M).sum())
            if evidence > best:
                best, chosen = evidence, (relevance, float(ratio))
    return chosen


def negative_evidence(inputs_MF: Array, centred_M: Array, log_relevance_F: Array,
                      log_ratio: float) -> tuple[float, Array]:
    """-log N(y; 0, a (K + r I)) at its best amplitude a, up to a constant, and the gradient by log w_f and log r.

    With C = K + r I, b = C^-1 y and a = y'b / M it is (M log a + log |C|) / 2, its derivative by an entry of C half of
    C^-1 - bb' / a.
    """
    count, relevance_F, ratio = len(centred_M), np.exp(log_relevance_F), np.exp(log_ratio)
    root_F = np.sqrt(relevance_F)
    kernel_MM = np.exp(-0.5 * cdist(inputs_MF * root_F, inputs_MF * root_F, "sqeuclidean"))
    factor = cho_factor(kernel_MM + ratio * np.eye(count), lower=True)
    inverse_MM = cho_solve(factor, np.eye(count))
    solved_M = inverse_MM @ centred_M
    amplitude = float(centred_M @ solved_M) / count
    loss = 0.5 * count * np.log(amplitude) + np.log(np.diag(factor[0])).sum()
    by_entry_MM = 0.5 * (inverse_MM - np.outer(solved_M, solved_M) / amplitude)
    weights_MM = by_entry_MM * kernel_MM       # of -w_f (x_if - x_jf)^2 / 2, expanded: no (M, M, F)
    by_feature_F = ((weights_MM @ inputs_MF) * inputs_MF).sum(axis=0) - inputs_MF.T**2 @ weights_MM.sum(axis=1)
    return float(loss), np.append(by_feature_F * relevance_F, np.trace(by_entry_MM) * ratio)
