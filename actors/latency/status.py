"""What a latency worker says of itself to whoever asks, without waiting for the measurement it is in.

Workers are named Ray actors of the namespace `NAMESPACE`, so any driver of the cluster finds them. The measuring thread
writes an `Activity`, the thread of the concurrency group "status" reads it: every field is replaced whole, so a reader
sees a value from before or after, never half of one.
"""
from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.exceptions import RayError

from actors.targets.target import Health, LatencySample, TargetIdentity

NAMESPACE, PREFIX = "paretoray", "latency-"
GROUP = "status"        # the concurrency group that answers while the worker measures
WorkerState = Literal["not probed", "idle", "measuring", "quarantined"]


@dataclass(frozen=True)
class WorkerStatus:
    """`resources` and `gpus`: what Ray gave the worker on its node. `health` is "ok" or the sentence. `waiting`:
    requests queued in its pool at its last call. `measured` counts networks since its process started; `last_s` is the
    age of its last visit and `drift` (max / min - 1) of its reference there, None before the first."""

    kind: str
    node_id: str
    host: str
    pid: int
    resources: Mapping[str, float]
    gpus: tuple[str, ...]
    device: str
    target_id: str
    state: WorkerState
    health: str
    waiting: int
    measured: int
    last_s: float | None
    drift: float | None


class Activity:
    """One worker's own account."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._identity: TargetIdentity | None = None
        self._health = ""
        self._quarantined = ""
        self._busy = False
        self._waiting = self._measured = 0
        self._last: tuple[float, float] | None = None      # when, on the monotonic clock, and the drift

    def probed(self, identity: TargetIdentity, health: Health) -> None:
        self._identity, self._health = identity, "ok" if health.ok else health.reason

    def unusable(self, reason: str) -> None:
        self._health = reason

    def quarantined(self, reason: str) -> None:
        self._quarantined = reason

    @contextlib.contextmanager
    def measuring(self, waiting: int) -> Iterator[None]:
        self._waiting, self._busy = waiting, True
        try:
            yield
        finally:
            self._busy = False

    def visited(self, samples: Sequence[LatencySample]) -> None:
        if samples:
            self._last = time.monotonic(), samples[-1].drift

    def counted(self, networks: int) -> None:
        self._measured += networks

    def status(self) -> WorkerStatus:
        """Call it in the worker: Ray's context says what the worker holds."""
        context, last = ray.get_runtime_context(), self._last
        state: WorkerState = ("quarantined" if self._quarantined else "measuring" if self._busy else
                              "idle" if self._health else "not probed")
        identity = self._identity
        return WorkerStatus(
            self._kind, context.get_node_id(), socket.gethostname(), os.getpid(), context.get_assigned_resources(),
            tuple(context.get_accelerator_ids().get("GPU", ())), identity.device if identity else "",
            identity.target_id if identity else "", state, self._quarantined or self._health or "not probed",
            self._waiting, self._measured, time.monotonic() - last[0] if last else None, last[1] if last else None)


def worker_statuses(timeout_s: float) -> list[WorkerStatus]:
    """Of all latency workers of the cluster that answer within `timeout_s`; those still waiting for a node do not."""
    calls: list[Any] = []
    for entry in ray.util.list_named_actors(all_namespaces=True):
        if entry["namespace"] == NAMESPACE and entry["name"].startswith(PREFIX):
            with contextlib.suppress(ValueError):       # it ended meanwhile
                calls.append(ray.get_actor(entry["name"], namespace=NAMESPACE).status.remote())
    if not calls:
        return []
    answered, _ = ray.wait(calls, num_returns=len(calls), timeout=timeout_s)
    found = []
    for call in answered:
        with contextlib.suppress(RayError):
            found.append(ray.get(call))
    return found
