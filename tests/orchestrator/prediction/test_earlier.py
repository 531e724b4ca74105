"""Trust in earlier runs against closed forms, and on a toy whose truth is known."""
from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import multivariate_normal, norm, spearmanr

from orchestrator.controllers.controller import EarlierRun
from orchestrator.prediction.earlier import (
    InformedPosterior,
    ScoreMap,
    Signals,
    learn_trust,
    normal_scores,
    posterior_from_state,
    same_task_trials,
    second_opinion,
    weighed,
)
from orchestrator.prediction.posterior import Posterior, PosteriorSettings
from searchspaces.nasbench201.space import NasBench201
from searchspaces.space import Tokens

SPACE = NasBench201()
SETTINGS = PosteriorSettings(trees=20)
ROWS = SPACE.sample_uniform(np.random.default_rng(0), 400)
GAIN = np.random.default_rng(3).uniform(0, 1, (6, 5))


def truth(tokens_NT: Tokens) -> NDArray[np.float64]:
    """Additive, and a bonus for the first edge like the last."""
    return GAIN[np.arange(6), tokens_NT].sum(axis=1) + 0.5 * (tokens_NT[:, 0] == tokens_NT[:, 5])


def run(accuracy_N: NDArray[np.float64], same_task: bool = False) -> EarlierRun:
    return EarlierRun("first", same_task, ROWS[:120], accuracy_N, np.full(120, np.nan))


def noisy(tokens_NT: Tokens, seed: int) -> NDArray[np.float64]:
    """In 0..1, with a noise of half of the signal's deviation."""
    signal = truth(tokens_NT)
    return 1 / (1 + np.exp(-(signal - 3 + 0.5 * signal.std() * np.random.default_rng(seed).normal(size=len(signal)))))


@pytest.mark.parametrize("v", [0.0, 0.3, 3.0])
def test_evidence_and_weights_equal_the_closed_form(v: float) -> None:
    """Of z ~ N(0, a (I + v S S')), a at its maximum, and of the ridge regression that it stands for."""
    rng = np.random.default_rng(11)
    s_MK = rng.normal(size=(30, 2))
    z_M = s_MK @ [0.8, 0.3] + 0.5 * rng.normal(size=30)
    evidence, trust = weighed(z_M, s_MK, v)
    covariance = np.eye(30) + v * s_MK @ s_MK.T
    amplitude = z_M @ np.linalg.solve(covariance, z_M) / 30
    expected = multivariate_normal(np.zeros(30), amplitude * covariance).logpdf(z_M)
    assert evidence == pytest.approx(expected + 0.5 * 30 * (1 + np.log(2 * np.pi)))
    if v:
        precision = s_MK.T @ s_MK + np.eye(2) / v
        assert trust.weights_K == pytest.approx(np.linalg.solve(precision, s_MK.T @ z_M))
        assert trust.doubt_KK == pytest.approx(amplitude * np.linalg.inv(precision))
    else:
        assert not trust.weights_K.any() and not trust.doubt_KK.any()


def test_a_signal_with_a_negative_weight_is_left_out() -> None:
    rng = np.random.default_rng(11)
    good_M, bad_M = rng.normal(size=(2, 40))
    z_M = good_M - bad_M
    both, alone = (weighed(z_M, s_MK, 1.0) for s_MK in (np.stack([good_M, bad_M], axis=1), good_M[:, None]))
    assert both[0] == pytest.approx(alone[0])
    assert both[1].weights_K == pytest.approx([alone[1].weights_K[0], 0.0])


def test_trust_follows_what_the_trials_say() -> None:
    """True signals are believed and both used, shuffled and reversed ones are not."""
    rng = np.random.default_rng(11)
    own_NT = ROWS[200:250]
    features, scores = SPACE.features(own_NT), normal_scores(noisy(own_NT, 1))
    good, other = truth(own_NT), truth(own_NT) + rng.normal(size=50)
    bad = rng.permutation(good)
    trust = learn_trust(features, scores, np.stack([good, other, bad, -good], axis=1) / good.std())
    assert trust.weights_K[0] > 0.5 and trust.weights_K[2] < 0.15 and trust.weights_K[3] == 0
    for misleading in (bad, -good):
        alone = learn_trust(features, scores, misleading[:, None] / good.std())
        assert alone.weights_K[0] < 0.15


@pytest.mark.parametrize(("kind", "helps"), [("true", True), ("shuffled", False), ("reversed", False)])
def test_posterior_gains_from_a_true_signal_and_loses_nothing_to_a_misleading_one(kind: str, helps: bool) -> None:
    rng = np.random.default_rng(11)
    earlier_N = noisy(ROWS[:120], 7)
    earlier_N = {"true": earlier_N, "shuffled": rng.permutation(earlier_N), "reversed": 1 - earlier_N}[kind]
    own_NT, unseen_NT = ROWS[200:225], ROWS[250:]
    features, accuracy = SPACE.features(own_NT), noisy(own_NT, 1)
    signals = Signals.learn(SPACE, [run(earlier_N)], SETTINGS, seed=0)
    assert signals is not None
    informed = InformedPosterior.fit(features, accuracy, signals, SETTINGS, seed=0)
    plain = Posterior.fit(features, accuracy, SETTINGS, seed=0)
    ranks = [spearmanr(posterior.believe(SPACE.features(unseen_NT)).mean_N, truth(unseen_NT))[0]
             for posterior in (informed, plain)]
    assert (informed.agreement > 0.5) is helps
    assert ranks[0] > ranks[1] + (0.1 if helps else -0.05), ranks
    restored = posterior_from_state(informed.state_dict())
    for name in ("trees_EN", "smooth_N", "spread_N"):
        assert np.array_equal(getattr(restored.believe(features), name), getattr(informed.believe(features), name))
    assert ((informed.believe(features).mean_N >= accuracy.min()) & (informed.believe(features).mean_N <= 1)).all()


def test_second_opinion_is_the_best_linear_estimate() -> None:
    """Of t from z = t + d_1 and s = t' + d_2 of unit variance, by least squares on a sample."""
    rng, error, correlation = np.random.default_rng(1), 0.5, 0.3
    agree = correlation / (1 - error)       # of the tasks
    t, u, d_1, d_2 = rng.normal(size=(4, 200_000)) * np.sqrt([[1 - error], [1 - error], [error], [error]])
    other = agree * t + np.sqrt(1 - agree**2) * u
    weights = np.linalg.lstsq(np.stack([t + d_1, other + d_2], axis=1), t, rcond=None)[0]
    assert second_opinion(correlation) == pytest.approx(weights[1] / weights[0], abs=0.02)
    assert second_opinion(0.0) == 0.0 and second_opinion(0.9) == second_opinion(1.0) == 1.0
    assert second_opinion(0.5) == pytest.approx(second_opinion(0.4999), abs=1e-3)


def test_scores_and_accuracies_map_onto_each_other() -> None:
    accuracy = np.array([0.1, 0.6, 0.5, 0.7, 0.7, 0.72, 0.8, 0.9])
    scores = normal_scores(accuracy)
    assert scores[0] == pytest.approx(norm.ppf(0.5 / 8)) and scores[3] == scores[4]
    mapped = ScoreMap.learn(accuracy)
    assert mapped.accuracy(scores) == pytest.approx(accuracy)
    grid = np.linspace(-6, 6, 200)
    assert (np.diff(mapped.accuracy(grid)) >= 0).all()
    assert mapped.accuracy(grid).min() == 0.1 and mapped.accuracy(grid).max() == 1.0


def test_runs_of_the_same_task_are_trials_and_those_that_say_nothing_are_no_signals() -> None:
    accuracy_N = np.where(np.arange(120) < 5, np.nan, 0.5)
    assert Signals.learn(SPACE, [run(accuracy_N), run(noisy(ROWS[:120], 2), same_task=True)], SETTINGS, 0) is None
    same = EarlierRun("second", True, ROWS[:3], np.array([0.5, np.nan, 0.7]), np.array([1.0, 2.0, 3.0]))
    trials = same_task_trials(SPACE, [run(noisy(ROWS[:120], 2)), same])
    assert [(t.accuracy, t.latency_ms) for t in trials] == [(0.5, 1.0), (0.7, 3.0)]
