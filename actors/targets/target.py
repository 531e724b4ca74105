"""The LatencyTarget contract: one device on which graphs are timed.

Lifecycle: constructed inside the latency worker that owns the device (never in the driver), as
`Target(input_shape=(C, H, W), reference_ms=None or a number, **options)` with the options of the `target` section of
the configuration; unknown options never reach it (catalogue.py checks the names), bad values are ConfigErrors.
`identity()` is asked first, then `prepare` and `measure` alternate; `close` ends it. Calls come from one thread, one at
a time: the worker has the device for itself. Nothing survives a restart except what `identity()` names and
`reference_ms`, which the run folder keeps and passes back in.

A target of your own subclasses `LatencyTarget`, is named `module:Class` in the configuration and passes
`paretoray check module:Class` (actors/targets/conformance.py). Unless it has a better way it times with
`pairing.visit`.
"""
from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from statistics import mean, stdev
from typing import Any

from searchspaces.graph import Graph
from searchspaces.space import Tokens

CPU_RESOURCE = "latency_cpu"    # of a node whose processor is measured, one network at a time


@dataclass(frozen=True)
class TargetIdentity:
    """What makes two latencies comparable; all fields equal or they are never mixed."""

    kind: str
    device: str
    runtime: str
    precision: str
    threads: int
    batch: int
    input_shape: tuple[int, ...]
    reference: str = ""   # hash of the reference network, where there is one

    @property
    def target_id(self) -> str:
        """"kind-" and 12 hex digits of a hash over every field."""
        text = json.dumps([self.kind, self.device, self.runtime, self.precision, self.threads, self.batch,
                           list(self.input_shape), self.reference])
        return f"{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class LatencySample:
    """One visit of one network: everything needed to judge it later.

    `candidate_ms` and `reference_ms_rounds` hold all kept timings, one tuple per round. `ratio` is the median over
    rounds of the paired 25th percentiles, `stderr` its standard error in the same unit, `drift` the spread
    (max / min - 1) of the reference's 25th percentiles within the visit, `load` the share of the machine's CPU time
    that other processes used meanwhile. `latency_ms = ratio * reference_ms`, with `reference_ms` the target's stored
    quiet value.
    """

    target_id: str
    latency_ms: float
    reference_ms: float
    ratio: float
    stderr: float
    rounds: int
    drift: float
    load: float
    candidate_ms: tuple[tuple[float, ...], ...]
    reference_ms_rounds: tuple[tuple[float, ...], ...]
    started_at: float
    duration_s: float
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stderr_ms(self) -> float:
        return self.stderr * self.reference_ms


def merge_samples(samples: Sequence[LatencySample]) -> LatencySample:
    """Several visits of one network as one sample: mean ratio, all timings.

    Its standard error is the larger of what the visits say of themselves and what their spread says, because a visit
    cannot see what differs between visits (memory layout, frequency).
    """
    if len(samples) == 1:
        return samples[0]
    assert len({(sample.target_id, sample.reference_ms) for sample in samples}) == 1, "visits of two targets"
    first, ratios = samples[0], [sample.ratio for sample in samples]
    within = sqrt(sum(sample.stderr**2 for sample in samples)) / len(samples)
    return LatencySample(
        first.target_id, mean(ratios) * first.reference_ms, first.reference_ms, mean(ratios),
        max(within, stdev(ratios) / sqrt(len(samples))), sum(sample.rounds for sample in samples),
        max(sample.drift for sample in samples), mean(sample.load for sample in samples),
        tuple(timings for sample in samples for timings in sample.candidate_ms),
        tuple(timings for sample in samples for timings in sample.reference_ms_rounds),
        first.started_at, sum(sample.duration_s for sample in samples), {**first.details, "visits": len(samples)})


@dataclass(frozen=True)
class Health:
    """`passing`: what is wrong ends by itself (heat, another user), so the device is worth waiting for."""

    ok: bool
    reason: str = ""
    passing: bool = False


@dataclass(frozen=True)
class Workload:
    """What is to be timed: either a graph (random weights are fine) or an exported ONNX file's bytes.

    A file may take uint8 images of free height and width; the sizes to time it with are in its metadata
    (searchspaces/onnxpixels.py, `timed_size`).
    """

    tokens_T: Tokens | None = None
    graph: Graph | None = None
    onnx: bytes | None = None


@dataclass(frozen=True)
class Claim:
    """One device of a cluster: the Ray actor options that keep it exclusive, and the target's options that pick it."""

    actor: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)


class LatencyTarget(ABC):
    """See the module docstring. Raises TargetError with one sentence; the pool retries and quarantines. A
    DeviceRestingError says that the device, not the network, is the reason, and that it is worth waiting for.
    """

    per_call = 4    # networks that travel to the device's worker at once; more where a call is costly
    times_files = True  # False: only tokens are looked up; a search then ends with architectures, without models

    @classmethod
    def announced(cls, options: Mapping[str, Any]) -> dict[str, float]:
        """The Ray resources by which this machine offers its devices of this kind. Where it has none: {}, or
        NoDeviceError if there is something to say about it. TargetError where a device is there and cannot be used.

        Asked on the node: by `paretoray worker`, and for the embedded local Ray. GPUs are found by Ray itself.
        """
        return {CPU_RESOURCE: 1.0}

    @classmethod
    def claims(cls, options: Mapping[str, Any], offered: Mapping[str, float]) -> list[Claim]:
        """One claim per device that `options` allow among the resources a cluster offers; [] where there is none."""
        return [Claim({"resources": {CPU_RESOURCE: 1}})] if offered.get(CPU_RESOURCE, 0) >= 1 else []

    @abstractmethod
    def identity(self) -> TargetIdentity:
        """Constant for the life of the object."""

    @abstractmethod
    def health(self) -> Health:
        """Cheap check that the device can measure now."""

    @abstractmethod
    def reference_ms(self) -> float:
        """Latency of the reference network in a quiet state; measured on first use unless given at construction."""

    @abstractmethod
    def prepare(self, workloads: Sequence[Workload]) -> list[Any]:
        """Builds whatever runs on the device (sessions, pushed files); handles for `measure`, in the same order.

        A workload that cannot run is a TargetError that leaves the target usable for others.
        """

    @abstractmethod
    def measure(self, handles: Sequence[Any]) -> list[LatencySample]:
        """One visit per handle, in order."""

    @abstractmethod
    def close(self) -> None:
        """Frees the device. May be called twice."""
