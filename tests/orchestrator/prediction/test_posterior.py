"""The two halves of the accuracy posterior beside scikit-learn's."""
from __future__ import annotations

import numpy as np

from orchestrator.prediction.posterior import Forest, PosteriorSettings
from orchestrator.prediction.process import GaussianProcess


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
