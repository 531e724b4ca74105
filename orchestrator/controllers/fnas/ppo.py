"""PPO on whole token sequences: settings, batch and loss (specification 3).

    L = - mean_{n,t live} W_n min( r_nt A_n, clip(r_nt, 1 - eps, 1 + eps) A_n )  -  w_H mean_n sum_{t live} H_nt
    r_nt = pi_theta(a_nt | a_n,<t) / pi_old(a_nt | a_n,<t),   pi_old = the policy at the start of the update

The ratio of a whole sequence has too large a variance at 42 tokens: every token has its own. One reward per sequence,
so no discount and no value function: all tokens of a sequence share the advantage A_n.

Shape legend: N sequences, T token positions, V largest vocabulary.
"""
from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from orchestrator.controllers.fnas.policy import LstmPolicy
from searchspaces.space import Tokens


class PpoSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: float = Field(3.5e-4, gt=0, description="of Adam")
    clip: float = Field(0.2, gt=0, lt=1, description="eps of the clipped ratio")
    epochs: int = Field(4, ge=1, description="passes over each batch, one step each")
    entropy_start: float = Field(1e-3, ge=0, description="weight per sequence nat")
    entropy_end: float = Field(1e-5, ge=0)
    gradient_norm: float = Field(0.5, gt=0, description="gradients longer than this are scaled down to it")
    hidden: int = Field(100, ge=1, description="units of the LSTM, and size of the embeddings")
    num_learners: int = Field(0, ge=0, description="0: in the driver; more: that many data-parallel learner actors")


def ppo_batch(policy: LstmPolicy, tokens_NT: Tokens, log_probs_old_NT: NDArray[np.floating] | None,
              advantages_N: NDArray[np.floating], weights_N: NDArray[np.floating],
              entropy_weight: float) -> dict[str, Tensor]:
    """One update as tensors with a first axis N; pi_old is the present policy unless its log-probabilities are given.

    The means of the loss are carried as shares (`live_share` sums to 1 over all live tokens, `row_share` over rows),
    so that the loss of a part of the rows is a plain sum and the parts add up to the loss of the whole.
    """
    live_NT, valid_NTV = policy.masks(tokens_NT)
    tokens = torch.from_numpy(tokens_NT)
    if log_probs_old_NT is None:
        with torch.no_grad():
            log_probs_old = policy(tokens, live_NT, valid_NTV)[0]
    else:
        log_probs_old = torch.as_tensor(log_probs_old_NT, dtype=torch.float32)
    rows = len(tokens)
    return {"tokens": tokens, "live": live_NT, "valid": valid_NTV, "log_probs_old": log_probs_old,
            "advantages": torch.as_tensor(advantages_N, dtype=torch.float32),
            "weights": torch.as_tensor(weights_N, dtype=torch.float32),
            "live_share": live_NT.float() / live_NT.sum(),
            "row_share": torch.full((rows,), 1 / rows),
            "entropy_weight": torch.full((rows,), entropy_weight)}


def clipped_objective(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """min(r A, clip(r, 1 - eps, 1 + eps) A), elementwise."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def ppo_loss(log_probs_NT: Tensor, entropy_NT: Tensor, batch: dict[str, Tensor],
             clip: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss above, and what a reader of the log wants to know about it.

    loss; entropy: mean nats of a sequence; clip_share: share of live tokens whose ratio left 1 +- eps; kl: mean over
    live tokens of (r - 1) - log r, which estimates KL(pi_old || pi_theta) without a negative value.
    """
    share_NT = batch["live_share"]
    log_ratio_NT = log_probs_NT - batch["log_probs_old"]
    ratio_NT = log_ratio_NT.exp()
    objective_NT = clipped_objective(ratio_NT, batch["advantages"][:, None], clip)
    entropy_N = batch["row_share"] * entropy_NT.sum(dim=1)
    loss = -(share_NT * batch["weights"][:, None] * objective_NT).sum() - (batch["entropy_weight"] * entropy_N).sum()
    with torch.no_grad():
        figures = {"loss": loss.detach(), "entropy": entropy_N.sum(),
                   "clip_share": (share_NT * ((ratio_NT - 1).abs() > clip)).sum(),
                   "kl": (share_NT * (ratio_NT - 1 - log_ratio_NT)).sum()}
    return loss, figures
