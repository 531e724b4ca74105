"""A GPU through ONNX Runtime's CUDA provider: paired measurement with CUDA events (latency.md section 4).

One timing is the mean of ten runs between two events; candidate and reference take turns as on the CPU. The batch is
part of the target, and so are TF32 and captured CUDA graphs. A GPU is measured by one process at a time: Ray gives it
to one worker as a whole, a file lock keeps programs outside Ray away. Clocks, temperature, power and the reasons why a
card slows down are recorded with every sample and never changed.
"""
from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from actors.targets.cuda.monitor import GpuMonitor, GpuState
from actors.targets.cuda.runtime import CudaNetwork, CudaRuntime, Modules
from actors.targets.host import ForeignLoad, no_garbage_collection
from actors.targets.lock import DeviceLock
from actors.targets.pairing import Protocol, Timer, quiet_ms, visit
from actors.targets.reference import graph_hash, reference_graph
from actors.targets.target import Claim, Health, LatencySample, LatencyTarget, TargetIdentity, Workload
from searchspaces.errors import ConfigError, TargetError
from searchspaces.graph import Graph
from searchspaces.onnxgraph import to_onnx

ACCELERATOR = "accelerator_type:"   # prefix of Ray's resource of every node that has that kind of GPU
BUSY_SHARE = 0.05       # of the GPU used by others at which it is not measured on
BUSY_CHECK_S = 0.5
# Every timing is a mean of ten runs: two warm up with twenty, one is dropped after each switch of network, and three
# make a round. `small_ms` 0: fast networks need no rule of their own, because the ten runs are timed as one.
GPU_PROTOCOL = Protocol(warm_up=2, reference_runs=4, reference_drop=1, candidate_runs=4, candidate_drop=1, small_ms=0.0)


class CudaTarget(LatencyTarget):
    """`gpu`: which one among those that this process may use; under Ray it has one. `gpu_type` chooses among the kinds
    of a cluster, by Ray's name for them (for example A100). `reference`: another reference network than the shipped
    one. `modules`: stand-ins for the hardware.
    """

    def __init__(self, input_shape: tuple[int, ...], reference_ms: float | None = None, *, batch: int = 1,
                 cuda_graph: bool = False, tf32: bool = False, gpu: int = 0, gpu_type: str | None = None,
                 reference: Graph | None = None, protocol: Protocol | None = None,
                 modules: Modules | None = None) -> None:
        if batch < 1:
            raise ConfigError(f"target cuda: batch is {batch}; it must be at least 1")
        _check_whole_gpu()
        self._batch, self._protocol = batch, protocol or GPU_PROTOCOL
        self._runtime = CudaRuntime(gpu, batch, cuda_graph=cuda_graph, tf32=tf32, modules=modules)
        self._lock = DeviceLock(self._runtime.uuid, f"{self._runtime.device} ({self._runtime.uuid})")
        self._monitor = GpuMonitor(self._runtime.uuid, modules.nvml if modules else None)
        graph = reference or reference_graph(input_shape[0], input_shape[1])
        self._identity = TargetIdentity(
            "cuda", self._runtime.device, f"{self._runtime.version} driver {self._monitor.driver}",
            "tf32" if tf32 else "float32", 1, batch, tuple(input_shape), graph_hash(graph))
        try:
            self._reference = self._load(Workload(graph=graph))
        except BaseException:
            self.close()
            raise
        self._reference_ms = reference_ms

    @classmethod
    def announced(cls, options: Mapping[str, Any]) -> dict[str, float]:
        """Nothing of its own: Ray finds GPUs."""
        return {}

    @classmethod
    def claims(cls, options: Mapping[str, Any], offered: Mapping[str, float]) -> list[Claim]:
        """A whole GPU each, all of one kind. Where kinds are mixed Ray tells on how many nodes each is, not how many
        GPUs: then one per node. ConfigError where `options` have to choose a kind."""
        gpus, wanted = offered.get("GPU", 0), options.get("gpu_type")
        if 0 < gpus < 1:
            raise ConfigError(f"target cuda needs a whole GPU and the cluster offers {gpus:g} of one; start the node "
                              "with ray start --num-gpus=1")
        kinds = {name.removeprefix(ACCELERATOR): int(nodes) for name, nodes in offered.items()
                 if name.startswith(ACCELERATOR)} if gpus else {}
        if wanted is None and len(kinds) > 1:
            raise ConfigError(f"the cluster has GPUs of several kinds ({', '.join(sorted(kinds))}), whose latencies do "
                              "not compare; choose one with the option 'gpu_type' of target cuda")
        if wanted is None:
            return [Claim({"num_gpus": 1})] * int(gpus)
        count = int(gpus) if list(kinds) == [wanted] else kinds.get(wanted, 0)
        return [Claim({"num_gpus": 1, "accelerator_type": wanted})] * count

    def identity(self) -> TargetIdentity:
        return self._identity

    def health(self) -> Health:
        """Not ok while the card slows itself down for heat or lack of power, or others use it."""
        others = self._monitor.others_now(BUSY_CHECK_S)     # first: this process has not used the GPU meanwhile
        if others is not None and others > BUSY_SHARE:
            return Health(False, f"other processes use {others:.0%} of {self._runtime.device}; end them or wait",
                          passing=True)
        self._runtime.run(self._reference, 1)
        self._runtime.synchronize()
        state = self._monitor.state()
        if state is not None and state.slowed:
            return Health(False, f"{self._runtime.device} slows itself down ({', '.join(state.slowed)}, "
                                 f"{state.temperature_c} degrees Celsius); cool it or wait", passing=True)
        return Health(True)

    def reference_ms(self) -> float:
        if self._reference_ms is None:
            with no_garbage_collection():
                self._reference_ms = quiet_ms(self._timer(self._reference), runs=4, drop=1)
        return self._reference_ms

    def prepare(self, workloads: Sequence[Workload]) -> list[Any]:
        return [self._load(workload) for workload in workloads]

    def measure(self, handles: Sequence[Any]) -> list[LatencySample]:
        return [self._visit(handle) for handle in handles]

    def close(self) -> None:
        self._lock.release()

    def _load(self, workload: Workload) -> CudaNetwork:
        if workload.graph is not None:
            return self._runtime.load(to_onnx(workload.graph, batch=self._batch).SerializeToString())
        if workload.onnx is None:
            raise TargetError("target cuda needs a graph or the bytes of an ONNX file, and got neither")
        return self._runtime.load(workload.onnx)

    def _timer(self, network: CudaNetwork) -> Timer:
        return lambda times: self._runtime.timings_ms(network, times)

    def _visit(self, handle: CudaNetwork) -> LatencySample:
        reference_ms = self.reference_ms()
        before, load = self._monitor.state(), ForeignLoad()
        started_at, started = time.time(), time.monotonic()
        with no_garbage_collection():
            result = visit(self._timer(self._reference), self._timer(handle), self._protocol)
        duration_s = time.monotonic() - started
        after = self._monitor.state()
        return LatencySample(
            self._identity.target_id, result.ratio * reference_ms, reference_ms, result.ratio, result.stderr,
            len(result.ratios), result.drift, load.share(), result.candidate_ms, result.reference_ms, started_at,
            duration_s, {"gpu": self._runtime.uuid, "session_ms": handle.session_ms,
                         **self._states(before, after, started_at)})

    def _states(self, before: GpuState | None, after: GpuState | None, since: float) -> dict[str, Any]:
        """The card before the visit and at its end, and the share of it that others used; or why they are not known."""
        if before is None or after is None:
            return {"gpu_state": self._monitor.absent}
        return {"gpu_before": before.details(), "gpu_after": after.details(),
                "gpu_others": self._monitor.others(since)}


def _check_whole_gpu() -> None:
    """Inside a Ray worker: what Ray has given it. Ray hides no GPU from a worker that was given none."""
    import ray  # not needed to measure in a process without it

    if not ray.is_initialized() or ray.get_runtime_context().get_task_id() is None:
        return  # a driver, or a process without Ray
    given = float(ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0))
    if given != 1.0:
        raise TargetError(f"target cuda measures on exactly one whole GPU and this worker was given {given:g}; claim "
                          "it with num_gpus=1, never a fraction")
