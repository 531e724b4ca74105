"""The architecture evaluator R(a | B; w) (specification 7; paper Fig. 2, Eq. 3).

Scores have an arbitrary offset and scale per budget: only scores of one budget may be compared.

Shape legend: M architectures, K training budgets, B budgets of a batch, D architecture features, N pairs (a, B).
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from orchestrator.controllers.pnag.budgets import TrainingBudgets
from orchestrator.controllers.pnag.dominance import pair_labels
from orchestrator.controllers.pnag.settings import EvaluatorSettings


@dataclass(frozen=True)
class Triplets:
    """What the evaluator learns from: features[M, D] of architectures, their cost in ms, their accuracy in 0..1."""

    features_MD: NDArray[np.float32]
    cost_M: NDArray[np.float64]
    accuracy_M: NDArray[np.float64]

    def rows(self, index: NDArray[np.int64]) -> Triplets:
        return Triplets(self.features_MD[index], self.cost_M[index], self.accuracy_M[index])


class Evaluator(nn.Module):
    """Linear(D+K, hidden) ReLU Linear(hidden, hidden) ReLU Linear(hidden, 1)."""

    def __init__(self, features: int, budgets: int, hidden: int) -> None:
        super().__init__()
        self.features = features
        self.first = nn.Linear(features + budgets, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, 1)

    def forward(self, features_ND: Tensor, budget_NK: Tensor) -> Tensor:
        """scores[N]: architecture n under budget n."""
        return self._score(self._architecture(features_ND) + self._budget(budget_NK))

    def grid(self, features_MD: Tensor, budget_BK: Tensor) -> Tensor:
        """scores[B, M]: every architecture under every budget; the first layer is shared, not repeated."""
        return self._score(self._architecture(features_MD)[None] + self._budget(budget_BK)[:, None])

    def _architecture(self, features_MD: Tensor) -> Tensor:
        return nn.functional.linear(features_MD, self.first.weight[:, :self.features], self.first.bias)

    def _budget(self, budget_BK: Tensor) -> Tensor:
        return nn.functional.linear(budget_BK, self.first.weight[:, self.features:])

    def _score(self, first: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(first)))).squeeze(-1)


def ranking_loss(scores_BM: Tensor, labels_BMM: Tensor, loss: str) -> Tensor:
    """Eq. 3: mean of phi(d(i,j) [R_i - R_j]) over the pairs that count, phi hinge (printed) or logistic (code)."""
    margin = labels_BMM * (scores_BM[:, :, None] - scores_BM[:, None, :])
    phi = torch.relu(1 - margin) if loss == "hinge" else nn.functional.softplus(-margin)
    counts = labels_BMM != 0
    return (phi * counts).sum() / counts.sum().clamp(min=1)


def kendall_tau(scores_BM: NDArray[np.float32], labels_BMM: NDArray[np.int8]) -> float:
    """Mean over budgets of the mean over pairs of d * sign(R_i - R_j); nan without pairs."""
    signs = np.sign(scores_BM[:, :, None] - scores_BM[:, None, :]) * labels_BMM
    pairs = (labels_BMM != 0).sum(axis=(1, 2))
    return float(np.mean(signs.sum(axis=(1, 2))[pairs > 0] / pairs[pairs > 0])) if pairs.any() else math.nan


def fit_evaluator(triplets: Triplets, budgets: TrainingBudgets, settings: EvaluatorSettings,
                  accuracy_constraint: bool, generator: torch.Generator) -> tuple[Evaluator, float]:
    """The fitted evaluator and the mean loss of its last epoch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        evaluator = Evaluator(triplets.features_MD.shape[1], len(budgets), settings.hidden)
    optimiser = _optimiser(evaluator, settings)
    count = len(triplets.cost_M)
    steps = max(1, round(count / settings.batch_size))
    epochs = max(settings.epochs, -(-settings.least_steps // steps))
    features_MD = torch.from_numpy(triplets.features_MD)
    losses: list[float] = []
    for epoch in range(epochs):
        for group in optimiser.param_groups:
            group["lr"] = _cosine(settings, epoch / (settings.schedule_epochs or epochs))
        order = torch.randperm(count, generator=generator)
        losses = []
        for index in order.tensor_split(steps):
            asked_B = budgets.draw(settings.budgets_per_batch, settings.p_interp, generator)
            labels = _labels(triplets.rows(index.numpy()), asked_B, settings, accuracy_constraint)
            scores_BM = evaluator.grid(features_MD[index], torch.from_numpy(budgets.soft_onehot(asked_B)))
            loss = ranking_loss(scores_BM, torch.from_numpy(labels), settings.loss)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(evaluator.parameters(), 1.0, error_if_nonfinite=True)
            optimiser.step()
            losses.append(loss.item())
    return evaluator.eval(), float(np.mean(losses))


@torch.no_grad()
def rank_correlation(evaluator: Evaluator, triplets: Triplets, budgets: TrainingBudgets,
                     settings: EvaluatorSettings, accuracy_constraint: bool) -> float:
    scores = evaluator.grid(torch.from_numpy(triplets.features_MD), torch.eye(len(budgets))).numpy()
    return kendall_tau(scores, _labels(triplets, np.array(budgets.values_ms), settings, accuracy_constraint))


def _labels(triplets: Triplets, budgets_B: NDArray[np.float64], settings: EvaluatorSettings,
            accuracy_constraint: bool) -> NDArray[np.int8]:
    return pair_labels(triplets.cost_M, triplets.accuracy_M, budgets_B, settings.ties, accuracy_constraint,
                       settings.cost_tie_share)


def _optimiser(evaluator: Evaluator, settings: EvaluatorSettings) -> torch.optim.Optimizer:
    if settings.optimiser == "adam":
        return torch.optim.Adam(evaluator.parameters(), settings.learning_rate, weight_decay=settings.weight_decay,
                                fused=True)
    return torch.optim.SGD(evaluator.parameters(), settings.learning_rate, momentum=0.9, nesterov=True,
                           weight_decay=settings.weight_decay)


def _cosine(settings: EvaluatorSettings, progress: float) -> float:
    share = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return settings.final_learning_rate + (settings.learning_rate - settings.final_learning_rate) * share
