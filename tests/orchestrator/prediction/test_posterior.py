"""The two halves of the accuracy posterior beside scikit-learn's."""
from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from orchestrator.prediction.posterior import Forest, PosteriorSettings
from orchestrator.prediction.process import GaussianProcess, negative_evidence


def test_forest_predicts_like_scikit_learn() -> None:
    from sklearn.ensemble import RandomForestRegressor
    rng = np.random.default_rng(0)
    x, new = rng.normal(size=(80, 6)).astype(np.float32), rng.normal(size=(50, 6)).astype(np.float32)
    y = x[:, 0] + np.abs(x[:, 1])
    settings = PosteriorSettings(trees=20)
    reference = RandomForestRegressor(20, max_features=settings.features_share, random_state=4).fit(x, y)
    predicted = Forest.fit(x, y, settings, seed=4).predict(new)
    assert np.allclose(predicted, [tree.predict(new) for tree in reference.estimators_])


def test_gaussian_process_equals_scikit_learn_with_the_same_kernel() -> None:
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel
    rng = np.random.default_rng(0)
    x, new = rng.normal(size=(60, 4)).astype(np.float32), rng.normal(size=(30, 4)).astype(np.float32)
    y = np.sin(x[:, 0]) + 0.1 * rng.normal(size=60)
    ours = GaussianProcess.fit(x, y)
    gram = np.linalg.inv(ours.whiten_MM @ ours.whiten_MM.T)
    ratio = float(np.mean(np.diag(gram)) - 1)
    kernel = ConstantKernel(ours.amplitude) * RBF(ours.length)
    reference = GaussianProcessRegressor(kernel, alpha=ratio * ours.amplitude, optimizer=None)
    reference.fit(ours.inputs_MF, y - y.mean())
    mean, spread = reference.predict((new - ours.centre_F) / ours.scale_F, return_std=True)
    assert np.allclose(ours.predict(new)[0], mean + y.mean(), atol=1e-6)
    assert np.allclose(ours.predict(new)[1], spread, atol=1e-4)


def test_evidence_is_that_of_the_normal_density_and_its_gradient_that_of_its_differences() -> None:
    from scipy.optimize import check_grad
    from scipy.stats import multivariate_normal
    rng = np.random.default_rng(0)
    x, log_values = rng.normal(size=(40, 3)), np.array([0.3, -1.0, 0.2, -1.3])
    y = np.sin(2 * x[:, 0]) + 0.1 * rng.normal(size=40)
    kernel = np.exp(-0.5 * ((x[:, None] - x) ** 2 * np.exp(log_values[:-1])).sum(axis=-1))
    covariance = kernel + np.exp(log_values[-1]) * np.eye(40)
    amplitude = y @ np.linalg.solve(covariance, y) / 40
    expected = -multivariate_normal.logpdf(y, np.zeros(40), amplitude * covariance) - 20 * (np.log(2 * np.pi) + 1)

    def loss(values: NDArray[np.float64]) -> float:
        return negative_evidence(x, y, values[:-1], values[-1])[0]

    assert np.isclose(loss(log_values), expected)
    assert check_grad(loss, lambda v: negative_evidence(x, y, v[:-1], v[-1])[1], log_values) < 1e-5


def test_gaussian_process_finds_the_features_that_matter() -> None:
    """Two of thirty do. With all equally relevant, 80 points would explain 0.6 of the variance."""
    rng = np.random.default_rng(0)
    x, new = rng.normal(size=(80, 30)), rng.normal(size=(400, 30))
    ours = GaussianProcess.fit(x, np.sin(2 * x[:, 3]) + x[:, 7])
    relevance_F = ours.scale_F ** -2
    assert set(np.argsort(-relevance_F)[:2]) == {3, 7}
    assert np.corrcoef(ours.predict(new)[0], np.sin(2 * new[:, 3]) + new[:, 7])[0, 1] ** 2 > 0.9
