"""What the C++ runner measures beside what the CPU target measures from Python, for the same networks on one core.

    python -m tests.benchmarks.runner                      # a minute or two on a quiet machine
    python -m tests.benchmarks.runner --networks 6 --visits 2

Both visit every network in turn, `--visits` times, with the same reference network, drops and clock (thread CPU time).
latency     the runner's 25th percentile of the candidate's timings over the target's, of the two visits next to each
            other; the target's timings hold what Python adds to a run
paired      the runner's ratio candidate / reference over the target's, which is what a search sees
agreement   Kendall's tau between both rankings of the networks, beside the tau of each with itself on another visit
Needs what tests/actors/targets/test_runner.py needs: a compiler and ONNX Runtime's headers.
"""
from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from scipy.stats import kendalltau

from actors.targets.onnx_cpu import OnnxCpuTarget
from actors.targets.pairing import Rounds, Visit, percentile_25
from actors.targets.reference import reference_graph
from actors.targets.target import Workload
from orchestrator.run.stages.measure import spread_sample
from searchspaces.catalogue import make_space
from searchspaces.onnxgraph import to_onnx
from tests.actors.targets.runner_build import CannotBuildError, build_runner

WARM_UP, ROUNDS, RUNS, DROP = 3, 10, 12, 5      # of the runner, for networks of any size
TIMEOUT_S = 120.0
Measure = Callable[[Path], Visit]


def from_python(target: OnnxCpuTarget) -> Measure:
    def measure(path: Path) -> Visit:
        sample = target.measure(target.prepare([Workload(onnx=path.read_bytes())]))[0]
        return Visit(sample.candidate_ms, sample.reference_ms_rounds)

    return measure


def from_runner(program: Path, reference: Path) -> Measure:
    """Inherits this process's core, which is the target's."""
    numbers = {"--warmup": WARM_UP, "--rounds": ROUNDS, "--runs": RUNS, "--threads": 1}
    command = [str(program), "--ref", str(reference), *(str(part) for pair in numbers.items() for part in pair)]

    def measure(path: Path) -> Visit:
        done = subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
        line = json.loads(done.stdout.splitlines()[0])
        return Visit(kept(line["candidate_ms"]), kept(line["reference_ms"]))

    return measure


def kept(rounds: list[list[float]]) -> Rounds:
    return tuple(tuple(timings[DROP:]) for timings in rounds)


def latency_ms(visit: Visit) -> float:
    return float(np.median([percentile_25(timings) for timings in visit.candidate_ms]))


def quotient(name: str, runner_VN: NDArray[np.float64], python_VN: NDArray[np.float64]) -> None:
    """[visit, network]. The mean and spread are over networks, of the geometric means over their visits."""
    logs_N = np.log(runner_VN / python_VN).mean(axis=0)
    mean, least, most = np.exp([logs_N.mean(), logs_N.min(), logs_N.max()])
    print(f"{name}, runner over Python: geometric mean {mean:.3f}, networks from {least:.3f} to {most:.3f}, "
          f"sd {100 * logs_N.std(ddof=1):.1f} %")


def tau(values_VN: NDArray[np.float64]) -> float:
    return float(np.mean([kendalltau(a, b).statistic for a, b in combinations(values_VN, 2)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="mobilenetv3-s32")
    parser.add_argument("--networks", type=int, default=20)
    parser.add_argument("--visits", type=int, default=4, help="of both, at least 2")
    arguments = parser.parse_args()
    space = make_space(arguments.space, classes=10, channels=3, options={})
    rows = spread_sample(space, arguments.networks, 1)
    shape = space.graph(rows[0]).input_shape
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            program = build_runner(folder)
        except CannotBuildError as missing:
            sys.exit(str(missing))
        onnx.save(to_onnx(reference_graph(shape[0], shape[1])), folder / "reference.onnx")
        paths = [folder / f"{index}.onnx" for index in range(len(rows))]
        for path, row in zip(paths, rows):
            onnx.save(to_onnx(space.graph(row)), path)
        target = OnnxCpuTarget(shape)
        print(f"{shlex.join(['python', '-m', 'tests.benchmarks.runner', *sys.argv[1:]])}\n{len(rows)} networks of "
              f"{space.space_id}, {arguments.visits} visits each, {target.identity().device}, "
              f"{target.identity().runtime}, load of the last minute {os.getloadavg()[0]:.1f}\n")
        measures = [from_runner(program, folder / "reference.onnx"), from_python(target)]
        visits = [[[measure(path) for measure in measures] for path in paths] for _ in range(arguments.visits)]
        target.close()
    latency_VNM = np.array([[[latency_ms(one) for one in pair] for pair in visit] for visit in visits])
    ratio_VNM = np.array([[[one.ratio for one in pair] for pair in visit] for visit in visits])
    quotient("latency", latency_VNM[..., 0], latency_VNM[..., 1])
    quotient("paired ratio", ratio_VNM[..., 0], ratio_VNM[..., 1])
    print(f"agreement of the rankings: tau {kendalltau(*ratio_VNM.mean(axis=0).T).statistic:.3f}; of one visit with "
          f"another: runner {tau(ratio_VNM[..., 0]):.3f}, Python {tau(ratio_VNM[..., 1]):.3f}")
    print(f"range of the networks: {latency_VNM[..., 1].min():.3g}-{latency_VNM[..., 1].max():.3g} ms")


if __name__ == "__main__":
    main()
