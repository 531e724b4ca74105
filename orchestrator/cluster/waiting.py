"""Devices of nodes that are not there yet: ask the autoscaler for one, wait, and only then fall back.

A pending placement group with the device's resource is what an autoscaler counts as demand. Where no autoscaler looks
after the cluster there is nothing to wait for.
"""
from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.targets.catalogue import claims
from actors.targets.target import CPU_RESOURCE, Claim
from orchestrator.config import ClusterSettings
from searchspaces.errors import ClusterError

log = logging.getLogger(__name__)
POLL_S = 0.5
GCS_S = 10          # longest wait for one answer
JOINED_S = 10.0     # until the resources of a node that has joined are told everywhere


def devices_when_there(name: str, options: Mapping[str, Any], settings: ClusterSettings, say: Callable[[str], None],
                       check: Callable[[], None] = lambda: None) -> list[Claim]:
    """The devices of the cluster on which the named target is measured, once there is one.

    Without one the driver's own processor is measured if the target can, `settings.local_fallback` permits, and `say`
    has heard it; otherwise ClusterError. `check` is called while waiting and may raise to stop.
    """
    found = claims(name, options, ray.cluster_resources())
    resource = wanted_resource(name, options)
    if not found and resource and autoscales():
        say(f"target {name}: no node has the resource '{resource}' yet; the cluster was asked for one, waiting up to "
            f"{settings.device_wait_s:g} s")
        found = _asked(name, options, resource, settings.device_wait_s, check)
    if found:
        return found
    if not settings.local_fallback or resource != CPU_RESOURCE:
        refused = "" if settings.local_fallback else " and cluster.local_fallback is false"
        raise ClusterError(f"no node of the cluster announces a device for target {name}{refused}; start the node that "
                           "has one with: paretoray worker --address HOST:PORT")
    say(f"target {name}: no node announces the resource '{CPU_RESOURCE}'; measuring on the driver's node, where only "
        "this run keeps the processor to itself (start the node to measure on with: paretoray worker)")
    node = ray.get_runtime_context().get_node_id()
    return [Claim({"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)})]


def wanted_resource(name: str, options: Mapping[str, Any]) -> str:
    """The Ray resource by which a node would offer the target's device; "" where the target does not say."""
    candidates = [CPU_RESOURCE, "GPU", *(f"android:{value}" for key, value in options.items() if key == "serial")]
    return next((resource for resource in candidates if claims(name, options, {resource: 1.0})), "")


def autoscales() -> bool:
    """Does an autoscaler look after this cluster? No, where that cannot be found out."""
    from ray._private import worker
    from ray.core.generated import autoscaler_pb2

    client: Any = worker.global_worker.gcs_client  # type: ignore[attr-defined]  # the one that has the token
    reply: Any = autoscaler_pb2.GetClusterStatusReply()  # type: ignore[attr-defined]
    try:
        reply.ParseFromString(client.get_cluster_status(timeout_s=GCS_S))
    except (RayError, RuntimeError, TimeoutError) as error:
        log.warning("whether an autoscaler looks after this cluster is not known (%s)", error)
        return False
    return bool(reply.autoscaling_state.last_seen_cluster_resource_state_version)


def _asked(name: str, options: Mapping[str, Any], resource: str, wait_s: float,
           check: Callable[[], None]) -> list[Claim]:
    demand = placement_group([{resource: 1.0}])
    deadline = time.monotonic() + wait_s
    try:
        while not ray.wait([demand.ready()], timeout=POLL_S)[0]:
            check()
            if time.monotonic() > deadline:
                return []
    finally:
        remove_placement_group(demand)
    deadline = time.monotonic() + JOINED_S
    while not (found := claims(name, options, ray.cluster_resources())) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return found
