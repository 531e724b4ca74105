"""Joining a cluster fails within seconds and with one sentence where there is none."""
from __future__ import annotations

import socket

import pytest

from orchestrator.cluster import check_reachable
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


def test_cluster_yaml_is_valid() -> None:
    from pathlib import Path

    import yaml
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = yaml.safe_load((Path(__file__).parents[2] / "cluster.yaml").read_text())
    validate_config(prepare_config(cluster))
    measuring = [name for name, node in cluster["available_node_types"].items() if "latency_cpu" in node["resources"]]
    assert measuring == ["latency"]
    with pytest.raises(Exception, match="head_node_typ"):
        validate_config(prepare_config(cluster | {"head_node_typ": "head"}))
