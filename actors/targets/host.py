"""What a measurement needs of its host: the processor's name, who else uses it, a core of one's own."""
from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from searchspaces.errors import ConfigError


def cpu_name() -> str:
    """The processor's model name, e.g. "AMD EPYC 9004"; what `platform` knows where the kernel does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """A collection in the middle of a timing would be timed too."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def clock_state(core: int | None) -> dict[str, float | str | None]:
    """`clock_mhz` and `governor` of a core (of the first one for None) as the system tells them now; None where it does
    not, as in most virtual machines."""
    folder = Path(f"/sys/devices/system/cpu/cpu{core or 0}/cpufreq")
    try:
        return {"clock_mhz": float((folder / "scaling_cur_freq").read_text()) / 1e3,
                "governor": (folder / "scaling_governor").read_text().strip()}
    except (OSError, ValueError):
        frequency = psutil.cpu_freq()
        return {"clock_mhz": float(frequency.current) if frequency else None, "governor": None}


class ForeignLoad:
    """Share of the machine's CPU time used by other processes since construction."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._started, self._busy, self._own = time.monotonic(), _busy_s(), self._own_s()

    def share(self) -> float:
        available = (time.monotonic() - self._started) * (psutil.cpu_count() or 1)
        foreign = (_busy_s() - self._busy) - (self._own_s() - self._own)
        return min(max(foreign / available, 0.0), 1.0) if available > 0 else 0.0

    def _own_s(self) -> float:
        times = self._process.cpu_times()
        return times.user + times.system


def _busy_s() -> float:
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


class Affinity:
    """Keeps the calling thread on one core. A no-op where the system has no affinity (macOS)."""

    def __init__(self, core: int | None) -> None:
        self._before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        if core is not None and core not in self._before:
            raise ConfigError(f"core {core} cannot be used for measuring; this process may use {sorted(self._before)}")
        self.core = core if core is not None else max(self._before, default=0)
        self.hold()

    def hold(self) -> None:
        if self._before and os.sched_getaffinity(0) != {self.core}:
            os.sched_setaffinity(0, {self.core})

    def release(self) -> None:
        if self._before:
            os.sched_setaffinity(0, self._before)
