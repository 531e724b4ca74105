"""The PPO learner of FNAS: RLlib's LearnerGroup behind five methods.

    learner = PpoLearner(space, PpoSettings(), seed)
    batch = learner.policy.sample(20, rng)
    learner.update(batch.tokens_NT, advantages_N, weights_N, entropy_weight)

With `num_learners` 0 it lives in this process and needs no Ray; the same seed and updates give the same policy, bit by
bit, on one thread. With more, that many data-parallel actors share each batch. If one of them dies, all are started
again from the state after the last complete update and the update is repeated: none is lost, none counts twice.

RLlib, its actors and the cluster's room for them come with the first update: who only samples, or answers from what was
learnt, needs none of them.

Shape legend: N sequences, T token positions.
"""
from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from torch import Tensor

from actors.rollout.worker import first_line
from orchestrator.controllers.fnas.policy import Conditions, LstmPolicy
from orchestrator.controllers.fnas.ppo import PpoSettings, load_policy, ppo_batch, shards
from searchspaces.errors import ClusterError, ParetorayError
from searchspaces.space import SearchSpace, Tokens

log = logging.getLogger(__name__)

START_TIME_OUT_S = 120.0
CALL_TIME_OUT_S = 120.0
ATTEMPTS = 3


class PpoLearner:
    """See the module docstring. Not thread-safe; `close` releases the actors, and the object is done."""

    def __init__(self, space: SearchSpace, settings: PpoSettings, seed: int = 0) -> None:
        self.settings = settings
        self._space, self._seed = space, seed
        self._policy = LstmPolicy(space, settings.hidden, seed, settings.conditions)
        self._moments: dict[str, Tensor] = {}   # Adam's, while they are here and not on a learner in this process
        self._group: Any = None
        self._release: Callable[[], object] = lambda: None

    @property
    def policy(self) -> LstmPolicy:
        """For sampling and evaluating; its weights follow every `update` and `load_state_dict`. Not to be changed."""
        return self._policy

    def update(self, tokens_NT: Tokens, advantages_N: NDArray[np.floating], weights_N: NDArray[np.floating],
               entropy_weight: float, log_probs_old_NT: NDArray[np.floating] | None = None,
               conditions_NK: Conditions = None) -> dict[str, float]:
        """All epochs of one PPO update on raw sampled rows int8[N, T], advantage A and importance weight W per row.

        `log_probs_old_NT` are those of the policy before this call, computed here if absent. Returns, of the last
        epoch: loss, entropy (nats per sequence), clip_share, kl, and gradient_norm before clipping.
        """
        batch = ppo_batch(self._policy, tokens_NT, advantages_N, weights_N, entropy_weight, log_probs_old_NT,
                          conditions_NK)
        parts = shards(batch, max(1, self.settings.num_learners))
        self._start()
        if not self.settings.num_learners:
            figures: dict[str, float] = self._on_learners(self._rllib.update, shards=parts,
                                                          epochs=self.settings.epochs)[0]
            return figures
        return self._update_on_actors(parts)

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the policy's weights: `LstmPolicy.load_state_dict` takes it."""
        return {name: value.detach().clone() for name, value in self._policy.state_dict().items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Weights and optimiser, flat: after `load_state_dict` the next update is exactly what it would have been."""
        if self._group is not None and not self.settings.num_learners:
            state: dict[str, Tensor] = self._on_learners(self._rllib.get_state)[0]
            return state
        return {f"policy.{name}": value for name, value in self.snapshot().items()} | {
            name: value.clone() for name, value in self._moments.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """StoreError, with nothing changed, if the state belongs to another space or other settings."""
        tensors = {name: torch.as_tensor(value) for name, value in state.items()}
        if self._group is not None:
            self._on_learners(self._rllib.set_state, state=tensors)
        if self._group is None or self.settings.num_learners:
            self._keep(tensors)

    def close(self) -> None:
        """Also called when the learner is forgotten and at exit; a second call does nothing. What was learnt stays
        readable where it was learnt on other processes."""
        self._release()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """The learners, with what is known so far; does nothing where they are there already."""
        if self._group is not None:
            return
        from orchestrator.controllers.fnas import rllib  # takes seconds, and other controllers do not need it

        self._rllib = rllib
        state = self.state_dict()
        room = reserve(self.settings.num_learners) if self.settings.num_learners else None
        self._group = rllib.learner_group(self._space, self.settings, self._seed, room)
        self._release = weakref.finalize(self, release, self._group, room)
        self._on_learners(rllib.set_state, state=state)
        if not self.settings.num_learners:
            self._policy = self._on_learners(rllib.policy_of)[0]

    def _on_learners(self, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        """The function's results on every learner, or the first error; ClusterError if one does not answer."""
        with self._rllib.quiet() if self.settings.num_learners else nullcontext():  # it costs a millisecond
            answers = list(self._group.foreach_learner(function, healthy_only=False, timeout_seconds=CALL_TIME_OUT_S,
                                                       **arguments))
        for answer in answers:
            if not answer.ok:
                error = answer.get()
                raise error.cause if isinstance(getattr(error, "cause", None), ParetorayError) else error
        if len(answers) < max(1, self.settings.num_learners):
            raise ClusterError(f"{len(answers)} of {self.settings.num_learners} PPO learners answered within "
                               f"{CALL_TIME_OUT_S:.0f} s; check the nodes of the cluster or lower policy.num_learners")
        return [answer.get() for answer in answers]

    def _update_on_actors(self, parts: list[dict[str, Tensor]]) -> dict[str, float]:
        for attempt in range(ATTEMPTS):
            try:
                if attempt:
                    log.warning("a PPO learner was lost; all are started again from the last update")
                    self.close()
                    self._group = None
                    self._start()
                answers = self._on_learners(self._rllib.update, shards=parts, epochs=self.settings.epochs)
                self._fetch()
                return {name: float(np.mean([figures[name] for figures in answers])) for name in answers[0]}
            except (RayError, ClusterError) as error:
                last = error
        raise ClusterError(f"the PPO learners failed {ATTEMPTS} times in a row, the last time with {first_line(last)}; "
                           "resume the run, and set policy.num_learners to 0 if it happens again") from last

    def _fetch(self) -> None:
        """All learners hold the same state: the first one's becomes ours."""
        self._keep(self._on_learners(self._rllib.get_state)[0])

    def _keep(self, state: Mapping[str, Tensor]) -> None:
        load_policy(self._policy, state)
        self._moments = {name: value.clone() for name, value in state.items() if name.startswith("adam.")}


def reserve(learners: int) -> PlacementGroup:
    """One CPU for each learner, on different nodes as far as possible."""
    if not ray.is_initialized():
        raise ClusterError(f"policy.num_learners is {learners}, but Ray is not running; use 0 to learn in the driver")
    room = placement_group([{"CPU": 1}] * learners, strategy="SPREAD")
    if not room.wait(START_TIME_OUT_S):
        remove_placement_group(room)
        raise ClusterError(f"{learners} PPO learners need {learners} free CPUs, and the cluster did not offer them "
                           f"within {START_TIME_OUT_S:.0f} s; lower policy.num_learners or add nodes")
    return room


def release(group: Any, room: PlacementGroup | None) -> None:
    """Ends the learners. Without a running Ray there is nothing left to end, and asking would start a new one."""
    if room is None:
        group.shutdown()
    elif not ray.is_initialized():
        group._is_shut_down = True  # or its destructor would ask
    else:
        try:
            group.shutdown()
        except RayError as error:
            log.debug("the learners did not shut down by themselves: %s", error)
            group._is_shut_down = True
        remove_placement_group(room)  # ends what still runs in it
