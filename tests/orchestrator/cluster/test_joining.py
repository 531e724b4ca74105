"""Joining a cluster fails within seconds and with one sentence where there is none."""
from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cluster.joining import check_reachable
from searchspaces.errors import ClusterError


def test_nothing_listens() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(ClusterError, match=f"nothing answers at 127.0.0.1:{port}"):
        check_reachable(f"127.0.0.1:{port}")


@pytest.mark.parametrize("address", ["localhost", "host:port", "ray://127.0.0.1:10001", ""])
def test_malformed_addresses(address: str) -> None:
    with pytest.raises(ClusterError, match="address"):
        check_reachable(address)


def test_something_listens() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        assert check_reachable(f"127.0.0.1:{server.getsockname()[1]}") is None


@pytest.mark.slow
def test_local_ray_offers_the_devices_it_is_given() -> None:
    """In a process of its own: there is one Ray per process."""
    code = ("import ray\nfrom orchestrator.cluster.joining import connected\n"
            "from orchestrator.config import ClusterSettings\n"
            "with connected(ClusterSettings(), None, resources={'toy:A': 2.0}):\n"
            "    print('offers', ray.cluster_resources().get('toy:A'), ray.cluster_resources().get('latency_cpu'))\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True,
                          timeout=240)
    assert "offers 2.0 None" in done.stdout, done.stderr


def test_cluster_yaml_is_valid() -> None:
    import yaml
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = yaml.safe_load((Path(__file__).parents[3] / "cluster.yaml").read_text())
    validate_config(prepare_config(cluster))
    types = cluster["available_node_types"]
    measuring = {name: next((resource for resource in node["resources"] if resource != "CPU"), "")
                 for name, node in types.items()}
    assert measuring == {"head": "", "rollout": "", "latency": "latency_cpu", "gpu": "GPU",
                         "phones": "android:10.0.0.7:5555"}
    assert all(node["resources"]["CPU"] >= 2 for node in types.values())    # a worker that measures takes one
    assert sum(node.get("max_workers", 0) for node in types.values()) == cluster["max_workers"]
    commands = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    assert all(line.startswith("RAY_AUTH_MODE=token ") for line in commands if "ray start" in line)
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token", "or the nodes have no token, or another"
    with pytest.raises(Exception, match="head_node_typ"):
        validate_config(prepare_config(cluster | {"head_node_typ": "head"}))
