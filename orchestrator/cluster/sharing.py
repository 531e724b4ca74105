"""Do the nodes of a cluster see the folder of a run? Found out before anything is measured or trained.

Whatever trains away from the driver keeps its checkpoints in the run's folder: the supernet's actor, the trainers of
single networks. A node that has another folder of that name, or none, would train from the start after every crash, and
the driver would look for weights in vain.
"""
from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.objectpath import AnyPath, ObjectPath, absolute
from actors.wholefile import write_whole
from searchspaces.errors import ClusterError

ANSWER_S = 20.0     # for all nodes together; one that is too busy to answer is not waited for


def check_shared(folder: AnyPath, say: Callable[[str], None]) -> None:
    """ClusterError for a node with CPUs that does not see this folder or cannot write to it. `say` hears of nodes that
    gave no answer. Nodes that join later are not asked."""
    folder, others = absolute(folder), _other_nodes()
    if not others:
        return
    token = folder / f"probe-{uuid.uuid4().hex}"
    write_whole(token, b"")
    asked = {_ask(token, node_id): name for node_id, name in others.items()}
    try:
        answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
        for reference in answered:
            try:
                reason = ray.get(reference)
            except RayError:
                silent.append(reference)
                continue
            if reason:
                raise ClusterError(_refusal(asked[reference], folder, reason))
        if silent:
            names = ", ".join(sorted(asked[reference] for reference in silent))
            say(f"{names}: no answer within {ANSWER_S:g} s whether the run's folder {folder} is seen there; it must "
                "be, for what is trained there")
    finally:
        for reference in asked:
            ray.cancel(reference)
        with contextlib.suppress(OSError):
            token.unlink(missing_ok=True)


def _other_nodes() -> dict[str, str]:
    """Names by id of living nodes where something could be trained, without the driver's own."""
    here = ray.get_runtime_context().get_node_id()
    return {node["NodeID"]: str(node.get("NodeName") or node["NodeManagerHostname"]) for node in ray.nodes()
            if node["Alive"] and node["NodeID"] != here and node["Resources"].get("CPU", 0) >= 1}


def _ask(token: AnyPath, node_id: str) -> ray.ObjectRef:
    there: Any = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task: Any = ray.remote(_trouble).options(num_cpus=0, max_retries=0, scheduling_strategy=there,
                                             name="see the run's folder")
    return task.remote(token, node_id)


def _trouble(token: AnyPath, node_id: str) -> str:
    """On the node: what is wrong, "" where all is well."""
    try:
        token.read_bytes()
        mine = token.with_name(f"{token.name}-{node_id}")
        write_whole(mine, b"")
        mine.unlink(missing_ok=True)
    except FileNotFoundError:
        return "it does not have what the driver wrote there"
    except OSError as error:
        return str(error.strerror or error)
    return ""


def _refusal(node: str, folder: AnyPath, reason: str) -> str:
    if isinstance(folder, ObjectPath):
        return f"node {node} cannot use the run's folder {folder}: {reason}"
    return (f"node {node} does not share the run's folder {folder}: {reason}; give --runs on a file system that all "
            "nodes mount at the same path, or in an object store (--runs s3://BUCKET/FOLDER)")
