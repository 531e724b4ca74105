"""Architectures retrained from scratch for the hand-over, where no supernet has weights for them ([S4 6.2]).

Each is trained once per run, whatever budgets it is a finalist for and however often the run is resumed: finished
weights are in checkpoints/retrained-ARCH.*, unfinished ones go on from their last epoch in checkpoints/retraining/.
"""
from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from actors.data import Preprocessing, Splits
from actors.evaluator import hits, tensor_of
from actors.objectpath import absolute
from actors.remote import fetch
from actors.rollout.trainer import retrained_weights, submit_retraining
from actors.wholefile import remove_tree
from orchestrator.config import Config
from orchestrator.data.accuracy import Recipe
from orchestrator.handover.delivered import Final
from orchestrator.handover.paired import packed
from orchestrator.record.store import RunStore
from orchestrator.services.context import POLL_S, RunContext
from orchestrator.services.recipes import proxy_settings
from orchestrator.services.states import intact_state, load_state, save_state
from searchspaces.errors import ClusterError, EvaluationError
from searchspaces.network import GraphNetwork
from searchspaces.space import SearchSpace, Tokens

log = logging.getLogger(__name__)
Weights = Mapping[str, NDArray[Any]]
Key = TypeVar("Key")
ACCURACY, HITS = "accuracy", "validation_hits"  # beside the tensors


class Retrained:
    """The retrained architectures of one run, on disk."""

    def __init__(self, config: Config, space: SearchSpace, splits: Splits, preprocessing: Preprocessing,
                 store: RunStore) -> None:
        self.space, self.splits, self.preprocessing = space, splits, preprocessing
        self.settings = proxy_settings(config, config.delivery.retrain_epochs)
        self.unfinished = absolute(store.path / "checkpoints" / "retraining")
        self._store = store

    def accuracy(self, tokens_T: Tokens) -> float | None:
        """Validation accuracy; None while it is not retrained, or where its weights are damaged."""
        final = self.final(tokens_T)
        return None if final is None else final.accuracy

    def final(self, tokens_T: Tokens) -> Final | None:
        """As `accuracy`, with the images that are right."""
        state = self._intact(tokens_T)
        return None if state is None else Final(float(state[ACCURACY]), str(state.get(HITS, "")))

    def weights(self, tokens_T: Tokens) -> Weights:
        """State dict of the finished network; trained here and now if it is not there yet."""
        if self._intact(tokens_T) is None:
            self.save(tokens_T, retrained_weights(self.space, tokens_T, self.splits.train, self.preprocessing,
                                                  self.settings, self.unfinished, torch.get_num_threads()))
        state = load_state(self._store, self._name(tokens_T))
        return {name: value.numpy() for name, value in state.items() if name not in (ACCURACY, HITS)}

    def save(self, tokens_T: Tokens, weights: Weights) -> None:
        network = GraphNetwork(self.space.graph(tokens_T)).eval()
        network.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})
        validation = self.preprocessing.inputs(self.splits.val)
        hits_I = hits(network, tensor_of(validation), torch.from_numpy(validation.labels)).numpy()
        save_state(self._store, self._name(tokens_T), {name: np.array(v) for name, v in weights.items()}
                   | {ACCURACY: int(hits_I.sum()) / len(hits_I), HITS: packed(hits_I)})
        with contextlib.suppress(OSError):
            remove_tree(self.unfinished / self.space.arch_id(tokens_T))

    def _intact(self, tokens_T: Tokens) -> dict[str, Any] | None:
        return intact_state(self._store, self._name(tokens_T))

    def _name(self, tokens_T: Tokens) -> str:
        return f"retrained-{self.space.arch_id(tokens_T)}"


def retrain_missing(run: RunContext, retrained: Retrained, tokens_NT: Tokens) -> Iterator[Tokens]:
    """Retrains what is missing, several at once across the cluster; yields each architecture as it is finished. One
    that diverges is left out with a warning."""
    recipe = run.config.accuracy
    assert isinstance(recipe, Recipe)
    waiting = [row for row in tokens_NT if retrained.accuracy(row) is None]
    if not waiting:
        return
    run.services.begin_training()
    run.services.close_rollouts()  # their CPUs and GPUs are for the trainers now
    gpus = run.services.trainer_gpus(recipe)
    run.services.room_to_train("retraining", recipe.cpus, gpus, "accuracy.cpus or accuracy.gpus")
    train = ray.put(run.splits.train)

    def submit(row: Tokens) -> ray.ObjectRef:
        return submit_retraining(run.space, row, train, run.preprocessing, retrained.settings, retrained.unfinished,
                                 recipe.cpus, gpus, run.store.name)

    with contextlib.closing(finished(run, waiting, submit, lambda: run.services.trainers(recipe), "retraining",
                                     "delivery.retrain_epochs")) as done:
        for row, reference in done:
            if _save(retrained, row, reference):
                yield row


def _save(retrained: Retrained, tokens_T: Tokens, reference: ray.ObjectRef) -> bool:
    try:
        retrained.save(tokens_T, fetch(reference))
    except EvaluationError as error:
        log.warning("retraining of %s failed (%s); it is not handed over", retrained.space.arch_id(tokens_T), error)
        return False
    return True


def finished(run: RunContext, keys: Sequence[Key], submit: Callable[[Key], ray.ObjectRef], at_once: Callable[[], int],
             what: str, epochs: str) -> Generator[tuple[Key, ray.ObjectRef], None, None]:
    """Submits one task per key, at most `at_once()` at a time; yields each with its key when it ends, well or not.
    Whoever closes this cancels those that run. ClusterError where no `what` ends in time; `epochs` is the setting that
    makes it shorter."""
    waiting, pending, progress_s = list(keys), dict[ray.ObjectRef, Key](), time.monotonic()
    time_out_s = run.config.delivery.retrain_time_out_s
    try:
        while waiting or pending:
            run.poll()
            while waiting and len(pending) < at_once():
                key = waiting.pop(0)
                pending[submit(key)] = key
            for reference in ray.wait(list(pending), timeout=POLL_S)[0]:
                key, progress_s = pending.pop(reference), time.monotonic()
                yield key, reference
            if time.monotonic() - progress_s > time_out_s:
                raise ClusterError(f"no {what} finished within {time_out_s:g} s (delivery.retrain_time_out_s); raise "
                                   f"it or lower {epochs}, then resume the run")
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)
