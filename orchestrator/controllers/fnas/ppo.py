"""PPO on whole token sequences: settings, batch, loss and the state that a restart needs (specification 3).

    L = - mean_{n,t live} W_n min( r_nt A_n, clip(r_nt, 1 - eps, 1 + eps) A_n )  -  w_H mean_n sum_{t live} H_nt
    r_nt = pi_theta(a_nt | a_n,<t) / pi_old(a_nt | a_n,<t),   pi_old = the policy at the start of the update

The ratio of a whole sequence has too large a variance at 42 tokens: every token has its own. One reward per sequence,
so no discount and no value function: all tokens of a sequence share the advantage A_n.

Shape legend: N sequences, T token positions.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.controllers.fnas.policy import Conditions, LstmPolicy
from searchspaces.errors import StoreError
from searchspaces.space import Tokens

LARGEST_LOG_RATIO = 20.0    # far beyond every clip; exp of 89 overflows, and infinity times a clipped term's 0 is nan


@dataclass(frozen=True)
class PpoSettings:
    """`epochs` passes over each batch, one step of Adam each; num_learners 0 learns in the driver; `conditions` of
    the policy (policy.py)."""

    learning_rate: float = 3.5e-4
    clip: float = 0.2
    epochs: int = 4
    gradient_norm: float = 0.5
    hidden: int = 100
    num_learners: int = 0
    conditions: int = 0


def ppo_batch(policy: LstmPolicy, tokens_NT: Tokens, advantages_N: NDArray[np.floating],
              weights_N: NDArray[np.floating], entropy_weight: float,
              log_probs_old_NT: NDArray[np.floating] | None = None,
              conditions_NK: Conditions = None) -> dict[str, Tensor]:
    """One update as tensors with a first axis N; pi_old is the present policy unless its log-probabilities are given.

    The means of the loss are carried as shares (`live_share` sums to 1 over all live tokens, `row_share` over rows),
    so that the loss of a part of the rows is a plain sum and the parts add up to the loss of the whole.
    """
    live_NT, valid_NTV = policy.masks(tokens_NT)
    old_NT = policy.evaluate(tokens_NT, conditions_NK)[0] if log_probs_old_NT is None else log_probs_old_NT
    assert all(np.isfinite(values).all() for values in (advantages_N, weights_N, old_NT))
    rows = len(tokens_NT)
    return {"tokens": torch.from_numpy(tokens_NT), "live": live_NT, "valid": valid_NTV,
            "log_probs_old": torch.as_tensor(old_NT, dtype=torch.float32),
            "advantages": torch.as_tensor(advantages_N, dtype=torch.float32),
            "weights": torch.as_tensor(weights_N, dtype=torch.float32),
            "live_share": live_NT.float() / live_NT.sum(),
            "row_share": torch.full((rows,), 1 / rows),
            "entropy_weight": torch.full((rows,), entropy_weight),
            **({} if conditions_NK is None else {"conditions": torch.from_numpy(conditions_NK)})}


def shards(batch: Mapping[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """The rows dealt to `parts` learners; the mean of their losses, and so of their gradients, is that of the whole.

    With fewer rows than learners some get a copy of the first row that counts for nothing.
    """
    result = []
    for rows in torch.arange(len(batch["tokens"])).tensor_split(parts):
        shard = {name: values[rows if len(rows) else [0]] for name, values in batch.items()}
        for share in ("live_share", "row_share"):
            shard[share] = shard[share] * (parts if len(rows) else 0)
        result.append(shard)
    return result


def clipped_objective(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """min(r A, clip(r, 1 - eps, 1 + eps) A), elementwise."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def ppo_loss(log_probs_NT: Tensor, entropy_NT: Tensor, batch: Mapping[str, Tensor],
             clip: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss above, and what a reader of the log wants to know about it.

    loss; entropy: mean nats of a sequence; clip_share: share of live tokens whose ratio left 1 +- eps; kl: mean over
    live tokens of (r - 1) - log r, which estimates KL(pi_old || pi_theta) without a negative value.
    """
    share_NT = batch["live_share"]
    log_ratio_NT = log_probs_NT - batch["log_probs_old"]
    ratio_NT = log_ratio_NT.clamp(max=LARGEST_LOG_RATIO).exp()
    objective_NT = clipped_objective(ratio_NT, batch["advantages"][:, None], clip)
    entropy_N = batch["row_share"] * entropy_NT.sum(dim=1)
    loss = -(share_NT * batch["weights"][:, None] * objective_NT).sum() - (batch["entropy_weight"] * entropy_N).sum()
    with torch.no_grad():
        figures = {"loss": loss.detach(), "entropy": entropy_N.sum(),
                   "clip_share": (share_NT * ((ratio_NT - 1).abs() > clip)).sum(),
                   "kl": (share_NT * (ratio_NT - 1 - log_ratio_NT)).sum()}
    return loss, figures


def training_state(policy: LstmPolicy, adam: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of all that the next update depends on: "policy.PARAMETER", "adam.step.PARAMETER", "adam.exp_avg..."."""
    state = {f"policy.{name}": parameter.detach().clone() for name, parameter in policy.named_parameters()}
    for name, parameter in policy.named_parameters():
        state |= {f"adam.{moment}.{name}": value.clone() for moment, value in adam.state[parameter].items()}
    return state


def load_policy(policy: LstmPolicy, state: Mapping[str, Tensor]) -> None:
    """The policy's part of `training_state`. StoreError, with nothing changed, if it is of another shape."""
    shapes = {f"policy.{name}": parameter.shape for name, parameter in policy.named_parameters()}
    found = {name: value.shape for name, value in state.items() if name.startswith("policy.")}
    if shapes != found:
        wrong = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
        raise StoreError(f"the saved policy does not fit search space {policy.space.space_id}: {wrong[0]} has shape "
                         f"{found.get(wrong[0])}, expected {shapes.get(wrong[0])}; resume with the settings of the run")
    for name, parameter in policy.named_parameters():
        parameter.data.copy_(state[f"policy.{name}"])


def load_training_state(policy: LstmPolicy, adam: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """The inverse of `training_state`. StoreError, with nothing changed, as `load_policy`."""
    load_policy(policy, state)
    moments: dict[int, dict[str, Tensor]] = {}
    for i, (name, _) in enumerate(policy.named_parameters()):
        saved = {key.split(".")[1]: value.clone() for key, value in state.items()
                 if key.startswith("adam.") and key.split(".", 2)[2] == name}
        if saved:
            moments[i] = saved
    adam.load_state_dict({"state": moments, "param_groups": adam.state_dict()["param_groups"]})
