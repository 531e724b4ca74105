"""Scale: long runs, many workers, nodes that come, go and vanish.

    python -m tests.benchmarks.cluster FOLDER --parts trials throughput elastic kills [--trials 100000]
        [--workers 64 128 256] [--evaluations 20000] [--sleep-s 0.05] [--kills 200]

`trials`: `report`, and `resume` up to its first evaluation, of a run with so many trials. `throughput`: a search whose
evaluations sleep, on a cluster of four simulated nodes (sleepers.py here): its share of workers / sleep, the
driver's processor time for a trial, its memory against the trials, and the seconds from the command to the first trial.
`elastic`: a head of one CPU under Ray's autoscaler, asked at once for a device, a phone, a GPU, the supernet's ranks
and rollout workers: until everything is there, and until the head is alone again (idle nodes leave after 6 s). `kills`:
tests/benchmarks/kills.py.

Every figure stands beside the load of the machine and, where there is one, its goal. FOLDER keeps the runs, so that a
part that is done is not done again; remove FOLDER/runs/NAME to repeat one.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from orchestrator.config import parse_config
from orchestrator.record.store import RunStore, Trial
from orchestrator.run.search import Search, Stage
from searchspaces.catalogue import make_space
from tests.orchestrator.cluster.autoscaling import autoscaling_cluster
from tests.orchestrator.cluster.test_autoscaling import GROWING, NODE_TYPES
from tests.orchestrator.run.test_search import ROOT, command

BASE = {"seed": 3, "data": {"name": "digits", "limit": 300}, "space": "mobilenetv3-s16",
        "target": {"name": "tests.orchestrator.plugins:Weighing", "unit": 0.001}, "budgets": {"count": 2},
        "latency": {"initial": 12, "maximum": 12, "visits": 1}, "controller": "random",
        "accuracy": {"source": "training", "epochs": 1, "workers": 2, "gpus": 0},
        "delivery": {"alternatives": 1, "retrain_epochs": 1}}
NODES = 4
ROWS_OF_A_PART = 5      # as slow evaluations make them
FIGURE_S = 3600.0


def measured_run(runs: Path) -> Path:
    """A run that is about to search; copies of it do."""
    if not (runs / "base" / "state.json").exists():
        Search(parse_config(BASE, "benchmark"), runs=runs, name="base").run(until=Stage.SEARCH)
    return runs / "base"


def copied(runs: Path, name: str, evaluations: int, workers: int) -> Path:
    folder = runs / name
    shutil.copytree(measured_run(runs), folder)
    ask(folder, evaluations, workers)
    return folder


def ask(folder: Path, evaluations: int, workers: int) -> None:
    raw = yaml.safe_load((folder / "config.yaml").read_text())
    raw["search"]["evaluations"], raw["accuracy"]["workers"] = evaluations, workers
    (folder / "config.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))


# --- a long run ----------------------------------------------------------------------------------------------------


def fill(folder: Path, count: int) -> None:
    """Random networks with made-up accuracies, recorded a few at a time."""
    store = RunStore(folder)
    store.lock()
    space = make_space("mobilenetv3-s16", classes=10, channels=1, options={})
    rng = np.random.default_rng(0)
    rows_NT = np.unique(space.sample_uniform(rng, int(1.2 * count) + 100), axis=0)
    rows_NT = rows_NT[rng.permutation(len(rows_NT))[:count]]
    madds_N, params_N = space.cost(rows_NT)
    target_id = next(iter(store.state()["targets"].values()))["target_id"]
    trials = [Trial(i, space.arch_id(rows_NT[i]), tuple(rows_NT[i].tolist()), space.space_id, "random",
                    float(rng.uniform(0.3, 0.9)), "proxy", 0, float(params_N[i]) / 1000, "predicted", target_id,
                    int(madds_N[i]), int(params_N[i]), None, None, 3, time.time(), 0.05, "node", "", "{}")
              for i in range(len(rows_NT))]
    for start in range(0, len(trials), ROWS_OF_A_PART):
        store.append_trials(trials[start:start + ROWS_OF_A_PART])


def long_run(runs: Path, count: int) -> None:
    folder = runs / f"trials-{count}"
    if not folder.exists():
        fill(copied(runs, folder.name, count + 20, 2), count)
    print(f"{count:,} trials lie in {len(list((folder / 'trials').glob('part-*')))} parts")
    tell("report", count, *timed(command("report", folder.name, "--runs", str(runs))))
    tell("resume to its first evaluation", count, *first_trial(runs, folder.name, 0.0))


def tell(what: str, count: int, wall_s: float, cpu_s: float) -> None:
    print(f"{what} of {count:,} trials: goal 20 s, ours {wall_s:.1f} s, {cpu_s:.1f} s of them processor time (load "
          f"{os.getloadavg()[0]:.0f} on {os.cpu_count()} cores)", flush=True)


def timed(arguments: list[str]) -> tuple[float, float]:
    """Seconds, and seconds of processor time, of a command that has to succeed."""
    before, began = _children_s(), time.perf_counter()
    subprocess.run(arguments, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=FIGURE_S)
    return time.perf_counter() - began, _children_s() - before


def _children_s() -> float:
    times = psutil.Process().cpu_times()
    return float(times.children_user + times.children_system)


def first_trial(runs: Path, name: str, sleep_s: float) -> tuple[float, float]:
    """Of a run that gets 20 evaluations more, by sleeping workers on a Ray of its own: until its first."""
    store = RunStore(runs / name)
    store.update_state(stage=Stage.SEARCH.value)    # an earlier benchmark may have ended it
    recorded = store.trials.rows
    ask(runs / name, recorded + 20, 2)
    first = next(line for line in sleepers(runs, name, "local", sleep_s) if line["trials"] > recorded)
    return float(first["s"]), float(first["cpu_s"])


# --- many workers ----------------------------------------------------------------------------------------------------


def sleepers(runs: Path, name: str, address: str, sleep_s: float) -> list[dict[str, Any]]:
    """Looks at the driver of this run, from its start to the end of its search."""
    done = subprocess.run([sys.executable, "-m", "tests.benchmarks.sleepers", str(runs), name, address, str(sleep_s)],
                          cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=FIGURE_S, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def throughput(runs: Path, workers: int, evaluations: int, sleep_s: float) -> None:
    from ray.cluster_utils import Cluster

    name = f"sleepers-{workers}-{evaluations}"
    file = runs / f"{name}.json"
    if not file.exists():
        shutil.rmtree(runs / name, ignore_errors=True)
        copied(runs, name, evaluations, workers)
        cluster = Cluster(initialize_head=True, head_node_args={
            "num_cpus": 2, "include_dashboard": False, "object_store_memory": 200 * 2**20})
        try:
            for _ in range(NODES):
                cluster.add_node(num_cpus=-(-workers // NODES), object_store_memory=100 * 2**20)
            lines = sleepers(runs, name, cluster.address, sleep_s)
        finally:
            cluster.shutdown()
        file.write_text(json.dumps({"load": os.getloadavg()[0], "lines": lines}))
    told(json.loads(file.read_text()), workers, sleep_s)


def told(found: dict[str, Any], workers: int, sleep_s: float) -> None:
    """Of the middle of the search, when all workers are there and none has run out of work."""
    looks = [line for line in found["lines"] if "done" not in line]
    total = found["lines"][-1]["trials"]
    middle = [line for line in looks if 0.3 * total <= line["trials"] <= 0.95 * total]
    begun = next(line for line in looks if line["trials"])
    print(f"{workers} workers, {sleep_s * 1000:.0f} ms an evaluation (load {found['load']:.0f} on {os.cpu_count()} "
          f"cores): first trial after {begun['first_s']:.1f} s, goal 20")
    if len(middle) > 1:
        trials, seconds = (middle[-1][key] - middle[0][key] for key in ("trials", "s"))
        cpu_ms = 1000 * (middle[-1]["cpu_s"] - middle[0]["cpu_s"]) / max(1, trials)
        rate = trials / seconds
        print(f"  {rate:.0f} evaluations/s, {rate * sleep_s / workers:.2f} of ideal, goal 0.95; "
              f"{cpu_ms:.2f} ms of the driver's processor for a trial, so {1000 / cpu_ms:.0f}/s at most")
        print(f"  the driver's memory from {middle[0]['trials']:,} to {middle[-1]['trials']:,} trials: "
              f"{middle[0]['rss_mb']:.0f} to {middle[-1]['rss_mb']:.0f} MB", flush=True)


# --- a cluster that grows ------------------------------------------------------------------------------------------


def elastic() -> None:
    with (tempfile.TemporaryDirectory(prefix="auto-") as folder, tempfile.TemporaryDirectory() as run,
          autoscaling_cluster(Path(folder), NODE_TYPES) as address):
        done = subprocess.run([sys.executable, "-m", GROWING, address, run], cwd=ROOT, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, text=True, timeout=FIGURE_S, check=True)
    told = [line for line in done.stderr.splitlines() if line.startswith(("grown", "shrunk"))]
    print(f"from one node to {len(NODE_TYPES) + 1} and back: {'; '.join(told)} (load {os.getloadavg()[0]:.0f} on "
          f"{os.cpu_count()} cores)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", nargs="*", default=["trials", "throughput"],
                        choices=["trials", "throughput", "elastic", "kills"])
    parser.add_argument("--trials", type=int, default=100_000)
    parser.add_argument("--workers", type=int, nargs="*", default=[64, 128, 256])
    parser.add_argument("--evaluations", type=int, default=20_000)
    parser.add_argument("--sleep-s", type=float, default=0.05)
    parser.add_argument("--kills", type=int, default=200)
    arguments = parser.parse_args()
    runs = arguments.folder.resolve() / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    print(f"command: python -m tests.benchmarks.cluster {' '.join(sys.argv[1:])}")
    if "trials" in arguments.parts:
        long_run(runs, arguments.trials)
    if "throughput" in arguments.parts:
        for workers in arguments.workers:
            throughput(runs, workers, arguments.evaluations, arguments.sleep_s)
    if "elastic" in arguments.parts:
        elastic()
    if "kills" in arguments.parts:
        subprocess.run([sys.executable, "-m", "tests.benchmarks.kills", str(arguments.folder), "--kills",
                        str(arguments.kills)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
