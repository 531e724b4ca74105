"""May this process join that cluster? One question to the cluster's GCS, answered in a sentence.

Ray itself asks too, but retries a refused token for 20 s with a log line each second, and tells of another version in
seven lines of which a short error keeps the first. Nothing of the answer but two version strings is used.
"""
from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

from searchspaces.errors import ClusterError

ANSWER_S = 30.0
TOKEN_FILE = Path.home() / ".ray" / "auth_token"


def has_token() -> bool:
    return "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ or TOKEN_FILE.exists()


def make_token() -> None:
    """The token of a new cluster, readable by this user only. ClusterError where it cannot be written."""
    try:
        TOKEN_FILE.parent.mkdir(mode=0o700, exist_ok=True)
        with os.fdopen(os.open(TOKEN_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:     # another process was first
        return
    except OSError as error:
        raise ClusterError(f"cannot write the cluster's token to {TOKEN_FILE} ({error}); give one in RAY_AUTH_TOKEN"
                           ) from error


def check_admission(address: str) -> None:
    """ClusterError where the cluster at host:port refuses this machine's token, runs another Ray or Python, or is none.
    RAY_AUTH_MODE must be as it will be for the joining (joining.prepare_environment)."""
    import grpc
    from ray._private.utils import check_version_info, compute_version_info

    try:
        metadata = json.loads(_cluster_metadata(address) or b"{}")
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise ClusterError(f"the Ray cluster at {address} refuses {_token_shown()}; bring ~/.ray/auth_token of its "
                               f"head to {TOKEN_FILE} on this machine, and set RAY_AUTH_MODE=token") from error
        raise ClusterError(f"what listens at {address} does not answer as a Ray cluster ({error.code().name}); give "
                           "the address of its head, port 6379 where nobody chose another (8265 is the dashboard's)"
                           ) from error
    if not metadata:        # a cluster that tells no versions: Ray asks again when it joins
        return
    try:
        check_version_info(metadata, address)
    except RuntimeError as error:
        ray_version, python_version = compute_version_info()
        raise ClusterError(f"the cluster at {address} runs Ray {metadata['ray_version']} with Python "
                           f"{metadata['python_version']}, this machine has Ray {ray_version} with Python "
                           f"{python_version}; install the same on both") from error


def _cluster_metadata(address: str) -> bytes:
    from ray._common.usage.usage_constants import CLUSTER_METADATA_KEY
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.ray_constants import KV_NAMESPACE_CLUSTER
    from ray.core.generated import gcs_service_pb2
    from ray.core.generated.gcs_service_pb2_grpc import InternalKVGcsServiceStub

    messages: Any = gcs_service_pb2
    with init_grpc_channel(address) as channel:     # with this machine's token, where RAY_AUTH_MODE says so
        answer = InternalKVGcsServiceStub(channel).InternalKVGet(
            messages.InternalKVGetRequest(namespace=KV_NAMESPACE_CLUSTER, key=CLUSTER_METADATA_KEY), timeout=ANSWER_S)
    return bytes(answer.value)


def _token_shown() -> str:
    """What this machine presented, without its value."""
    if os.environ.get("RAY_AUTH_MODE") != "token" or not has_token():
        return "a process that presents no token"
    if "RAY_AUTH_TOKEN" in os.environ:
        return "the token in RAY_AUTH_TOKEN"
    return f"the token in {os.environ.get('RAY_AUTH_TOKEN_PATH', TOKEN_FILE)}"
