"""Stages 2 and 3 of PNAG: fit the evaluator on triplets, then train the generator against it (specification 10).

A `Learner` holds what one fit produced for one set of training budgets: K budgets jointly, or one alone.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from orchestrator.controllers import rewards
from orchestrator.controllers.pnag.budgets import TrainingBudgets
from orchestrator.controllers.pnag.evaluator import Evaluator, Triplets, fit_evaluator, rank_correlation
from orchestrator.controllers.pnag.generator import Generator
from orchestrator.controllers.pnag.policy_gradient import RewardFunction, train_generator
from orchestrator.controllers.pnag.settings import PnagSettings
from searchspaces.space import SearchSpace, Tokens

Predict = Callable[[Tokens], NDArray[np.float64]]


@dataclass(frozen=True)
class Learner:
    space: SearchSpace
    budgets: TrainingBudgets
    evaluator: Evaluator
    generator: Generator
    metrics: dict[str, float]

    @torch.no_grad()
    def scores(self, tokens_NT: Tokens, budgets_ms_N: NDArray[np.float64]) -> NDArray[np.float64]:
        """R(a | B) per row; comparable within one budget only."""
        weights_NK = torch.from_numpy(self.budgets.soft_onehot(budgets_ms_N))
        return self.evaluator(torch.from_numpy(self.space.onehot(tokens_NT)), weights_NK).numpy().astype(np.float64)

    @torch.no_grad()
    def sample(self, budgets_ms: Sequence[float] | NDArray[np.float64], count: int, seed: int,
               greedy: bool = True) -> Tokens:
        """int8[B, count (+ 1), T]: architectures drawn for each budget, the greedy decode last."""
        rows = count + int(greedy)
        weights_RK = np.repeat(self.budgets.soft_onehot(budgets_ms), rows, axis=0)
        greedy_R = torch.arange(len(weights_RK)) % rows == count if greedy else None
        noise = torch.Generator().manual_seed(seed)
        draw = self.generator.draw(torch.from_numpy(weights_RK), noise, greedy_R)
        return draw.tokens_NT.reshape(-1, rows, draw.tokens_NT.shape[1])

    def state_dict(self) -> dict[str, Any]:
        parts = {"evaluator": self.evaluator, "generator": self.generator}
        return {f"{part}.{key}": value for part, module in parts.items() for key, value in module.state_dict().items()}


def learn(space: SearchSpace, settings: PnagSettings, budgets: TrainingBudgets, triplets: Triplets,
          pseudo: Triplets | None, accuracy: Predict, latency_ms: Predict, updates: int, seed: int) -> Learner:
    """Fits both networks. `accuracy` and `latency_ms` predict what the two hand-written rewards need.

    A share of the observed triplets is held out to report how well the evaluator ranks what it has not seen.
    """
    noise = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(triplets.cost_M), generator=noise).numpy()
    held = int(len(order) * settings.evaluator.holdout_share)
    used = triplets.rows(order[held:])
    if pseudo is not None:
        used = Triplets(np.concatenate([used.features_MD, pseudo.features_MD]),
                        np.concatenate([used.cost_M, pseudo.cost_M]),
                        np.concatenate([used.accuracy_M, pseudo.accuracy_M]))
    constraint = settings.reward != "cost_only"
    evaluator, loss = fit_evaluator(used, budgets, settings.evaluator, constraint, noise)
    metrics = {"evaluator_loss": loss}
    if held > 1:
        metrics["evaluator_kendall_tau"] = rank_correlation(evaluator, triplets.rows(order[:held]), budgets,
                                                            settings.evaluator, constraint)
    reward = _reward(space, settings, budgets, evaluator, accuracy, latency_ms)
    trained = train_generator(space, budgets, settings.generator, reward, updates, noise)
    metrics |= {"generator_updates": trained.updates, "generator_reward": trained.mean_reward,
                "generator_entropy": trained.entropy}
    return Learner(space, budgets, evaluator, trained.generator, metrics)


def restore(space: SearchSpace, settings: PnagSettings, budgets: TrainingBudgets, state: dict[str, Any]) -> Learner:
    """The learner of `Learner.state_dict`."""
    features = space.onehot(space.canonical(space.extremes())).shape[1]
    evaluator = Evaluator(features, len(budgets), settings.evaluator.hidden)
    generator = Generator(space, len(budgets), settings.generator.hidden, settings.generator.budget_every_step,
                          settings.generator.mask_dead_tokens)
    for part, module in (("evaluator.", evaluator), ("generator.", generator)):
        module.load_state_dict({key.removeprefix(part): torch.as_tensor(value) for key, value in state.items()
                                if key.startswith(part)})
    return Learner(space, budgets, evaluator.eval(), generator.eval(), {})


def _reward(space: SearchSpace, settings: PnagSettings, budgets: TrainingBudgets, evaluator: Evaluator,
            accuracy: Predict, latency_ms: Predict) -> RewardFunction:
    """The full rule and the rule without accuracy constraint are R itself; the others are formulas (section 11)."""

    @torch.no_grad()
    def learned(tokens_RT: Tokens, budget_R: NDArray[np.float64]) -> NDArray[np.float64]:
        weights_RK = torch.from_numpy(budgets.soft_onehot(budget_R))
        return evaluator(torch.from_numpy(space.onehot(tokens_RT)), weights_RK).numpy().astype(np.float64)

    def multiplicative(tokens_RT: Tokens, budget_R: NDArray[np.float64]) -> NDArray[np.float64]:
        return rewards.multiplicative(accuracy(tokens_RT), latency_ms(tokens_RT), budget_R, settings.reward_exponent,
                                      settings.reward_pays_below_budget)

    def absolute(tokens_RT: Tokens, budget_R: NDArray[np.float64]) -> NDArray[np.float64]:
        return rewards.absolute(accuracy(tokens_RT), latency_ms(tokens_RT), budget_R, settings.reward_coefficient)

    return {"rule": learned, "cost_only": learned, "multiplicative": multiplicative,
            "absolute": absolute}[settings.reward]
