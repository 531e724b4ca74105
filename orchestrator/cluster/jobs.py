"""A search that runs as a Ray job (`ray job submit`): where its files are, and its progress in the job's status."""
from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

from actors.objectpath import AnyPath

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"      # of every driver that a job starts
SUBMISSION_ID = "job_submission_id"
ANSWER_S = 5


def submission_id() -> str:
    """Of the job that this process is the driver of; "" outside."""
    try:
        return str(json.loads(os.environ.get(JOB_CONFIG, "{}")).get("metadata", {}).get(SUBMISSION_ID, ""))
    except ValueError:
        return ""


def shown_path(path: AnyPath) -> str:
    """As a person finds it: a job's reader sits elsewhere, so it is absolute there, with the node."""
    if not isinstance(path, Path):
        return str(path)    # the same everywhere
    return f"{path.absolute()} (on {socket.gethostname()})" if submission_id() else str(path)


def runs_may_be_lost(runs: AnyPath) -> str:
    """What to say where a job keeps its runs in the copy of the working directory, which Ray removes when it needs the
    room; "" elsewhere."""
    if not submission_id() or not isinstance(runs, Path) or not runs.absolute().is_relative_to(Path.cwd()):
        return ""
    return (f"{runs.absolute()} is in this job's copy of the working directory, which Ray may remove after the job; "
            "give --runs a folder that stays, best one that all nodes share")


def tell_job(line: str) -> None:
    """Makes `line` the message of this job's status, as `ray job status` and the dashboard show it; outside of a job
    and where it does not work nothing happens. While the driver lives nobody else writes it."""
    job = submission_id()
    if not job:
        return
    with contextlib.suppress(Exception):    # Ray's insides may move, and a line of progress is worth no run
        from ray._private.ray_constants import KV_NAMESPACE_JOB
        from ray._private.worker import global_worker
        from ray.dashboard.modules.job.common import JobInfoStorageClient

        key = JobInfoStorageClient.JOB_DATA_KEY.format(job_id=job).encode()
        store: Any = global_worker.gcs_client    # type: ignore[attr-defined]
        info = json.loads(store.internal_kv_get(key, namespace=KV_NAMESPACE_JOB, timeout=ANSWER_S))
        if info["status"] == "RUNNING":
            store.internal_kv_put(key, json.dumps(info | {"message": line}).encode(), True, namespace=KV_NAMESPACE_JOB,
                                  timeout=ANSWER_S)
