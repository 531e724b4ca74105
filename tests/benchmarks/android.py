"""What the Android chain costs, without a phone: a real adb server and client, a stand-in phone on loopback.

    python -m tests.benchmarks.android                        # everything, about two minutes
    python -m tests.benchmarks.android --parts faults
    python -m tests.benchmarks.android --parts overhead --runner build/linux/paretoray_runner --libraries \
        build/linux/libonnxruntime.so.1                       # with the C++ runner; with --serial on a real phone

overhead   per architecture, alone and in one batch: writing the file, pushing it, a runner call less the runs it times,
           reading its output, looking at the phone's state; with our Python runner (which starts an interpreter and
           onnxruntime in every call), or the given one, and with one that times nothing, which leaves the chain itself
faults     time from a fault to the sample, less that of a call without one; the phone comes back after 0.5 s
"""
from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from actors.targets.android.target import AndroidTarget
from actors.targets.android.target import target as android
from actors.targets.target import LatencySample, Workload
from searchspaces.catalogue import make_space
from searchspaces.errors import TargetError
from searchspaces.onnxgraph import to_onnx
from searchspaces.space import SearchSpace
from tests.actors.targets.android.adbchain import PYTHON_RUNNER, QUICK_RUNNER, adb_server, attached_phone
from tests.actors.targets.android.adbdevice import AdbDevice, RunFault

PARTS = ("overhead", "faults")
RUN_FAULTS: tuple[RunFault, ...] = ("silent", "short", "garbage", "drop", "reboot")
STALL_S = 3.0


@contextmanager
def clocked(target: AndroidTarget) -> Iterator[dict[str, float]]:
    """Seconds spent in pushes, runner calls and reading."""
    spent = {"push": 0.0, "run": 0.0, "read": 0.0}

    def watch(owner: object, name: str, key: str) -> Callable[[], None]:
        original = getattr(owner, name)

        def timed(*arguments: object) -> object:
            start = time.perf_counter()
            try:
                return original(*arguments)
            finally:
                spent[key] += time.perf_counter() - start

        setattr(owner, name, timed)
        return lambda: delattr(owner, name)

    undo = [watch(target._phone, "push", "push"), watch(target, "_call", "run"), watch(target._runner, "read", "read")]
    try:
        yield spent
    finally:
        for step in undo:
            step()


def timed_s(samples: list[LatencySample]) -> float:
    """Seconds that the runner was asked to time, with the runs that were dropped."""
    total = 0.0
    for sample in samples:
        for kept, asked in ((sample.candidate_ms, 12 if sample.latency_ms < 1.0 else 8),
                            (sample.reference_ms_rounds, 12 if sample.reference_ms < 1.0 else 8)):
            total += sum(asked * float(np.mean(timings)) for timings in kept)
    return total / 1e3


def overhead(name: str, target: AndroidTarget, space: SearchSpace, networks: int) -> None:
    rows = space.sample_uniform(np.random.default_rng(0), 2 * networks)
    alone = [rows[index:index + 1] for index in range(networks)]
    for title, batches in (("alone", alone), (f"batch of {networks}", [rows[networks:]])):
        write_s, samples, began = 0.0, [], time.perf_counter()
        with clocked(target) as spent:
            for batch in batches:
                start = time.perf_counter()
                contents = [to_onnx(space.graph(row)).SerializeToString() for row in batch]
                write_s += time.perf_counter() - start
                samples += target.measure(target.prepare([Workload(onnx=content) for content in contents]))
        total_s, timing_s = time.perf_counter() - began, timed_s(samples) if "quick" not in name else 0.0
        looks_s = total_s - write_s - spent["push"] - spent["run"]
        ms = [1e3 * seconds / networks for seconds in (write_s, spent["push"], spent["run"] - spent["read"] - timing_s,
                                                      spent["read"], looks_s, total_s - timing_s)]
        print(f"{name:16s} {title:11s} write {ms[0]:5.1f}  push {ms[1]:5.1f}  run {ms[2]:7.1f}  read {ms[3]:4.2f}  "
              f"state {ms[4]:5.1f}  together {ms[5]:7.1f} ms per architecture", flush=True)


def faults(target: AndroidTarget, phone: AdbDevice, space: SearchSpace) -> None:
    target._time_out_s, android.START_S, android.GRACE_S = STALL_S / 2, STALL_S / 2, 0.0
    rows = iter(space.sample_uniform(np.random.default_rng(1), 100))

    def measure() -> float:
        start = time.perf_counter()
        target.measure(target.prepare([Workload(graph=space.graph(next(rows)))]))
        return time.perf_counter() - start

    plain_s = float(np.median([measure() for _ in range(5)]))
    print(f"{'no fault':44s} {plain_s:6.2f} s for one network", flush=True)

    def report(name: str, play: Callable[[], None], after: Callable[[], None] = lambda: None) -> None:
        recovered = []
        for _ in range(3):
            play()
            start = time.perf_counter()
            try:
                measure()
                recovered.append(time.perf_counter() - start - plain_s)
            except TargetError as error:
                recovered.append(float("nan"))
                print(f"    {error}")
            after()
        print(f"{name:44s} {np.median(recovered):6.2f} s more", flush=True)

    report("link cut in the middle of a push", lambda: setattr(phone.faults, "push_drops", 1))
    for fault in RUN_FAULTS:
        report({"silent": "empty output with exit code 0", "short": "half the output, exit code 0",
                "garbage": "garbage, exit code 0", "drop": "link cut in the middle of a run",
                "reboot": "reboot in the middle of a run"}[fault], lambda fault=fault: phone.faults.runs.append(fault))
    report(f"run that stalls (time-out {STALL_S:g} s)", lambda: phone.faults.runs.append("stall"))
    report("offline when work comes, back at once", lambda: (phone.leave(), phone.come_back()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--space", default="mobilenetv3-s32")
    parser.add_argument("--networks", type=int, default=8)
    parser.add_argument("--serial", help="a real phone, for overhead")
    parser.add_argument("--runner", default=PYTHON_RUNNER)
    parser.add_argument("--libraries", nargs="*", default=[])
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)        # of the faults that are played
    space = make_space(arguments.space, classes=10, channels=3, options={})
    shape = space.graph(space.extremes()[1]).input_shape
    print(f"{shlex.join(['python', '-m', 'tests.benchmarks.android', *sys.argv[1:]])}\nload average "
          f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    if arguments.serial is not None:
        target = AndroidTarget(shape, runner=arguments.runner, libraries=arguments.libraries, serial=arguments.serial)
        overhead(target.identity().device, target, space, arguments.networks)
        target.close()
        return
    with adb_server() as port, tempfile.TemporaryDirectory() as folder, attached_phone(port, Path(folder)) as phone:
        for runner, libraries in ((arguments.runner, arguments.libraries), (QUICK_RUNNER, [])):
            target = AndroidTarget(shape, runner=runner, libraries=libraries, serial=phone.serial, adb_port=port,
                                   max_drift=10.0)
            if "overhead" in arguments.parts:
                overhead(Path(runner).stem, target, space, arguments.networks)
            if "faults" in arguments.parts and runner == QUICK_RUNNER:
                faults(target, phone, space)
            target.close()


if __name__ == "__main__":
    main()
