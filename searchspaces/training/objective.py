"""What UNAS minimises: losses on training and validation images, and latency (specification unas 5, 6 and 8)."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from searchspaces.errors import ConfigError
from searchspaces.training.estimators import Point

Gap = Literal["batch", "per_example"]
LatencyMode = Literal["linear", "hinge"]


def generalisation_loss(train_B: Tensor, validation_B: Tensor, weight: float, gap: Gap = "batch") -> Tensor:
    """L_gen = L_train + lambda |L_val - L_train| (equation 8), from the losses of single images; a scalar.

    One architecture serves the batch, so the gap is that of the means. `per_example` is the public code's form, which
    pairs the i-th images: it is above 0 even where there is no gap, and meant for one architecture per image.
    """
    if gap == "batch":
        train, validation = train_B.mean(), validation_B.mean()
        return train + weight * (validation - train).abs()
    return (train_B + weight * (validation_B - train_B).abs()).mean()


def ramp(step: float, weight: float, steps: float) -> float:
    """Rises linearly from 0 to `weight` over `steps`, then stays; both in steps, or both as shares of a search."""
    return weight * min(1.0, step / steps) if steps > 0 else weight


def latency_loss(latency: Tensor, target: float | None, weight: float, mode: LatencyMode) -> Tensor:
    """h(t): `weight` times the latency, or times what exceeds the target; in the unit of both."""
    if mode == "linear":
        return weight * latency
    if target is None:
        raise ConfigError("latency_mode 'hinge' needs a latency target, the budget; give one, or use 'linear'")
    return weight * (latency - target).clamp(min=0)


def ridge(x_ND: NDArray[np.float64], y_N: NDArray[np.float64], penalty: float,
          penalise_bias: bool = False) -> NDArray[np.float64]:
    """float64[D + 1]: weights and bias that minimise |y - Xw - b|^2 + penalty |w|^2, in closed form.

    One-hot features are rank deficient, so weights are defined up to constants per decision: compare predictions only.
    """
    ones_N1 = np.ones((len(x_ND), 1))
    x = np.concatenate([x_ND, ones_N1], axis=1)
    diagonal = np.full(x.shape[1], penalty)
    diagonal[-1] = penalty if penalise_bias else 0.0
    return np.linalg.lstsq(x.T @ x + np.diag(diagonal), x.T @ y_N, rcond=None)[0]


@dataclass(frozen=True, eq=False)
class AdditiveLatency:
    """The surrogate g(z) = sum of l_ij z_ij + bias (section 5.2 of the paper), defined on relaxed points too. It is in
    the unit of what it was fitted on."""

    weights: Tensor     # [D + 1], the bias last

    @staticmethod
    def fit(onehot_ND: NDArray[np.floating], latency_N: NDArray[np.floating]) -> AdditiveLatency:
        """Ridge on standardised latencies with lambda = 1e-3 n / 10,000, the bias free (specification 6, ours)."""
        x, y = np.asarray(onehot_ND, dtype=np.float64), np.asarray(latency_N, dtype=np.float64)
        mean, scale = float(y.mean()), float(y.std()) or 1.0
        weights = ridge(x, (y - mean) / scale, penalty=1e-3 * len(y) / 10_000) * scale
        weights[-1] += mean
        return AdditiveLatency(torch.from_numpy(weights))

    def __call__(self, point: Point) -> Tensor:
        """[...]: latency of a point of the product of simplices."""
        flat = torch.cat(list(point), dim=-1)
        weights = self.weights.to(flat)
        return flat @ weights[:-1] + weights[-1]
