"""Latency predictors that start from other devices, on latencies whose law is known."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from orchestrator.prediction.fit import Prior, choice_counts, fit_helped, inputs
from orchestrator.prediction.predictor import LatencyPredictor
from orchestrator.prediction.transfer import LookedUp, choose_to_measure
from searchspaces.catalogue import make_space
from searchspaces.errors import DataError
from searchspaces.space import Tokens

SPACE = make_space("mobilenetv3-s32", classes=10, channels=3, options={})
CELLS = make_space("nasbench201", classes=10, channels=3, options={})
ALL_CELLS = CELLS.all_tokens()      # type: ignore[attr-defined]
WEIGHTS = np.random.default_rng(1).uniform(0.0, 0.02, 64)


class Device:
    """Additive latency."""

    def predict(self, tokens_NT: Tokens) -> NDArray[np.float64]:
        features_NF = SPACE.latency_features(tokens_NT).astype(np.float64)
        return 0.3 + features_NF @ WEIGHTS[:features_NF.shape[1]]


class Nonsense:
    """Always the same random latency for a network, whatever it is."""

    def predict(self, tokens_NT: Tokens) -> NDArray[np.float64]:
        seeds = [int.from_bytes(row.tobytes()[-8:], "little") for row in np.asarray(tokens_NT, dtype=np.int8)]
        return np.array([np.random.default_rng(seed).uniform(1.0, 5.0) for seed in seeds])


def random_networks(n: int, seed: int) -> Tokens:
    return SPACE.sample_uniform(np.random.default_rng(seed), n)


def error(predictor: LatencyPredictor, tokens_NT: Tokens, latency_N: NDArray[np.float64]) -> float:
    return float(np.mean(np.abs(predictor.predict(tokens_NT) / latency_N - 1.0)))


def cell_latencies(weights: tuple[float, ...], seed: int) -> NDArray[np.float64]:
    """ms of every cell: so much per operation, with 3 % that nothing explains."""
    noise = np.random.default_rng(seed).normal(size=len(ALL_CELLS))
    return (2.0 + choice_counts(CELLS, ALL_CELLS) @ weights) * np.exp(0.03 * noise)


@pytest.mark.parametrize("n", [4, 5])
def test_scale_and_offset_are_learnt_exactly_from_four_networks(n: int) -> None:
    """y2 = 1.7 y1 + 0.3: what is not additive on the other device comes with it."""
    first = LatencyPredictor.fit(SPACE, random_networks(80, 3), Device().predict(random_networks(80, 3)) ** 2)
    assert first.correction is not None     # so there is something that features alone do not explain
    tokens, unseen = random_networks(n, 4), random_networks(200, 5)
    predictor = LatencyPredictor.fit(SPACE, tokens, 1.7 * first.predict(tokens) + 0.3, known=[first])
    np.testing.assert_allclose(predictor.predict(unseen), 1.7 * first.predict(unseen) + 0.3, rtol=1e-4)
    assert predictor.known == (first,) and predictor.heldout_error < 1e-4
    assert error(LatencyPredictor.fit(SPACE, tokens, 1.7 * first.predict(tokens) + 0.3), unseen,
                 1.7 * first.predict(unseen) + 0.3) > 0.01


def test_one_spoilt_measurement_does_not_spoil_scale_and_offset() -> None:
    device = LookedUp(ALL_CELLS, cell_latencies((0.0, 0.1, 0.5, 2.0, 0.4), 1))
    cells = CELLS.sample_uniform(np.random.default_rng(3), 12)
    latency = 1.7 * device.predict(cells) + 0.3
    spoilt = np.where(np.arange(12) == 7, 1.8 * latency, latency)
    reference = inputs(CELLS, ALL_CELLS[::50], False, [device])
    prior = Prior.learn(reference[:, :-1], reference[:, -1:])
    measured, everything = inputs(CELLS, cells, False, [device]), inputs(CELLS, ALL_CELLS, False, [device])
    truth = 1.7 * device.predict(ALL_CELLS) + 0.3
    predicted = fit_helped(measured, spoilt, prior, 1000.0).predict(everything)
    least_squares = np.linalg.lstsq(measured[:, -2:] / spoilt[:, None], np.ones(12), rcond=None)[0]
    plain_error = np.mean(np.abs(everything[:, -2:] @ least_squares / truth - 1.0))
    assert np.mean(np.abs(predicted / truth - 1.0)) < 0.6 * plain_error


def test_departures_are_learnt_from_a_few_more() -> None:
    """A new device on which 3x3 convolutions are dearer: four networks give the scale, twenty the difference."""
    old, new = LookedUp(ALL_CELLS, cell_latencies((0.0, 0.1, 0.5, 2.0, 0.4), 1)), \
        cell_latencies((0.0, 0.2, 1.0, 9.0, 0.4), 2)
    rows = choose_to_measure(CELLS, ALL_CELLS, [old], 20)
    few, more = (LatencyPredictor.fit(CELLS, ALL_CELLS[rows[:n]], new[rows[:n]], known=[old]) for n in (4, 20))
    assert error(few, ALL_CELLS, new) < 0.35
    assert error(more, ALL_CELLS, new) < 0.08
    assert error(LatencyPredictor.fit(CELLS, ALL_CELLS[rows[:4]], new[rows[:4]]), ALL_CELLS, new) \
        > error(few, ALL_CELLS, new)


@pytest.mark.parametrize("n", [10, 30])
def test_misleading_devices_do_not_hurt(n: int) -> None:
    learnt_on, unseen, rng = random_networks(100, 6), random_networks(200, 7), np.random.default_rng(8)
    truth = Device().predict(unseen)
    bad, good = (LatencyPredictor.fit(SPACE, learnt_on, model.predict(learnt_on)) for model in (Nonsense(), Device()))
    ratios_2S: tuple[list[float], list[float]] = ([], [])
    for seed in range(5):
        tokens = random_networks(n, 10 + seed)
        measured = Device().predict(tokens) * (1.0 + 0.02 * rng.normal(size=n))
        alone, misled, both = (error(LatencyPredictor.fit(SPACE, tokens, measured, known=known), unseen, truth)
                               for known in ([], [bad], [bad, good]))
        for ratios, helped in zip(ratios_2S, (misled, both)):
            ratios.append(helped / alone)
    assert np.median(ratios_2S[0]) < 1.1 and np.median(ratios_2S[1]) < 0.9


def test_misleading_tables_do_not_hurt() -> None:
    new = cell_latencies((0.0, 0.2, 1.0, 9.0, 0.4), 2)
    shuffled = LookedUp(ALL_CELLS, np.random.default_rng(0).permutation(new))
    ratios = []
    for seed in range(5):
        rows = choose_to_measure(CELLS, ALL_CELLS, [], 15, seed)
        alone, misled = (LatencyPredictor.fit(CELLS, ALL_CELLS[rows], new[rows], known=known)
                         for known in ([], [shuffled]))
        ratios.append(error(misled, ALL_CELLS, new) / error(alone, ALL_CELLS, new))
    assert np.median(ratios) < 1.1


def test_state_holds_the_other_devices(tmp_path: Path) -> None:
    """A table, a predictor that was helped itself, and a model that has no state of its own."""
    table = LookedUp(ALL_CELLS, cell_latencies((0.0, 0.1, 0.5, 2.0, 0.4), 1))
    second = 2.0 * table.predict(ALL_CELLS) ** 1.05     # with all that features do not explain
    helped = LatencyPredictor.fit(CELLS, ALL_CELLS[::1500], second[::1500], known=[table])

    class Stateless:
        def predict(self, tokens_NT: Tokens) -> NDArray[np.float64]:
            return table.predict(tokens_NT) + 1.0

    new = 0.5 * table.predict(ALL_CELLS) + 0.5 * helped.predict(ALL_CELLS)
    predictor = LatencyPredictor.fit(CELLS, ALL_CELLS[::1600], new[::1600], known=[table, helped, Stateless()])
    assert len(predictor.known) == 3 and helped.known == (table,)
    assert error(predictor, ALL_CELLS, new) < 0.01
    state = predictor.state_dict()
    arrays = {key: value for key, value in state.items() if isinstance(value, np.ndarray)}
    save_file(arrays, tmp_path / "state.safetensors")
    text = json.dumps({key: value for key, value in state.items() if key not in arrays})
    restored = LatencyPredictor.from_state(CELLS, json.loads(text) | load_file(tmp_path / "state.safetensors"))
    np.testing.assert_array_equal(restored.predict(ALL_CELLS), predictor.predict(ALL_CELLS))
    assert restored.state_dict().keys() == state.keys()


def test_states_from_before_there_was_help_predict_what_they_did() -> None:
    """Weights of the space's features and the constant, a correction on the same; nothing else."""
    tokens = random_networks(50, 1)
    features = np.c_[SPACE.latency_features(tokens).astype(np.float64), np.ones(50)]
    weights = np.append(WEIGHTS[:features.shape[1] - 1], 0.3)
    state = {"space_id": SPACE.space_id, "n": 50, "heldout_error": 0.02, "noise_floor": 0.01, "fastest_ms": 0.1,
             "weights": weights, "correction_mean": features.mean(0), "correction_scale": np.ones(len(weights)),
             "correction_centres": features[:1] - features.mean(0), "correction_alpha": np.array([0.5]),
             "correction_length": 4.0}
    predictor = LatencyPredictor.from_state(SPACE, state)
    distance = ((features - features[0]) ** 2).sum(1)
    np.testing.assert_allclose(predictor.predict(tokens), features @ weights * (1 + 0.5 * np.exp(-distance / 32)))
    assert predictor.known == () and predictor.typical_error == 0.02


def test_tables_know_what_they_hold() -> None:
    table = LookedUp(ALL_CELLS[:100], np.linspace(1.0, 2.0, 100))
    np.testing.assert_array_equal(table.predict(ALL_CELLS[[99, 0]]), [2.0, 1.0])
    with pytest.raises(DataError, match=r"no row for tokens \[0, 0, 0, 4, 0, 0\]"):
        table.predict(ALL_CELLS[[5, 100]])
    with pytest.raises(DataError, match="positive numbers"):
        LookedUp(ALL_CELLS[:2], [1.0, 0.0])


def test_choice_is_spread_diverse_and_repeatable() -> None:
    latency = cell_latencies((0.0, 0.1, 0.5, 2.0, 0.4), 1)
    known = LookedUp(ALL_CELLS, latency)
    rows = choose_to_measure(CELLS, ALL_CELLS, [known], 10, seed=1)
    rank = np.argsort(np.argsort(latency)) / len(latency)
    assert len(set(rows)) == 10
    assert np.abs(np.sort(rank[rows]) - (np.arange(10) + 0.5) / 10).max() < 0.12
    assert rank[rows[:2]].min() < 0.15 and rank[rows[:2]].max() > 0.85      # the first two are far apart
    np.testing.assert_array_equal(rows, choose_to_measure(CELLS, ALL_CELLS, [known], 10, seed=1))
    assert set(rows) != set(choose_to_measure(CELLS, ALL_CELLS, [known], 10, seed=2))

    def spread(chosen: NDArray[np.int64]) -> float:
        counts = np.c_[choice_counts(CELLS, ALL_CELLS[chosen]), np.ones(len(chosen))]
        return float(np.linalg.slogdet(counts.T @ counts + np.eye(6))[1])

    at_random = [spread(np.random.default_rng(seed).choice(len(ALL_CELLS), 10)) for seed in range(20)]
    assert spread(rows) > np.quantile(at_random, 0.9)
    assert len(choose_to_measure(CELLS, ALL_CELLS[:3], [], 10)) == 3
    assert len(choose_to_measure(SPACE, random_networks(30, 1), [], 4)) == 4
