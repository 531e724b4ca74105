"""What earlier runs on other tasks say about this one's accuracies, and how far to believe them.

Each earlier run k is one signal s_k(x): the mean of a posterior of its own trials. A second opinion of another dataset
has its own scale and its own errors, so accuracies of every task are replaced by their normal scores (Salinas et al.
2020, "A quantile-based approach for hyperparameter transfer learning"), and this task's scores z are modelled as

    z(x) = sum_k b_k s_k(x) + g(x) + e,    b_k >= 0,  b ~ N(0, a v I),  g ~ GP(0, a K),  e ~ N(0, a r)

`learn_trust` finds b: the v, the length of K and the noise ratio r maximise the marginal likelihood of this task's own
trials, b itself integrated out, the amplitude a in closed form (Rasmussen and Williams 2006, 2.7). v = 0, no trust at
all, is among the choices, and few trials leave b near zero. What b s leaves over is the business of the usual
posterior, fitted to the rest; a monotone map takes scores back to accuracies.

A cheap accuracy errs in a way of its own: z = t + d_1 and the trusted signals together s = t' + d_2, where t is what a
full training would show. `second_opinion` is the weight that s has beside z in the best linear estimate of t.

Shape legend: M trials of this task, N architectures asked about, K earlier runs, F features, E trees, Q quantiles.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.optimize import nnls
from scipy.spatial.distance import cdist
from scipy.stats import norm, rankdata

from orchestrator.controllers.controller import EarlierRun, Observation
from orchestrator.prediction.posterior import Believed, Posterior, PosteriorSettings
from searchspaces.space import SearchSpace

Array = NDArray[np.float64]
LEAST_TRIALS = 4                                    # of an earlier run, to be a signal
LEAST_TREES = 10                                    # of a signal's forest
LENGTHS = (0.5, 0.7, 1.0, 1.4, 2.0, 4.0)            # of K, in standard deviations of all features together
NOISE_RATIOS = tuple(np.logspace(-2, 0.5, 6))       # r
TRUSTS = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)      # v
OWN_ERROR = 0.5                                     # at most this share of a cheap signal's variance is its own error
UPPER_SHARE = 0.25                                  # best trials whose slope extends the map beyond them


@dataclass(frozen=True)
class Signals:
    """Posteriors of the normal scores of earlier runs."""

    posteriors: tuple[Posterior, ...]

    @classmethod
    def learn(cls, space: SearchSpace, runs: Sequence[EarlierRun], settings: PosteriorSettings,
              seed: int) -> Signals | None:
        """Of the runs on other tasks; None where none has anything to say. The trees are shared out among them."""
        known = [(space.features(space.canonical(run.tokens_NT[good_N])), run.accuracy_N[good_N]) for run in runs
                 if not run.same_task
                 and len(np.unique(run.accuracy_N[good_N := np.isfinite(run.accuracy_N)])) >= LEAST_TRIALS]
        if not known:
            return None
        settings = settings.model_copy(update={"trees": min(settings.trees,
                                                            max(LEAST_TREES, settings.trees // len(known)))})
        return cls(tuple(Posterior.fit(features_NF, normal_scores(accuracy_N), settings, seed)
                         for features_NF, accuracy_N in known))

    def each(self, features_NF: NDArray[np.float32]) -> tuple[Array, Array]:
        """(mean[N, K], standard deviation[N, K]) of every run's normal score."""
        believed = [posterior.believe(features_NF) for posterior in self.posteriors]
        mean_NK = np.stack([b.mean_N for b in believed], axis=1)
        return mean_NK, np.stack([b.upper_N(1.0) - b.mean_N for b in believed], axis=1)

    def believe(self, features_NF: NDArray[np.float32]) -> Believed:
        """The runs' mean normal score, all trusted alike: what there is to go by before the first trial."""
        believed = [posterior.believe(features_NF) for posterior in self.posteriors]
        trees_EN, smooth_N, spread_N = (np.mean([getattr(b, name) for b in believed], axis=0)
                                        for name in ("trees_EN", "smooth_N", "spread_N"))
        return Believed(trees_EN, smooth_N, spread_N)


@dataclass(frozen=True)
class Trust:
    """The mean and covariance of b, given this task's trials."""

    weights_K: Array
    doubt_KK: Array


def learn_trust(features_MF: NDArray[np.float32], scores_M: Array, signals_MK: Array) -> Trust:
    """See the module docstring; runs that would get a negative weight get none."""
    features_MF = np.asarray(features_MF, dtype=np.float64)
    spread_F = features_MF.std(axis=0)
    inputs_MF = features_MF / np.where(spread_F > 0, spread_F, 1.0) / np.sqrt(max(1, int((spread_F > 0).sum())))
    squared_MM = cdist(inputs_MF, inputs_MF, "sqeuclidean")
    z_M, s_MK = scores_M - scores_M.mean(), signals_MK - signals_MK.mean(axis=0)
    best, found = -np.inf, Trust(np.zeros(s_MK.shape[1]), np.zeros((s_MK.shape[1],) * 2))
    for length in LENGTHS:
        eigenvalues, vectors_MM = eigh(np.exp(-squared_MM / (2 * length**2)), driver="evd")
        rotated_M, rotated_MK = vectors_MM.T @ z_M, vectors_MM.T @ s_MK
        for ratio in NOISE_RATIOS:
            whiten_M = 1 / np.sqrt(np.maximum(eigenvalues, 0) + ratio)
            for v in TRUSTS:
                evidence, trust = weighed(whiten_M * rotated_M, whiten_M[:, None] * rotated_MK, v)
                evidence += float(np.log(whiten_M).sum())
                if evidence > best:
                    best, found = evidence, trust
    return found


def weighed(z_M: Array, s_MK: Array, v: float) -> tuple[float, Trust]:
    """(log evidence up to a constant, b) of z = s b + a unit of noise times sqrt(a), b ~ N(0, a v I), b >= 0."""
    count = s_MK.shape[1]
    weights_K, doubt_KK, determinant = np.zeros(count), np.zeros((count, count)), 0.0
    rest_M, penalty = z_M, 0.0
    if v > 0:
        weights_K, _ = nnls(np.vstack([s_MK, np.eye(count) / np.sqrt(v)]), np.concatenate([z_M, np.zeros(count)]))
        used = np.flatnonzero(weights_K)
        precision = s_MK[:, used].T @ s_MK[:, used] + np.eye(len(used)) / v
        determinant = float(np.linalg.slogdet(v * precision)[1])
        doubt_KK[np.ix_(used, used)] = np.linalg.inv(precision)
        rest_M, penalty = z_M - s_MK @ weights_K, float(weights_K @ weights_K) / v
    amplitude = max((float(rest_M @ rest_M) + penalty) / len(z_M), 1e-12)
    return -0.5 * (len(z_M) * np.log(amplitude) + determinant), Trust(weights_K, amplitude * doubt_KK)


@dataclass(frozen=True)
class ScoreMap:
    """Normal scores of accuracies and back: piecewise linear between the trials, as steep as the best quarter above."""

    scores_Q: Array
    accuracy_Q: Array

    @classmethod
    def learn(cls, accuracy_M: Array) -> ScoreMap:
        accuracy_Q, first = np.unique(accuracy_M, return_index=True)
        return cls(normal_scores(accuracy_M)[first], accuracy_Q)

    def accuracy(self, scores: Array) -> Array:
        """Of the same shape; not below the worst trial, at most 1."""
        upper = int(len(self.scores_Q) * (1 - UPPER_SHARE))
        rise = self.accuracy_Q[-1] - self.accuracy_Q[upper - 1]
        slope = rise / (self.scores_Q[-1] - self.scores_Q[upper - 1]) if upper and rise > 0 else 0.0
        above = np.maximum(scores - self.scores_Q[-1], 0.0)
        return np.minimum(np.interp(scores, self.scores_Q, self.accuracy_Q) + slope * above, 1.0)


@dataclass(frozen=True)
class InformedPosterior:
    """Accuracy of any architecture from this task's trials and earlier runs; what it says is shaped as a Posterior's.

    `rest` is the posterior of what the trusted signals leave over of the normal scores; `centre_K` are the signals'
    means over the trials, where the doubt about b does not matter; `agreement` is the share of the scores' deviation
    that b s has, 0 where no earlier run is trusted.
    """

    signals: Signals
    trust: Trust
    centre_K: Array
    rest: Posterior
    scores: ScoreMap
    agreement: float

    @classmethod
    def fit(cls, features_MF: NDArray[np.float32], accuracy_M: Array, signals: Signals, settings: PosteriorSettings,
            seed: int) -> InformedPosterior:
        """At most `process_trials` trials decide about the trust: its cost is cubic, too."""
        scores_M, signals_MK = normal_scores(accuracy_M), signals.each(features_MF)[0]
        chosen = np.random.default_rng(seed).permutation(len(accuracy_M))[:settings.process_trials]
        trust = learn_trust(features_MF[chosen], scores_M[chosen], signals_MK[chosen])
        prior_M = signals_MK @ trust.weights_K
        rest = Posterior.fit(features_MF, scores_M - prior_M, settings, seed)
        return cls(signals, trust, signals_MK.mean(axis=0), rest, ScoreMap.learn(accuracy_M),
                   min(1.0, float(prior_M.std() / max(scores_M.std(), 1e-9))))

    def believe(self, features_NF: NDArray[np.float32]) -> Believed:
        signals_NK, spread_NK = self.signals.each(features_NF)
        prior_N, rest = signals_NK @ self.trust.weights_K, self.rest.believe(features_NF)
        away_NK = signals_NK - self.centre_K
        variance_N = ((spread_NK * self.trust.weights_K) ** 2).sum(axis=1) + np.einsum(
            "nk,kl,nl->n", away_NK, self.trust.doubt_KK, away_NK)
        opinion = second_opinion(self.agreement)
        other_N, own = opinion / max(self.agreement, 1e-9) * (away_NK @ self.trust.weights_K), 1 / (1 + opinion)
        trees_EN, smooth_N = (own * (part + prior_N + other_N) for part in (rest.trees_EN, rest.smooth_N))
        spread_N = own * np.sqrt(rest.spread_N**2 + variance_N)
        low_N, high_N = self.scores.accuracy(smooth_N - spread_N), self.scores.accuracy(smooth_N + spread_N)
        return Believed(self.scores.accuracy(trees_EN), self.scores.accuracy(smooth_N), (high_N - low_N) / 2)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"weights": self.trust.weights_K, "doubt": self.trust.doubt_KK,
                                 "centre": self.centre_K, "scores": self.scores.scores_Q,
                                 "accuracy": self.scores.accuracy_Q, "agreement": self.agreement}
        for prefix, posterior in [("rest.", self.rest)] + [
                (f"signal{k}.", posterior) for k, posterior in enumerate(self.signals.posteriors)]:
            state |= {prefix + name: value for name, value in posterior.state_dict().items()}
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> InformedPosterior:
        def part(prefix: str) -> Posterior:
            return Posterior.from_state({name.removeprefix(prefix): value for name, value in state.items()
                                         if name.startswith(prefix)})

        arrays = {name: np.asarray(state[name], dtype=np.float64)
                  for name in ("weights", "doubt", "centre", "scores", "accuracy")}
        signals = Signals(tuple(part(f"signal{k}.") for k in range(len(arrays["weights"]))))
        return cls(signals, Trust(arrays["weights"], arrays["doubt"]), arrays["centre"], part("rest."),
                   ScoreMap(arrays["scores"], arrays["accuracy"]), float(state["agreement"]))


def same_task_trials(space: SearchSpace, runs: Sequence[EarlierRun]) -> list[Observation]:
    """Simply more trials, on the scale of this run's."""
    return [Observation(tokens_T, float(accuracy), float(ms)) for run in runs if run.same_task
            for tokens_T, accuracy, ms in zip(space.canonical(run.tokens_NT), run.accuracy_N, run.latency_ms_N)
            if np.isfinite(accuracy) and np.isfinite(ms)]


def second_opinion(correlation: float) -> float:
    """Weight of the other signal over that of one's own in the best linear estimate of t, both of unit variance.

    With d the share of a signal's variance that is its own error, cov(t, z) = 1 - d and cov(t, s) = cov(z, s) = c, so
    the weights are (1 - d - c^2, c d) / (1 - c^2). What two signals do not share, 1 - c, may be error or a difference
    of the tasks; it is taken for error up to OWN_ERROR of the variance. Weights are equal then, and a signal without
    correlation has none."""
    error = min(1 - correlation, OWN_ERROR)
    return 1.0 if error < OWN_ERROR else correlation * error / (1 - error - correlation**2)


def fit_posterior(features_MF: NDArray[np.float32], accuracy_M: Array, signals: Signals | None,
                  settings: PosteriorSettings, seed: int) -> Posterior | InformedPosterior:
    """With earlier runs where there are signals."""
    if signals is None:
        return Posterior.fit(features_MF, accuracy_M, settings, seed)
    return InformedPosterior.fit(features_MF, accuracy_M, signals, settings, seed)


def posterior_from_state(state: dict[str, Any]) -> Posterior | InformedPosterior:
    """Of either kind's `state_dict`."""
    return InformedPosterior.from_state(state) if "weights" in state else Posterior.from_state(state)


def normal_scores(values_N: Array) -> Array:
    """Quantiles of the standard normal distribution in the order of the values; equal ones get equal scores."""
    scores: Array = norm.ppf((rankdata(values_N) - 0.5) / len(values_N))
    return scores
