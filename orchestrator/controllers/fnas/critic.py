"""Uncertainty-Aware Critic (FNAS section 4.2): predicts the reward of an architecture, and how far to believe it.

Legend: N architectures, D features of the expand embedding, M members of the ensemble.

Two forms. `printed` is the paper's: V is one network (Eq. 3, |V - R|) and U a second one that learns V's absolute error
(Eq. 4). U learns the errors V made before it saw the sample (prequential), because after the fit they are far too
small. `ensemble` trains M networks V from different starts on different resamples of the data; V is their mean and U
their spread, which needs no errors to learn from and is large exactly where there are no data.

Several tasks are learnt at once: rewards are standardised per task, and predictions are in units of the current one.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

Floats = NDArray[np.float64]
Form = Literal["ensemble", "printed"]
MINIBATCH = 32
PARTS = 10          # of an earlier search's samples, in pretraining
LEARNING_RATE = 1e-3


class Mlps(nn.Module):
    """M networks side by side: D - hidden - hidden - hidden - 1 with PReLU; float[M, B, D] to float[M, B]."""

    def __init__(self, members: int, inputs: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        widths = [inputs, hidden, hidden, hidden, 1]
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for fan_in, fan_out in zip(widths, widths[1:], strict=False):
            bound = fan_in ** -0.5
            for shape, parameters in (((members, fan_in, fan_out), self.weights), ((members, 1, fan_out), self.biases)):
                parameters.append(nn.Parameter((2 * torch.rand(shape, generator=generator) - 1) * bound))
        self.slopes = nn.Parameter(torch.full((len(widths) - 2, members, 1, 1), 0.25))

    def forward(self, features_MBD: Tensor) -> Tensor:
        x = features_MBD
        for weight, bias, slope in zip(self.weights, self.biases, [*self.slopes, None], strict=True):
            x = torch.baddbmm(bias, x, weight)
            if slope is not None:
                x = torch.maximum(x, torch.zeros(())) + slope * torch.minimum(x, torch.zeros(()))
        return x[..., 0]


@dataclass
class _Samples:
    """Trained samples of one task; residuals are nan where no prediction was made before the reward was known."""

    features: list[NDArray[np.float32]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    residuals: list[float] = field(default_factory=list)

    def scale(self) -> tuple[float, float]:
        """Mean and standard deviation of the rewards, (0, 1) where there are too few to tell."""
        if len(self.rewards) < 2:
            return (self.rewards[0] if self.rewards else 0.0), 1.0
        return float(np.mean(self.rewards)), max(float(np.std(self.rewards)), 1e-6)

    def first(self, count: int) -> _Samples:
        return _Samples(self.features[:count], self.rewards[:count], self.residuals[:count])


class Critic:
    """V and U. Pure given the order of calls: its random numbers come from `seed` only."""

    def __init__(self, inputs: int, seed: int, form: Form = "ensemble", members: int = 5, hidden: int = 200) -> None:
        self.form = form
        self._members = members if form == "ensemble" else 1
        self._random = torch.Generator().manual_seed(seed)
        self._value = Mlps(self._members, inputs, hidden, self._random)
        self._doubt = Mlps(1, inputs, hidden, self._random) if form == "printed" else None
        parameters = [*self._value.parameters(), *(self._doubt.parameters() if self._doubt else ())]
        self._optimiser = torch.optim.Adam(parameters, lr=LEARNING_RATE)
        self._own = _Samples()
        self._earlier: list[_Samples] = []

    # --- data --------------------------------------------------------------------------------------------------------

    def add_earlier(self, features_ND: NDArray[np.float32], rewards_N: Floats) -> None:
        """Trained samples of another search, on this task or another one."""
        samples = _Samples(list(features_ND), [float(r) for r in rewards_N], [float("nan")] * len(rewards_N))
        self._earlier.append(samples)

    def add(self, features_D: NDArray[np.float32], reward: float, predicted: float | None) -> None:
        """A trained sample, and what V said about it before (None: it was not asked)."""
        self._own.features.append(features_D)
        self._own.rewards.append(reward)
        self._own.residuals.append(abs(predicted - reward) if predicted is not None else float("nan"))

    @property
    def trained_samples(self) -> int:
        return len(self._own.rewards)

    @property
    def all_samples(self) -> int:
        return self.trained_samples + sum(len(samples.rewards) for samples in self._earlier)

    @property
    def calibrated(self) -> bool:
        """Are predictions in units of this search's rewards yet?"""
        return self.trained_samples >= 2

    def recent_residuals(self, count: int) -> Floats:
        """The last `count` prequential |V - R|."""
        known = [r for r in self._own.residuals if np.isfinite(r)]
        return np.array(known[-count:])

    def reward_deviation(self) -> float:
        return self._own.scale()[1]

    # --- prediction --------------------------------------------------------------------------------------------------

    def predict(self, features_ND: NDArray[np.float32]) -> tuple[Floats, Floats]:
        """(V float64[N] in units of the reward, U float64[N] >= 0 likewise)."""
        mean, deviation = self._own.scale()
        with torch.inference_mode():
            x = torch.from_numpy(np.ascontiguousarray(features_ND, dtype=np.float32))
            values_MN = self._value(x.expand(self._members, *x.shape)).double()
            if self._doubt is not None:
                doubt_N = functional.softplus(self._doubt(x[None])[0]).double()
            else:
                doubt_N = values_MN.std(dim=0, unbiased=False)
        return values_MN.mean(0).numpy() * deviation + mean, doubt_N.numpy() * deviation

    # --- learning ----------------------------------------------------------------------------------------------------

    def pretrain(self, steps: int) -> None:
        """`fit` on the samples of earlier searches. U of the printed form learns V's errors before the fit: for it the
        samples come in parts, in the order in which they were trained then, each predicted before it is learnt."""
        if self._doubt is None:
            self.fit(steps)
            return
        tasks = self._earlier
        for part in range(1, PARTS + 1):
            known = [(task, len(task.rewards) * part // PARTS) for task in tasks]
            self._earlier = [task.first(count) for task, count in known if count]
            self.fit(steps // PARTS)
            for task, count in known:
                self._predict_next(task, count, len(task.rewards) * (part + 1) // PARTS)
        self._earlier = tasks

    def _predict_next(self, task: _Samples, start: int, end: int) -> None:
        if not start or not task.rewards[start:end]:
            return
        mean, deviation = task.first(start).scale()
        with torch.inference_mode():
            values_N = self._value(torch.from_numpy(np.stack(task.features[start:end]))[None])[0].double().numpy()
        errors_N = np.abs(values_N * deviation + mean - np.array(task.rewards[start:end]))
        task.residuals[start:end] = [float(error) for error in errors_N]

    def fit(self, steps: int) -> None:
        """`steps` of Adam on minibatches of trained samples: half of each from this search once it has enough."""
        tasks = [self._own, *self._earlier] if len(self._own.rewards) >= 2 else self._earlier
        if not tasks or steps == 0:
            return
        features_ND = torch.from_numpy(np.concatenate([np.stack(t.features) for t in tasks]))
        targets_N = torch.from_numpy(np.concatenate([self._standardised(t) for t in tasks])).float()
        residuals_N = torch.tensor([r / deviation for t in tasks for deviation in (t.scale()[1],) for r in t.residuals])
        shares_N = torch.cat([torch.full((len(t.rewards),), 1 / (len(tasks) * len(t.rewards))) for t in tasks])
        rows = torch.multinomial(shares_N, steps * self._members * MINIBATCH, True, generator=self._random)
        for rows_MB in rows.view(steps, self._members, MINIBATCH):
            loss = self._loss(features_ND, targets_N, residuals_N, rows_MB)
            self._optimiser.zero_grad(set_to_none=True)
            loss.backward()
            self._optimiser.step()

    @staticmethod
    def _standardised(samples: _Samples) -> Floats:
        mean, deviation = samples.scale()
        return (np.array(samples.rewards) - mean) / deviation

    def _loss(self, features_ND: Tensor, targets_N: Tensor, residuals_N: Tensor, rows_MB: Tensor) -> Tensor:
        values_MB = self._value(features_ND[rows_MB])
        loss = (values_MB - targets_N[rows_MB]).abs().mean(dim=1).sum()  # Eq. 3, each member on its own minibatch
        if self._doubt is not None:
            known_B = rows_MB[0][torch.isfinite(residuals_N[rows_MB[0]])]
            if len(known_B):
                doubt_B = functional.softplus(self._doubt(features_ND[known_B][None])[0])
                loss = loss + (doubt_B - residuals_N[known_B]).abs().mean()  # Eq. 4 on prequential residuals
        return loss

    def state_dict(self) -> Mapping[str, Tensor]:
        """Tensors of both networks, for a look at them; a controller is rebuilt from its trials, not from these."""
        networks = {"value": self._value} | ({"doubt": self._doubt} if self._doubt is not None else {})
        return {f"{name}.{key}": tensor for name, network in networks.items()
                for key, tensor in network.state_dict().items()}
