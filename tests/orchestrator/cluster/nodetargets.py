"""A target kind with devices of its own, as a user's would be, and a driver that measures on them.

    python -m tests.orchestrator.cluster.nodetargets HOST:PORT LOG GATE   # six networks on the one that is well
"""
from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.targets.target import CPU_RESOURCE, Claim, Health, LatencySample, LatencyTarget, TargetIdentity, Workload
from searchspaces.errors import TargetError

WELL, SICK = "toy:A [1]", "toy:it's \"$HOME\""      # a serial is what its maker likes
PREFIX = "toy:"
NETWORKS = 6


class ToyTarget(LatencyTarget):
    """Appends a line to `log` per visit, and waits (at most a minute) until the file `gate` exists."""

    def __init__(self, input_shape: tuple[int, ...], reference_ms: float | None = None, *, serial: str = "",
                 log: str = "", gate: str = "") -> None:
        self._serial, self._log, self._gate = serial, log, gate
        self._identity = TargetIdentity("toy", "a toy", "1", "none", 1, 1, tuple(input_shape))

    @classmethod
    def announced(cls, options: Mapping[str, Any]) -> dict[str, float]:
        return {WELL: 1.0, SICK: 1.0}

    @classmethod
    def claims(cls, options: Mapping[str, Any], offered: Mapping[str, float]) -> list[Claim]:
        return [Claim({"resources": {name: 1}}, {"serial": name.removeprefix(PREFIX)})
                for name in sorted(offered) if name.startswith(PREFIX)]

    def identity(self) -> TargetIdentity:
        return self._identity

    def health(self) -> Health:
        return Health(PREFIX + self._serial == WELL, f"device '{self._serial}' is hot")

    def reference_ms(self) -> float:
        return 1.0

    def prepare(self, workloads: Sequence[Workload]) -> list[Any]:
        return list(workloads)

    def measure(self, handles: Sequence[Any]) -> list[LatencySample]:
        return [self._visit() for _ in handles]

    def close(self) -> None:
        pass

    def _visit(self) -> LatencySample:
        with Path(self._log).open("a") as log:
            log.write("visit\n")
        for _ in range(1200):
            if Path(self._gate).exists():
                break
            time.sleep(0.05)
        return LatencySample(self._identity.target_id, 2.0, 1.0, 2.0, 0.01, 1, 0.03, 0.0, ((2.0,),), ((1.0,),),
                             time.time(), 0.0)


class NoDriver(ToyTarget):
    """Of a kind whose tools are missing here."""

    @classmethod
    def announced(cls, options: Mapping[str, Any]) -> dict[str, float]:
        raise TargetError("no toy server answers; start one")


class Needy(ToyTarget):
    """Cannot be opened without what only a configuration says."""

    def __init__(self, input_shape: tuple[int, ...], reference_ms: float | None = None, *, runner: str,
                 serial: str = "") -> None:
        super().__init__(input_shape, reference_ms, serial=serial)


class Hangs(ToyTarget):
    @classmethod
    def announced(cls, options: Mapping[str, Any]) -> dict[str, float]:
        time.sleep(600.0)
        return {}


class OtherWork:
    """Holds a device, and is no latency worker."""

    def ready(self) -> None:
        pass


def drive(address: str, log: str, gate: str) -> None:
    from orchestrator.cluster.joining import connected, prepare_environment
    from orchestrator.config import ClusterSettings

    prepare_environment(address)
    import ray

    from actors.latency.pool import LatencyPool, LatencyPoolSettings, LatencyRequest
    from orchestrator.resources.waiting import devices_when_there
    from orchestrator.run.stages.measure import spread_sample
    from searchspaces.catalogue import make_space

    space = make_space("nasbench201", classes=10, channels=3, options={})
    kind = "tests.orchestrator.cluster.nodetargets:ToyTarget"
    with connected(ClusterSettings(), address):
        other = ray.remote(OtherWork).options(num_cpus=0, resources={CPU_RESOURCE: 1}).remote()
        ray.get(other.ready.remote(), timeout=60)
        devices = devices_when_there(kind, {}, ClusterSettings(), print)
        pool = LatencyPool(space, kind, {"log": log, "gate": gate}, devices=devices,
                           settings=LatencyPoolSettings(per_call=1, max_failures=1))
        while any(device.state == "starting" for device in pool.health()):
            time.sleep(0.1)
        pool.submit([LatencyRequest(row) for row in spread_sample(space, NETWORKS, seed=0)])
        print("submitted", flush=True)
        results = []
        while pool.outstanding:
            results += pool.collect(timeout_s=1.0)
        print("measured", sum(not result.error for result in results), flush=True)
        pool.close()


if __name__ == "__main__":
    drive(*sys.argv[1:])
