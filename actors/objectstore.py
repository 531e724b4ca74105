"""Opening an object store with the credentials of this process's environment, or saying in one sentence why that fails.

The first answer comes within OPENING_S. Later requests are bounded by Arrow: each is given up after ATTEMPTS times
SILENT_S without a byte.
"""
from __future__ import annotations

import errno
import functools
import os
import re
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from searchspaces.errors import StoreError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

OPENING_S = 25.0        # longest wait for a store's first answer
CONNECT_S = 5.0
SILENT_S = 7.0          # without a byte, after which a request is given up; it is tried ATTEMPTS times
ATTEMPTS = 3
OPTIONS = {"s3": ("region", "endpoint_override", "scheme", "force_virtual_addressing", "tls_ca_file_path"),
           "gs": ("endpoint_override", "scheme", "project_id", "anonymous")}
CHECK = "check the endpoint, the network and the proxy"
CREDENTIALS = ("give credentials that may list, read, write and delete there: AWS_ACCESS_KEY_ID and "
               "AWS_SECRET_ACCESS_KEY, a profile, or a role; GOOGLE_APPLICATION_CREDENTIALS for gs://")
DENIED = "ACCESS_DENIED|Forbidden|HTTP status 40[13]|INVALID_ACCESS_KEY|SIGNATURE|PERMISSION_DENIED|EXPIRED_TOKEN"
REASONS = (     # what a native message holds, what to say, what to do
    (r"NO_SUCH_BUCKET|NoSuchBucket", "there is no such bucket", "create it, or correct the name"),
    (r"OAuth2|access token|authenticat", "no credentials were found", CREDENTIALS),
    (DENIED, "access is denied", CREDENTIALS),
    (r"NETWORK_CONNECTION|UNAVAILABLE|SERVICE_UNAVAILABLE|curl", "the store does not answer", CHECK),
)


class ObjectStoreError(StoreError, OSError):
    """An object store refuses or does not answer. An OSError too, for whoever handles those of a disk: `strerror` is
    the reason, `filename` the path."""

    def __str__(self) -> str:
        return f"{self.filename} cannot be used: {self.strerror}"


@functools.cache
def opened(scheme: str, bucket: str, query: str) -> FileSystem:
    """Once per process, after the store has answered that it has the bucket."""
    options: dict[str, Any] = dict(parse_qsl(query))
    try:
        store, kind = _within(OPENING_S, lambda: _looked_at(scheme, bucket, options))
    except TimeoutError:
        silent = f"the store does not answer within {OPENING_S:g} s; {CHECK}"
        raise ObjectStoreError(errno.EIO, silent, bucket) from None
    except (OSError, ValueError) as error:
        raise ObjectStoreError(errno.EIO, reason_of(str(error)), bucket) from error
    if kind == "NotFound":
        raise ObjectStoreError(errno.EIO, f"there is no bucket '{bucket}' there; create it, or correct the name",
                               bucket)
    return store


def _looked_at(scheme: str, bucket: str, options: dict[str, Any]) -> tuple[FileSystem, str]:
    store = _s3(bucket, options) if scheme == "s3" else _gs(options)
    try:
        return store, str(store.get_file_info(bucket).type.name)
    except OSError as error:
        if re.search(DENIED, str(error)):   # perhaps only folders in it are allowed
            return store, "Unknown"
        raise


def _s3(bucket: str, options: dict[str, Any]) -> FileSystem:
    from pyarrow import fs

    if "force_virtual_addressing" in options:
        options["force_virtual_addressing"] = _yes(options["force_virtual_addressing"])
    elsewhere = "endpoint_override" in options or {"AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"} & set(os.environ)
    if "region" not in options and not elsewhere:
        options["region"] = fs.resolve_s3_region(bucket)    # Amazon refuses requests to another one
    return fs.S3FileSystem(**options, connect_timeout=CONNECT_S, request_timeout=SILENT_S,
                           allow_delayed_open=True,     # small objects by one request instead of three
                           retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS))


def _gs(options: dict[str, Any]) -> FileSystem:
    from pyarrow import fs

    return fs.GcsFileSystem(**options | {"anonymous": _yes(options.get("anonymous", ""))},
                            retry_time_limit=timedelta(seconds=OPENING_S / 2))


def _yes(value: str) -> bool:
    return value.lower() in ("1", "true", "yes")


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """The result, or the error, of work that may hang in native code; TimeoutError."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True, name="open an object store")
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def reason_of(message: str) -> str:
    """One sentence of a native message, which may be a page long."""
    line = " ".join(message.split())
    detail = (re.search(r"Details: (.{1,120}?)(?::? Could not|$)", line) or re.search(r"(AWS Error .{1,160})", line)
              or re.search(r"google::cloud::Status\((\w+)", line) or re.match(r"(.{1,160})", line))
    for pattern, what, remedy in REASONS:
        if re.search(pattern, message, re.IGNORECASE):
            return f"{what} ({detail[1] if detail else line}); {remedy}"
    return detail[1] if detail else line
