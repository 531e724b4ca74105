"""Answers of remote calls, as the caller of a local function would get them."""
from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import RayTaskError

from searchspaces.errors import ParetorayError

FETCH_TIME_OUT_S = 300.0


def fetched(data: Any) -> Any:
    """What a reference stands for; anything else as it is."""
    return ray.get(data, timeout=FETCH_TIME_OUT_S) if isinstance(data, ray.ObjectRef) else data


def fetch(reference: ray.ObjectRef, timeout_s: float | None = None) -> Any:
    """The result of a remote call. A ParetorayError raised there is raised here as it was, one sentence; Ray's own
    version of it would say the whole remote traceback."""
    try:
        return ray.get(reference, timeout=timeout_s)
    except RayTaskError as error:
        cause: BaseException = error
        while isinstance(cause, RayTaskError):  # an actor that called another one wraps it again
            cause = cause.cause
        if isinstance(cause, ParetorayError):
            raise cause from error
        raise


def last_line(error: Exception) -> str:
    """What a remote traceback, which Ray makes the text of an error, ends with."""
    return ([line for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]
