"""Accuracy of architectures that nobody evaluated, with its uncertainty.

The posterior is the average of a random forest, which finds thresholds and ignores outliers, and of a Gaussian process,
which is smooth between them: together they rank better than either. Accuracies of cheap training are noisy single runs,
so also an observed accuracy is better believed after smoothing. The forest is stored as plain arrays (safetensors), and
predicts all trees at once without scikit-learn.

Shape legend: N architectures, E trees, F features, J nodes of the largest tree.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from sklearn.ensemble import RandomForestRegressor

from orchestrator.prediction.process import GaussianProcess
from orchestrator.settings import Frozen

FOREST, PROCESS = "forest.", "process."


class PosteriorSettings(Frozen):
    """Accuracy of any architecture, with its uncertainty, from the observed trials."""

    trees: int = Field(50, ge=2, le=1_000_000, description="of the random forest")
    features_share: float = Field(1.0, gt=0, le=1, description="share of the features that a split looks at")
    optimism: float = Field(1.0, ge=0, description="standard deviations added to the mean when candidates are chosen")
    process_trials: int = Field(600, ge=4, le=1_000_000, description=(
        "at most this many trials, at random, for the Gaussian process: its cost is cubic"))


@dataclass(frozen=True)
class Believed:
    """What both models believe of N architectures."""

    trees_EN: NDArray[np.float64]
    smooth_N: NDArray[np.float64]
    spread_N: NDArray[np.float64]

    @property
    def mean_N(self) -> NDArray[np.float64]:
        return (self.trees_EN.mean(axis=0) + self.smooth_N) / 2

    def upper_N(self, optimism: float) -> NDArray[np.float64]:
        """float64[N]: mean plus so many standard deviations, averaged over both models."""
        return self.mean_N + optimism * (self.trees_EN.std(axis=0) + self.spread_N) / 2


@dataclass(frozen=True)
class Posterior:
    forest: Forest
    process: GaussianProcess

    @classmethod
    def fit(cls, features_NF: NDArray[np.float32], accuracy_N: NDArray[np.float64], settings: PosteriorSettings,
            seed: int) -> Posterior:
        chosen = np.random.default_rng(seed).permutation(len(accuracy_N))[:settings.process_trials]
        return cls(Forest.fit(features_NF, accuracy_N, settings, seed),
                   GaussianProcess.fit(features_NF[chosen], accuracy_N[chosen]))

    def believe(self, features_NF: NDArray[np.float32]) -> Believed:
        return Believed(self.forest.predict(features_NF), *self.process.predict(features_NF))

    def state_dict(self) -> dict[str, Any]:
        return ({FOREST + name: value for name, value in vars(self.forest).items()}
                | {PROCESS + name: value for name, value in vars(self.process).items()})

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Posterior:
        def part(prefix: str) -> dict[str, Any]:
            return {key.removeprefix(prefix): value if isinstance(value, int | float) else np.asarray(value)
                    for key, value in state.items() if key.startswith(prefix)}

        return cls(Forest(**part(FOREST)), GaussianProcess(**part(PROCESS)))


@dataclass(frozen=True)
class Forest:
    """Nodes of every tree, padded to J. A leaf points to itself, so that a walk of `depth` steps ends in a leaf."""

    feature_EJ: NDArray[np.int64]
    threshold_EJ: NDArray[np.float64]
    left_EJ: NDArray[np.int64]
    right_EJ: NDArray[np.int64]
    value_EJ: NDArray[np.float64]
    depth: int

    @classmethod
    def fit(cls, features_NF: NDArray[np.float32], accuracy_N: NDArray[np.float64], settings: PosteriorSettings,
            seed: int) -> Forest:
        model = RandomForestRegressor(settings.trees, max_features=settings.features_share, random_state=seed)
        model.fit(features_NF, accuracy_N)
        trees = [estimator.tree_ for estimator in model.estimators_]
        shape = (len(trees), max(tree.node_count for tree in trees))
        forest = cls(np.zeros(shape, dtype=np.int64), np.zeros(shape), np.tile(np.arange(shape[1]), (shape[0], 1)),
                     np.tile(np.arange(shape[1]), (shape[0], 1)), np.zeros(shape), max(t.max_depth for t in trees))
        for e, tree in enumerate(trees):
            inner = np.flatnonzero(tree.children_left >= 0)
            forest.feature_EJ[e, inner] = tree.feature[inner]
            forest.threshold_EJ[e, inner] = tree.threshold[inner]
            forest.left_EJ[e, inner] = tree.children_left[inner]
            forest.right_EJ[e, inner] = tree.children_right[inner]
            forest.value_EJ[e, :tree.node_count] = tree.value[:, 0, 0]
        return forest

    def predict(self, features_NF: NDArray[np.float32]) -> NDArray[np.float64]:
        """float64[E, N]: the accuracy according to each tree."""
        trees, columns = np.arange(len(self.left_EJ))[:, None], np.arange(len(features_NF))
        node_EN = np.zeros((len(self.left_EJ), len(features_NF)), dtype=np.int64)
        for _ in range(self.depth):
            value_EN = features_NF[columns, self.feature_EJ[trees, node_EN]]
            node_EN = np.where(value_EN <= self.threshold_EJ[trees, node_EN], self.left_EJ[trees, node_EN],
                               self.right_EJ[trees, node_EN])
        return self.value_EJ[trees, node_EN]
