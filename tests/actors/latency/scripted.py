"""A latency target that misbehaves on request, inside the real worker process. Latency = 1 + sum of tokens, in ms."""
from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.targets.target import Health, LatencySample, LatencyTarget, TargetIdentity, Workload
from searchspaces.errors import DeviceRestingError, TargetError


class ScriptedTarget(LatencyTarget):
    """Appends a line to `log` per visit. `kill`, `fail` and `stall` are sums of tokens at which that happens;
    of two workers the one that first creates the file `spoilt` is `how`. It rests while the file `hot` exists."""

    def __init__(self, input_shape: tuple[int, ...], reference_ms: float | None = None, *, log: str, kill: int = -1,
                 fail: int = -1, stall: int = -1, pause_s: float = 0.0, spoilt: str = "",
                 how: str = "unhealthy", hot: str = "") -> None:
        self._hot = Path(hot) if hot else None
        self._log, self._kill, self._fail, self._stall, self._pause_s = Path(log), kill, fail, stall, pause_s
        self._reference_ms = reference_ms
        self._how = how if spoilt and _claim(Path(spoilt)) else ""
        device = "odd one" if self._how == "odd" else "scripted"
        self._identity = TargetIdentity("scripted", device, "1", "none", 1, 1, tuple(input_shape))

    def identity(self) -> TargetIdentity:
        return self._identity

    def health(self) -> Health:
        if self._hot is not None and self._hot.exists():
            return Health(False, "it is hot", passing=True)
        return Health(self._how != "unhealthy", "the script says so")

    def reference_ms(self) -> float:
        if self._reference_ms is None:
            self._reference_ms = 1.0 + os.getpid() / 1e9     # another value in every process
        return self._reference_ms

    def prepare(self, workloads: Sequence[Workload]) -> list[Any]:
        return [len(w.onnx or b"") if w.tokens_T is None else int(w.tokens_T.sum()) for w in workloads]

    def measure(self, handles: Sequence[Any]) -> list[LatencySample]:
        return [self._visit(total) for total in handles]

    def close(self) -> None:
        pass

    def _visit(self, total: int) -> LatencySample:
        if self._hot is not None and self._hot.exists():
            raise DeviceRestingError("it is hot")
        with self._log.open("a") as log:
            log.write(f"{total}\n")
        if total == self._kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if total == self._fail:
            raise TargetError(f"total {total} does not run here")
        time.sleep(600.0 if total == self._stall else self._pause_s)
        reference_ms = self.reference_ms()
        return LatencySample(self._identity.target_id, (1.0 + total) * reference_ms, reference_ms, 1.0 + total, 0.01, 1,
                             0.0, 0.0, ((1.0 + total,),), ((1.0,),), time.time(), 0.0, {"pid": os.getpid()})


def _claim(path: Path) -> bool:
    """Is this the process that came first?"""
    try:
        with path.open("x") as claim:
            claim.write(str(os.getpid()))
    except FileExistsError:
        return path.read_text() == str(os.getpid())
    return True
