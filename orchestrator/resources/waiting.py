"""Devices of nodes that are not there yet: ask the autoscaler for one, wait, and only then fall back.

Where no autoscaler looks after the cluster there is nothing to wait for, and where it can add no node with the device
it says so within seconds.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.targets.catalogue import claims
from actors.targets.target import CPU_RESOURCE, Claim
from orchestrator.config import ClusterSettings
from orchestrator.resources.autoscaler import autoscales, type_needed
from orchestrator.resources.room import Answer, Need, wait_for_room
from searchspaces.errors import ClusterError

POLL_S = 0.5
JOINED_S = 10.0     # until the resources of a node that has joined are told everywhere


def devices_when_there(name: str, options: Mapping[str, Any], settings: ClusterSettings, say: Callable[[str], None],
                       check: Callable[[], None] = lambda: None) -> list[Claim]:
    """The devices of the cluster on which the named target is measured, once there is one.

    Without one the driver's own processor is measured if the target can, `settings.local_fallback` permits, and `say`
    has heard it; otherwise ClusterError. `check` is called while waiting and may raise to stop.
    """
    found = claims(name, options, ray.cluster_resources())
    resource, refused = wanted_resource(name, options), ""
    if not found and resource and autoscales():
        say(f"target {name}: no node has the resource '{resource}' yet; the cluster was asked for one, waiting up to "
            f"{settings.device_wait_s:g} s")
        found, refused = _asked(name, options, resource, settings.device_wait_s, say, check)
    if found:
        return found
    if not settings.local_fallback or resource != CPU_RESOURCE:
        strict = "" if settings.local_fallback else " and cluster.local_fallback is false"
        raise ClusterError(f"no node of the cluster announces a device for target {name}{strict}{refused}; start the "
                           "node that has one with: paretoray worker --address HOST:PORT")
    say(f"target {name}: no node announces the resource '{CPU_RESOURCE}'{refused}; measuring on the driver's node, "
        "where only this run keeps the processor to itself (start the node to measure on with: paretoray worker)")
    node = ray.get_runtime_context().get_node_id()
    return [Claim({"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)})]


def wanted_resource(name: str, options: Mapping[str, Any]) -> str:
    """The Ray resource by which a node would offer the target's device; "" where the target does not say."""
    serials = options.get("serial") or ()
    phones = [serials] if isinstance(serials, str) else serials
    candidates = [CPU_RESOURCE, "GPU", *(f"android:{serial}" for serial in phones)]
    return next((resource for resource in candidates if claims(name, options, {resource: 1.0})), "")


def _asked(name: str, options: Mapping[str, Any], resource: str, wait_s: float, say: Callable[[str], None],
           check: Callable[[], None]) -> tuple[list[Claim], str]:
    """The devices once there are some; or none and, where none will ever come, why."""
    def found() -> list[Claim]:
        return claims(name, options, ray.cluster_resources())

    bundle = _demand(name, options, resource)
    answer = wait_for_room(Need(f"target {name}", bundle), wait_s, say, check, found=lambda: bool(found()))
    if answer is not Answer.THERE:
        return [], f", and {type_needed(bundle)}" if answer is Answer.REFUSED else ""
    deadline = time.monotonic() + JOINED_S
    while not (there := found()) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return there, ""


def _demand(name: str, options: Mapping[str, Any], resource: str) -> dict[str, float]:
    """What the worker takes that measures on the device."""
    actor = claims(name, options, {resource: 1.0})[0].actor
    return {"CPU": float(actor.get("num_cpus", 1)), resource: 1.0}
