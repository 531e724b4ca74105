"""What a phone says about itself: what it is, its cores and clocks, how warm and how busy it is.

The functions that read a command's output are pure; `Phone.shell` runs the commands. What a phone does not tell (the
thermal service came with Android 10) is None, and nothing is refused because of it.
"""
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actors.targets.android.device import Phone
from searchspaces.errors import ConfigError

CPU = "/sys/devices/system/cpu"
CLOCK_FILES = ("cpuinfo_max_freq", "scaling_cur_freq", "scaling_max_freq", "scaling_governor")
PROPS = ("ro.product.manufacturer", "ro.product.model", "ro.soc.model", "ro.board.platform", "ro.product.cpu.abi")
LOOK = ("dumpsys thermalservice 2>/dev/null; echo; dumpsys battery 2>/dev/null; echo; grep '^cpu ' /proc/stat; "
        + f"grep -H . {' '.join(f'{CPU}/cpu[0-9]*/cpufreq/{name}' for name in CLOCK_FILES)} 2>/dev/null; true")
TICKS = 100.0               # per second and core, of /proc/stat on every Android


@dataclass(frozen=True)
class State:
    """`thermal_status`: 0 none to 6 shutdown. Clocks in kHz by core. `busy_s` and `total_s`: CPU time of all cores
    since the phone was started."""

    thermal_status: int | None
    battery_c: float | None
    clocks: dict[int, dict[str, str]]
    busy_s: float
    total_s: float

    def heat(self, max_battery_c: float) -> str:
        """Why the phone is too warm to measure; "" where it is not."""
        if self.thermal_status:
            return f"its thermal status is {self.thermal_status}, so it slows its cores down"
        if self.battery_c is not None and self.battery_c > max_battery_c:
            return f"its battery has {self.battery_c:g} C, above max_battery_c {max_battery_c:g}"
        return ""

    def highest(self) -> dict[int, int]:
        """core -> highest clock in kHz; {} where the phone does not say."""
        return {core: int(names["cpuinfo_max_freq"]) for core, names in self.clocks.items()
                if names.get("cpuinfo_max_freq", "").isdigit()}

    def clock_details(self, cores: Sequence[int]) -> dict[str, Any]:
        """Of the cores used: [now, allowed now, highest] in kHz and the governor, as text where a file was odd."""
        used = {core: self.clocks.get(core, {}) for core in cores}
        return {str(core): [names.get(name, "") for name in ("scaling_cur_freq", "scaling_max_freq", "cpuinfo_max_freq",
                                                             "scaling_governor")] for core, names in used.items()}


def look(phone: Phone) -> State:
    return parse_state(phone.shell(LOOK).out)


def parse_state(output: str) -> State:
    """From the output of `LOOK`; every part may be missing."""
    status = re.search(r"^\s*Thermal Status:\s*(\d+)", output, re.MULTILINE)
    battery = re.search(r"^\s*temperature:\s*(-?\d+)", output, re.MULTILINE)
    ticks = re.search(r"^cpu +([\d ]+)$", output, re.MULTILINE)
    times = [int(word) / TICKS for word in ticks.group(1).split()[:8]] if ticks else []     # the rest is in user time
    idle = sum(times[3:5])
    clocks: dict[int, dict[str, str]] = {}
    for core, name, value in re.findall(r"/cpu(\d+)/cpufreq/(\w+):(.*)$", output, re.MULTILINE):
        clocks.setdefault(int(core), {})[name] = value.strip()
    return State(int(status.group(1)) if status else None, int(battery.group(1)) / 10.0 if battery else None,
                 dict(sorted(clocks.items())), sum(times) - idle, sum(times))


def foreign_load(before: State, after: State, own_s: float) -> float:
    """Share of the phone's CPU time between two looks that went to anything but `own_s` seconds of ours."""
    total_s = after.total_s - before.total_s
    return min(max((after.busy_s - before.busy_s - own_s) / total_s, 0.0), 1.0) if total_s > 0 else 0.0


def choose_cores(wanted: str | Sequence[int], highest: dict[int, int], threads: int) -> list[int]:
    """The cores to stay on. "big": the fastest cluster, and the next ones until every thread has a core of its own.

    [] means no affinity, where the phone does not tell its cores and none are named.
    """
    if not isinstance(wanted, str):
        unknown = sorted(set(wanted) - highest.keys()) if highest else []
        if unknown or not wanted or min(wanted) < 0:
            raise ConfigError(f"cores is {list(wanted)}; this phone has {sorted(highest) or 'no list of its cores'}")
        return sorted(set(wanted))
    if wanted == "all":
        return sorted(highest)
    chosen: list[int] = []
    for clock in sorted(set(highest.values()), reverse=True):
        if len(chosen) < threads:
            chosen += [core for core, its in highest.items() if its == clock]
    return sorted(chosen)


def mask(cores: Sequence[int]) -> str:
    """For taskset: hexadecimal, bit i is core i."""
    return f"{sum(1 << core for core in cores):x}"


def describe(phone: Phone) -> tuple[str, str]:
    """("Google Pixel 8, Tensor G3, arm64-v8a", the ABI): equal for equal phones."""
    lines = phone.checked("; ".join(f"getprop {name}" for name in PROPS), "say what it is").splitlines()
    maker, model, chip, board, abi = [line.strip() for line in [*lines, *[""] * len(PROPS)][:len(PROPS)]]
    name = model if model.lower().startswith(maker.lower()) else f"{maker} {model}"
    return ", ".join(part for part in (name, chip or board, abi) if part), abi
