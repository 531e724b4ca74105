"""What one GPU says of itself through NVML: clocks, temperature, power, why it is slowed down, who else uses it.

Only ever read: no setting of a card is changed. Without NVML (package nvidia-ml-py, the driver's library) every reading
is None and `absent` says why. Readings that a card does not support are None one by one.
"""
from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

# The call's name with newer and with older drivers, and the bits of its answer (nvml.h).
REASON_CALLS = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
REASONS = {0x1: "idle", 0x2: "application clocks", 0x4: "power cap", 0x8: "hardware slowdown", 0x10: "sync boost",
           0x20: "thermal slowdown by the driver", 0x40: "thermal slowdown by the hardware", 0x80: "power brake",
           0x100: "display clocks"}
# A full card often runs at its power cap, and an idle one idles; these are faults of cooling or supply.
SLOWED = (0x8, 0x20, 0x40, 0x80)


@dataclass(frozen=True)
class GpuState:
    """At one moment: clocks in MHz, temperature in degrees Celsius, power in watts."""

    sm_mhz: int | None
    memory_mhz: int | None
    temperature_c: int | None
    power_w: float | None
    reasons: tuple[str, ...] | None

    @property
    def slowed(self) -> tuple[str, ...]:
        """Reasons at which measuring is not worth while."""
        return tuple(reason for reason in self.reasons or () if reason in [REASONS[bit] for bit in SLOWED])

    def details(self) -> dict[str, Any]:
        """For a sample, which is kept as JSON."""
        return asdict(self) | {"reasons": None if self.reasons is None else list(self.reasons)}


class GpuMonitor:
    """One GPU by its UUID, whatever CUDA_VISIBLE_DEVICES says. `nvml`: the module `pynvml` or one that acts like it."""

    def __init__(self, uuid: str, nvml: Any = None) -> None:
        self._nvml, self._handle, self.absent = nvml, None, ""
        try:
            self._nvml = nvml or importlib.import_module("pynvml")
        except ImportError:
            self.absent = "package nvidia-ml-py is not installed"
            return
        try:
            self._nvml.nvmlInit()
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
        except self._nvml.NVMLError as error:
            self.absent = f"NVML: {error}"

    @property
    def driver(self) -> str:
        """The driver's version, "unknown" without NVML."""
        return str(self._read("nvmlSystemGetDriverVersion") or "unknown")

    def state(self) -> GpuState | None:
        if self._handle is None:
            return None
        nvml, handle = self._nvml, self._handle
        power_mw = self._read("nvmlDeviceGetPowerUsage", handle)
        bits = next((bits for call in REASON_CALLS if (bits := self._read(call, handle)) is not None), None)
        return GpuState(
            self._read("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_SM),
            self._read("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_MEM),
            self._read("nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU),
            None if power_mw is None else power_mw / 1e3,
            None if bits is None else tuple(name for bit, name in REASONS.items() if bits & bit))

    def others(self, since: float) -> float | None:
        """The largest share of the GPU's multiprocessors that another process used since that time (time.time()).

        None where it cannot be known. In a container the driver may know this process by another id: ask after a while
        in which it has not used the GPU itself.
        """
        if self._handle is None:
            return None
        nvml = self._nvml
        try:
            samples = nvml.nvmlDeviceGetProcessUtilization(self._handle, int(since * 1e6))
        except nvml.NVMLError as error:     # raised also where there is no sample because nobody used the GPU
            return 0.0 if error.value in (nvml.NVML_SUCCESS, nvml.NVML_ERROR_NOT_FOUND) else None
        return max((sample.smUtil / 100.0 for sample in samples if sample.pid not in (0, os.getpid())), default=0.0)

    def others_now(self, pause_s: float, sleep: Callable[[float], None] = time.sleep) -> float | None:
        """`others` over a pause from now on, in which this process leaves the GPU alone."""
        started = time.time()
        sleep(0.0 if self._handle is None else pause_s)
        return self.others(started)

    def _read(self, name: str, *arguments: Any) -> Any:
        if self._handle is None or not hasattr(self._nvml, name):
            return None
        try:
            return getattr(self._nvml, name)(*arguments)
        except self._nvml.NVMLError:
            return None
