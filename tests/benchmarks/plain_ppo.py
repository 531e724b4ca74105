"""The FNAS learner in plain torch, written straight from the specification: the peer that the RLlib learner must equal.

Same interface and same numbers as orchestrator/controllers/fnas/learner.py, own loss, no RLlib.
Shape legend: N sequences, T token positions.
"""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.controllers.fnas.policy import LstmPolicy
from orchestrator.controllers.fnas.ppo import PpoSettings
from searchspaces.space import SearchSpace, Tokens


class PlainPpo:
    def __init__(self, space: SearchSpace, settings: PpoSettings, seed: int = 0) -> None:
        self.settings = settings
        self.policy = LstmPolicy(space, settings.hidden, seed)
        self._optimiser = torch.optim.Adam(self.policy.parameters(), settings.learning_rate)

    def update(self, tokens_NT: Tokens, log_probs_old_NT: NDArray[np.floating] | None,
               advantages_N: NDArray[np.floating], weights_N: NDArray[np.floating],
               entropy_weight: float) -> dict[str, float]:
        if log_probs_old_NT is None:
            log_probs_old_NT = self.policy.log_probs(tokens_NT)
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
            self._optimiser.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.settings.gradient_norm)
            self._optimiser.step()
            live_ratio = ratio_NT.detach()[live_NT]
            figures = {"loss": loss.item(), "entropy": entropy.item(), "gradient_norm": norm.item(),
                       "clip_share": float(((live_ratio - 1).abs() > self.settings.clip).float().mean()),
                       "kl": float((live_ratio - 1 - live_ratio.log()).mean())}
        return figures

    def snapshot(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.policy.state_dict().items()}

    def state_dict(self) -> dict[str, Tensor]:
        names = [name for name, _ in self.policy.named_parameters()]
        moments = {f"optimiser.{names[i]}.{key}": value.detach().clone()
                   for i, state in self._optimiser.state_dict()["state"].items() for key, value in state.items()}
        return {f"policy.{name}": value for name, value in self.snapshot().items()} | moments

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.policy.load_state_dict({name.removeprefix("policy."): value for name, value in state.items()
                                     if name.startswith("policy.")})
        names = [name for name, _ in self.policy.named_parameters()]
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key.startswith("optimiser."):
                name, moment = key.removeprefix("optimiser.").rsplit(".", 1)
                moments.setdefault(names.index(name), {})[moment] = value.clone()
        groups = self._optimiser.state_dict()["param_groups"]
        self._optimiser.load_state_dict({"state": moments, "param_groups": groups})

    def close(self) -> None:
        pass
