"""The pure parts of a latency predictor: inputs of architectures, and fits to measured latencies.

Shape legend: N architectures, M measured ones, F latency features of the space and a constant, C counts of choices,
D other devices, I inputs: F, then C where choices are counted, then D where other devices are inputs themselves.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import nnls
from scipy.spatial.distance import cdist

from orchestrator.controllers.controller import LatencyModel
from searchspaces.space import SearchSpace, Tokens

Array = NDArray[np.float64]

REFERENCES = 300        # networks on which other devices are compared with the features
OUTLYING = 3.0          # median residuals beyond which a measurement counts less
REWEIGHTED = 2
TRIVIAL_SHARE = 0.05    # of the median latency: below are networks that a compiler removed


@dataclass(frozen=True)
class Linear:
    """Weights per input: ms per feature, and the share of each other device's latency."""

    weights_I: Array

    def predict(self, inputs_NI: Array) -> Array:
        return inputs_NI @ self.weights_I


@dataclass(frozen=True)
class Correction:
    """g(x) = k(x, X) alpha with k a squared exponential over standardised inputs."""

    mean_I: Array
    scale_I: Array
    centres_MI: Array       # standardised
    alpha_M: Array
    length: float

    def predict(self, inputs_NI: Array) -> Array:
        return _kernel((inputs_NI - self.mean_I) / self.scale_I, self.centres_MI, self.length) @ self.alpha_M


@dataclass(frozen=True)
class Prior:
    """What other devices say about the weights: `parts_FD` are the linear parts of their latencies, `median_D` their
    medians, `share_F` the root mean square share of a latency of 1 that a weight of 1 stands for (0: it is free)."""

    parts_FD: Array
    median_D: Array
    share_F: Array

    @classmethod
    def learn(cls, features_RF: Array, known_RD: Array) -> Prior:
        """From R reference networks. What is 1 for all of them is an offset and free."""
        median_D = np.median(known_RD, axis=0)
        usual_RD = known_RD >= TRIVIAL_SHARE * median_D
        parts = [fit_linear(features_RF[usual_R], known_R[usual_R]).weights_I
                 for known_R, usual_R in zip(known_RD.T, usual_RD.T)]
        mean_R = np.maximum((known_RD / median_D).mean(axis=1), TRIVIAL_SHARE)
        share_F = np.sqrt(np.mean((features_RF / mean_R[:, None]) ** 2, axis=0))
        share_F[(features_RF == 1.0).all(axis=0)] = 0.0
        return cls(np.stack(parts, axis=1), median_D, share_F)


def inputs(space: SearchSpace, tokens_NT: Tokens, counts: bool, known: Sequence[LatencyModel]) -> Array:
    """float64[N, I]. The constant is there because nothing else explains the stem."""
    tokens_NT = np.asarray(tokens_NT, dtype=np.int8)
    features_NF = np.asarray(space.latency_features(tokens_NT), dtype=np.float64)
    columns = [features_NF, np.ones((len(features_NF), 1))]
    if counts:
        columns.append(choice_counts(space, tokens_NT))
    columns += [np.asarray(model.predict(tokens_NT), dtype=np.float64)[:, None] for model in known]
    return np.concatenate(columns, axis=1)


def choice_counts(space: SearchSpace, tokens_NT: Tokens) -> Array:
    """float64[N, C]: how often each value of each vocabulary is chosen at a live position."""
    live_NT, counts = space.live_mask(tokens_NT), []
    for kind in dict.fromkeys((choice.kind, choice.values) for choice in space.choices):
        positions = [t for t, choice in enumerate(space.choices) if (choice.kind, choice.values) == kind]
        rows_NP, live_NP = tokens_NT[:, positions], live_NT[:, positions]
        counts += [((rows_NP == value) & live_NP).sum(axis=1) for value in range(len(kind[1]))]
    return np.stack(counts, axis=1).astype(np.float64)


def fit_linear(features_MF: Array, latency_M: Array) -> Linear:
    """Non-negative least squares on relative residuals; columns are scaled alike for its tolerance."""
    relative_MF = features_MF / latency_M[:, None]
    return Linear(_nnls(relative_MF, np.ones(len(latency_M))))


def fit_helped(inputs_MI: Array, latency_M: Array, prior: Prior, strength: float) -> Linear:
    """Minimises sum_i u_i e_i^2 + strength * sum_f (share_f (w_f - sum_d a_d p_fd))^2 over w, a >= 0 with relative
    residuals e_i of y = sum_f w_f x_f + sum_d a_d (k_d - sum_f p_fd x_f); the weights returned are those of x and of k.

    Inputs without columns of other devices: y = sum_f w_f x_f, drawn to the same linear parts.

    Robust: u_i = min(1, OUTLYING * median |e| / |e_i|) after a first fit with u = 1 (two steps of Huber's weights).
    """
    count = len(prior.share_F)
    features_MF, known_MD = inputs_MI[:, :count], inputs_MI[:, count:]
    with_rest = known_MD.shape[1] > 0
    median = np.median(latency_M)
    unit_D = median / prior.median_D        # a is fitted in units of equal medians
    parts_FD = prior.parts_FD * unit_D
    rest_MD = known_MD * unit_D - features_MF @ parts_FD if with_rest else np.zeros((len(latency_M), len(unit_D)))
    data_M = np.concatenate([features_MF, rest_MD], axis=1) / latency_M[:, None]
    share_F = sqrt(strength) * prior.share_F / median
    pull_F = np.concatenate([np.diag(share_F), -share_F[:, None] * parts_FD], axis=1)
    root_M = np.ones(len(latency_M))
    for _ in range(1 + REWEIGHTED):
        solution = _nnls(np.concatenate([data_M * root_M[:, None], pull_F]), np.concatenate([root_M, np.zeros(count)]))
        error_M = np.maximum(np.abs(data_M @ solution - 1.0), 1e-9)
        root_M = np.sqrt(np.minimum(1.0, OUTLYING * np.median(error_M) / error_M))
    weights_F, scale_D = solution[:count], solution[count:]
    if not with_rest:
        return Linear(weights_F)
    return Linear(np.concatenate([weights_F - parts_FD @ scale_D, scale_D * unit_D]))


def _nnls(columns_MF: Array, values_M: Array) -> Array:
    norm_F = np.linalg.norm(columns_MF, axis=0)
    norm_F[norm_F == 0] = 1.0
    weights_F, _ = nnls(columns_MF / norm_F, values_M, maxiter=30 * len(norm_F))
    return weights_F / norm_F


def fit_correction(inputs_MI: Array, residual_M: Array, length: float, noise: float) -> Correction:
    """Gaussian-process mean of the relative residuals: alpha = (K + noise I)^-1 residual."""
    mean_I, scale_I = inputs_MI.mean(axis=0), inputs_MI.std(axis=0)
    scale_I = np.where(scale_I > 0, scale_I, 1.0) * sqrt(inputs_MI.shape[1])
    centres_MI = (inputs_MI - mean_I) / scale_I
    gram_MM = _kernel(centres_MI, centres_MI, length) + noise * np.eye(len(residual_M))
    return Correction(mean_I, scale_I, centres_MI, cho_solve(cho_factor(gram_MM), residual_M), length)


def _kernel(a_NI: Array, b_MI: Array, length: float) -> Array:
    return np.exp(-0.5 * cdist(a_NI, b_MI, "sqeuclidean") / length**2)


def reference_networks(space: SearchSpace) -> Tokens:
    """int8[R, T], always the same: uniform ones, and as many that share half or three quarters with an extreme."""
    rng = np.random.default_rng(0)
    uniform_NT = space.sample_uniform(rng, REFERENCES // 3)
    extreme_NT = space.canonical(space.extremes())[rng.integers(2, size=len(uniform_NT))]
    half_NT = space.crossover(rng, uniform_NT, extreme_NT)
    return np.concatenate([uniform_NT, half_NT, space.crossover(rng, half_NT, extreme_NT)])
