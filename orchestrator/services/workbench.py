"""Where a model is finished: on the run's cluster or in this process, from the supernet's weights or from scratch.

The cluster benches use the services of a running search. The local ones need no Ray, so that `paretoray generate`
answers at once; they work where this machine is the device the run was made for, and say so where it is not.
"""
from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import RayError

from actors.data import Preprocessing, Splits, calibration_images
from actors.evaluator import Evaluation, SupernetEvaluator
from actors.latency.worker import input_shape
from actors.remote import fetch, last_line
from actors.supernet.actor import load_weights
from actors.supernet.finetune import fine_tuned_weights
from actors.supernet.training import whole_batches
from actors.targets.catalogue import make_target
from actors.targets.target import LatencySample, LatencyTarget, Workload, merge_samples
from orchestrator.config import Config, DeliverySettings
from orchestrator.data.accuracy import TableAccuracy
from orchestrator.data.sources import looked_up
from orchestrator.handover.architectures import makes_models
from orchestrator.handover.delivered import Final
from orchestrator.handover.models import Workbench
from orchestrator.record.goals import Goal, target_state
from orchestrator.record.store import RunStore
from orchestrator.services.context import RunContext, recorded_latencies
from orchestrator.services.evaluation import evaluate_architectures, measure_architectures
from orchestrator.services.pretrained import timed_image_size
from orchestrator.services.recipes import single_threads, supernet_settings
from orchestrator.services.retraining import Retrained, finished, retrain_missing
from orchestrator.services.states import intact_state, save_state
from searchspaces.errors import EvaluationError, ParetorayError, TargetError
from searchspaces.space import SearchSpace, Tokens

Weights = Mapping[str, NDArray[Any]]
log = logging.getLogger(__name__)


def cluster_bench(run: RunContext) -> Workbench:
    return SupernetClusterBench(run) if run.config.accuracy.source == "supernet" else ScratchClusterBench(run)


def local_bench(config: Config, space: SearchSpace, splits: Splits, preprocessing: Preprocessing,
                store: RunStore, goal: Goal) -> Workbench:
    """TargetError if this machine has not the goal's targets."""
    scratch = ScratchLocalBench if makes_models(config, goal) else RecordedLocalBench
    bench = SupernetLocalBench if config.accuracy.source == "supernet" else scratch
    return bench(config, space, splits, preprocessing, store, goal.targets)


class ClusterBench:
    """The run's own pools; what is measured or evaluated here is recorded in the run."""

    def __init__(self, run: RunContext) -> None:
        self.run = run

    def latencies_ms(self, target: str, tokens_NT: Tokens) -> list[float | None]:
        device = next(device for device in self.run.targets if device.label == target)
        measure_architectures(self.run, device, tokens_NT)
        return [device.measured_ms.get(self.run.space.arch_id(row)) for row in tokens_NT]

    def accuracies(self, tokens_NT: Tokens) -> list[float | None]:
        return [trial.accuracy for trial in evaluate_architectures(self.run, tokens_NT)]

    def time_file(self, target: str, model: bytes) -> LatencySample:
        return self.run.services.latency(target).measure_onnx(model, visits=self.run.config.latency.visits)


class SupernetClusterBench(ClusterBench):
    """Fine-tunes from the supernet's weights, in tasks, several at once; what has no room for them, and what trains on
    GPUs, in the supernet's actor. Finished weights are in checkpoints/finetuned-*: a resumed run finds them."""

    def __init__(self, run: RunContext) -> None:
        super().__init__(run)
        self._diverged: dict[str, EvaluationError] = {}     # by name of the weights

    def train_ahead(self, tokens_NT: Tokens) -> None:
        waiting = [row for row in tokens_NT if self._name(row) not in self._diverged
                   and intact_state(self.run.store, self._name(row)) is None]
        at_once = self.run.services.finishers()
        if not waiting or not at_once:
            return
        self.run.services.close_rollouts()      # their CPUs are for the trainings now
        with self.run.progress.within(f"fine-tune, {min(at_once, len(waiting))} at once", len(waiting)), \
                contextlib.closing(finished(self.run, waiting, self.run.services.finish, lambda: at_once, "fine-tuning",
                                            "delivery.fine_tune_epochs")) as done:
            for row, reference in done:
                self._save(row, reference)
                self.run.progress.advance(1)

    def _save(self, tokens_T: Tokens, reference: ray.ObjectRef) -> None:
        """What diverged would again; one whose process was lost again and again is left to the supernet's actor."""
        try:
            weights: Weights = fetch(reference)
            save_state(self.run.store, self._name(tokens_T), {name: np.array(value) for name, value in weights.items()})
        except EvaluationError as error:
            self._diverged[self._name(tokens_T)] = error
        except RayError as error:
            log.warning("fine-tuning of %s failed (%s)", self.run.space.arch_id(tokens_T), last_line(error))

    def _name(self, tokens_T: Tokens) -> str:
        return f"finetuned-{self.run.store.state()['weights_version']}-{self.run.space.arch_id(tokens_T)}"

    def finals(self, tokens_NT: Tokens) -> list[Final | None]:
        return [None] * len(tokens_NT)

    def trained_weights(self, tokens_T: Tokens) -> Weights:
        self.train_ahead(tokens_T[None])
        if self._name(tokens_T) in self._diverged:
            raise self._diverged[self._name(tokens_T)]
        finished = intact_state(self.run.store, self._name(tokens_T))
        if finished is not None:
            return {name: tensor.numpy() for name, tensor in finished.items()}
        settings, supernet = self.run.config.delivery, self.run.services.supernet()
        weights: Weights = self.run.wait(supernet.fine_tune.remote(
            tokens_T, settings.fine_tune_epochs, settings.fine_tune_learning_rate,
            self.run.store.state()["weights_version"]))
        return weights

    def training(self) -> dict[str, Any]:
        return fine_tuning(self.run.config.delivery)


class ScratchClusterBench(ClusterBench):
    """Retrains from scratch, all finalists at once."""

    def train_ahead(self, tokens_NT: Tokens) -> None:
        """`finals` has."""

    def __init__(self, run: RunContext) -> None:
        super().__init__(run)
        self._retrained = Retrained(run.config, run.space, run.splits, run.preprocessing, run.store)

    def finals(self, tokens_NT: Tokens) -> list[Final | None]:
        done = sum(self._retrained.accuracy(row) is not None for row in tokens_NT)
        self.run.progress.stage("retrain finalists", total=len(tokens_NT), done=done)
        for row in retrain_missing(self.run, self._retrained, tokens_NT):
            self.run.store.event("retrained", arch_id=self.run.space.arch_id(row),
                                 accuracy=self._retrained.accuracy(row))
            self.run.progress.advance(1, validation=self._retrained.accuracy(row) or 0.0)
        return [self._retrained.final(row) for row in tokens_NT]

    def trained_weights(self, tokens_T: Tokens) -> Weights:
        return self._retrained.weights(tokens_T)

    def training(self) -> dict[str, Any]:
        return retraining(self.run.config)


class LocalBench:
    """Everything in this process, for the targets with these labels."""

    def __init__(self, config: Config, space: SearchSpace, splits: Splits, preprocessing: Preprocessing,
                 store: RunStore, labels: Sequence[str]) -> None:
        self.config, self.space, self.splits = config, space, splits
        self.preprocessing = preprocessing
        self._states = {label: target_state(store, label) for label in labels}
        self._measured = {label: recorded_latencies(store, state["target_id"])
                          for label, state in self._states.items()}
        for label, state in self._states.items():
            with contextlib.closing(self._target(label)) as target:
                if target.identity().target_id != state["target_id"]:
                    raise TargetError(f"this machine has {target.identity()}, not the run's target {label}, "
                                      f"{state['target']}; generate on the machine that the run measured")

    def train_ahead(self, tokens_NT: Tokens) -> None:
        """This process trains one network after the other."""

    def latencies_ms(self, target: str, tokens_NT: Tokens) -> list[float | None]:
        return [self._latency_ms(target, row) for row in tokens_NT]

    def time_file(self, target: str, model: bytes) -> LatencySample:
        return self._visits(target, Workload(onnx=model), self.config.latency.visits)

    def _latency_ms(self, label: str, tokens_T: Tokens) -> float | None:
        arch_id, measured = self.space.arch_id(tokens_T), self._measured[label]
        if arch_id not in measured:
            try:
                workload = Workload(tokens_T=tokens_T, graph=self.space.graph(tokens_T))
                measured[arch_id] = self._visits(label, workload, 1).latency_ms
            except ParetorayError:
                return None
        return measured[arch_id]

    def _visits(self, label: str, workload: Workload, visits: int) -> LatencySample:
        with contextlib.closing(self._target(label)) as target:
            handles = target.prepare([workload])
            return merge_samples([target.measure(handles)[0] for _ in range(visits)])

    def _target(self, label: str) -> LatencyTarget:
        """Opened for each measurement only: while it is open, this thread and its children stay on one core."""
        plugin = next(plugin for plugin in self.config.targets if plugin.label == label)
        return make_target(plugin.name, plugin.options, input_shape(self.space), self._states[label]["reference_ms"],
                           timed_image_size(self.config, self.splits))


class SupernetLocalBench(LocalBench):
    """With the supernet's last checkpoint."""

    def __init__(self, config: Config, space: SearchSpace, splits: Splits, preprocessing: Preprocessing,
                 store: RunStore, labels: Sequence[str]) -> None:
        super().__init__(config, space, splits, preprocessing, store, labels)
        torch.set_num_threads(single_threads(config))   # as in the search
        calibration = calibration_images(splits.train, config.search.calibration_images, config.seed)
        self._evaluator = SupernetEvaluator(space, preprocessing.inputs(splits.val),
                                            preprocessing.prepare(calibration))
        self._evaluator.set_weights(*load_weights(store.path / "checkpoints", store.state()["weights_version"]))

    def accuracies(self, tokens_NT: Tokens) -> list[float | None]:
        evaluations: Sequence[Evaluation] = self._evaluator.evaluate(tokens_NT)
        return [None if e.error else e.accuracy for e in evaluations]

    def finals(self, tokens_NT: Tokens) -> list[Final | None]:
        return [None] * len(tokens_NT)

    def trained_weights(self, tokens_T: Tokens) -> Weights:
        settings, delivery = supernet_settings(self.config, []), self.config.delivery
        batches = whole_batches(self.splits.train, self.preprocessing, settings)
        return fine_tuned_weights(self._evaluator.network(tokens_T), batches, delivery.fine_tune_epochs,
                                  delivery.fine_tune_learning_rate, settings.calibration_images)

    def training(self) -> dict[str, Any]:
        return fine_tuning(self.config.delivery)


class ScratchLocalBench(LocalBench):
    """With what the run has retrained already; an architecture that it has not is retrained here, in this process."""

    def __init__(self, config: Config, space: SearchSpace, splits: Splits, preprocessing: Preprocessing,
                 store: RunStore, labels: Sequence[str]) -> None:
        super().__init__(config, space, splits, preprocessing, store, labels)
        self._recorded = {trial.arch_id: trial.accuracy for trial in store.read_trials()}
        self._retrained = Retrained(config, space, splits, preprocessing, store)

    def accuracies(self, tokens_NT: Tokens) -> list[float | None]:
        """Of the recorded trials; what the search never evaluated comes last, it is not evaluated here."""
        return [self._recorded.get(self.space.arch_id(row), 0.0) for row in tokens_NT]

    def finals(self, tokens_NT: Tokens) -> list[Final | None]:
        return [self._retrained.final(row) for row in tokens_NT]

    def trained_weights(self, tokens_T: Tokens) -> Weights:
        return self._retrained.weights(tokens_T)

    def training(self) -> dict[str, Any]:
        return retraining(self.config)


class RecordedLocalBench(ScratchLocalBench):
    """Where a run ends with architectures: nothing is retrained, so an accuracy is one that somebody knows."""

    def accuracies(self, tokens_NT: Tokens) -> list[float | None]:
        """Of the recorded trials; of others what the table says, None without one."""
        accuracy = self.config.accuracy
        known = (looked_up(accuracy, self.space, tokens_NT, accuracy.accuracy_column)
                 if isinstance(accuracy, TableAccuracy) else [None] * len(tokens_NT))
        return [self._recorded.get(self.space.arch_id(row), value) for row, value in zip(tokens_NT, known)]


def fine_tuning(settings: DeliverySettings) -> dict[str, Any]:
    return {"fine_tune_epochs": settings.fine_tune_epochs}


def retraining(config: Config) -> dict[str, Any]:
    return {"retrain_epochs": config.delivery.retrain_epochs,
            "recipe": config.accuracy.model_dump(mode="json", exclude={"workers", "cpus", "gpus", "knowledge",
                                                                            "test_column"})}
