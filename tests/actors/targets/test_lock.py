"""A device is measured by one process at a time, whoever started it. All processes here are real."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from actors.targets import onnx_cpu
from actors.targets.cuda.target import CudaTarget
from actors.targets.lock import DeviceLock
from actors.targets.onnx_cpu import OnnxCpuTarget
from actors.targets.reference import reference_graph
from actors.targets.target import Workload
from searchspaces.errors import TargetError
from tests.actors.targets.cuda.fakegpu import UUID, FakeGpu

ROOT = Path(__file__).parents[3]
PATIENCE_S = 120.0
HOLDER = """
import sys, time
from actors.targets.lock import DeviceLock
with DeviceLock(sys.argv[1], "a device", 30):
    print("inside", flush=True)
    time.sleep(600)
"""
MEASURER = """
import json, os, sys
from actors.targets.onnx_cpu import OnnxCpuTarget
from actors.targets.reference import reference_graph
from actors.targets.target import Workload
target = OnnxCpuTarget((1, 8, 8), reference_ms=1.0, core=int(sys.argv[1]))
handle = target.prepare([Workload(graph=reference_graph(1, 8))])
print("inside", flush=True)
sys.stdin.readline()
samples = [target.measure(handle)[0] for _ in range(5)]
print(json.dumps([(s.started_at, s.started_at + s.duration_s) for s in samples]))
"""


@pytest.fixture(autouse=True)
def own_folder_for_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))     # of the processes started here
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def start(script: str, argument: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", script, argument], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline().strip() == "inside"
    return process


@contextmanager
def held(name: str) -> Iterator[subprocess.Popen[str]]:
    process = start(HOLDER, name)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE_S)


def measure_on_the_cpu() -> None:
    target = OnnxCpuTarget((1, 8, 8), reference_ms=1.0)
    with closing(target):
        target.measure(target.prepare([Workload(graph=reference_graph(1, 8))]))


def measure_on_the_gpu() -> None:
    CudaTarget((3, 8, 8), 1.0, modules=FakeGpu().modules()).close()


@pytest.mark.parametrize(("name", "measure", "device"), [
    (f"device-cpu{max(os.sched_getaffinity(0))}" if hasattr(os, "sched_getaffinity") else "device-cpu0",
     measure_on_the_cpu, "device cpu[0-9]+ of this machine"),
    (f"GPU-{UUID}", measure_on_the_gpu, f"Fake GPU [(]GPU-{UUID}[)]")])
def test_a_held_device_is_refused_in_time_and_free_after_a_kill(
        name: str, measure: Callable[[], None], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_cpu, "LOCK_TIME_OUT_S", 0.1)
    with held(name) as holder:
        who = f"process {holder.pid}" if sys.platform.startswith("linux") else "another process"
        with pytest.raises(TargetError, match=f"^{device} is being measured by {who}.*; wait until that") as caught:
            measure()
        assert "\n" not in str(caught.value) and ("within 0.1 s" in str(caught.value)) == (device[0] == "d")
        DeviceLock(f"{name}-other", "another device").release()
        holder.send_signal(signal.SIGKILL)
        with DeviceLock(name, "this device", PATIENCE_S) as lock:
            with pytest.raises(TargetError, match=f"is being measured by (process {os.getpid()}|another process)"):
                measure()
            lock.release()
            measure()       # and once more when `lock` is released a second time
    measure()


def test_a_lock_that_cannot_be_made_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "paretoray-GPU-1.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TargetError, match="cannot lock Fake GPU: .*paretoray-GPU-1.lock is not usable"):
        DeviceLock("GPU-1", "Fake GPU")
    assert not (tmp_path / "elsewhere").exists()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    with pytest.raises(TargetError, match="cannot lock Fake GPU: .*No such file or directory"):
        DeviceLock("GPU-1", "Fake GPU", 1.0)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no CPU affinity")
def test_two_processes_take_turns_on_one_core() -> None:
    core = str(max(os.sched_getaffinity(0)))
    processes = [start(MEASURER, core) for _ in range(2)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    deadline = time.monotonic() + PATIENCE_S
    outputs = [process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0] for process in processes]
    visits = sorted((begin, end, owner) for owner, output in enumerate(outputs) for begin, end in json.loads(output))
    assert len(visits) == 10
    assert all(first[1] <= second[0] for first, second in zip(visits, visits[1:])), "two visits at once"
    turns = sum(first[2] != second[2] for first, second in zip(visits, visits[1:]))
    assert turns >= 3, "nobody is kept waiting for all of the other's visits"
