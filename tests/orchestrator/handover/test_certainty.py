"""How sure a choice is, against closed forms, brute force, and worlds whose truth is known."""
from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import norm

from orchestrator.handover.beliefs import belief_of_models, belief_of_search
from orchestrator.handover.certainty import DRAWS, Belief, normal_draws
from orchestrator.handover.considered import Considered, searched_belief
from orchestrator.handover.delivered import Candidate, Final
from orchestrator.handover.paired import error_covariance, packed, unpacked
from searchspaces.nasbench201.space import NasBench201

THREE_SIGMA = 3 * np.sqrt(0.25 / DRAWS)


def test_two_independent_normals_have_a_closed_form() -> None:
    """P(a > b) = Phi(d / s), s^2 the sum of both variances."""
    mean_N, deviation_N = np.array([0.92, 0.90]), np.array([0.01, 0.02])
    draws = normal_draws(mean_N, np.diag(deviation_N**2), DRAWS, np.random.default_rng(3))
    found = Belief(("a", "b"), draws).certainty("a", ["a", "b"], ["a"])
    assert found.probability_best == pytest.approx(norm.cdf(0.02 / np.hypot(0.01, 0.02)), abs=THREE_SIGMA)
    assert found.expected_gain == pytest.approx(0.02, abs=0.0005)
    assert (found.runner_up, found.considered, found.considered_trained) == ("b", 2, 1)


def test_three_correlated_normals_by_brute_force() -> None:
    """By a grid over both differences to the chosen one, whose joint density is known."""
    mean_N = np.array([0.90, 0.91, 0.905])
    covariance_NN = 1e-4 * np.array([[2.0, 1.5, 0.2], [1.5, 2.0, 0.1], [0.2, 0.1, 1.0]])
    differ = np.array([[1.0, -1.0, 0.0], [1.0, 0.0, -1.0]])
    inverse, step = np.linalg.inv(differ @ covariance_NN @ differ.T), 1e-4
    x = np.arange(step / 2, 0.12, step)
    grid = np.stack(np.meshgrid(x, x), axis=-1) - differ @ mean_N
    density = np.exp(-0.5 * np.einsum("abi,ij,abj->ab", grid, inverse, grid)) * np.sqrt(np.linalg.det(inverse))
    expected = density.sum() * step**2 / (2 * np.pi)
    draws = normal_draws(mean_N, covariance_NN, DRAWS, np.random.default_rng(0))
    found = Belief(("a", "b", "c"), draws).certainty("a", ["b", "c"], [])
    assert found.probability_best == pytest.approx(expected, abs=THREE_SIGMA)
    assert found.runner_up == "b" and found.expected_gain == pytest.approx(-0.01, abs=0.0005)
    alone = Belief(("a", "b", "c"), draws).certainty("a", [], ["a"])
    assert (alone.probability_best, alone.expected_gain, alone.runner_up, alone.considered) == (1.0, None, "", 1)


def test_models_on_the_same_images_differ_by_mcnemars_variance() -> None:
    rng, images = np.random.default_rng(1), 400
    difficulty_I = rng.random(images)
    hits = [difficulty_I + 0.2 * rng.random(images) > limit for limit in (0.15, 0.2, 0.5)]
    assert all((unpacked(packed(row), images) == row).all() for row in hits)
    accuracy_N = np.array([row.mean() for row in hits])
    covariance_NN = error_covariance(accuracy_N, hits, images)
    b, c = int((hits[0] & ~hits[1]).sum()), int((hits[1] & ~hits[0]).sum())
    variance = covariance_NN[0, 0] + covariance_NN[1, 1] - 2 * covariance_NN[0, 1]
    assert variance == pytest.approx((b + c + 1 - (b - c) ** 2 / images) / images**2)
    # Brute force: the variance of the difference over other drawings of as many images.
    draws = rng.integers(images, size=(20_000, images))
    resampled = (hits[0].astype(float) - hits[2])[draws].mean(axis=1).var()
    variance = covariance_NN[0, 0] + covariance_NN[2, 2] - 2 * covariance_NN[0, 2]
    assert resampled == pytest.approx(variance, rel=0.06)
    unknown_NN = error_covariance(accuracy_N, [hits[0], None, hits[2]], images)
    assert unknown_NN[0, 1] == unknown_NN[1, 2] == 0 and unknown_NN[0, 2] == covariance_NN[0, 2]
    assert unknown_NN[1, 1] == pytest.approx(covariance_NN[1, 1])


def calibration(rounds: int, trained: int, residual: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(chance said[rounds], was it the best[rounds]) of the most accurate of some trained candidates among eight, in
    worlds drawn as belief_of_models supposes."""
    said, true = [], []
    for seed in range(rounds):
        rng = np.random.default_rng([7, seed])
        searched_N = rng.normal(0.7, 0.03, 8)
        true_N = 0.85 + rng.normal(1.0, 0.5) * (searched_N - 0.7) + rng.normal(0, residual, 8)
        hits = [rng.random(300) < accuracy for accuracy in true_N[:trained]]
        final_N = np.array([row.mean() for row in hits] + [np.nan] * (8 - trained))
        names, chosen = [str(n) for n in range(8)], int(np.nanargmax(final_N))
        belief = belief_of_models(names, searched_N, final_N, [*hits, *[None] * (8 - trained)], 300)
        said.append(belief.certainty(str(chosen), names, ()).probability_best)
        true.append(float(true_N.argmax() == chosen))
    return np.array(said), np.array(true)


def test_chances_are_shares_in_worlds_that_are_as_believed() -> None:
    """Within three standard errors of the share, all together and in the surer and the less sure half."""
    said, true = calibration(100, trained=5, residual=0.02)
    surer = said > np.median(said)
    for some in (np.ones(100, dtype=bool), surer, ~surer):
        error = np.sqrt((said[some] * (1 - said[some])).sum()) / some.sum()
        assert said[some].mean() == pytest.approx(true[some].mean(), abs=3 * error)
    assert true[surer].mean() > true[~surer].mean()


def test_the_best_of_many_equal_models_is_no_better_than_the_others() -> None:
    """Selection: eight models of one accuracy. The luckiest looks better, and is believed to be by far less."""
    rng, gained, looked = np.random.default_rng(5), [], []
    for _ in range(20):
        hits = [rng.random(500) < 0.9 for _ in range(8)]
        final_N = np.array([row.mean() for row in hits])
        order = np.argsort(-final_N, kind="stable")
        names = [str(n) for n in range(8)]
        belief = belief_of_models(names, np.full(8, 0.7), final_N, hits, 500)
        gained.append(belief.accuracy_SN.mean(axis=0)[order[0]] - 0.9)
        looked.append(final_N[order[0]] - 0.9)
    assert np.mean(looked) > 0.01 and np.mean(gained) < 0.5 * np.mean(looked)


def test_candidates_that_were_only_searched_are_believed_by_what_became_of_the_others() -> None:
    """Twelve models came out 0.2 above the search, within 0.002; the last one was not made, and searched best."""
    searched_N = np.linspace(0.60, 0.72, 13)
    final_N = np.append(searched_N[:12] + 0.2 + 0.002 * (-1.0) ** np.arange(12), np.nan)
    belief = belief_of_models([str(n) for n in range(13)], searched_N, final_N, [None] * 13, 10**6)
    assert belief.accuracy_SN[:, 12].mean() == pytest.approx(0.92, abs=0.003)
    assert 0.001 < belief.accuracy_SN[:, 12].std() < 0.006
    assert belief.certainty("11", ["11", "12"], ["11"]).probability_best < 0.02
    unknown = belief_of_models([str(n) for n in range(13)], np.append(searched_N[:12], np.nan), final_N, [None] * 13,
                               10**6)
    assert unknown.accuracy_SN[:, 12].std() > 0.03, "nothing is known of it but what the others are like"


def test_what_a_search_says_is_smoothed_over_similar_architectures() -> None:
    """A signal with one clear best, seen through noise: the mean of the belief is closer to it than what was seen."""
    space, rng = NasBench201(), np.random.default_rng(2)
    tokens_NT = np.unique(space.canonical(space.sample_uniform(rng, 60)), axis=0)
    features_NF = space.features(tokens_NT)
    signal_N = 0.6 + 0.03 * features_NF[:, :4].sum(axis=1)
    searched_N = signal_N + rng.normal(0, 0.02, len(signal_N))
    names = [space.arch_id(row) for row in tokens_NT]
    belief = belief_of_search(names, features_NF, searched_N, features_NF[:0], searched_N[:0])
    off_N = belief.accuracy_SN.mean(axis=0) - signal_N
    assert np.sqrt((off_N**2).mean()) < 0.8 * 0.02
    low_N, high_N = np.quantile(belief.accuracy_SN, [0.1, 0.9], axis=0)
    final_N = signal_N + rng.normal(0, 0.03, len(signal_N))     # noise of its own, and departures as large
    assert 0.6 < ((low_N < final_N) & (final_N < high_N)).mean() <= 0.95
    candidates = [Candidate(row, name, float(a), 1.0, 1.0) for row, name, a in zip(tokens_NT, names, searched_N)]
    same = searched_belief(space, [candidates], tokens_NT[:5], searched_N[:5])
    np.testing.assert_array_equal(same.accuracy_SN, belief.accuracy_SN, "a candidate's own trial counts once")
    equal = belief_of_search(names, features_NF, np.full(len(names), 0.5), features_NF[:0], searched_N[:0])
    assert equal.certainty(names[0], names, ()).expected_gain == 0


def test_models_of_an_earlier_version_are_considered_too() -> None:
    """Their sidecars have neither the images they had right nor their accuracy in the search."""
    rows = [np.array([n], dtype=np.int8) for n in range(3)]
    candidates = [Candidate(row, name, accuracy, ms, ms, accuracy)
                  for row, name, accuracy, ms in zip(rows, "abc", (0.6, 0.7, 0.8), (1, 2, 3))]
    models = {name: ({"accuracy": {"validation": value}}, ms) for name, value, ms in (("a", 0.8, 1.1), ("z", 0.9, 2.5))}
    considered = Considered(models, candidates, 100)
    assert considered.certainty("a", 2.2).runner_up == "b"
    found = considered.certainty("z", 3.5)
    assert (found.considered, found.considered_trained) == (4, 2)


def test_retrained_finalists_are_compared_image_by_image() -> None:
    """A finalist that was not exported is surer to be worse where it is known on which images."""
    rng, images = np.random.default_rng(4), 200
    better = rng.random(images) < 0.8
    worse = better & (rng.random(images) < 0.95)
    sidecar = {"accuracy": {"validation": float(better.mean())}, "validation_hits": packed(better)}

    def sure(hits: str) -> float:
        finalist = Candidate(np.array([1], np.int8), "b", worse.mean(), 1.0, 1.0, 0.5, Final(float(worse.mean()), hits))
        return Considered({"a": (sidecar | {"accuracy_in_search": 0.5}, 1.0)}, [finalist], images).certainty(
            "a", 2.0).probability_best

    assert sure(packed(worse)) > sure("") + 0.05 > 0.5 + 0.05
