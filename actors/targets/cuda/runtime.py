"""Running a network on one GPU: ONNX Runtime's CUDA provider on a torch stream, timed by CUDA events.

    runtime = CudaRuntime(gpu=0, batch=32)
    network = runtime.load(model)           # fixed device buffers, warmed up; captured, with `cuda_graph`
    runtime.timings_ms(network, 3)          # three times the mean of REPLAYS runs

ONNX Runtime is given torch's stream, so that a pair of torch's events encloses exactly the work of the runs between
them. A run does not wait for the GPU (`disable_synchronize_execution_providers`): the host may prepare the next one
meanwhile, as it does in use. Nothing ever falls back to the processor, in any of the three ways in which ONNX Runtime
would do that silently: a build without CUDA, a provider that does not load, single nodes.
"""
from __future__ import annotations

import importlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime

from actors.targets.onnx_cpu import first_line, fixed_shape, random_feed
from searchspaces.errors import TargetError

CUDA = "CUDAExecutionProvider"
WARM_UP = 20    # runs of a network before anything is timed; the first also choose convolution algorithms
REPLAYS = 10    # runs between two events
INSTALL = "pip install 'paretoray[cuda]' (in place of onnxruntime)"


@dataclass(frozen=True)
class Modules:
    """What acts on the hardware; tests put in things that act like these. `nvml` None: the module pynvml.

    Torch is imported when a GPU is first used, because workers of other targets do without it. It also loads the CUDA
    libraries that ONNX Runtime needs.
    """

    ort: Any = onnxruntime
    torch: Any = field(default_factory=lambda: importlib.import_module("torch"))
    nvml: Any = None


@dataclass(frozen=True)
class CudaNetwork:
    """A network ready to run. `buffers` are the device memory that `binding` refers to."""

    session: Any
    binding: Any
    buffers: tuple[Any, ...]
    session_ms: float


class CudaRuntime:
    """The GPU with index `gpu` among those that this process may use. TargetError where it cannot be used."""

    def __init__(self, gpu: int, batch: int, *, cuda_graph: bool = False, tf32: bool = False,
                 modules: Modules | None = None) -> None:
        self._modules = modules or Modules()
        self._gpu, self._batch, self._cuda_graph, self._tf32 = gpu, batch, cuda_graph, tf32
        ort, cuda = self._modules.ort, self._modules.torch.cuda
        if CUDA not in ort.get_available_providers():
            raise TargetError(f"target cuda cannot run on this build of onnxruntime {ort.__version__}, which has only "
                              f"{', '.join(ort.get_available_providers())}; install the CUDA build with {INSTALL}")
        if not cuda.is_available():
            raise TargetError(f"torch {self._modules.torch.__version__} finds no GPU it can use; measure on a node "
                              "with an NVIDIA GPU, its driver, and a torch built for CUDA")
        if not 0 <= gpu < cuda.device_count():
            raise TargetError(f"target cuda is told to use GPU {gpu} and this process may use {cuda.device_count()}, "
                              "counted from 0; correct the option 'gpu'")
        properties = cuda.get_device_properties(gpu)
        self.device, self.uuid = str(properties.name), f"GPU-{properties.uuid}"
        self._stream = cuda.Stream(device=gpu)  # its own: ONNX Runtime takes the default one's handle, 0, for none
        self._run_options = ort.RunOptions()
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    @property
    def version(self) -> str:
        """ONNX Runtime, CUDA and cuDNN as loaded; a captured graph is another way to run and is said."""
        module = self._modules.torch
        return (f"onnxruntime {self._modules.ort.__version__} CUDA {module.version.cuda} "
                f"cuDNN {module.backends.cudnn.version()}{' cuda_graph' if self._cuda_graph else ''}")

    def load(self, model: bytes) -> CudaNetwork:
        """The network after `WARM_UP` runs. TargetError where it does not load, does not run, or not wholly on the GPU.
        """
        started = time.perf_counter()
        try:
            session = self._modules.ort.InferenceSession(
                model, self._session_options(), providers=[(CUDA, self._provider_options())], enable_fallback=0)
        except Exception as error:  # the runtime raises its own family of exceptions, all of them mean this
            raise TargetError(f"{self.version} cannot load the network on {self.device}: "
                              f"{first_line(error)}") from error
        if session.get_providers()[0] != CUDA:
            raise TargetError(f"{self.version} runs the network with {session.get_providers()[0]} instead of {CUDA}; "
                              "its CUDA or cuDNN libraries are missing or of another version than it was built for")
        binding = session.io_binding()
        buffers = (*self._bind_inputs(session, binding), *self._bind_outputs(session, binding))
        network = CudaNetwork(session, binding, buffers, (time.perf_counter() - started) * 1e3)
        self.run(network, WARM_UP)
        self.synchronize()
        return network

    def timings_ms(self, network: CudaNetwork, times: int) -> list[float]:
        """`times` times the mean duration of `REPLAYS` runs in a row, between two events on an idle GPU."""
        return [self._timing_ms(network) for _ in range(times)]

    def run(self, network: CudaNetwork, times: int) -> None:
        """Enqueues so many runs. TargetError where the runtime refuses one."""
        try:
            for _ in range(times):
                network.session.run_with_iobinding(network.binding, self._run_options)
        except Exception as error:  # as above
            raise TargetError(f"{self.version} cannot run the network on {self.device}: {first_line(error)}") from error

    def synchronize(self) -> None:
        """Waits for all runs. TargetError where one of them has failed, which the runtime only notices here."""
        try:
            self._stream.synchronize()
        except Exception as error:  # as above
            raise TargetError(f"{self.device} failed while running a network: {first_line(error)}") from error

    def _timing_ms(self, network: CudaNetwork) -> float:
        event = self._modules.torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        self.synchronize()
        start.record(self._stream)
        self.run(network, REPLAYS)
        end.record(self._stream)
        self.synchronize()
        return float(start.elapsed_time(end)) / REPLAYS

    def _session_options(self) -> Any:
        options = self._modules.ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.graph_optimization_level = self._modules.ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        options.log_severity_level = 4      # its errors arrive as exceptions
        return options

    def _provider_options(self) -> dict[str, str]:
        return {"device_id": str(self._gpu), "user_compute_stream": str(self._stream.cuda_stream),
                "use_tf32": str(int(self._tf32)), "enable_cuda_graph": str(int(self._cuda_graph)),
                "cudnn_conv_algo_search": "EXHAUSTIVE"}

    def _bind_inputs(self, session: Any, binding: Any) -> Iterable[Any]:
        """Random images in device memory."""
        for name, values in random_feed(session, self._batch).items():
            buffer = self._modules.ort.OrtValue.ortvalue_from_numpy(values, "cuda", self._gpu)
            binding.bind_ortvalue_input(name, buffer)
            yield buffer

    def _bind_outputs(self, session: Any, binding: Any) -> Iterable[Any]:
        for argument in session.get_outputs():
            shape = fixed_shape("output", argument, self._batch)
            buffer = self._modules.ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, "cuda", self._gpu)
            binding.bind_ortvalue_output(argument.name, buffer)
            yield buffer
