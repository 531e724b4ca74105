"""The CUDA target without a GPU: the order of what it does, its refusals, what a sample holds (its lock: test_lock.py).
The stand-ins run the networks on the CPU (fakegpu.py). On real hardware: the conformance suite, marked gpu."""
from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from actors.targets.catalogue import check_options, claims, make_target
from actors.targets.conformance import check_target
from actors.targets.cuda import target as cuda
from actors.targets.cuda.monitor import GpuMonitor
from actors.targets.cuda.runtime import CUDA, CudaRuntime
from actors.targets.cuda.target import GPU_PROTOCOL, CudaTarget
from actors.targets.pixels import PixelTarget
from actors.targets.reference import reference_graph
from actors.targets.target import Claim, LatencySample, Workload
from searchspaces.errors import ConfigError, TargetError
from searchspaces.graph import INPUT, Graph, GraphBuilder
from searchspaces.onnxgraph import to_onnx
from tests.actors.targets.cuda.fakegpu import STREAM, UUID, FakeGpu, FakeNvml

SHAPE = (3, 8, 8)
REFERENCE = reference_graph(3, 8)
ROOT = Path(__file__).parents[4]
HAVE_GPU = CUDA in onnxruntime.get_available_providers() and torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAVE_GPU, reason="needs an NVIDIA GPU, a torch that uses it, and onnxruntime-gpu")


@pytest.fixture(autouse=True)
def own_folder_for_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(cuda, "BUSY_CHECK_S", 0.0)


@pytest.fixture
def gpu() -> FakeGpu:
    return FakeGpu()


@pytest.fixture
def target(gpu: FakeGpu) -> Iterator[CudaTarget]:
    made = CudaTarget(SHAPE, 2.0, modules=gpu.modules())
    yield made
    made.close()


def tiny() -> Graph:
    builder = GraphBuilder(*SHAPE[:2])
    builder.begin_block("only", -1, "only")
    x = builder.conv(INPUT, "conv", 8, 3, 2, bias=True)
    builder.linear(builder.flatten(builder.global_pool(x, "pool"), "flat"), "linear", 10)
    return builder.build()


def measured(made: CudaTarget, graph: Graph) -> LatencySample:
    return made.measure(made.prepare([Workload(graph=graph)]))[0]


def groups(log: list[str]) -> list[str]:
    """The log with equal neighbours counted: "run x10"."""
    counted: list[tuple[str, int]] = []
    for entry in log:
        if counted and counted[-1][0] == entry:
            counted[-1] = (entry, counted[-1][1] + 1)
        else:
            counted.append((entry, 1))
    return [f"{entry} x{times}" for entry, times in counted]


# --- order and numbers ------------------------------------------------------------------------------------------------


def test_a_timing_is_ten_runs_between_two_events_on_an_idle_gpu(gpu: FakeGpu) -> None:
    runtime = CudaRuntime(0, 1, modules=gpu.modules())
    model = to_onnx(tiny(), batch=1).SerializeToString()
    network = runtime.load(model)
    assert groups(gpu.log) == ["run x20", "synchronize x1"]     # warm-up
    gpu.log.clear()
    assert runtime.timings_ms(network, 3) == pytest.approx([len(model) / 1e6] * 3, rel=0.01)
    assert gpu.log == ["synchronize", "record", *["run"] * 10, "record", "synchronize"] * 3


def test_a_file_that_takes_uint8_images_gets_them_in_device_memory(gpu: FakeGpu) -> None:
    """Its first run is a real one, through the real binding."""
    made = PixelTarget(CudaTarget(SHAPE, 2.0, batch=2, modules=gpu.modules()), (20, 30))
    handle, = made.prepare([Workload(graph=tiny())])
    images, probabilities = (buffer.numpy() for buffer in handle.buffers)
    assert images.dtype == np.uint8 and images.shape == (2, 20, 30, 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)
    assert made.measure([handle])[0].target_id == made.identity().target_id
    made.close()


def test_a_visit_warms_up_both_networks_and_alternates(gpu: FakeGpu, target: CudaTarget) -> None:
    handle = target.prepare([Workload(graph=tiny())])
    reference, candidate = gpu.sessions
    order: list[str] = []

    def run(name: str, run_ms: float) -> None:
        order.append(name)
        gpu.now_s += run_ms / 1e3

    reference.run_with_iobinding = lambda binding, options: run("reference", 4.0)
    candidate.run_with_iobinding = lambda binding, options: run("candidate", 6.0)
    sample = target.measure(handle)[0]
    runs = GPU_PROTOCOL.reference_runs * 10
    assert GPU_PROTOCOL.warm_up * 10 >= 20 and GPU_PROTOCOL.reference_runs == GPU_PROTOCOL.candidate_runs
    assert groups(order)[:2] == ["reference x20", "candidate x20"]
    assert groups(order)[2:] == [f"reference x{runs}", f"candidate x{runs}"] * sample.rounds
    assert sample.ratio == pytest.approx(1.5) and sample.latency_ms == pytest.approx(3.0)
    np.testing.assert_allclose(sample.candidate_ms, np.full((6, 3), 6.0))
    np.testing.assert_allclose(sample.reference_ms_rounds, np.full((6, 3), 4.0))


def test_sessions_are_bound_to_the_gpu_and_its_stream(gpu: FakeGpu) -> None:
    CudaTarget(SHAPE, 2.0, batch=3, cuda_graph=True, modules=gpu.modules()).close()
    session = gpu.sessions[0]
    assert session.provider == CUDA and session.enable_fallback == 0
    assert session.provider_options == {
        "device_id": "0", "user_compute_stream": str(STREAM), "use_tf32": "0", "enable_cuda_graph": "1",
        "cudnn_conv_algo_search": "EXHAUSTIVE"}
    assert session.options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
    assert session.options.intra_op_num_threads == session.options.inter_op_num_threads == 1
    assert session.options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert [value.shape() for value in session.binding.get_outputs()] == [[3, 10]]


def test_buffers_stay_the_same_from_run_to_run(gpu: FakeGpu) -> None:
    """A captured graph replays addresses: an output that is allocated anew would be lost."""
    runtime = CudaRuntime(0, 2, modules=gpu.modules())
    network = runtime.load(to_onnx(tiny(), batch=None).SerializeToString())
    address = network.binding.get_outputs()[0].data_ptr()
    runtime.run(network, 3)
    assert network.binding.get_outputs()[0].data_ptr() == address == network.buffers[1].data_ptr()
    assert network.buffers[0].shape() == [2, *SHAPE]


def test_conformance(gpu: FakeGpu) -> None:
    assert check_target(CudaTarget(SHAPE, batch=2, modules=gpu.modules())) == []


# --- identity ---------------------------------------------------------------------------------------------------------


def identity(**options: Any) -> Any:
    gpu = options.pop("fake", FakeGpu())
    made = CudaTarget(options.pop("shape", SHAPE), 1.0, modules=gpu.modules(), **options)
    made.close()
    return made.identity()


def test_identity_names_all_that_latency_depends_on() -> None:
    plain = identity()
    assert (plain.kind, plain.device, plain.precision, plain.batch) == ("cuda", "Fake GPU", "float32", 1)
    assert plain.runtime == "onnxruntime 1.99 CUDA 12.9 cuDNN 91000 driver 570.1"
    others = [identity(batch=32), identity(tf32=True), identity(cuda_graph=True), identity(shape=(3, 16, 16)),
              identity(reference=tiny())]
    assert len({i.target_id for i in (plain, *others)}) == 6
    assert [i.batch for i in others] == [32, 1, 1, 1, 1] and others[1].precision == "tf32"
    assert "cuda_graph" in others[2].runtime
    assert identity(gpu_type="H100") == plain and identity(fake=FakeGpu(uuid="another-card")) == plain


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="this onnxruntime is a CUDA build")
def test_this_cpu_build_is_refused() -> None:
    """The real onnxruntime, which would take the CPU without a word."""
    with pytest.raises(TargetError, match=r"cannot run on this build of onnxruntime .*pip install 'paretoray\[cuda\]'"):
        make_target("cuda", {"batch": 32}, SHAPE)
    model = to_onnx(tiny(), batch=1).SerializeToString()
    with pytest.warns(UserWarning, match="not in available"):
        silent = onnxruntime.InferenceSession(model, providers=[CUDA])
        assert silent.get_providers() == ["CPUExecutionProvider"]
        runtime = CudaRuntime(0, 1, modules=FakeGpu().modules())
        with pytest.raises(Exception, match="fallback to CPU EP has been explicitly disabled"):
            onnxruntime.InferenceSession(model, runtime._session_options(), providers=[CUDA], enable_fallback=0)


def test_a_build_without_cuda_a_torch_without_gpu_and_a_wrong_index_are_refused(gpu: FakeGpu) -> None:
    for options, changes, message in (
            ({}, {"available": ["CPUExecutionProvider"]}, "has only CPUExecutionProvider; install the CUDA build"),
            ({}, {"usable": False}, "torch 2.99 finds no GPU"),
            ({"gpu": 1}, {}, "told to use GPU 1 and this process may use 1")):
        with pytest.raises(TargetError, match=re.escape(message)):
            CudaTarget(SHAPE, modules=replace(gpu, **changes).modules(), **options)
    assert "run" not in gpu.log


def test_a_provider_that_did_not_load_is_refused_and_the_gpu_freed(gpu: FakeGpu) -> None:
    gpu.providers = ["CPUExecutionProvider"]
    with pytest.raises(TargetError, match="with CPUExecutionProvider instead of CUDAExecutionProvider"):
        CudaTarget(SHAPE, modules=gpu.modules())
    assert gpu.log == []
    gpu.providers = [CUDA, "CPUExecutionProvider"]
    CudaTarget(SHAPE, 1.0, modules=gpu.modules()).close()


def test_nodes_that_would_fall_back_and_faults_of_the_gpu_are_said(gpu: FakeGpu, target: CudaTarget) -> None:
    gpu.refuse = "This session contains graph nodes that are assigned to the default CPU EP\nand a second line"
    with pytest.raises(TargetError, match="cannot load the network on Fake GPU: .*default CPU EP$"):
        target.prepare([Workload(graph=tiny())])
    gpu.refuse, gpu.fault = "", "CUDA error: an illegal memory access was encountered"
    with pytest.raises(TargetError, match="Fake GPU failed while running a network: CUDA error"):
        target.prepare([Workload(graph=tiny())])
    gpu.fault = ""
    assert measured(target, tiny()).latency_ms > 0


def test_bad_options_are_named() -> None:
    for options, message in (({"batch": 0}, "batch is 0"), ({"gpu": 0.5}, "option 'gpu' of latency target cuda is 0.5"),
                             ({"gpus": 0.5}, "has no option 'gpus'"), ({"modules": 1}, "has no option 'modules'"),
                             ({"batch": "many"}, "must be int")):
        with pytest.raises(ConfigError, match=re.escape(message)):
            make_target("cuda", options, SHAPE)
    check_options("cuda", {"batch": 32, "cuda_graph": True, "tf32": False, "gpu": 1, "gpu_type": "A100"})


# --- whole GPUs -------------------------------------------------------------------------------------------------------


def test_claims_are_whole_gpus_of_one_kind() -> None:
    one = Claim({"num_gpus": 1})
    assert claims("cuda", {}, {"CPU": 8.0}) == [] and claims("cuda", {}, {"GPU": 2.0}) == [one, one]
    assert claims("cuda", {}, {"GPU": 1.0, "accelerator_type:H100": 1.0}) == [one]
    mixed = {"GPU": 5.0, "accelerator_type:H100": 1.0, "accelerator_type:T4": 2.0}
    t4 = Claim({"num_gpus": 1, "accelerator_type": "T4"})
    assert claims("cuda", {"gpu_type": "T4"}, mixed) == [t4, t4]
    assert claims("cuda", {"gpu_type": "T4"}, {"GPU": 4.0, "accelerator_type:T4": 1.0}) == [t4] * 4
    assert claims("cuda", {"gpu_type": "A100"}, mixed) == []
    with pytest.raises(ConfigError, match=r"several kinds \(H100, T4\).*'gpu_type'"):
        claims("cuda", {}, mixed)
    with pytest.raises(ConfigError, match="offers 0.5 of one"):
        claims("cuda", {}, {"GPU": 0.5})


# --- the state of the card --------------------------------------------------------------------------------------------


def test_clocks_temperature_power_and_reasons_are_in_every_sample(gpu: FakeGpu) -> None:
    gpu.nvml = FakeNvml(reasons=0x4 | 0x20, usage={os.getpid(): 90, 12: 7})
    made = CudaTarget(SHAPE, 2.0, modules=gpu.modules())
    details = measured(made, tiny()).details
    made.close()
    state = {"sm_mhz": 1980, "memory_mhz": 2619, "temperature_c": 61, "power_w": 312.5,
             "reasons": ["power cap", "thermal slowdown by the driver"]}
    assert details["gpu_before"] == details["gpu_after"] == state
    assert details["gpu_others"] == pytest.approx(0.07) and details["gpu"] == f"GPU-{UUID}"
    assert details["session_ms"] > 0
    assert not [name for name in gpu.nvml.asked if "Set" in name or "Reset" in name], "settings are never changed"


def test_a_card_that_slows_down_or_is_shared_is_not_healthy(gpu: FakeGpu) -> None:
    for nvml, reason in (
            (FakeNvml(), ""),
            (FakeNvml(reasons=0x40 | 0x1, temperature_c=92),
             "slows itself down (thermal slowdown by the hardware, 92 degrees Celsius)"),
            (FakeNvml(usage={os.getpid(): 99, 4711: 3}), ""),
            (FakeNvml(usage={4711: 38}), "other processes use 38% of Fake GPU")):
        gpu.nvml = nvml
        made = CudaTarget(SHAPE, 2.0, modules=gpu.modules())
        health = made.health()
        made.close()
        assert health.ok == (not reason) and reason in health.reason


def test_without_nvml_it_measures_and_says_so(gpu: FakeGpu) -> None:
    gpu.nvml = FakeNvml(library=False)
    made = CudaTarget(SHAPE, 2.0, modules=gpu.modules())
    assert made.health().ok and made.identity().runtime.endswith("driver unknown")
    assert measured(made, tiny()).details["gpu_state"] == "NVML: NVML error 12"
    made.close()


def test_what_a_card_does_not_tell_is_none() -> None:
    nvml = FakeNvml(missing=["nvmlDeviceGetPowerUsage", "nvmlDeviceGetProcessUtilization",
                             "nvmlDeviceGetCurrentClocksEventReasons"], reasons=0x8)
    monitor = GpuMonitor(f"GPU-{UUID}", nvml)
    state = monitor.state()
    assert state is not None and state.power_w is None and state.sm_mhz == 1980
    assert state.reasons == state.slowed == ("hardware slowdown",)      # from the older call
    assert monitor.others(0.0) is None


@pytest.mark.skipif(HAVE_GPU, reason="there is a GPU")
def test_the_real_nvml_is_absent_here_and_that_is_said() -> None:
    monitor = GpuMonitor(f"GPU-{UUID}")
    assert monitor.absent.startswith(("package nvidia-ml-py is not installed", "NVML: "))
    assert monitor.state() is None and monitor.others_now(60.0) is None and monitor.driver == "unknown"


# --- on hardware ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("options", [{"batch": 1}, {"batch": 32}, {"batch": 1, "cuda_graph": True}], ids=str)
def test_conformance_on_hardware(options: dict[str, Any]) -> None:
    assert check_target(CudaTarget((3, 32, 32), **options)) == []


@pytest.mark.gpu
@needs_gpu
def test_the_card_tells_its_state() -> None:
    made = CudaTarget((3, 32, 32))
    details = made.measure(made.prepare([Workload(graph=reference_graph(3, 32))]))[0].details
    made.close()
    assert details["gpu_after"]["sm_mhz"] > 0 and details["gpu_after"]["temperature_c"] > 0


@pytest.mark.skipif(HAVE_GPU, reason="there is a GPU")
def test_the_benchmark_says_that_there_is_nothing_to_measure() -> None:
    run = subprocess.run([sys.executable, "-m", "tests.benchmarks.cuda"], cwd=ROOT, capture_output=True, text=True,
                         timeout=120)
    assert run.returncode == 2 and "nothing is measured: " in run.stdout
