"""What Ray's autoscaler (v2) says of its cluster: which demands it adds no node for, and which nodes it starts.

It tells the GCS after each of its looks, one in five seconds. Which types of node it has it tells nobody, so a missing
type can only be described by the demand.
"""
from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

log = logging.getLogger(__name__)
GCS_S = 10          # longest wait for one answer
Bundle = Mapping[str, float]


@dataclass(frozen=True)
class Outlook:
    """`asked`: demands of single actors and tasks that find no room. `refused` of these, and placement groups by id in
    `refused_groups`, are those for which no node can be added: no type has it, or all nodes that may be had are there
    and taken. `starting`: nodes by type. `failed`: why a type's last start failed."""

    asked: tuple[Bundle, ...] = ()
    refused: tuple[Bundle, ...] = ()
    refused_groups: tuple[str, ...] = ()
    starting: Mapping[str, int] | None = None
    failed: Mapping[str, str] | None = None

    def nodes(self) -> str:
        """The nodes that are being started, and those that failed to, for a sentence; "" for none."""
        starting = " and ".join(f"{count} of type {name}" for name, count in sorted((self.starting or {}).items()))
        failed = "; ".join(f"a node of type {name} did not start ({reason})" for name, reason in
                           sorted((self.failed or {}).items()))
        return "; ".join(filter(None, (f"the autoscaler is starting {starting}" if starting else "", failed)))


def autoscales() -> bool:
    """Does an autoscaler look after this cluster? No, where that cannot be found out."""
    return outlook() is not None


def outlook() -> Outlook | None:
    """None without an autoscaler, or where that cannot be found out."""
    from ray._private import worker
    from ray.core.generated import autoscaler_pb2

    client: Any = worker.global_worker.gcs_client  # type: ignore[attr-defined]  # the one that has the token
    reply: Any = autoscaler_pb2.GetClusterStatusReply()  # type: ignore[attr-defined]
    try:
        reply.ParseFromString(client.get_cluster_status(timeout_s=GCS_S))
    except (RayError, RuntimeError, TimeoutError) as error:
        log.warning("whether an autoscaler looks after this cluster is not known (%s)", error)
        return None
    state = reply.autoscaling_state
    if not state.last_seen_cluster_resource_state_version:
        return None
    starting = Counter({asked.ray_node_type_name: asked.count for asked in state.pending_instance_requests})
    starting.update(instance.ray_node_type_name for instance in state.pending_instances)
    asked_for = reply.cluster_resource_state.pending_resource_requests
    return Outlook(tuple(dict(asked.request.resources_bundle) for asked in asked_for),
                   tuple(dict(request.resources_bundle) for request in state.infeasible_resource_requests),
                   tuple(group.details.partition(":")[0] for group in state.infeasible_gang_resource_requests),
                   starting, {request.ray_node_type_name: request.reason
                              for request in state.failed_instance_requests})


def held_by_a_node(bundle: Bundle) -> bool:
    """Has a node of the cluster as much, whoever uses it now?"""
    return any(all(node["Resources"].get(name, 0.0) >= amount for name, amount in bundle.items())
               for node in ray.nodes() if node["Alive"])


def in_words(bundle: Bundle) -> str:
    """As a cluster file has it: {CPU: 1, latency_cpu: 1}."""
    return "{" + ", ".join(f'"{name}": {amount:g}' if ":" in name else f"{name}: {amount:g}"
                           for name, amount in bundle.items() if amount) + "}"


def type_needed(bundle: Bundle) -> str:
    """Which type of node a cluster lacks, for the end of a sentence."""
    whole = {name: math.ceil(amount) for name, amount in bundle.items()}
    return ("the autoscaler can add none: available_node_types (workerGroupSpecs on Kubernetes) needs a type with "
            f"resources {in_words(whole)}, and room for it below max_workers")
