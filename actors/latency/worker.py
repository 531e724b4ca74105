"""The Ray actor that owns one measuring device, and how its pool talks to it."""
from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from actors.latency.status import GROUP, Activity, WorkerStatus
from actors.targets.catalogue import make_target
from actors.targets.target import LatencySample, LatencyTarget, TargetIdentity, Workload, merge_samples
from searchspaces.errors import DeviceRestingError, ParetorayError, TargetError
from searchspaces.space import SearchSpace, Tokens


@dataclass(frozen=True)
class Probe:
    """A device that answered and is healthy."""

    host: str
    pid: int
    identity: TargetIdentity
    reference_ms: float


def input_shape(space: SearchSpace) -> tuple[int, ...]:
    """(C, H, W) of the space's images; of the largest, where the resolution is searched too."""
    return space.graph(space.extremes()[1]).input_shape


class LatencyWorker:
    """One device: builds the target in its own process, turns tokens into graphs there, and times them.

    Every method may be called again after a restart: the target is opened on the first call that needs it, with the
    `reference_ms` that the pool passes along, so that all samples of a run relate to one quiet value.
    Probes and measurements run one after the other in one thread, which is not the process's first; what is marked with
    the concurrency group "status" runs beside them and never touches the target.
    """

    def __init__(self, space: SearchSpace, target: str, options: Mapping[str, Any],
                 image_size: tuple[int, int] | None = None, shown: str = "") -> None:
        """`shown`: what Ray's dashboard and logs call it."""
        self._space, self._name, self._options, self._image_size = space, target, dict(options), image_size
        self._shown = shown or target
        self._target: LatencyTarget | None = None
        self._given_ms: float | None = None
        self._activity = Activity(target)

    @ray.method(concurrency_group=GROUP, max_task_retries=-1)
    def status(self) -> WorkerStatus:
        return self._activity.status()

    @ray.method(concurrency_group=GROUP, max_task_retries=-1)
    def quarantine(self, reason: str) -> None:
        """The pool will not use this device any more; the reason is for whoever asks."""
        self._activity.quarantined(reason)

    def probe(self, reference_ms: float | None) -> Probe:
        """Opens the device where needed. TargetError or ConfigError with the reason where it cannot measure."""
        try:
            target = self._open(reference_ms)
            health = target.health()
        except Exception as error:
            self._activity.unusable(str(error))
            raise
        self._activity.probed(target.identity(), health)
        if not health.ok:
            kind = DeviceRestingError if health.passing else TargetError
            raise kind(f"latency target {self._name} on {socket.gethostname()} is not healthy: {health.reason}")
        return Probe(socket.gethostname(), os.getpid(), target.identity(), target.reference_ms())

    def measure(self, tokens_NT: Sequence[Tokens], visits: int, reference_ms: float,
                waiting: int = 0) -> list[LatencySample | str]:
        """Per architecture a sample, or the reason why there is none. DeviceRestingError where the device has to rest
        first. `waiting`: requests still queued in the pool."""
        with self._activity.measuring(waiting):
            return self._measure(tokens_NT, visits, reference_ms)

    def measure_file(self, model: bytes, visits: int, reference_ms: float, waiting: int = 0) -> LatencySample | str:
        """An exported ONNX file."""
        with self._activity.measuring(waiting):
            try:
                return self._visit(self._open(reference_ms), [Workload(onnx=model)], visits)[0]
            except DeviceRestingError:
                raise
            except ParetorayError as error:
                return str(error)

    def close(self) -> None:
        if self._target is not None:
            self._target.close()
            self._target = None

    def _measure(self, tokens_NT: Sequence[Tokens], visits: int, reference_ms: float) -> list[LatencySample | str]:
        target = self._open(reference_ms)
        try:
            workloads = [Workload(tokens_T=row, graph=self._space.graph(row)) for row in tokens_NT]
            return list(self._visit(target, workloads, visits))
        except DeviceRestingError:
            raise
        except ParetorayError as error:
            if len(tokens_NT) == 1:
                return [str(error)]
        # One of them is bad: alone, the others work and the bad one gets its own reason.
        return [outcome for row in tokens_NT for outcome in self._measure([row], visits, reference_ms)]

    def _visit(self, target: LatencyTarget, workloads: Sequence[Workload], visits: int) -> list[LatencySample]:
        """Visits of one network lie apart in time, because what disturbs one also disturbs the next."""
        handles, rounds = target.prepare(workloads), []
        for _ in range(visits):
            rounds.append(target.measure(handles))
            self._activity.visited(rounds[-1])
        self._activity.counted(len(workloads))
        return [merge_samples(samples) for samples in zip(*rounds, strict=True)]

    def _open(self, reference_ms: float | None) -> LatencyTarget:
        if self._target is not None and reference_ms not in (None, self._given_ms, self._target.reference_ms()):
            self.close()
        if self._target is None:
            self._target = make_target(self._name, self._options, input_shape(self._space), reference_ms,
                                       self._image_size)
            self._given_ms = reference_ms
        return self._target

    def __repr__(self) -> str:
        return f"LatencyWorker({self._shown})"
