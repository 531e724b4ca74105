"""The adapter to RLlib, and the only file that imports it (which takes seconds: import this module late).

RLlib contributes the learner: optimiser, gradient clipping, epochs, and data-parallel learners on other nodes. One row
of its batch is a whole token sequence, so the module is stateless for RLlib, and the default connectors, which would
add a dummy step to every sequence, stay off.
"""
from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.util.placement_group import PlacementGroup
from torch import Tensor

from orchestrator.controllers.fnas.policy import LstmPolicy
from orchestrator.controllers.fnas.ppo import PpoSettings, load_training_state, ppo_loss, training_state
from searchspaces.space import SearchSpace

GRADIENT_NORM = "gradients_default_optimizer_global_norm"  # RLlib's name, before clipping
FIGURES = {"loss": "loss", "entropy": "entropy", "clip_share": "clip_share", "kl": "kl", "gradient_norm": GRADIENT_NORM}


class SequenceModule(TorchRLModule):
    """The policy as an RLModule: maps token sequences to their log-probabilities and entropies."""

    def setup(self) -> None:
        options: Any = self.model_config
        self.policy = LstmPolicy(**options)

    def _forward(self, batch: Mapping[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        log_probs_NT, entropy_NT = self.policy(batch["tokens"], batch["live"], batch["valid"], batch.get("conditions"))
        return {"log_probs": log_probs_NT, "entropy": entropy_NT}


class SequenceLearner(PPOTorchLearner):
    """PPO with per-token clipping, importance weights and no value function (ppo.py)."""

    def build(self) -> None:
        with quiet():
            super().build()

    @classmethod
    def rl_module_required_apis(cls) -> list[type]:
        return []  # PPOLearner asks for a value function; this loss has none

    def compute_loss_for_module(self, *, module_id: str, config: Any, batch: dict[str, Any],
                                fwd_out: dict[str, Any]) -> Tensor:
        loss, figures = ppo_loss(fwd_out["log_probs"], fwd_out["entropy"], batch, config.clip_param)
        self.metrics.log_dict(figures, key=module_id, window=1)
        return loss


def learner_group(space: SearchSpace, settings: PpoSettings, seed: int, room: PlacementGroup | None) -> LearnerGroup:
    """One learner in this process, or `num_learners` actors in the bundles of `room`, one CPU each."""
    with quiet():
        return _learner_group(space, settings, seed, room)


def _learner_group(space: SearchSpace, settings: PpoSettings, seed: int, room: PlacementGroup | None) -> LearnerGroup:
    nothing: gym.Space[Any] = gym.spaces.Discrete(1)  # RLlib asks for spaces that nothing here uses
    module = RLModuleSpec(module_class=SequenceModule, observation_space=nothing, action_space=nothing,
                          model_config={"space": space, "hidden": settings.hidden, "seed": seed,
                                        "conditions": settings.conditions})
    config = (PPOConfig()
              .learners(num_learners=settings.num_learners, num_cpus_per_learner=1, learner_class=SequenceLearner,
                        add_default_connectors_to_learner_pipeline=False)
              .training(lr=settings.learning_rate, grad_clip=settings.gradient_norm, grad_clip_by="global_norm",
                        clip_param=settings.clip, use_kl_loss=False, use_critic=False))
    return LearnerGroup(config=config, module_spec=module, placement_group=room)


@contextmanager
def quiet() -> Iterator[None]:
    """RLlib warns about its own internals, and logs the errors that it returns or raises: neither is for the user."""
    levels = {logging.getLogger(name): level for name, level in (("ray._common.deprecation", logging.ERROR),
                                                                 ("ray.rllib", logging.ERROR),
                                                                 ("ray.rllib.utils.actor_manager", logging.CRITICAL))}
    before = {logger: logger.level for logger in levels}
    try:
        for logger, level in levels.items():
            logger.setLevel(level)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)


# --- what runs on a learner, wherever it lives: LearnerGroup.foreach_learner(function, ...) -------------------------

def update(learner: SequenceLearner, shards: Sequence[Mapping[str, Tensor]], epochs: int) -> dict[str, float]:
    """All epochs on this learner's shard; the figures of the last one, over all shards if averaged over learners."""
    shard = shards[torch.distributed.get_rank() if len(shards) > 1 else 0]
    batch = MultiAgentBatch({DEFAULT_MODULE_ID: SampleBatch(shard)}, env_steps=len(shard["tokens"]))
    results = learner.update(batch=batch, num_epochs=epochs)[DEFAULT_MODULE_ID]
    return {name: float(results[key].peek()) for name, key in FIGURES.items()}


def policy_of(learner: SequenceLearner) -> LstmPolicy:
    module = learner.module[DEFAULT_MODULE_ID].unwrapped()
    assert isinstance(module, SequenceModule)
    return module.policy


def get_state(learner: SequenceLearner) -> dict[str, Tensor]:
    return training_state(policy_of(learner), learner.get_optimizer(DEFAULT_MODULE_ID))


def set_state(learner: SequenceLearner, state: Mapping[str, Tensor]) -> None:
    load_training_state(policy_of(learner), learner.get_optimizer(DEFAULT_MODULE_ID), state)
