"""The workbench of the fixed network: trained at several resolutions at once, on the run's cluster."""
from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import ray

from actors.objectpath import absolute
from actors.remote import fetch
from actors.supernet.tuning import submit_tuning
from orchestrator.comparison.fixed import FixedNetworks
from orchestrator.handover.delivered import Final
from orchestrator.handover.exported import as_pixels
from orchestrator.record.goals import target_state
from orchestrator.services.context import RunContext
from orchestrator.services.retraining import finished
from orchestrator.services.workbench import ClusterBench, Weights
from searchspaces.errors import EvaluationError
from searchspaces.onnxgraph import to_onnx
from searchspaces.space import Tokens


class FixedBench(ClusterBench):
    """`folder` holds the checkpoints of what is not handed over yet: what was killed goes on from its last epoch, what
    was finished costs nothing again."""

    def __init__(self, run: RunContext, fixed: FixedNetworks) -> None:
        super().__init__(run)
        self.fixed = fixed
        self.folder = run.store.path / "checkpoints" / "comparing"
        self._trained: dict[int, Weights | EvaluationError] = {}

    def latency_ms(self, target: str, resolution: int) -> float:
        """Of the network before its training: weights do not change how long it takes."""
        batch = target_state(self.run.store, target)["target"]["batch"]
        graph, run = self.fixed.space.graph(self.fixed.tokens(resolution)), self.run
        pixels = (as_pixels(run.preprocessing, run.splits.val.shape) if run.config.delivery.preprocess_in_model
                  else None)
        return self.time_file(target, to_onnx(graph, batch=batch, pixels=pixels).SerializeToString()).latency_ms

    def train_ahead(self, tokens_NT: Tokens) -> None:
        services = self.run.services
        services.begin_training()
        services.end_training()     # their CPUs and GPUs are for these trainings now
        self.run.progress.stage("compare: fine-tune", total=len(tokens_NT), done=0)
        start, train = ray.put(self.fixed.start()), ray.put(self.run.splits.train)
        places, cpus, gpus = services.tuners()
        services.room_to_train("fine-tuning", cpus, gpus, "supernet.cpus or supernet.gpus")

        def submit(resolution: int) -> ray.ObjectRef:
            graph = self.fixed.space.graph(self.fixed.tokens(resolution))
            own = replace(self.run.preprocessing, resolution=resolution)
            return submit_tuning(f"tune-r{resolution}", graph, start, train, own, self.fixed.settings,
                                 absolute(self.folder / f"r{resolution}"), cpus, gpus)

        resolutions = [self.fixed.resolution(row) for row in tokens_NT]
        with contextlib.closing(finished(self.run, resolutions, submit, lambda: places, "fine-tuning",
                                         "supernet.epochs")) as done:
            for resolution, reference in done:
                self._trained[resolution] = _outcome(reference)
                self.run.store.event("tuned", resolution=resolution, epochs=self.fixed.settings.epochs)
                self.run.progress.advance(1)

    def finals(self, tokens_NT: Tokens) -> list[Final | None]:
        return [None] * len(tokens_NT)

    def trained_weights(self, tokens_T: Tokens) -> Weights:
        resolution = self.fixed.resolution(tokens_T)
        if resolution not in self._trained:
            self.train_ahead(tokens_T[None])
        found = self._trained[resolution]
        if isinstance(found, EvaluationError):
            raise found
        return found

    def training(self) -> dict[str, Any]:
        return self.fixed.told()


def _outcome(reference: ray.ObjectRef) -> Weights | EvaluationError:
    """The weights, or why there are none."""
    try:
        weights: Weights = fetch(reference)
        return weights
    except EvaluationError as error:
        return error
