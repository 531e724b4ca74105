"""UNAS' objective: worked numbers of specification unas 12."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from searchspaces.errors import ConfigError
from searchspaces.training.objective import AdditiveLatency, generalisation_loss, latency_loss, ramp, ridge


def test_gap_loss_worked_example() -> None:
    train, validation = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.5])
    assert float(generalisation_loss(train, validation, 0.5)) == pytest.approx(1.625)
    assert float(generalisation_loss(train, validation, 0.5, "per_example")) == pytest.approx(1.875)
    assert float(generalisation_loss(train, validation, 0.0)) == pytest.approx(1.5)


def test_latency_ramp_and_hinge_worked_example() -> None:
    assert ramp(500, 0.1, 30_000) == pytest.approx(0.0016667, abs=1e-7)
    assert ramp(40_000, 0.1, 30_000) == 0.1 and ramp(0, 0.1, 0) == 0.1
    twelve, nine = torch.tensor(12.0), torch.tensor(9.0)
    assert float(latency_loss(twelve, 10.0, ramp(30_000, 0.1, 30_000), "hinge")) == pytest.approx(0.2)
    assert float(latency_loss(nine, 10.0, 0.1, "hinge")) == 0.0
    assert float(latency_loss(nine, None, 0.1, "linear")) == pytest.approx(0.9)
    with pytest.raises(ConfigError, match="hinge"):
        latency_loss(nine, None, 0.1, "hinge")


TOY = np.array([[1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1]], dtype=np.float64)
TOY_MS = np.array([3.0, 4.0, 5.0, 6.0])


def test_ridge_worked_example() -> None:
    weights = ridge(TOY, TOY_MS, penalty=1.0, penalise_bias=True)
    assert weights == pytest.approx([1 / 3, 5 / 3, 2 / 3, 4 / 3, 2])
    assert TOY @ weights[:-1] + weights[-1] == pytest.approx([3, 11 / 3, 13 / 3, 5])


def test_additive_latencies_are_predicted_at_and_between_vertices() -> None:
    surrogate = AdditiveLatency.fit(TOY, TOY_MS)
    points = [torch.tensor(TOY[:, :2]), torch.tensor(TOY[:, 2:])]
    assert surrogate(points).numpy() == pytest.approx(TOY_MS, abs=1e-5)
    middle = surrogate([torch.full((2,), 0.5, dtype=torch.float64)] * 2)
    assert float(middle) == pytest.approx(4.5, abs=1e-5)


def test_proxyless_features_are_rank_deficient_and_still_predicted() -> None:
    """15 layers of seven values and six of six: 141 features and a bias, rank 121 (specification 6)."""
    rng = np.random.default_rng(0)
    sizes = [7] * 15 + [6] * 6
    rows = np.concatenate([np.eye(size)[rng.integers(size, size=400)] for size in sizes], axis=1)
    assert rows.shape[1] == 141
    assert np.linalg.matrix_rank(np.concatenate([rows, np.ones((400, 1))], axis=1)) == 121
    truth = rows @ rng.random(141) + 2
    surrogate = AdditiveLatency.fit(rows[:300], truth[:300])
    predicted = surrogate([torch.tensor(rows[300:])]).numpy()
    assert predicted == pytest.approx(truth[300:], rel=1e-3)


def test_equal_latencies_and_single_precision_points() -> None:
    surrogate = AdditiveLatency.fit(TOY, np.full(4, 2.0))
    assert float(surrogate([torch.tensor([0.3, 0.7]), torch.tensor([1.0, 0.0])])) == pytest.approx(2.0)
