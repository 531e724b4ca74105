"""What is believed of candidates' true accuracies: where models are made, and where a search is all there is.

Both shrink: a choice is the best of many noisy values, so its own value is too high more often than not. Each candidate
is drawn towards what its like are expected to be, by as much as it is noisy (empirical Bayes; Efron and Morris 1975).

Shape legend: S draws, N candidates, K of them with final weights, M trials, F features, T positions.
"""
from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from orchestrator.handover.certainty import DRAWS, SEED, Array, Belief, normal_draws
from orchestrator.handover.paired import error_covariance

FLAT = 1.0              # standard deviation of an accuracy of which nothing is known
SLOPE = 0.5             # standard deviation of final accuracy per accuracy in the search, around 1
SPREADS = np.logspace(-1.5, 1.0, 21)    # of residuals, in units of what they are expected to be about as large as
MOST_TRIALS = 500       # behind a belief; the cost of a Gaussian process is cubic


def belief_of_models(arch_ids: Sequence[str], searched_N: Array, final_N: Array,
                     hits: Sequence[NDArray[np.bool_] | None], images: int) -> Belief:
    """`final_N`: validation accuracy of final weights on `images` images, nan where there are none; `searched_N`: the
    accuracy in the search, nan where it is unknown. At least one has final weights.

        true_n  = offset + slope * (searched_n - mean) + residual_n
        final_n = true_n + error_n

    with the errors' covariance from the images (paired.py). Offset, slope and the residuals' spread are learned from
    the models that were made. They are few, so nothing is set to its best value: offset and slope are integrated over
    normal priors, the spread over a half-Cauchy prior (Gelman 2006) as wide as the search accuracies themselves. So
    candidates that were only searched are believed by what became of the others.
    """
    made = [n for n, final in enumerate(final_N) if np.isfinite(final)]
    error_KK = error_covariance(final_N[made], [hits[n] for n in made], images)
    known = np.isfinite(searched_N)
    centre = float(searched_N[known].mean()) if known.any() else 0.0
    deviation_N = np.where(known, searched_N - centre, 0.0)
    scale = max(float(searched_N[known].std()) if known.any() else 0.0, 1 / images)
    common_NN = FLAT**2 + SLOPE**2 * np.outer(deviation_N, deviation_N)
    prior_N = float(final_N[made].mean()) + deviation_N
    beliefs = [_given(prior_N, common_NN + np.diag((spread * scale) ** 2 + np.where(known, 0.0, scale**2)), made,
                      final_N[made], error_KK) for spread in SPREADS]
    logs = np.array([evidence for _, _, evidence in beliefs]) + np.log(_half_cauchy())
    weights = np.exp(logs - logs.max())
    rng = np.random.default_rng(SEED)
    counts = rng.multinomial(DRAWS, weights / weights.sum())
    draws = [normal_draws(mean_N, covariance_NN, int(count), rng)
             for (mean_N, covariance_NN, _), count in zip(beliefs, counts) if count]
    return Belief(tuple(arch_ids), np.concatenate(draws))


def _given(prior_N: Array, prior_NN: Array, made: Sequence[int], final_K: Array,
           error_KK: Array) -> tuple[Array, Array, float]:
    """(mean[N], covariance[N, N], log evidence) of a normal prior, given noisy values of some."""
    total_KK = prior_NN[np.ix_(made, made)] + error_KK
    gain_NK = np.linalg.solve(total_KK, prior_NN[made]).T
    surprise_K = final_K - prior_N[made]
    evidence = -0.5 * (surprise_K @ np.linalg.solve(total_KK, surprise_K) + np.linalg.slogdet(total_KK)[1])
    return prior_N + gain_NK @ surprise_K, prior_NN - gain_NK @ prior_NN[made], float(evidence)


def belief_of_search(arch_ids: Sequence[str], features_NF: NDArray[np.float32], searched_N: Array,
                     features_MF: NDArray[np.float32], searched_M: Array) -> Belief:
    """Where nothing is trained: candidates and further trials with what their evaluation in the search said.

        searched_n = signal_n + noise_n,    true_n = signal_n + noise'_n + departure_n

    The signal is a Gaussian process over the features, its size, smoothness and noise by maximum likelihood; a final
    training has a noise of its own. How far a final training departs from what the evaluations of the search say is
    nothing that a run can learn. Departures are taken to be independent, and their spread to be as wide as the noise,
    give or take a half-Cauchy: about as often smaller as larger, and sometimes many times larger.
    """
    # Here, because every command would wait a second for what only such runs need.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    rng = np.random.default_rng(SEED)
    further = rng.permutation(len(searched_M))[:max(0, MOST_TRIALS - len(searched_N))]
    inputs = np.concatenate([features_NF, features_MF[further]]).astype(np.float64)
    spread_F = inputs.std(axis=0)
    varied = spread_F > 0
    inputs = (inputs - inputs.mean(axis=0))[:, varied] / spread_F[varied] / np.sqrt(max(1, varied.sum()))
    values = np.concatenate([searched_N, searched_M[further]])
    if not varied.any() or np.ptp(values) == 0:
        return Belief(tuple(arch_ids), np.tile(searched_N, (DRAWS, 1)))     # nothing to learn from
    kernel = ConstantKernel(1.0, (1e-3, 1e3)) * RBF(1.0, (0.1, 10.0)) + WhiteKernel(0.1, (1e-4, 10.0))
    process = GaussianProcessRegressor(kernel, normalize_y=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)     # a value at its bound is an answer too
        process.fit(inputs, values)
    mean_N, covariance_NN = process.predict(inputs[:len(searched_N)], return_cov=True)      # noise' included
    noise = float(np.sqrt(process.kernel_.k2.noise_level) * values.std())
    spread_S = noise * rng.choice(SPREADS, DRAWS, p=_half_cauchy())
    departure_SN = spread_S[:, None] * rng.standard_normal((DRAWS, len(searched_N)))
    return Belief(tuple(arch_ids), normal_draws(mean_N, covariance_NN, DRAWS, rng) + departure_SN)


def _half_cauchy() -> Array:
    """Of SPREADS: the density 1 / (1 + spread^2), on their logarithmic grid."""
    weights = SPREADS / (1 + SPREADS**2)
    return np.asarray(weights / weights.sum())
