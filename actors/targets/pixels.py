"""Networks timed as they are handed over where a file holds its own preprocessing (delivery.preprocess_in_model).

Then the latency of a network is that of a file from uint8 images to probabilities, everywhere: in what is measured
before the search, in predictions, in budgets, and in the file itself. Such latencies are not comparable with those of
plain networks, so the identity differs.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from actors.targets.target import Health, LatencySample, LatencyTarget, TargetIdentity, Workload
from searchspaces.onnxgraph import to_onnx
from searchspaces.onnxpixels import Pixels


class PixelTarget(LatencyTarget):
    """`target` with every graph timed behind its preprocessing, from images of `size` (height, width). The reference
    network stays a plain one."""

    def __init__(self, target: LatencyTarget, size: tuple[int, int]) -> None:
        self._target, self._size = target, size
        identity = target.identity()
        self._identity = replace(identity, runtime=f"{identity.runtime} from {size[0]}x{size[1]} uint8")

    def identity(self) -> TargetIdentity:
        return self._identity

    def health(self) -> Health:
        return self._target.health()

    def reference_ms(self) -> float:
        return self._target.reference_ms()

    def prepare(self, workloads: Sequence[Workload]) -> list[Any]:
        return self._target.prepare([self._with_preprocessing(workload) for workload in workloads])

    def measure(self, handles: Sequence[Any]) -> list[LatencySample]:
        return [replace(sample, target_id=self._identity.target_id) for sample in self._target.measure(handles)]

    def close(self) -> None:
        self._target.close()

    def _with_preprocessing(self, workload: Workload) -> Workload:
        if workload.graph is None:
            return workload     # a file is complete
        pixels = Pixels.neutral(self._size, int(workload.graph.input_shape[0]))
        model = to_onnx(workload.graph, batch=self._identity.batch, pixels=pixels)
        return Workload(tokens_T=workload.tokens_T, onnx=model.SerializeToString())
