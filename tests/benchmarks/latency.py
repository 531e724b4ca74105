"""How good and how dear latency measurements on this CPU are.

    python -m tests.benchmarks.latency                                   # everything, about three minutes
    python -m tests.benchmarks.latency --parts repeatability --networks 10 --visits 4
    python -m tests.benchmarks.latency --parts predictor --space mobilenetv3 --measured 120

repeatability   every network is visited several times in turn, idle and with a process that multiplies matrices on the
                other cores; CV is the root mean square over networks of the standard deviation between visits over the
                mean, tau Kendall's between two repetitions of the whole set, "unpaired" the plain median CPU time
cost            milliseconds for graph and file, session, visit
predictor       error on networks that were not fitted on, against the number of measured networks
"""
from __future__ import annotations

import argparse
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau

from actors.targets.onnx_cpu import OnnxCpuTarget
from actors.targets.target import LatencySample, Workload, merge_samples
from orchestrator.prediction.predictor import LatencyPredictor
from orchestrator.run.stages.measure import spread_sample
from searchspaces.catalogue import make_space
from searchspaces.onnxgraph import to_onnx
from searchspaces.space import SearchSpace, Tokens

PARTS = ("repeatability", "cost", "predictor")
SIZES = (25, 50, 100, 200)
REPEATS = 5     # random splits per size
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
Samples = list[list[LatencySample]]


def multiply(core: int) -> None:
    """Steady load with cache traffic, until killed or orphaned."""
    os.sched_setaffinity(0, {core})     # also of the threads that the product below starts
    parent = os.getppid()
    a = np.random.default_rng(0).random((400, 400))
    while os.getppid() == parent:
        a = a @ a
        a /= np.abs(a).max()


@contextmanager
def load_on(cores: Sequence[int]) -> Iterator[None]:
    workers = [multiprocessing.get_context("spawn").Process(target=multiply, args=(core,), daemon=True)
               for core in cores]
    for worker in workers:
        worker.start()
    time.sleep(3.0)
    try:
        yield
    finally:
        for worker in workers:
            worker.terminate()
            worker.join(timeout=10.0)


def visit_all(target: OnnxCpuTarget, space: SearchSpace, rows: Tokens, visits: int) -> Samples:
    """[visit][network]; every visit prepares anew, so that what a session's memory layout changes is seen too."""
    return [[target.measure(target.prepare([Workload(graph=space.graph(row))]))[0] for row in rows]
            for _ in range(visits)]


def spread(values_VN: NDArray[np.float64]) -> tuple[float, float]:
    """(CV in %, mean Kendall tau between visits)."""
    cv = np.sqrt(np.mean((values_VN.std(axis=0, ddof=1) / values_VN.mean(axis=0)) ** 2))
    taus = [kendalltau(a, b).statistic for a, b in combinations(values_VN, 2)]
    return 100 * float(cv), float(np.mean(taus))


def report(name: str, reference: str, ours: str) -> None:
    print(f"{name:52s} {reference:>28s}   {ours}", flush=True)


def repeatability(target: OnnxCpuTarget, space: SearchSpace, rows: Tokens, visits: int) -> None:
    core = target.measure(target.prepare([Workload(graph=space.graph(rows[0]))]))[0].details["core"]
    for condition, busy in (("idle", []), ("other cores loaded", [c for c in CORES if c != core])):
        with load_on(busy):
            samples = visit_all(target, space, rows, visits)
        ratios = np.array([[s.ratio for s in visit] for visit in samples])
        plain = np.array([[np.median(np.concatenate(s.candidate_ms)) for s in visit] for visit in samples])
        pairs = (ratios[: visits // 2 * 2 : 2] + ratios[1 : visits // 2 * 2 : 2]) / 2
        load = np.mean([s.load for visit in samples for s in visit])
        for name, values, target_text in (("one visit", ratios, "CV <= 2.5 %, tau >= 0.95"),
                                          ("mean of two", pairs, "CV 1.1-1.9 %, tau .96-.99"),
                                          ("unpaired", plain, "CV 8-10 %, tau .87")):
            if len(values) > 1:
                cv, tau = spread(values)
                report(f"repeatability, {condition}, {name}", target_text,
                       f"CV {cv:.2f} %, tau {tau:.3f} (others used {load:.0%})")


def cost(target: OnnxCpuTarget, space: SearchSpace, rows: Tokens) -> None:
    """Of the spread networks; thread CPU time for what computes, wall time for the visit."""
    graph_ms, session_ms, visit_ms = [], [], []
    for row in rows:
        start = time.thread_time()
        content = to_onnx(space.graph(row)).SerializeToString()
        middle = time.thread_time()
        handle = target.prepare([Workload(onnx=content)])
        end = time.thread_time()
        graph_ms.append(1e3 * (middle - start))
        session_ms.append(1e3 * (end - middle))
        visit_ms.append(1e3 * target.measure(handle)[0].duration_s)
    for name, reference, values in (("graph and file", "6-11 ms (32 px), 17-23 (224)", graph_ms),
                                    ("session", "20-100 ms", session_ms), ("visit", "150-800 ms", visit_ms)):
        report(f"cost per architecture, {name}", reference,
               f"{np.median(values):.1f} ms median, {max(values):.1f} most")


def predictor(target: OnnxCpuTarget, space: SearchSpace, measured: int) -> None:
    """Tested on networks left out of the fit, whose labels are means of two visits."""
    rows = spread_sample(space, measured + measured // 4, 0)
    first, second = visit_all(target, space, rows, 2)
    label = np.array([s.latency_ms for s in first])
    stderr = np.array([s.stderr_ms for s in first])
    truth = np.array([merge_samples(pair).latency_ms for pair in zip(first, second)])
    other = np.array([s.latency_ms for s in second])
    repeat = float(np.mean(np.abs(np.log(other / label)))) / np.sqrt(2.0)
    report("label noise, mean absolute, from two visits", "", f"{repeat:.2%} over {len(rows)} networks, range "
           f"{label.min():.3g}-{label.max():.3g} ms")
    rng = np.random.default_rng(0)
    for size in (s for s in SIZES if s <= measured):
        errors, floors, corrected = [], [], 0
        for _ in range(REPEATS):
            order = rng.permutation(len(rows))
            fit, test = order[:size], order[size:]
            model = LatencyPredictor.fit(space, rows[fit], label[fit], stderr[fit])
            errors.append(float(np.mean(np.abs(model.predict(rows[test]) / truth[test] - 1.0))))
            floors.append(model.noise_floor)
            corrected += model.correction is not None
        reference = {50: "2.2-2.4 %", 100: "1.6-2.0 % (target < 3 %)", 200: "1.4-1.8 %"}.get(size, "")
        report(f"predictor, {size} networks measured, held-out error", reference,
               f"{np.mean(errors):.2%}, noise floor {np.mean(floors):.2%}" + (f", corrected {corrected}/{REPEATS}"
                                                                             if corrected else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--space", default="mobilenetv3-s32")
    parser.add_argument("--networks", type=int, default=30, help="for repeatability and cost")
    parser.add_argument("--visits", type=int, default=6, help="per network, for repeatability")
    parser.add_argument("--measured", type=int, default=200, help="networks to fit the predictor on, at most")
    arguments = parser.parse_args()
    space = make_space(arguments.space, classes=10, channels=3, options={})
    shape = space.graph(space.extremes()[1]).input_shape
    target = OnnxCpuTarget(shape)
    rows = spread_sample(space, arguments.networks, 1)
    print(f"{shlex.join(['python', '-m', 'tests.benchmarks.latency', *sys.argv[1:]])}\n{space.space_id} on "
          f"{target.identity().device}, {target.identity().runtime}, reference {target.reference_ms():.3g} ms\n")
    report("figure", "specification or target", "ours")
    if "repeatability" in arguments.parts:
        repeatability(target, space, rows, arguments.visits)
    if "cost" in arguments.parts:
        cost(target, space, rows)
    if "predictor" in arguments.parts:
        predictor(target, space, arguments.measured)
    target.close()


if __name__ == "__main__":
    main()
