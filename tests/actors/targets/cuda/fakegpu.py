"""A GPU that is not there: modules that act like onnxruntime, torch and pynvml and write down what they are asked.

A network's first run is a real one on the CPU, through the real bindings. Time is made up: every run takes as many
nanoseconds as the model has bytes, give or take half a per cent.
"""
from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from actors.targets.cuda.runtime import CUDA, Modules

STREAM = 0x5EED
UUID = "01234567-89ab-cdef-0123-456789abcdef"


@dataclass
class FakeGpu:
    """`log` is what happened. `providers`: of every session. `refuse`: raised by new sessions, `fault` by the next
    synchronisations."""

    log: list[str] = field(default_factory=list)
    now_s: float = 0.0
    available: Sequence[str] = (CUDA, "CPUExecutionProvider")
    providers: Sequence[str] = (CUDA, "CPUExecutionProvider")
    refuse: str = ""
    fault: str = ""
    usable: bool = True
    uuid: str = UUID
    sessions: list[Any] = field(default_factory=list)
    nvml: Any = None

    def modules(self) -> Modules:
        return Modules(ort=self._ort(), torch=self._torch(), nvml=self.nvml or FakeNvml())

    def _ort(self) -> Any:
        class OrtValue:
            """On the CPU, whatever device is asked for; asserts that it was the right one."""

            @staticmethod
            def ortvalue_from_numpy(values: Any, device: str, index: int) -> Any:
                assert (device, index) == ("cuda", 0) and values.dtype in (np.float32, np.uint8)
                return onnxruntime.OrtValue.ortvalue_from_numpy(values)

            @staticmethod
            def ortvalue_from_shape_and_type(shape: list[int], kind: Any, device: str, index: int) -> Any:
                assert (device, index) == ("cuda", 0)
                return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, kind)

        def session(model: bytes, options: Any, providers: Any, enable_fallback: int) -> Any:
            if self.refuse:
                raise RuntimeError(self.refuse)
            self.sessions.append(FakeSession(self, model, options, providers, enable_fallback))
            return self.sessions[-1]

        return SimpleNamespace(
            __version__="1.99", get_available_providers=lambda: list(self.available), InferenceSession=session,
            OrtValue=OrtValue, SessionOptions=onnxruntime.SessionOptions, RunOptions=onnxruntime.RunOptions,
            GraphOptimizationLevel=onnxruntime.GraphOptimizationLevel)

    def _torch(self) -> Any:
        gpu = self

        class Stream:
            cuda_stream = STREAM

            def __init__(self, device: int) -> None:
                assert device == 0

            def synchronize(self) -> None:
                gpu.log.append("synchronize")
                if gpu.fault:
                    raise RuntimeError(gpu.fault)

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing, "without timing torch refuses elapsed_time"

            def record(self, stream: Stream) -> None:
                assert stream.cuda_stream == STREAM
                self.at_s = gpu.now_s
                gpu.log.append("record")

            def elapsed_time(self, end: Event) -> float:
                assert gpu.log[-1] == "synchronize", "an event that has not passed yet has no time"
                return (end.at_s - self.at_s) * 1e3

        cuda = SimpleNamespace(
            is_available=lambda: gpu.usable, device_count=lambda: 1, Stream=Stream, Event=Event,
            get_device_properties=lambda index: SimpleNamespace(name="Fake GPU", uuid=gpu.uuid))
        return SimpleNamespace(__version__="2.99", cuda=cuda, version=SimpleNamespace(cuda="12.9"),
                               backends=SimpleNamespace(cudnn=SimpleNamespace(version=lambda: 91000)))


class FakeSession:
    """Keeps what it was made with."""

    def __init__(self, gpu: FakeGpu, model: bytes, options: Any, providers: Any, enable_fallback: int) -> None:
        self.gpu, self.options, self.enable_fallback = gpu, options, enable_fallback
        (self.provider, self.provider_options), = providers
        plain = onnxruntime.SessionOptions()
        plain.intra_op_num_threads, plain.log_severity_level = 1, 4
        self.real = onnxruntime.InferenceSession(model, plain, providers=["CPUExecutionProvider"])
        self.get_inputs, self.get_outputs = self.real.get_inputs, self.real.get_outputs
        self.get_modelmeta = self.real.get_modelmeta
        self.binding: Any = None
        self.ran = False
        self._run_s, self._noise = len(model) * 1e-9, np.random.default_rng(len(gpu.sessions))

    def get_providers(self) -> list[str]:
        return list(self.gpu.providers)

    def io_binding(self) -> Any:
        self.binding = self.real.io_binding()
        return self.binding

    def run_with_iobinding(self, binding: Any, run_options: Any) -> None:
        assert binding is self.binding, "another binding would be other buffers"
        assert run_options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        if not self.ran:
            self.real.run_with_iobinding(binding)
            self.ran = True
        self.gpu.log.append("run")
        self.gpu.now_s += self._run_s * (1.0 + 0.005 * self._noise.standard_normal())


class FakeNvmlError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


@dataclass
class FakeNvml:
    """`missing`: calls that this card or driver does not support."""

    reasons: int = 0x4
    temperature_c: int = 61
    usage: dict[int, int] = field(default_factory=dict)     # pid -> per cent
    missing: Sequence[str] = ()
    library: bool = True
    asked: list[str] = field(default_factory=list)

    NVMLError = FakeNvmlError
    NVML_SUCCESS, NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_NOT_FOUND, NVML_ERROR_LIBRARY_NOT_FOUND = 0, 3, 6, 12
    NVML_TEMPERATURE_GPU, NVML_CLOCK_SM, NVML_CLOCK_MEM = 0, 1, 2

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml"):
            self.asked.append(name)
            if name in self.missing:
                return self._refuse
        return object.__getattribute__(self, name)

    def _refuse(self, *arguments: Any) -> None:
        raise FakeNvmlError(self.NVML_ERROR_NOT_SUPPORTED)

    def nvmlInit(self) -> None:
        if not self.library:
            raise FakeNvmlError(self.NVML_ERROR_LIBRARY_NOT_FOUND)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert uuid.startswith("GPU-"), "NVML's UUIDs have this prefix, torch's have not"
        return "handle"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "570.1"

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return {self.NVML_CLOCK_SM: 1980, self.NVML_CLOCK_MEM: 2619}[kind]

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return self.temperature_c

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 312_500

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return self.reasons

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return self.reasons

    def nvmlDeviceGetProcessUtilization(self, handle: str, since_us: int) -> list[Any]:
        assert abs(since_us / 1e6 - time.time()) < 3600.0, "NVML counts microseconds of the host's clock"
        if not self.usage:
            raise FakeNvmlError(self.NVML_ERROR_NOT_FOUND)
        return [SimpleNamespace(pid=pid, smUtil=share) for pid, share in self.usage.items()]
