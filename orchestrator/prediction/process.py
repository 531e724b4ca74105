"""Gaussian process over standardised features: the smooth half of the accuracy posterior.

    y ~ N(mean, a (K + r I)),   K_ij = exp(-|x_i - x_j|^2 / (2 l^2))

One eigendecomposition per length l gives the marginal likelihood of every noise ratio r; the amplitude a that
maximises it is closed form (Rasmussen and Williams 2006, 2.2 and 5.4.1).

Shape legend: M observed architectures, N asked about, F features.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.spatial.distance import cdist

Array = NDArray[np.float64]
LENGTHS = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0)      # in standard deviations of all features together
NOISE_RATIOS = tuple(np.logspace(-3, 0.3, 8))       # noise variance over signal variance


@dataclass(frozen=True)
class GaussianProcess:
    centre_F: Array
    scale_F: Array
    inputs_MF: Array        # standardised
    mean: float
    amplitude: float        # variance of the signal
    length: float
    alpha_M: Array          # (K + r I)^-1 (y - mean)
    whiten_MM: Array        # columns v_i / sqrt(w_i + r) of K's eigenvectors

    @classmethod
    def fit(cls, features_MF: NDArray[np.float32], values_M: Array) -> GaussianProcess:
        """The length and noise ratio of the grid that maximise the marginal likelihood."""
        features_MF = np.asarray(features_MF, dtype=np.float64)
        spread_F = features_MF.std(axis=0)
        varied = max(1, int((spread_F > 0).sum()))
        centre_F, scale_F = features_MF.mean(axis=0), np.where(spread_F > 0, spread_F, 1.0) * np.sqrt(varied)
        inputs_MF = (features_MF - centre_F) / scale_F
        squared_MM = cdist(inputs_MF, inputs_MF, "sqeuclidean")
        centred_M, best, chosen = values_M - values_M.mean(), -np.inf, None
        for length in LENGTHS:
            eigenvalues, vectors_MM = eigh(np.exp(-squared_MM / (2 * length**2)), driver="evd")
            rotated_M = vectors_MM.T @ centred_M
            for ratio in NOISE_RATIOS:
                variances_M = np.maximum(eigenvalues, 0) + ratio
                amplitude = max(float(np.mean(rotated_M**2 / variances_M)), 1e-12)
                evidence = -0.5 * (len(values_M) * np.log(amplitude) + np.log(variances_M).sum())
                if evidence > best:
                    best, chosen = evidence, (length, amplitude, vectors_MM, rotated_M, variances_M)
        assert chosen is not None  # the first candidate is always better than -inf
        length, amplitude, vectors_MM, rotated_M, variances_M = chosen
        return cls(centre_F, scale_F, inputs_MF, float(values_M.mean()), amplitude, length,
                   vectors_MM @ (rotated_M / variances_M), vectors_MM / np.sqrt(variances_M))

    def predict(self, features_NF: NDArray[np.float32]) -> tuple[Array, Array]:
        """(mean[N], standard deviation[N]) of the smooth signal, without the noise of an observation."""
        inputs_NF = (features_NF - self.centre_F) / self.scale_F
        kernel_NM = np.exp(-cdist(inputs_NF, self.inputs_MF, "sqeuclidean") / (2 * self.length**2))
        variance_N = 1 - ((kernel_NM @ self.whiten_MM) ** 2).sum(axis=1)
        return self.mean + kernel_NM @ self.alpha_M, np.sqrt(self.amplitude * np.maximum(variance_N, 1e-9))
