"""Latency predictors on latencies whose law is known: recovery, noise floor, correction, round trip."""
from __future__ import annotations

import json
from math import pi, sqrt
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from orchestrator.prediction.predictor import LatencyPredictor, fit_linear
from searchspaces.catalogue import make_space
from searchspaces.errors import DataError, StoreError
from searchspaces.nasbench201.space import NasBench201
from searchspaces.space import SearchSpace

SPACE = make_space("mobilenetv3-s32", classes=10, channels=3, options={})
CELLS = make_space("nasbench201", classes=10, channels=3, options={})
RNG_SEED = 0


def architectures(n: int, seed: int = RNG_SEED) -> np.ndarray:
    return SPACE.sample_uniform(np.random.default_rng(seed), n)


def additive_ms(tokens_NT: np.ndarray) -> np.ndarray:
    """Latency in the span of the features, with non-negative coefficients."""
    features = SPACE.latency_features(tokens_NT).astype(np.float64)
    weights = np.random.default_rng(1).uniform(0.0, 0.02, features.shape[1])
    return 0.3 + features @ weights


def test_additive_latency_is_recovered_exactly() -> None:
    train, test = architectures(120), architectures(200, seed=5)
    predictor = LatencyPredictor.fit(SPACE, train, additive_ms(train))
    np.testing.assert_allclose(predictor.predict(test), additive_ms(test), rtol=1e-6)
    assert predictor.n == 120 and predictor.heldout_error < 1e-6 and predictor.noise_floor == 0.0


def test_error_approaches_the_noise_floor() -> None:
    """With noise of known size the floor is its mean absolute value, and 200 networks come near it."""
    rng, tokens, noise = np.random.default_rng(2), architectures(200), 0.02
    truth = additive_ms(tokens)
    measured = truth * (1.0 + noise * rng.normal(size=200))
    predictor = LatencyPredictor.fit(SPACE, tokens, measured, noise * measured)
    assert predictor.noise_floor == pytest.approx(noise * sqrt(2.0 / pi))
    assert predictor.noise_floor < predictor.heldout_error < 1.3 * predictor.noise_floor
    unseen = architectures(200, seed=6)
    assert np.mean(np.abs(predictor.predict(unseen) / additive_ms(unseen) - 1.0)) < 0.5 * predictor.noise_floor
    assert predictor.correction is None      # nothing but noise is left: no reason for a correction


def test_linear_weights_are_non_negative_and_relative() -> None:
    """Against brute force: no non-negative weights on a grid fit better in relative terms."""
    rng = np.random.default_rng(3)
    features = rng.uniform(0.5, 2.0, (40, 2))
    latency = np.maximum(features @ [2.0, -0.3] + 0.1 * rng.normal(size=40), 0.1)
    weights = fit_linear(features, latency).weights_I
    assert (weights >= 0).all() and weights[1] == 0.0

    def loss(w: np.ndarray) -> float:
        return float(np.sum((features @ w / latency - 1.0) ** 2))

    grid = [np.array([a, b]) for a in np.linspace(0, 3, 61) for b in np.linspace(0, 1, 21)]
    assert loss(weights) <= min(map(loss, grid)) + 1e-9


def test_correction_learns_what_is_not_additive() -> None:
    def curved_ms(tokens_NT: np.ndarray) -> np.ndarray:
        linear = additive_ms(tokens_NT)
        return linear * (1.0 + 0.5 * np.tanh(4.0 * (linear / linear.mean() - 1.0)))

    train, test = architectures(200), architectures(200, seed=7)
    truth = curved_ms(np.concatenate([train, test]))
    predictor = LatencyPredictor.fit(SPACE, train, truth[:200])
    assert predictor.correction is not None
    plain = fit_linear(np.c_[SPACE.latency_features(train), np.ones(200)].astype(np.float64), truth[:200])
    plain_error = np.mean(np.abs(plain.predict(np.c_[SPACE.latency_features(test), np.ones(200)]) / truth[200:] - 1.0))
    error = np.mean(np.abs(predictor.predict(test) / truth[200:] - 1.0))
    assert error < 0.7 * plain_error
    assert predictor.heldout_error == pytest.approx(error, rel=0.5)


def test_state_round_trip_through_json_and_safetensors(tmp_path: Path) -> None:
    tokens = architectures(60)
    for latency in (additive_ms(tokens), additive_ms(tokens) ** 3):     # without and with a correction
        predictor = LatencyPredictor.fit(SPACE, tokens, latency, 0.01 * latency)
        state = predictor.state_dict()
        arrays = {key: value for key, value in state.items() if isinstance(value, np.ndarray)}
        save_file(arrays, tmp_path / "state.safetensors")
        text = json.dumps({key: value for key, value in state.items() if key not in arrays})
        restored = LatencyPredictor.from_state(SPACE, json.loads(text) | load_file(tmp_path / "state.safetensors"))
        np.testing.assert_array_equal(restored.predict(tokens), predictor.predict(tokens))
        assert (restored.n, restored.heldout_error, restored.noise_floor) == (60, predictor.heldout_error,
                                                                              predictor.noise_floor)
        assert restored.typical_error == predictor.typical_error
    assert predictor.correction is not None
    with pytest.raises(StoreError, match="is for mobilenetv3"):
        LatencyPredictor.from_state(CELLS, state)


def test_few_networks_and_bad_latencies() -> None:
    tokens = architectures(10)
    latency = additive_ms(tokens)
    predictor = LatencyPredictor.fit(SPACE, tokens, latency)       # fewer networks than features
    everything = np.concatenate([SPACE.extremes(), architectures(100, seed=8)])
    assert (predictor.predict(everything) > 0).all() and np.isfinite(predictor.predict(everything)).all()
    with pytest.raises(DataError, match="at least 4 measured networks, got 3"):
        LatencyPredictor.fit(SPACE, tokens[:3], latency[:3])
    with pytest.raises(DataError, match="positive numbers"):
        LatencyPredictor.fit(SPACE, tokens, np.where(np.arange(10) == 4, np.nan, latency))


class Plain(NasBench201):
    """A user's space without latency features of its own."""

    def latency_features(self, tokens_NT: np.ndarray) -> np.ndarray:
        return SearchSpace.latency_features(self, tokens_NT)


def test_spaces_need_no_features_of_their_own() -> None:
    space = Plain(classes=10, channels=3)
    tokens = space.sample_uniform(np.random.default_rng(0), 80)
    madds, _ = space.cost(tokens)
    predictor = LatencyPredictor.fit(space, tokens, 1.0 + madds / 1e8)
    assert predictor.heldout_error < 1e-3
