"""What runners and phones print, read: real outputs of the public programs, ours, and broken ones. No phone needed but
for the last tests, which run a program of each kind on the stand-in."""
from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from actors.targets.android.device import LinkError
from actors.targets.android.rounds import without_cold
from actors.targets.android.runners import (
    RUNNERS,
    BenchmarkModel,
    Benchncnn,
    OnnxruntimePerfTest,
    ParetorayRunner,
    Plan,
    Timings,
    UnfinishedError,
)
from actors.targets.android.state import State, choose_cores, foreign_load, mask, parse_state
from actors.targets.pairing import Protocol
from actors.targets.reference import reference_graph
from actors.targets.target import Workload
from searchspaces.errors import ConfigError, TargetError
from searchspaces.onnxgraph import to_onnx
from tests.actors.targets.android.adbchain import PYTHON_RUNNER, quick_target
from tests.actors.targets.android.adbdevice import AdbDevice

PLAN = Plan("/d/runner", "/d/ref.onnx", ("taskset", "f0"), 3, 2, 4, 1, 1, (3, 32, 32), True)
PERF_TEST_OLD = """Total time cost:58.8053
Total iterations:1000
Average time cost:58.8053 ms
Total run time:58.8102 s
Min Latency is 0.0559777sec
Max Latency is 0.0623472sec
P50 Latency is 0.0587108sec
P90 Latency is 0.0599845sec
"""
PERF_TEST_NEW = """Session creation time cost: 0.0204 s
First inference time cost: 3 ms
Total inference time cost: 0.0587 s
Total inference requests: 24
Average inference time cost: 2.44691 ms
Min Latency: 0.00231 s
Max Latency: 0.00397 s
P50 Latency: 0.00240275 s
P90 Latency: 2.5e-03 s
"""
BENCHMARK_MODEL = """INFO: STARTING!
INFO: Graph: [mobilenet_v1_1.0_224.tflite]
INFO: Initialized session in 12.75ms.
INFO: count=37 first=14744 curr=15520 min=13164 max=18295 avg=13764.3 std=967

INFO: count=74 first=14850 curr=13315 min=13105 max=15765 avg=13520.2 std=470

INFO: Inference timings in us: Init: 12750, First inference: 14744, Warmup (avg): 13764.3, Inference (avg): 13520.2
INFO: Note: as the benchmark tool itself affects memory footprint, the following is only APPROXIMATE
"""
BENCHMARK_MODEL_OLD = "Average inference timings in us: Warmup: 76605.9, Init: 9933, no stats: 66767.6\n"
BENCHNCNN = """loop_count = 8
num_threads = 1
powersave = 2
gpu_device = -1
cooling_down = 0
   /data/local/tmp/a  min =    7.50  max =    7.71  avg =    7.58
"""
THERMAL = """IsStatusOverride: false
Thermal Status: 1
Cached temperatures:
        Temperature{mValue=25.6, mType=0, mName=AP, mStatus=0}
Current Battery Service state:
  AC powered: false
  max charging current: 0
  level: 98
  temperature: 318
  technology: Li-ion
cpu  1000 50 450 8000 100 10 20 5 0 0
/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq:1803000
/sys/devices/system/cpu/cpu4/cpufreq/cpuinfo_max_freq:2348000
/sys/devices/system/cpu/cpu4/cpufreq/scaling_cur_freq:1197000
/sys/devices/system/cpu/cpu4/cpufreq/scaling_max_freq:2348000
/sys/devices/system/cpu/cpu4/cpufreq/scaling_governor:sched_pixel
/sys/devices/system/cpu/cpu7/cpufreq/cpuinfo_max_freq:2850000
"""
PIXEL = {0: 1803000, 1: 1803000, 2: 1803000, 3: 1803000, 4: 2348000, 5: 2348000, 6: 2850000, 7: 2850000}


def line(model: str, **changed: object) -> str:
    answer = {"model": model, "candidate_ms": [[4.0, 2.0, 2.0, 2.0]] * 2, "reference_ms": [[1, 1, 1, 1]] * 2,
              "clock": "thread_cpu", "affinity": [6, 7], "temperature_c": {"skin": 31.5},
              "runtime": "onnxruntime 1.32.0"}
    return json.dumps({key: value for key, value in {**answer, **changed}.items() if value is not None})


# --- public programs --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("runner", "output", "ms"), [
    (OnnxruntimePerfTest(), PERF_TEST_OLD, 58.7108), (OnnxruntimePerfTest(), PERF_TEST_NEW, 2.40275),
    (BenchmarkModel(), BENCHMARK_MODEL, 13.5202), (BenchmarkModel(), BENCHMARK_MODEL_OLD, 66.7676),
    (Benchncnn(), BENCHNCNN, 7.50), (OnnxruntimePerfTest(), BENCHNCNN, None), (BenchmarkModel(), "", None),
    (Benchncnn(), "min = x", None), (BenchmarkModel(), "Inference (avg): 1e+e", None),
])
def test_statistic_of_a_public_program(runner: OnnxruntimePerfTest, output: str, ms: float | None) -> None:
    assert runner.milliseconds(output) == (None if ms is None else pytest.approx(ms))


def printed(*timings: str, models: int = 1) -> str:
    """Of benchncnn: one invocation per timing."""
    parts = [f"@@ /d/x\nloop_count = 8\n{t}\n@= {0 if 'min' in t else 1}" for t in timings]
    return "\n".join([*parts, f"@@ done {models}\n"])


def ncnn(ms: float) -> str:
    return f"      x  min =  {ms:.2f}  max =  9.00  avg =  5.00"


def test_unpaired_program_runs_the_reference_before_and_after() -> None:
    text = Benchncnn().command(PLAN, ["/d/a.param"])
    runs = [part for part in text.splitlines() if "param=" in part]
    assert [("ref" in run) for run in runs] == [True, False, True, False, True, False, True]
    assert "taskset f0 /d/runner 8 1 2 -1 0 param=/d/a.param 'shape=[32,32,3]'" in text
    timings = Benchncnn().read(printed(*map(ncnn, (1.0, 4.0, 2.0, 4.0, 1.0, 4.0, 3.0))), ["/d/a.param"], PLAN)[0]
    assert isinstance(timings, Timings) and not timings.single and timings.details["statistic"] == "minimum"
    assert timings.candidate_ms == ((4.0,),) * 3 and timings.reference_ms == ((1.5,), (1.5,), (2.0,))
    assert timings.details["reference_before_after_ms"] == [1.0, 2.0, 1.0, 3.0]


def test_public_program_that_cannot_run_a_model() -> None:
    good, bad = map(ncnn, [1.0, 4.0] * 3 + [1.0]), [ncnn(1.0), "Segmentation fault", *map(ncnn, [1.0] * 5)]
    outcomes = Benchncnn().read(printed(*good, *bad, models=2), ["a", "b"], PLAN)
    assert isinstance(outcomes[0], Timings)
    assert outcomes[1] == "benchncnn cannot run b: 'loop_count = 8 Segmentation fault' (exit code 1)"
    silent = Benchncnn().read(printed(*[ncnn(1.0)] * 7).replace("min", "xxx"), ["a"], PLAN)[0]
    assert isinstance(silent, str)
    assert silent.startswith("benchncnn cannot run the reference network: it printed no minimum but ")


@pytest.mark.parametrize("output", [
    "", "Segmentation fault", printed(*[ncnn(1.0)] * 6), printed(*[ncnn(1.0)] * 7, models=2),
    printed(*[ncnn(1.0)] * 7).replace("@@ done 1", "")])
def test_public_program_that_ends_early(output: str) -> None:
    with pytest.raises(UnfinishedError, match="and not the end of 1 models"):
        Benchncnn().read(output, ["a"], PLAN)


def test_commands_quote_everything() -> None:
    for runner in RUNNERS.values():
        words = shlex.split(runner().command(PLAN, ["/d/a b;reboot'.onnx"]))
        assert any(word.rpartition("=")[2] == "/d/a b;reboot'.onnx" for word in words)


# --- our runner -------------------------------------------------------------------------------------------------------

def test_our_runner_is_read() -> None:
    refused = line("c", error="cannot load c\nat x")
    output = "\n".join([line("b"), "WARNING: linker: unused DT entry", line("a"), refused, '{"done": 3}\n'])
    a, b, c = ParetorayRunner().read(output, ["a", "b", "c"], PLAN)
    assert isinstance(a, Timings) and a.candidate_ms == ((4.0, 2.0, 2.0, 2.0),) * 2 and a.reference_ms[0] == (1.0,) * 4
    assert a.single and a.runtime == "onnxruntime 1.32.0" and a.details["affinity"] == [6, 7]
    assert isinstance(b, Timings) and c == "cannot load c"


@pytest.mark.parametrize("output", [
    "", line("a"), line("a") + '\n{"done": 2}', '{"done": 1}', line("b") + '\n{"done": 1}',
    line("a")[:40] + '\n{"done": 1}', '{"done": 1}\n' + line("a"), "[" * 100_000,
    *(line("a", **{key: value}) + '\n{"done": 1}' for key in ("candidate_ms", "reference_ms") for value in (
        None, "x", [[1.0] * 4], [[1.0] * 3] * 2, [[1.0, 1.0, 1.0, 0.0]] * 2, [[1.0, 1.0, 1.0, math.nan]] * 2,
        [[1.0, 1.0, 1.0, True]] * 2, [[1.0, 1.0, 1.0, "1"]] * 2, {"0": 1})),
    line("a", runtime=None) + '\n{"done": 1}',
])
def test_batch_that_does_not_count(output: str) -> None:
    with pytest.raises(UnfinishedError):
        ParetorayRunner().read(output, ["a"], PLAN)
    assert issubclass(UnfinishedError, LinkError)       # so it is tried again


def test_python_runner_obeys_the_contract(tmp_path: Path) -> None:
    good, bad, reference = tmp_path / "good.onnx", tmp_path / "bad.onnx", tmp_path / "reference.onnx"
    good.write_bytes(to_onnx(reference_graph(3, 32), batch=None).SerializeToString())
    reference.write_bytes(to_onnx(reference_graph(3, 16), batch=2).SerializeToString())
    bad.write_bytes(b"junk")
    plan = Plan(PYTHON_RUNNER, str(reference), (sys.executable,), 1, 2, 3, 1, 2, (3, 16, 16), True)
    models = [str(good), str(bad), str(reference)]
    run = subprocess.run(["sh", "-c", ParetorayRunner().command(plan, models)], capture_output=True, text=True,
                         timeout=120.0)
    first, second, third = ParetorayRunner().read(run.stdout, models, plan)
    assert run.returncode == 0 and isinstance(first, Timings) and isinstance(third, Timings)
    assert np.min(first.candidate_ms) > np.min(first.reference_ms)
    assert first.details["clock"] == "thread_cpu" and first.runtime.startswith("onnxruntime 1.")
    assert isinstance(second, str) and second.startswith(f"cannot run {bad}: ")
    for words in (["--ref", str(reference)], ["--rounds", "0"]):
        wrong = subprocess.run([sys.executable, PYTHON_RUNNER, *words], capture_output=True, text=True, timeout=60.0)
        assert wrong.returncode == 2 and not wrong.stdout


def test_cold_runs_are_dropped() -> None:
    protocol = Protocol()
    assert without_cold((9.0, 8.0, 7.0, 6.0, 5.0), protocol) == (6.0, 5.0)
    assert without_cold((0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3), protocol) == (0.4, 0.3)
    assert without_cold((0.9, 0.8), protocol) == (0.8,)


# --- the phone --------------------------------------------------------------------------------------------------------

def test_state_of_a_phone() -> None:
    state = parse_state(THERMAL)
    assert state.thermal_status == 1 and state.battery_c == 31.8
    assert state.highest() == {0: 1803000, 4: 2348000, 7: 2850000}
    assert state.clock_details([4, 5]) == {"4": ["1197000", "2348000", "2348000", "sched_pixel"], "5": [""] * 4}
    assert state.total_s == pytest.approx(96.35) and state.busy_s == pytest.approx(15.35)
    assert "thermal status is 1" in state.heat(40.0)
    assert parse_state("") == State(None, None, {}, 0.0, 0.0) and parse_state("").heat(0.0) == ""
    later = State(0, 31.8, {}, state.busy_s + 5.0, state.total_s + 20.0)
    assert foreign_load(state, later, 1.0) == pytest.approx(0.2) and later.heat(31.0) and not later.heat(32.0)
    assert foreign_load(state, later, 9.0) == 0.0 and foreign_load(state, state, 0.0) == 0.0


@pytest.mark.parametrize(("wanted", "threads", "cores", "hexadecimal"), [
    ("big", 1, [6, 7], "c0"), ("big", 2, [6, 7], "c0"), ("big", 3, [4, 5, 6, 7], "f0"),
    ("big", 9, list(range(8)), "ff"), ("all", 1, list(range(8)), "ff"), ([4, 0, 4], 1, [0, 4], "11"),
])
def test_cores(wanted: str, threads: int, cores: list[int], hexadecimal: str) -> None:
    assert choose_cores(wanted, PIXEL, threads) == cores and mask(cores) == hexadecimal


def test_cores_that_are_not_there() -> None:
    assert choose_cores("big", {}, 1) == [] and choose_cores([2], {}, 1) == [2]
    for wanted in ([9], [], [-1]):
        with pytest.raises(ConfigError, match="this phone has"):
            choose_cores(wanted, PIXEL, 1)


# --- on the stand-in --------------------------------------------------------------------------------------------------

def one_byte_shorter(content: bytes) -> bytes:
    return content[:-1]


def refuses(content: bytes) -> bytes:
    raise KeyError("Unheard")


def script(folder: Path, name: str, body: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\nfor model; do :; done\n{body}\n")
    return str(path)


@pytest.mark.parametrize(("adapter", "converter", "model", "output", "statistic"), [
    ("onnxruntime_perf_test", None, "$model", "P50 Latency: $size.0 s", "median"),
    ("benchmark_model", "one_byte_shorter", '$(for w; do case $w in --graph=*) echo "${w#--graph=}";; esac; done)',
     "INFO: Inference timings in us: Init: 1, First inference: 1, Warmup (avg): 1, Inference (avg): $size", "average"),
    ("benchncnn", "one_byte_shorter", '$(for w; do case $w in param=*) echo "${w#param=}";; esac; done)',
     "x  min = $size.00  max = 9.00  avg = 9.00", "minimum"),
])
def test_public_program_measures(adb_port: int, phone: AdbDevice, tmp_path: Path, adapter: str, converter: str | None,
                                 model: str, output: str, statistic: str) -> None:
    """The times that these programs print are the sizes of the files they got."""
    program = script(tmp_path, adapter, f'size=$(stat -c %s "{model}"); echo "{output}"')
    target = quick_target(adb_port, phone, runner=program, adapter=adapter,
                          converter=f"{__name__}:{converter}" if converter else None)
    assert target.identity().runtime.startswith(f"{adapter} ") and len(target.identity().runtime.split()[1]) == 16
    handle = target.prepare([Workload(graph=reference_graph(3, 32))])[0]
    assert len(handle.content) == len(to_onnx(reference_graph(3, 32)).SerializeToString()) - bool(converter)
    sample = target.measure([handle])[0]
    assert sample.ratio == pytest.approx(len(handle.content) / len(target._reference.content))
    assert sample.details["statistic"] == statistic and sample.rounds == 6 and sample.drift == 0.0
    assert handle.path.endswith(f".{RUNNERS[adapter].suffix}")


def test_converter_that_fails(adb_port: int, phone: AdbDevice, tmp_path: Path) -> None:
    program = script(tmp_path, "program", "exit 0")
    with pytest.raises(TargetError, match="the converter failed with KeyError: 'Unheard'"):
        quick_target(adb_port, phone, runner=program, adapter="benchncnn", converter=f"{__name__}:refuses")
