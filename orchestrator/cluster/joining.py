"""Connecting to Ray: an embedded local one by default, an existing cluster by address or inside a Ray job.

Why so careful: a bare `ray.init()` may join a stranger's cluster through a current-cluster file, and an unreachable
address makes the client retry for minutes. So: reuse an initialised Ray; with an address (argument or RAY_ADDRESS)
check that something listens there and join; otherwise start locally with address="local".
"""
from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.targets.target import CPU_RESOURCE
from orchestrator.cluster.admission import check_admission, has_token
from orchestrator.cluster.embedded import start_embedded
from orchestrator.cluster.jobs import JOB_CONFIG
from orchestrator.cluster.watch import Watch
from orchestrator.config import ClusterSettings
from searchspaces.errors import ClusterError

log = logging.getLogger(__name__)
PACKAGES = ("searchspaces", "actors", "orchestrator")
REACH_TIMEOUT_S = 3.0
LOCAL_RESOURCES = {CPU_RESOURCE: 1.0}


def prepare_environment(address: str | None) -> None:
    """Settings that Ray reads once, when it is imported: call this before anything imports ray.

    Clusters ask for a token by default since Ray 2.60; a client without RAY_AUTH_MODE=token is turned away. The token
    itself comes from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if has_token() and not is_local(address):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def is_local(address: str | None) -> bool:
    """Will `connected` start a Ray of its own?"""
    return not (address or os.environ.get("RAY_ADDRESS"))


@contextlib.contextmanager
def connected(settings: ClusterSettings, address: str | None, slots: int = 0,
              resources: Mapping[str, float] = LOCAL_RESOURCES, own: Sequence[str] = ()) -> Iterator[Watch]:
    """Ray is initialised inside; what was started here is shut down at the end, a joined cluster is only left. A local
    Ray gets at least `slots` CPUs and offers `resources`: this machine's devices (devices.announced_resources). `own`:
    modules that travel to a joined cluster (ownmodules.own_modules). The watch yielded looks after the Ray that was
    started or joined here; ClusterError where an error inside was Ray's death."""
    import ray

    watch = Watch()
    if ray.is_initialized():
        yield watch
        return
    address = address or os.environ.get("RAY_ADDRESS")
    with watch.guarded():
        if address:
            _join(address, own)
        else:
            start_embedded(settings, slots, resources)
            watch.begin()
        try:
            yield watch
        except Exception as error:
            if reason := watch.lost():
                raise ClusterError(reason) from error
            raise
        finally:
            watch.end()
            ray.shutdown()


def _join(address: str, own: Sequence[str]) -> None:
    import ray
    from ray.exceptions import RayError

    if address != "auto":
        check_reachable(address)
        check_admission(address)
    inside_job = JOB_CONFIG in os.environ
    try:
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False,
                 runtime_env={"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}} | ({} if inside_job else
                                                                 {"py_modules": [*_package_folders(), *own]}))
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise ClusterError(f"cannot join the Ray cluster at {address} ({str(error).splitlines()[0]}); check that its "
                           "nodes run and reach each other, with: ray status") from error


def check_reachable(address: str) -> None:
    """ClusterError within seconds if nothing listens at host:port."""
    try:
        socket.create_connection(host_and_port(address), timeout=REACH_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(f"nothing answers at {address} ({error}); start the cluster with 'ray start --head' or "
                           "correct --address") from error


def host_and_port(address: str) -> tuple[str, int]:
    """ClusterError where the address is of another form."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address.startswith("ray://"):
        raise ClusterError(f"{address} is a Ray client address; give the cluster's own address host:6379 instead, or "
                           "submit the search with 'ray job submit'")
    if not host or not port.isdigit():
        raise ClusterError(f"'{address}' is not a cluster address; write host:port, for example 10.0.0.1:6379")
    return host, int(port)


def _package_folders() -> list[str]:
    """Our packages, and the file with the names for users, shipped to the nodes of a cluster that lack them."""
    root = Path(__file__).parents[2]
    return [*(str(root / name) for name in PACKAGES), str(root / "paretoray.py")]


def total_cpus() -> int:
    import ray

    return int(ray.cluster_resources().get("CPU", 1))


def environment() -> dict[str, Any]:
    """Versions, host and command of this run, for environment.json."""
    import platform
    import subprocess
    from importlib.metadata import version

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True,
                            timeout=10, check=False).stdout.strip()
    packages = ("ray", "torch", "numpy", "onnxruntime", "onnx", "pyarrow", "scikit-learn")
    return {"python": sys.version.split()[0], "platform": platform.platform(), "host": platform.node(),
            "cpus": os.cpu_count(), "command": sys.argv, "commit": commit or None,
            "versions": {name: version(name) for name in packages}}
