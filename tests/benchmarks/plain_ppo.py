"""The FNAS learner in plain torch, written straight from the specification: the peer that the RLlib learner must equal.

Same interface and same numbers as orchestrator/controllers/fnas/learner.py, own loss, no RLlib.
Shape legend: N sequences, T token positions.
"""
from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from orchestrator.controllers.fnas.policy import LstmPolicy
from orchestrator.controllers.fnas.ppo import PpoSettings
from searchspaces.space import SearchSpace, Tokens


class PlainPpo:
    def __init__(self, space: SearchSpace, settings: PpoSettings, seed: int = 0) -> None:
        self.settings = settings
        self.policy = LstmPolicy(space, settings.hidden, seed)
        self._adam = torch.optim.Adam(self.policy.parameters(), settings.learning_rate)

    def update(self, tokens_NT: Tokens, advantages_N: NDArray[np.floating], weights_N: NDArray[np.floating],
               entropy_weight: float, log_probs_old_NT: NDArray[np.floating] | None = None) -> dict[str, float]:
        if log_probs_old_NT is None:
            log_probs_old_NT = self.policy.evaluate(tokens_NT)[0]
        live_NT, valid_NTV = self.policy.masks(tokens_NT)
        tokens, old_NT = torch.from_numpy(tokens_NT), torch.as_tensor(log_probs_old_NT, dtype=torch.float32)
        advantages_N1 = torch.as_tensor(advantages_N, dtype=torch.float32)[:, None]
        weights_N1 = torch.as_tensor(weights_N, dtype=torch.float32)[:, None]
        figures: dict[str, float] = {}
        for _ in range(self.settings.epochs):
            log_probs_NT, entropy_NT = self.policy(tokens, live_NT, valid_NTV)
            ratio_NT = torch.exp(log_probs_NT - old_NT)
            clipped_NT = torch.clamp(ratio_NT, 1 - self.settings.clip, 1 + self.settings.clip)
            objective_NT = weights_N1 * torch.minimum(ratio_NT * advantages_N1, clipped_NT * advantages_N1)
            entropy = entropy_NT.sum(dim=1).mean()
            loss = -objective_NT[live_NT].mean() - entropy_weight * entropy
            self._adam.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.settings.gradient_norm)
            self._adam.step()
            live_ratio = ratio_NT.detach()[live_NT]
            figures = {"loss": loss.item(), "entropy": entropy.item(), "gradient_norm": norm.item(),
                       "clip_share": ((live_ratio - 1).abs() > self.settings.clip).float().mean().item(),
                       "kl": (live_ratio - 1 - live_ratio.log()).mean().item()}
        return figures
