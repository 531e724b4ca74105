"""This machine's CPU through ONNX Runtime: paired thread-CPU-time measurement (latency.md section 3).

With one thread the clock is the CPU time of the measuring thread, which other processes do not lengthen by taking turns
with it. It means nothing with several threads: those use wall time, need the host for themselves and say so.
Ray sets OMP_NUM_THREADS for its workers, so the runtime's thread counts are always set explicitly.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from actors.targets.host import Affinity, ForeignLoad, clock_state, cpu_name, no_garbage_collection
from actors.targets.lock import DeviceLock
from actors.targets.pairing import Protocol, Timer, quiet_ms, visit
from actors.targets.reference import graph_hash, reference_graph
from actors.targets.target import Health, LatencySample, LatencyTarget, TargetIdentity, Workload
from searchspaces.errors import ConfigError, TargetError
from searchspaces.graph import Graph
from searchspaces.onnxgraph import to_onnx
from searchspaces.onnxpixels import timed_size

FLOATS, BYTES = "tensor(float)", "tensor(uint8)"
BUSY_LOAD = 0.25        # share of the machine used by others at which wall time is not worth taking
BUSY_CHECK_S = 0.2
LOCK_TIME_OUT_S = 60.0  # of waiting for another process's visit; one takes a second or two
Clock = Callable[[], int]
Feed = dict[str, NDArray[np.float32] | NDArray[np.uint8]]


@dataclass(frozen=True)
class Loaded:
    """A handle: one network ready to run."""

    session: onnxruntime.InferenceSession
    feed: Feed
    session_ms: float


class OnnxCpuTarget(LatencyTarget):
    """`core`: which one to stay on, by default the last that this process may use (the first serves interrupts).

    `reference`: another reference network than the shipped one; it becomes part of the identity.
    """

    def __init__(self, input_shape: tuple[int, ...], reference_ms: float | None = None, *, batch: int = 1,
                 threads: int = 1, core: int | None = None, reference: Graph | None = None,
                 protocol: Protocol | None = None) -> None:
        if threads < 1 or batch < 1:
            raise ConfigError(f"target onnx_cpu: threads is {threads} and batch is {batch}; both must be at least 1")
        self._protocol = protocol or Protocol()
        self._clock: Clock = time.thread_time_ns if threads == 1 else time.perf_counter_ns
        self._threads, self._batch = threads, batch
        self._affinity = Affinity(core) if threads == 1 else None
        self._runtime = f"onnxruntime {onnxruntime.__version__}"
        graph = reference or reference_graph(input_shape[0], input_shape[1])
        self._identity = TargetIdentity("onnx_cpu", cpu_name(), self._runtime, "float32", threads,
                                        batch, tuple(input_shape), graph_hash(graph))
        self._reference = self._load(Workload(graph=graph))
        self._reference_ms = reference_ms

    def identity(self) -> TargetIdentity:
        return self._identity

    def health(self) -> Health:
        timings = self._timer(self._reference)(1)
        return Health(True) if timings[0] > 0 else Health(False, "the clock did not move during a run")

    def reference_ms(self) -> float:
        if self._reference_ms is None:
            with self._undisturbed():
                self._reference_ms = quiet_ms(self._timer(self._reference))
        return self._reference_ms

    def prepare(self, workloads: Sequence[Workload]) -> list[Any]:
        return [self._load(workload) for workload in workloads]

    def measure(self, handles: Sequence[Any]) -> list[LatencySample]:
        return [self._visit(handle) for handle in handles]

    def close(self) -> None:
        if self._affinity is not None:
            self._affinity.release()

    def _visit(self, handle: Loaded) -> LatencySample:
        reference_ms = self.reference_ms()
        with self._undisturbed():
            started_at, started, load = time.time(), time.monotonic(), ForeignLoad()
            try:
                result = visit(self._timer(self._reference), self._timer(handle), self._protocol)
            except Exception as error:   # the runtime raises its own family of exceptions, all of them mean this
                raise TargetError(f"{self._runtime} cannot run the network: {first_line(error)}") from error
            share, duration_s = load.share(), time.monotonic() - started
        if self._threads > 1:
            _refuse_if_busy(share, self._threads)
        core = self._affinity.core if self._affinity is not None else None
        return LatencySample(
            self._identity.target_id, result.ratio * reference_ms, reference_ms, result.ratio, result.stderr,
            len(result.ratios), result.drift, share, result.candidate_ms, result.reference_ms, started_at,
            duration_s, {"core": core, "session_ms": handle.session_ms, **clock_state(core)})

    def _load(self, workload: Workload) -> Loaded:
        started = time.perf_counter()
        if workload.onnx is None and workload.graph is None:
            raise TargetError("target onnx_cpu needs a graph or the bytes of an ONNX file, and got neither")
        try:
            content = workload.onnx
            if workload.graph is not None:
                content = to_onnx(workload.graph, batch=self._batch).SerializeToString()
            session = onnxruntime.InferenceSession(content, _session_options(self._threads),
                                                   providers=["CPUExecutionProvider"])
        except Exception as error:       # as above
            raise TargetError(f"{self._runtime} cannot load the network: {first_line(error)}") from error
        return Loaded(session, random_feed(session, self._batch), (time.perf_counter() - started) * 1e3)

    def _timer(self, network: Loaded) -> Timer:
        session, feed, clock = network.session, network.feed, self._clock

        def run(times: int) -> list[float]:
            timings = []
            for _ in range(times):
                start = clock()
                session.run(None, feed)
                timings.append((clock() - start) / 1e6)
            return timings

        return run

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """On our core, that no other process measures on, without garbage collection; several threads also need a quiet
        host."""
        device = "cpus" if self._affinity is None else f"cpu{self._affinity.core}"
        with DeviceLock(f"device-{device}", f"device {device} of this machine", LOCK_TIME_OUT_S):
            if self._affinity is not None:
                self._affinity.hold()
            else:
                load = ForeignLoad()
                time.sleep(BUSY_CHECK_S)
                _refuse_if_busy(load.share(), self._threads)
            with no_garbage_collection():
                yield


def _refuse_if_busy(share: float, threads: int) -> None:
    if share > BUSY_LOAD:
        raise TargetError(f"other processes use {share:.0%} of this machine; measuring with {threads} threads takes "
                          f"wall time and needs that below {BUSY_LOAD:.0%}: stop the other work or use threads: 1")


def _session_options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4      # its errors arrive as exceptions
    return options


def random_feed(session: Any, batch: int) -> Feed:
    """Random images of the types and sizes that the file takes: floats of 0 to 1, or bytes."""
    rng, feed = np.random.default_rng(0), Feed()
    sizes = timed_size(session.get_modelmeta().custom_metadata_map)
    for argument in session.get_inputs():
        shape = fixed_shape("input", argument, batch, sizes)
        feed[argument.name] = (rng.integers(0, 256, shape, dtype=np.uint8) if argument.type == BYTES
                               else rng.random(shape, dtype=np.float32))
    return feed


def fixed_shape(role: str, argument: Any, batch: int, sizes: Mapping[str, int] | None = None) -> list[int]:
    """The shape of a session's input or output; a free first dimension takes the batch, others what `sizes` says of
    their names. TargetError where one stays free, or for other types than floats and bytes."""
    shape = [batch if index == 0 and not isinstance(size, int) else (sizes or {}).get(size, size)
             for index, size in enumerate(argument.shape)]
    if argument.type not in (FLOATS, BYTES) or not shape or not all(isinstance(size, int) for size in shape):
        raise TargetError(f"{role} {argument.name} of the network is {argument.type} {argument.shape}; only float and "
                          "uint8 tensors can be timed, with a fixed size after the first dimension or one that the "
                          "file's metadata gives")
    if shape[0] != batch:
        raise TargetError(f"the network is made for batch {shape[0]}, this target measures batch {batch}")
    return shape


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
