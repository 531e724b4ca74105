"""`paretoray targets`: which measuring devices there are and whether they can measure now."""
from __future__ import annotations

from pathlib import Path

from actors.targets.catalogue import make_target
from orchestrator.config import ClusterSettings, load_config
from searchspaces.errors import ParetorayError

EXAMPLE_SHAPE = (3, 32, 32)


def list_targets(config: Path | None, address: str | None) -> list[dict[str, str]]:
    """One row per device: this machine's, or every node's that announces one where an address is given."""
    if address is not None:
        return _cluster_rows(address)
    name, options = "onnx_cpu", {}
    if config is not None:
        target = load_config(config).target
        name, options = target.name, target.options
    try:
        device = make_target(name, options, EXAMPLE_SHAPE)
    except ParetorayError as error:
        return [{"target": name, "node": "this machine", "device": "", "runtime": "", "health": str(error)}]
    identity, health = device.identity(), device.health()
    device.close()
    return [{"target": name, "node": "this machine", "device": identity.device, "runtime": identity.runtime,
             "health": "ok" if health.ok else health.reason}]


def _cluster_rows(address: str) -> list[dict[str, str]]:
    import ray

    from orchestrator.cluster import connected

    with connected(ClusterSettings(), address):
        return [{"target": "onnx_cpu", "node": node["NodeManagerHostname"], "device": node["NodeID"][:12],
                 "runtime": "", "health": "ok" if node["Alive"] else "node is gone"}
                for node in ray.nodes() if node["Resources"].get("latency_cpu", 0) >= 1]
