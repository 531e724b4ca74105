"""Two places where a model can be finished: on the run's cluster, or in this process.

`ClusterBench` uses the services of a running search. `LocalBench` needs no Ray, so that `paretoray generate` answers
at once; it works where this machine is the device the run was made for, and says so where it is not.
"""
from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from actors.data import Batches, Preprocessing, Splits, calibration_images
from actors.evaluator import Evaluation, SupernetEvaluator
from actors.finetune import fine_tuned_weights
from actors.latencyworker import input_shape
from actors.targets.catalogue import make_target
from actors.targets.target import LatencySample, LatencyTarget, Workload, merge_samples
from orchestrator.config import Config
from orchestrator.context import RunContext
from orchestrator.evaluation import evaluate_architectures, measure_architectures
from orchestrator.services import supernet_settings
from searchspaces.errors import ParetorayError, TargetError
from searchspaces.space import SearchSpace, Tokens


class ClusterBench:
    """The run's own pools and supernet actor; what is measured or evaluated here is recorded in the run."""

    def __init__(self, run: RunContext) -> None:
        self._run = run

    def latencies_ms(self, tokens_NT: Tokens) -> list[float | None]:
        measure_architectures(self._run, tokens_NT)
        return [self._run.measured_ms.get(self._run.space.arch_id(row)) for row in tokens_NT]

    def accuracies(self, tokens_NT: Tokens) -> list[float | None]:
        return [trial.accuracy for trial in evaluate_architectures(self._run, tokens_NT)]

    def trained_weights(self, tokens_T: Tokens, epochs: int, learning_rate: float) -> Mapping[str, NDArray[Any]]:
        supernet = self._run.services.supernet()
        weights: Mapping[str, NDArray[Any]] = self._run.wait(supernet.fine_tune.remote(tokens_T, epochs, learning_rate))
        return weights

    def time_file(self, model: bytes) -> LatencySample:
        return self._run.services.latency().measure_onnx(model, visits=self._run.config.latency.visits)


class LocalBench:
    """Everything in this process. TargetError if this machine is not the run's target."""

    def __init__(self, config: Config, space: SearchSpace, splits: Splits, preprocessing: Preprocessing,
                 weights: tuple[int, Mapping[str, NDArray[Any]]], state: Mapping[str, Any],
                 measured_ms: Mapping[str, float]) -> None:
        self._config, self._space, self._splits = config, space, splits
        self._preprocessing = preprocessing
        self._measured = dict(measured_ms)
        torch.set_num_threads(config.supernet.cpus)  # as in the training worker
        self._reference_ms: float = state["reference_ms"]
        with contextlib.closing(self._target()) as target:
            if target.identity().target_id != state["target_id"]:
                raise TargetError(f"this machine is {target.identity()}, not the run's target {state['target']}; "
                                  "generate on the machine that the run measured")
        calibration = calibration_images(splits.train, config.search.calibration_images, config.seed)
        self._evaluator = SupernetEvaluator(space, preprocessing.prepare(splits.val),
                                            preprocessing.prepare(calibration))
        self._evaluator.set_weights(*weights)

    def latencies_ms(self, tokens_NT: Tokens) -> list[float | None]:
        return [self._latency_ms(row) for row in tokens_NT]

    def accuracies(self, tokens_NT: Tokens) -> list[float | None]:
        evaluations: Sequence[Evaluation] = self._evaluator.evaluate(tokens_NT)
        return [None if e.error else e.accuracy for e in evaluations]

    def trained_weights(self, tokens_T: Tokens, epochs: int, learning_rate: float) -> Mapping[str, NDArray[Any]]:
        settings = supernet_settings(self._config)
        batches = Batches(self._splits.train, self._preprocessing, settings.augmentation,
                          min(settings.batch_size, len(self._splits.train)), settings.seed)
        network = self._evaluator.network(tokens_T)
        return fine_tuned_weights(network, batches, epochs, learning_rate, settings.calibration_images)

    def time_file(self, model: bytes) -> LatencySample:
        return self._visits(Workload(onnx=model), self._config.latency.visits)

    def _latency_ms(self, tokens_T: Tokens) -> float | None:
        arch_id = self._space.arch_id(tokens_T)
        if arch_id not in self._measured:
            try:
                workload = Workload(tokens_T=tokens_T, graph=self._space.graph(tokens_T))
                self._measured[arch_id] = self._visits(workload, 1).latency_ms
            except ParetorayError:
                return None
        return self._measured[arch_id]

    def _visits(self, workload: Workload, visits: int) -> LatencySample:
        with contextlib.closing(self._target()) as target:
            handles = target.prepare([workload])
            return merge_samples([target.measure(handles)[0] for _ in range(visits)])

    def _target(self) -> LatencyTarget:
        """Opened for each measurement only: while it is open, this thread and its children stay on one core."""
        return make_target(self._config.target.name, self._config.target.options, input_shape(self._space),
                           self._reference_ms)


