"""The Ray that `paretoray` starts for itself on this machine, and what is said where it does not come up.

Ray reports a part that does not start by a timeout of half a minute, or by whatever exception met it first, and leaves
the parts that did start behind. Here they are ended, what may pass is tried once more, and the rest is one sentence.
"""
from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import psutil

from orchestrator.cluster.remains import end_processes, ray_processes
from orchestrator.config import ClusterSettings
from searchspaces.errors import ClusterError

log = logging.getLogger(__name__)
ATTEMPTS = 2
GIB = 2**30
SHARED_MEMORY = Path("/dev/shm")


def start_embedded(settings: ClusterSettings, slots: int, resources: Mapping[str, float]) -> None:
    """`ray.init` with at least `slots` CPUs and these resources. ClusterError where Ray does not come up."""
    import ray

    for attempt in range(1, ATTEMPTS + 1):
        try:
            _init(settings, slots, resources)
            return
        except Exception as error:      # Ray raises bare exceptions too
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            ray.shutdown()
            end_processes(ray_processes(psutil.Process()))
            if attempt == ATTEMPTS or not _may_pass(error):
                raise ClusterError(f"Ray did not start on this machine ({reason}); {_what_ray_needs()}") from error
            log.warning("Ray did not start (%s), once more", reason)


def _init(settings: ClusterSettings, slots: int, resources: Mapping[str, float]) -> None:
    import ray

    # Training, rollouts and measuring take turns, so each may have all cores: Ray counts slots, not cores. With fewer
    # slots than actors (one core, two rollouts asked for) the last actor would wait for ever.
    cpus = max(2 * (settings.cpus or usable_cores()) + 1, slots)
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    memory = settings.object_store_mb * 2**20 if settings.object_store_mb else None
    ray.init(address="local", num_cpus=cpus, resources=dict(resources), object_store_memory=memory,
             include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False, configure_logging=False)


def usable_cores() -> int:
    return len(psutil.Process().cpu_affinity())


def _may_pass(error: Exception) -> bool:
    """A folder that cannot be written and a size that is refused stay as they are; a timeout may have been the load."""
    return not isinstance(error, OSError | ValueError) or isinstance(error, ConnectionError | TimeoutError)


def _what_ray_needs() -> str:
    from ray._common.utils import get_default_ray_temp_dir

    folder = Path(get_default_ray_temp_dir())
    shared = f", /dev/shm ({psutil.disk_usage(str(SHARED_MEMORY)).free / GIB:.1f} GB free)" if SHARED_MEMORY.exists() \
        else ""
    sessions = sorted(folder.glob(f"session_*_{os.getpid()}")) if folder.is_dir() else []
    logs = f"; its logs: {sessions[-1] / 'logs'}" if sessions else ""
    return (f"it needs memory ({psutil.virtual_memory().available / GIB:.1f} GB free){shared}, of which "
            "cluster.object_store_mb may ask for less, free ports, and a folder with a short path that it may write to "
            f"({folder}, RAY_TMPDIR names another){logs}")
