"""Looking at a device that nobody uses: what is it, and can it measure now?"""
from __future__ import annotations

import contextlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from actors.targets.catalogue import make_target
from searchspaces.errors import ParetorayError


@dataclass(frozen=True)
class Seen:
    """`health` is "ok" or the sentence that says why the device cannot measure; then the others may be empty."""

    device: str
    target_id: str
    health: str


@dataclass(frozen=True)
class Look:
    """Which target to open where: `actor` holds the Ray options that take the device on its node."""

    actor: Mapping[str, Any]
    kind: str
    options: Mapping[str, Any]


def look(kind: str, options: Mapping[str, Any], shape: tuple[int, ...]) -> Seen:
    """Opens the device in this process, asks, and closes it. Whatever fails becomes the sentence."""
    try:
        with contextlib.closing(make_target(kind, options, shape)) as target:
            identity, health = target.identity(), target.health()
            return Seen(identity.device, identity.target_id, "ok" if health.ok else health.reason)
    except ParetorayError as error:
        return Seen("", "", str(error))
    except Exception as error:      # a target of the user's may raise anything; the others are still worth a row
        return Seen("", "", f"{type(error).__name__}: {error}")


class DeviceProbe:
    """A short-lived worker that holds the device while it looks."""

    def look(self, kind: str, options: Mapping[str, Any], shape: tuple[int, ...]) -> Seen:
        return look(kind, options, shape)


def look_at_all(looks: Sequence[Look], shape: tuple[int, ...], timeout_s: float) -> list[Seen]:
    """All at once, each by a worker on its node; after `timeout_s` the silent ones are given up. No worker is left."""
    worker: Any = ray.remote(DeviceProbe)
    # no CPU: a node whose slots are all taken can still be looked at
    probes = [worker.options(**{**each.actor, "num_cpus": 0, "name": f"look at {each.kind}.{uuid.uuid4().hex[:6]}"}
                             ).remote() for each in looks]
    calls = [probe.look.remote(each.kind, each.options, shape) for probe, each in zip(probes, looks)]
    try:
        ready = set(ray.wait(calls, num_returns=len(calls), timeout=timeout_s)[0]) if calls else set()
        return [_answer(call) if call in ready else Seen("", "", f"no answer within {timeout_s:g} s") for call in calls]
    finally:
        for probe in probes:
            ray.kill(probe)


def _answer(call: Any) -> Seen:
    try:
        seen: Seen = ray.get(call)
        return seen
    except RayError as error:
        return Seen("", "", f"the worker that looked at the device ended ({str(error).splitlines()[0]})")
