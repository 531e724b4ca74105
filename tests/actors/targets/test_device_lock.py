"""A device is measured by one process at a time, whoever started it. All processes here are real."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from actors.targets.host import device_lock
from searchspaces.errors import TargetError

ROOT = Path(__file__).parents[3]
PATIENCE_S = 120.0
HOLDER = """
import sys, time
from actors.targets.host import device_lock
with device_lock(sys.argv[1], 30):
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
print("ready", flush=True)
sys.stdin.readline()
samples = [target.measure(handle)[0] for _ in range(5)]
print(json.dumps([(s.started_at, s.started_at + s.duration_s) for s in samples]))
"""


def start(script: str, argument: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", script, argument], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline().strip() in ("inside", "ready")
    return process


def test_a_held_device_is_refused_in_time_and_free_after_a_kill() -> None:
    name = f"test-{os.getpid()}"
    holder = start(HOLDER, name)
    try:
        with pytest.raises(TargetError, match=f"device {name} of this machine is being measured") as caught, \
                device_lock(name, 0.1):
            pass
        assert "\n" not in str(caught.value)
        with device_lock(f"{name}-other", 0.1):
            pass
        holder.send_signal(signal.SIGKILL)
        with device_lock(name, PATIENCE_S), pytest.raises(TargetError), device_lock(name, 0.05):
            pass
        with device_lock(name, 0.0):
            pass
    finally:
        holder.kill()
        holder.communicate()
        for path in Path(tempfile.gettempdir()).glob(f"paretoray-device-{name}*"):
            path.unlink()


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
