"""The latency pool: one queue in front of all devices of one target (latency.md section 7).

    pool = LatencyPool(space, "onnx_cpu", {}, devices=claims("onnx_cpu", {}, ray.cluster_resources()))
    pool.preload(results_of_this_run)                     # nothing is measured twice
    pool.submit([LatencyRequest(row, client="pnag") for row in rows])
    while pool.outstanding: use(pool.collect(timeout_s=0.5))
    results = pool.measure(tokens_NT)                     # or wait for these
    sample = pool.measure_onnx(file.read_bytes(), visits=2)

Identical requests are measured once; what was known or already under way comes back as "cached". Requests of several
clients are served in rounds. A device whose worker dies, or does not answer in time, is probed until it is back; its
requests go back to the front of the queue and travel alone, so that a network that kills its worker harms no other.
After `max_failures` a request fails with the reason, and a device that fails that many probes is quarantined.
Searches that share a device take turns (turns.py): call `give_way` now and then while nothing is measured.

The pool is a plain object in the driver, single-threaded; workers start again without it losing anything. To share one
between drivers wrap it as an actor (`ray.remote(LatencyPool)`): all arguments and results pickle.
"""
from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray

from actors.latency.device import LOOK_S, Device, DeviceHealth, Job, LatencyPoolSettings, Outcome
from actors.latency.result import LatencyRequest, LatencyResult
from actors.latency.turns import waiting_claims
from actors.latency.worker import Probe
from actors.targets.catalogue import check_options, target_class
from actors.targets.target import CPU_RESOURCE, Claim, LatencySample, TargetIdentity
from searchspaces.errors import ClusterError, TargetError
from searchspaces.space import SearchSpace, Tokens

__all__ = ["DeviceHealth", "LatencyPool", "LatencyPoolSettings", "LatencyRequest", "LatencyResult"]

log = logging.getLogger(__name__)
DEVICE = Claim({"resources": {CPU_RESOURCE: 1}})
FILES = "\0files"       # the client of measure_onnx


class LatencyPool:
    """See the module docstring. Ray must be initialised. `devices`: one claim per device, with the Ray resource that
    keeps it exclusive. `reference_ms` is the stored quiet value of an earlier start. With `image_size` (height, width)
    networks are timed behind their preprocessing, from such images. `search`: who measures, in names that others see.
    `say` hears once for whom it waits; `check` is called while waiting and may raise to stop.
    """

    def __init__(self, space: SearchSpace, target: str, options: Mapping[str, Any], *,
                 devices: Sequence[Claim] = (DEVICE,), settings: LatencyPoolSettings | None = None,
                 reference_ms: float | None = None, image_size: tuple[int, int] | None = None, search: str = "pool",
                 say: Callable[[str], None] = log.warning, check: Callable[[], None] = lambda: None) -> None:
        check_options(target, options)
        _check_resources(devices)
        self._space, self._target, self._per_call = space, target, target_class(target).per_call
        self._settings = settings or LatencyPoolSettings()
        self._reference_ms = reference_ms
        self._identity: TargetIdentity | None = None
        self._known: dict[tuple[str, str], tuple[int, LatencySample]] = {}     # (target_id, arch_id) -> visits, sample
        self._pending: dict[tuple[str, int], Job] = {}                        # by (arch_id, visits)
        self._queues: dict[str, deque[Job]] = {}
        self._turns: deque[str] = deque()                                      # clients with a queue, next one first
        self._retries: deque[Job] = deque()
        self._tickets = 0
        self._submitted: set[int] = set()
        self._done: dict[int, LatencyResult] = {}
        self._say, self._check, self._told, self._looked = say, check, {""}, time.monotonic()
        self._devices = [Device(search, claim.actor, self._settings,
                                (space, target, {**options, **claim.options}, image_size)) for claim in devices]

    # --- what the driver calls ---------------------------------------------------------------------------------------

    def identity(self) -> TargetIdentity:
        """What is measured; waits for the first device. TargetError where none becomes healthy."""
        while self._identity is None:
            reasons = [device.quarantined for device in self._devices if device.quarantined]
            if len(reasons) == len(self._devices):
                raise TargetError(f"latency target {self._target} cannot measure: {reasons[0]}")
            self._pump(0.5)
        return self._identity

    def reference_ms(self) -> float:
        """The quiet value that this pool's samples relate to; keep it and pass it to the next pool of the run."""
        self.identity()
        assert self._reference_ms is not None
        return self._reference_ms

    def preload(self, results: Sequence[LatencyResult]) -> None:
        """Makes samples of earlier runs known. Those of other targets never answer a request."""
        for result in results:
            if result.sample is not None:
                visits = int(result.sample.details.get("visits", 1))
                self._known[(result.sample.target_id, result.arch_id)] = (visits, result.sample)

    @property
    def outstanding(self) -> int:
        """Requests submitted and not yet collected."""
        return len(self._submitted)

    def submit(self, requests: Sequence[LatencyRequest]) -> None:
        """Queues the requests. SpaceError for tokens outside the space; waits for the first device if none is up."""
        self._submitted.update(self._enqueue(requests))
        self._dispatch()

    def collect(self, timeout_s: float) -> list[LatencyResult]:
        """Finished requests: at once where there are any, otherwise the first ones within `timeout_s`, or []."""
        deadline = time.monotonic() + timeout_s
        while not (finished := self._submitted & self._done.keys()):
            patience_s = deadline - time.monotonic()
            if not self._submitted or patience_s <= 0:
                return []
            self._pump(patience_s)
        self._submitted -= finished
        self._dispatch()
        return [self._done.pop(ticket) for ticket in sorted(finished)]

    def measure(self, tokens_NT: Tokens, visits: int = 1, client: str = "") -> list[LatencyResult]:
        """Waits for these architectures; results in the order of the rows."""
        return self._wait(self._enqueue([LatencyRequest(row, client, visits) for row in tokens_NT]))

    def measure_onnx(self, model: bytes, visits: int = 2) -> LatencySample:
        """An exported file, never cached. TargetError with the reason where it cannot be measured."""
        self.identity()
        self._tickets += 1
        ticket = self._tickets
        self._queue(Job(f"file-{ticket}", np.zeros(0, np.int8), FILES, visits, [ticket], model))
        result = self._wait([ticket])[0]
        if result.sample is None:
            raise TargetError(result.error)
        return result.sample

    def health(self) -> list[DeviceHealth]:
        """One row per device, as last seen."""
        self._pump(0.0)
        return [device.health() for device in self._devices]

    def activities(self) -> dict[str, int]:
        """How many devices are idle, measuring, starting, waiting for their turn, quarantined."""
        return dict(Counter(device.activity() for device in self._devices))

    def give_way(self) -> None:
        """Lets other searches of the cluster have devices that they wait for: at once what is not needed here,
        the rest after its share of time. Costs a question to Ray every few seconds."""
        now = time.monotonic()
        if now - self._looked < LOOK_S or not any(device.ready for device in self._devices):
            return
        self._looked = now
        mine = {device.claim for device in self._devices}
        wanted = Counter(key for name, key in waiting_claims().items() if name not in mine)
        for device in self._devices:
            if wanted[device.key] > 0 and device.spared(needed=self.waiting > 0):
                wanted[device.key] -= 1
                device.release()

    def close(self) -> None:
        """Ends all workers and forgets what is queued. May be called twice."""
        for device in self._devices:
            device.close()
        self._devices = []
        self._submitted.clear()

    # --- queue ------------------------------------------------------------------------------------------------------

    def _enqueue(self, requests: Sequence[LatencyRequest]) -> list[int]:
        """One ticket per request; known ones are done at once, pending ones are joined."""
        if not requests:
            return []
        target_id = self.identity().target_id
        rows = self._space.canonical(self._space.check_tokens(np.stack([request.tokens_T for request in requests])))
        tickets = []
        for row, request in zip(rows, requests):
            self._tickets += 1
            tickets.append(self._tickets)
            arch_id = self._space.arch_id(row)
            visits, sample = self._known.get((target_id, arch_id), (0, None))
            pending = self._pending.get((arch_id, request.visits))
            if sample is not None and visits >= request.visits:
                self._done[self._tickets] = LatencyResult(arch_id, row, "cached", sample)
            elif pending is not None:
                pending.tickets.append(self._tickets)
            else:
                job = Job(arch_id, row, request.client, request.visits, [self._tickets])
                self._pending[(arch_id, request.visits)] = job
                self._queue(job)
        return tickets

    def _queue(self, job: Job) -> None:
        if job.client not in self._turns:
            self._turns.append(job.client)
            self._queues[job.client] = deque()
        self._queues[job.client].append(job)

    @property
    def waiting(self) -> int:
        """Requests that no device has yet."""
        return len(self._retries) + sum(map(len, self._queues.values()))

    def _take(self) -> list[Job]:
        """The next call's jobs: a failed one alone, else one per client in turn, all with the same visits."""
        if self._retries:
            return [self._retries.popleft()]
        ready = sum(device.probe is not None for device in self._devices)
        share = math.ceil(self.waiting / max(1, ready))
        jobs: list[Job] = []
        while self._turns and len(jobs) < min(self._settings.per_call or self._per_call, share):
            job = self._queues[self._turns[0]][0]
            if jobs and (job.visits != jobs[0].visits or job.model is not None or jobs[0].model is not None):
                break
            jobs.append(self._queues[self._turns[0]].popleft())
            if self._queues[self._turns[0]]:
                self._turns.rotate(-1)
            else:
                del self._queues[self._turns.popleft()]
        return jobs

    def _wait(self, tickets: list[int]) -> list[LatencyResult]:
        """Bounded, because calls are bounded in time and requests in failures."""
        while not all(ticket in self._done for ticket in tickets):
            self._pump(0.5)
        return [self._done.pop(ticket) for ticket in tickets]

    def _failed(self, job: Job, reason: str) -> None:
        """Back to the front of the queue, or given up with the reason."""
        job.failures += 1
        if job.failures < self._settings.max_failures:
            self._retries.append(job)
        else:
            log.warning("architecture %s cannot be measured: %s", job.arch_id, reason)
            self._finish(job, None, f"failed {job.failures} times, last: {reason}")

    def _finish(self, job: Job, sample: LatencySample | None, error: str) -> None:
        if sample is not None and job.model is None:
            self._known[(sample.target_id, job.arch_id)] = (job.visits, sample)
        self._pending.pop((job.arch_id, job.visits), None)
        measured = LatencyResult(job.arch_id, job.tokens_T, "measured", sample, error)
        for ticket in job.tickets:
            self._done[ticket] = measured if ticket == job.tickets[0] else replace(measured, source="cached")

    # --- devices ----------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        self.give_way()
        for device in self._devices:
            if device.due and (self.waiting or not device.released):
                device.send_probe(self._reference_ms)
            elif device.ready and (jobs := self._take()):
                assert self._reference_ms is not None
                device.send(jobs, self._reference_ms, self.waiting)

    def _pump(self, patience_s: float) -> None:
        """One step: send what can be sent, wait a little, take in what came back or took too long."""
        self._check()
        self._dispatch()
        calls = [device.call for device in self._devices if device.call is not None]
        if calls:
            ray.wait(calls, timeout=max(0.0, min(patience_s, 0.5)))
        else:
            time.sleep(max(0.0, min(patience_s, 0.02)))
        for device in self._devices:
            for job, outcome in device.receive():
                self._settle(device, job, outcome)
            if device.probe is not None:
                self._check_identity(device, device.probe)
            if device.holder not in self._told:
                self._told.add(device.holder)
                self._say(f"target {self._target} waits for its turn: {device.holder} measures on {device.key}; "
                          "searches that share a device get it in turn")
        if self._devices and all(device.quarantined for device in self._devices):
            self._give_up(f"every device of latency target {self._target} is quarantined, last: "
                          f"{self._devices[-1].quarantined}")

    def _check_identity(self, device: Device, probe: Probe) -> None:
        """The first device says what is measured; another kind behind the same resource is never mixed in."""
        if self._identity is None:
            self._identity = probe.identity
            self._reference_ms = probe.reference_ms
        elif probe.identity != self._identity:
            device.quarantine(f"{probe.host} is {probe.identity.target_id}, this run measures "
                              f"{self._identity.target_id}; latencies of two targets are never mixed")

    def _settle(self, device: Device, job: Job, outcome: Outcome) -> None:
        if outcome is None:
            self._retries.append(job)
        elif isinstance(outcome, LatencySample):
            assert self._identity is not None and outcome.target_id == self._identity.target_id
            self._finish(job, outcome, "")
        else:
            self._failed(job, outcome)

    def _give_up(self, reason: str) -> None:
        for queue in (self._retries, *self._queues.values()):
            for job in queue:
                self._finish(job, None, reason)
            queue.clear()
        self._queues, self._turns = {}, deque()


def _check_resources(devices: Sequence[Claim]) -> None:
    """A resource that no node has would be waited for in silence."""
    offered = ray.cluster_resources()
    for device in devices:
        for name, amount in device.actor.get("resources", {}).items():
            if offered.get(name, 0) < amount:
                raise ClusterError(f"no node of the cluster offers the resource '{name}' of a latency device; start "
                                   f"the node to measure on with ray start --resources='{{\"{name}\": {amount}}}'")
