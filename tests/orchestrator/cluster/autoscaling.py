"""A cluster of one head with Ray's autoscaler v2, which starts further nodes on this machine when they are asked for.

`ray.cluster_utils.AutoscalingCluster` would stop every Ray of the machine; this one ends what it started.
"""
from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
STARTED_S = 90
SCRIPTS = Path(sys.executable).parent


@contextmanager
def autoscaling_cluster(folder: Path, node_types: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """The address of a head with one CPU; `node_types`: resources by name, at most one node of each, none at first.
    `folder` must have a short path (Ray's sockets) and is named in the command line of every process that it starts."""
    address = f"127.0.0.1:{_free_port()}"
    config = folder / "autoscaling.json"
    config.write_text(json.dumps(_config(address, node_types)))
    environment = os.environ | {
        "PATH": f"{SCRIPTS}:{os.environ['PATH']}",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID}
    command = [str(SCRIPTS / "ray"), "start", "--head", "--num-cpus=1", "--block",
               f"--node-ip-address={address.partition(':')[0]}",
               f"--port={address.rpartition(':')[2]}", f"--temp-dir={folder}", f"--autoscaling-config={config}",
               "--include-dashboard=false", "--disable-usage-stats"]
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for(address, head, folder / "head.log")
        yield address
    finally:
        _end(folder, head)


def _config(address: str, node_types: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    types: dict[str, Any] = {"ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0}}
    types |= {name: {"resources": dict(resources), "node_config": {}, "min_workers": 0, "max_workers": 1}
              for name, resources in node_types.items()}
    return {"cluster_name": "test", "max_workers": len(node_types), "idle_timeout_minutes": 0.1,
            "provider": {"type": "external", "module": PROVIDER, "launch_multiple": True, "gcs_address": address,
                         "head_node_id": FAKE_HEAD_NODE_ID},
            "available_node_types": types, "head_node_type": "ray.head.default", "auth": {}, "docker": {},
            "upscaling_speed": 1.0, "file_mounts": {}, "cluster_synced_files": [],
            "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": [],
            **{f"{name}_commands": [] for name in ("initialization", "setup", "head_setup", "worker_setup",
                                                   "head_start_ray", "worker_start_ray")}}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _wait_for(address: str, head: subprocess.Popen[bytes], log: Path) -> None:
    deadline, (host, _, port) = time.monotonic() + STARTED_S, address.partition(":")
    while time.monotonic() < deadline and head.poll() is None:
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            if "Ray runtime started" in log.read_text():
                return
        time.sleep(0.5)
    raise AssertionError(f"the head did not start: {log.read_text()}")


def _end(folder: Path, head: subprocess.Popen[bytes]) -> None:
    """Every process that has the folder in its command line, and the head."""
    head.kill()
    head.wait()
    mine = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(folder) in " ".join(process.cmdline()):
                process.kill()
                mine.append(process)
    psutil.wait_procs(mine, timeout=20)
