"""Training of the generator against a frozen reward (specification 3, 8, 10 steps 7-8).

    J(theta) = 1/K sum_k 1/N sum_i { A_ki sum_t m_t log pi(a_t | a_<t, B_k) + lambda_H sum_t m_t H[pi(. | a_<t, B_k)] }
    A_ki     = (reward_ki - mu_k) / (sigma_k + 1e-3)

Shape legend: K training budgets, N architectures per budget, B budgets of one update, R = B * N rows, T positions.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from orchestrator.controllers.pnag.budgets import TrainingBudgets
from orchestrator.controllers.pnag.generator import Generator
from orchestrator.controllers.pnag.settings import GeneratorSettings
from searchspaces.space import SearchSpace, Tokens

# reward[R] of architectures int8[R, T], each under its own budget in ms[R]
RewardFunction = Callable[[Tokens, NDArray[np.float64]], NDArray[np.float64]]
ARCHITECTURES_CAP = 120_000  # paper 4.1
IMPROVEMENT = 1e-3


@dataclass
class Baseline:
    """EMA of the mean mu_k and the spread sigma_k of the reward at every training budget.

    Between training budgets both are interpolated with the soft one-hot, and updated with it as a weight.
    """

    decay: float
    mean_K: NDArray[np.float64]
    spread_K: NDArray[np.float64]
    seen_K: NDArray[np.bool_]

    @classmethod
    def empty(cls, budgets: int, decay: float) -> Baseline:
        return cls(decay, np.zeros(budgets), np.ones(budgets), np.zeros(budgets, dtype=bool))

    def advantage(self, reward_BN: NDArray[np.float64], budget_BK: NDArray[np.float32]) -> NDArray[np.float64]:
        """Updates with the new rewards, then A[B, N]."""
        for reward_N, weights_K in zip(reward_BN, budget_BK, strict=True):
            for k in np.flatnonzero(weights_K):
                step = 1.0 if not self.seen_K[k] else (1 - self.decay) * float(weights_K[k])
                self.mean_K[k] += step * (reward_N.mean() - self.mean_K[k])
                self.spread_K[k] += step * (reward_N.std() - self.spread_K[k])
                self.seen_K[k] = True
        return (reward_BN - (budget_BK @ self.mean_K)[:, None]) / ((budget_BK @ self.spread_K)[:, None] + 1e-3)


@dataclass(frozen=True)
class Trained:
    generator: Generator
    updates: int
    mean_reward: float
    entropy: float


def train_generator(space: SearchSpace, budgets: TrainingBudgets, settings: GeneratorSettings, reward: RewardFunction,
                    updates: int, noise: torch.Generator) -> Trained:
    """A generator trained from scratch for at most `updates`, ARCHITECTURES_CAP draws, or until it stops improving."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(noise.initial_seed())
        generator = Generator(space, len(budgets), settings.hidden, settings.budget_every_step,
                              settings.mask_dead_tokens)
    optimiser = torch.optim.Adam(generator.parameters(), settings.learning_rate, fused=True)
    baseline = None if settings.baseline_decay is None else Baseline.empty(len(budgets), settings.baseline_decay)
    per_update = (1 if settings.single_budget else len(budgets)) * settings.samples_per_budget
    updates = max(1, min(updates, ARCHITECTURES_CAP // per_update))
    smooth, best, best_at, entropy, update = 0.0, -np.inf, 0, 0.0, 0
    for update in range(updates):
        asked_B = budgets.draw(1 if settings.single_budget else len(budgets), settings.p_interp, noise)
        weights_BK = budgets.soft_onehot(asked_B)
        draw = generator.draw(torch.from_numpy(weights_BK).repeat_interleave(settings.samples_per_budget, dim=0), noise)
        reward_BN = reward(draw.tokens_NT, asked_B.repeat(settings.samples_per_budget)).reshape(len(asked_B), -1)
        advantage_BN = baseline.advantage(reward_BN, weights_BK) if baseline else reward_BN * settings.reward_scale
        progress = update / max(1, updates - 1)
        weight = settings.entropy_start + (settings.entropy_end - settings.entropy_start) * progress
        _ascend(generator, optimiser, draw.log_prob_N, torch.from_numpy(advantage_BN.ravel()).float(),
                weight * draw.entropy_N, settings.gradient_norm)
        entropy = float(draw.entropy_N.mean().detach())
        smooth = reward_BN.mean() if update == 0 else 0.95 * smooth + 0.05 * reward_BN.mean()
        if smooth > best + IMPROVEMENT:
            best, best_at = smooth, update
        elif settings.patience is not None and update - best_at >= settings.patience:
            break
    return Trained(generator.eval(), update + 1, float(smooth), entropy)


def _ascend(generator: Generator, optimiser: torch.optim.Optimizer, log_prob_R: Tensor, advantage_R: Tensor,
            bonus_R: Tensor, gradient_norm: float | None) -> None:
    """One step along the gradient of J; no gradient flows through the advantage."""
    loss = -(advantage_R * log_prob_R + bonus_R).mean()
    optimiser.zero_grad()
    loss.backward()
    if gradient_norm is not None:
        nn.utils.clip_grad_norm_(generator.parameters(), gradient_norm, error_if_nonfinite=True)
    optimiser.step()
