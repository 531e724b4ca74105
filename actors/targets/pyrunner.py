#!/usr/bin/env python3
"""The on-device runner in Python: for Linux boards, and where the C++ runner is not built. Needs onnxruntime and numpy.

    RUNNER --ref REF.onnx --warmup W --rounds R --runs N --threads T [--batch B] MODEL...

Prints one JSON line per model: `candidate_ms` and `reference_ms` (N timings in each of R rounds, in the order of
running: N reference runs, then N candidate runs), `clock` ("thread_cpu" with one thread, otherwise "wall"), `affinity`,
`temperature_c` by thermal zone, `runtime`, or the model and an `error` of one sentence; then {"done": models}. Dropping
cold runs and pairing is the reader's. The exit code is 0 unless the command line is wrong. Stands alone: one file.
"""
from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

Run = Callable[[], float]       # runs a network once and returns ms


def load(path: str, threads: int, batch: int) -> Run:
    """Raises ValueError, or what the runtime raises, where the file cannot be run."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4      # its errors arrive as exceptions
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    rng, feed = np.random.default_rng(0), {}
    for argument in session.get_inputs():
        shape = [batch if index == 0 and not isinstance(size, int) else size
                 for index, size in enumerate(argument.shape)]
        kinds = ("tensor(float)", "tensor(uint8)")
        if argument.type not in kinds or not all(isinstance(size, int) for size in shape):
            raise ValueError(f"input {argument.name} is {argument.type} {argument.shape}; only float and uint8 tensors "
                             "with a fixed size after the first dimension can be timed")
        if shape and shape[0] != batch:
            raise ValueError(f"the network is made for batch {shape[0]}, asked for is batch {batch}")
        feed[argument.name] = (rng.random(shape, dtype=np.float32) if argument.type == kinds[0]
                               else rng.integers(0, 256, shape, dtype=np.uint8))
    clock = time.thread_time_ns if threads == 1 else time.perf_counter_ns

    def run() -> float:
        start = clock()
        session.run(None, feed)
        return (clock() - start) / 1e6

    return run


def measure(reference: Run, candidate: Run, arguments: argparse.Namespace) -> dict[str, Any]:
    for _ in range(arguments.warmup):
        reference()
        candidate()
    rounds: dict[str, list[list[float]]] = {"candidate_ms": [], "reference_ms": []}
    for _ in range(arguments.rounds):
        rounds["reference_ms"].append([reference() for _ in range(arguments.runs)])
        rounds["candidate_ms"].append([candidate() for _ in range(arguments.runs)])
    return {**rounds, "clock": "thread_cpu" if arguments.threads == 1 else "wall",
            "affinity": sorted(os.sched_getaffinity(0)), "temperature_c": temperatures(),
            "runtime": f"onnxruntime {onnxruntime.__version__}"}


def temperatures() -> dict[str, float]:
    """Of the thermal zones that can be read, in degrees Celsius."""
    found = {}
    for zone in sorted(Path("/sys/class/thermal").glob("thermal_zone*")):
        try:
            found[(zone / "type").read_text().strip()] = int((zone / "temp").read_text()) / 1000.0
        except (OSError, ValueError):
            continue
    return found


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times ONNX models against a reference network.")
    parser.add_argument("--ref", required=True)
    for name in ("warmup", "rounds", "runs", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("models", nargs="+")
    arguments = parser.parse_args(words)
    if min(arguments.rounds, arguments.runs, arguments.threads, arguments.batch) < 1 or arguments.warmup < 0:
        parser.error("--rounds, --runs, --threads and --batch must be at least 1, --warmup at least 0")
    return arguments


def report(model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    path = arguments.ref
    try:
        reference = load(path, arguments.threads, arguments.batch)
        path = model
        return {"model": model, **measure(reference, load(path, arguments.threads, arguments.batch), arguments)}
    except Exception as error:      # the runtime raises its own family, and the next model must have its turn
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        return {"model": model, "error": f"cannot run {path}: {text}"}


def anchor(arguments: argparse.Namespace) -> Run | None:
    """A first session that only exists. Without it the reference is the first one in the process, which is 2 to 4 %
    slower than every later one (the same file timed against itself had a ratio of 0.97, with it 0.99)."""
    try:
        run = load(arguments.ref, arguments.threads, arguments.batch)
        run()
    except Exception:       # every model's line will say so
        return None
    return run


def main() -> None:
    arguments = parse(sys.argv[1:])
    gc.disable()
    held = anchor(arguments)
    for model in arguments.models:
        print(json.dumps(report(model, arguments)), flush=True)         # noqa: T201
    del held
    print(json.dumps({"done": len(arguments.models)}), flush=True)      # noqa: T201


if __name__ == "__main__":
    main()
