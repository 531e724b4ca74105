"""Searches of every controller on a small cluster whose processes and nodes are killed at random.

    python -m tests.benchmarks.kills FOLDER [--kills 200] [--seed 0] [--controllers pnag fnas ...]

A head and two further nodes on this machine. One search after the other; some seconds after every sign of progress (a
measurement, an epoch, a trial, a model) one process of the search (a rollout worker or trainer, the supernet, one of
its ranks, a learner, the knowledge pool, a latency worker, a fine-tuning task) or one whole node dies by SIGKILL, and a
killed node is replaced. How long the search then leaves nothing behind is what the kill cost: 0 to 6 s of it pass
between signs anyway. A search that ends with an error or hangs needed a person; it is resumed once.
FOLDER/kills.jsonl remembers every search, so that a campaign goes on where it was stopped.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from ray.cluster_utils import Cluster

from orchestrator.record.store import RunStore
from tests.orchestrator.run.test_fnas_runs import TINY as PROXY
from tests.orchestrator.run.test_search import ROOT, TINY, command

SUPERNET = {"target": {"name": "tests.orchestrator.plugins:Weighing", "unit": 0.001},
            "supernet": {"epochs": 4, "batch_size": 64, "workers": 2, "parts": 2, "cpus": 1},
            "search": {"evaluations": 40, "calibration_images": 64, "rollouts": 3}}
NARROW = {"name": "mobilenetv3-s16", "width": 0.25}
UNAS = {"name": "unas", "warm_up": 0.25, "learning_rate": 0.1, "latency": {"samples": 6, "networks": 12}}
CONFIGS: dict[str, dict[str, Any]] = {
    "random": SUPERNET | {"space": NARROW, "controller": "random"},
    "evolution": SUPERNET | {"space": NARROW, "controller": {"name": "evolution", "population": 8, "sample": 4}},
    "nsga2": SUPERNET | {"space": NARROW, "controller": {"name": "nsga2", "population": 8}},
    "pnag": SUPERNET | {"space": NARROW, "controller": "pnag"},
    "unas": SUPERNET | {"space": NARROW, "controller": UNAS, "supernet": SUPERNET["supernet"] | {"batch_size": 32}},
    "nss": SUPERNET | {"space": {"name": "expanded-s16", "width": 16, "width_bin": 8}, "budgets": {"values_ms": [10.0]},
                       "controller": {"name": "nss", "learning_rate": 0.3, "warm_up": 0.25}},
    "fnas": {"target": SUPERNET["target"]},
}
NODE, GAP_S, PATIENCE_S = "node", (0.0, 6.0), 400.0


def config_of(controller: str, seed: int) -> str:
    changes = CONFIGS[controller]
    raw = yaml.safe_load(PROXY if controller == "fnas" else TINY) | changes | {"seed": seed}
    if controller == "fnas":
        raw["controller"]["policy"] = {"hidden": 16, "num_learners": 1}
    return str(yaml.safe_dump(raw))


class Nodes:
    """The cluster, and what can be killed in it. The head holds no work but the driver's and what must stay with it."""

    def __init__(self) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args={
            "num_cpus": 3, "include_dashboard": False, "object_store_memory": 300 * 2**20,
            "_system_config": {"health_check_period_ms": 1000, "health_check_failure_threshold": 15}})
        self.others: list[Any] = []
        self.refill()

    def refill(self) -> None:
        while len(self.others) < 2:
            self.others.append(self.cluster.add_node(num_cpus=3, object_store_memory=150 * 2**20))

    def victims(self) -> dict[str, list[psutil.Process]]:
        """Workers of the search by what they are."""
        found: dict[str, list[psutil.Process]] = {}
        for process in psutil.Process().children(recursive=True):
            try:
                title = " ".join(process.cmdline())
            except psutil.Error:
                continue
            match = re.match(r"ray::(?!IDLE|\w+Agent)(fine-tune|retrain|\w+)", title)
            if match and process.status() != psutil.STATUS_ZOMBIE:
                found.setdefault(match.group(1), []).append(process)
        return found

    def kill(self, rng: random.Random) -> str:
        """Somebody, each kind as often as any other; "" where nobody works."""
        victims = self.victims()
        if not victims:
            return ""
        kind = rng.choice([*sorted(victims), NODE])
        if kind == NODE:
            self.cluster.remove_node(self.others.pop(rng.randrange(len(self.others))), allow_graceful=False)
            return NODE
        process = rng.choice(victims[kind])
        try:
            process.kill()
        except psutil.NoSuchProcess:
            return ""
        return kind


def search(nodes: Nodes, folder: Path, name: str, controller: str, rng: random.Random) -> dict[str, Any]:
    """One search to its end, with kills; what became of it."""
    (folder / f"{name}.yaml").write_text(config_of(controller, rng.randrange(1000)))
    killed: list[list[Any]] = []
    began = time.time()
    codes = [_drive(nodes, folder, name, ["search", str(folder / f"{name}.yaml"), "--name", name], killed, rng)]
    if codes[0] != 0:
        codes.append(_drive(nodes, folder, name, ["resume", name], [], random.Random(0), most=0))
    trials = RunStore(folder / "runs" / name).read_trials() if (folder / "runs" / name).exists() else []
    wanted = int(yaml.safe_load(config_of(controller, 0))["search"]["evaluations"])
    return {"name": name, "controller": controller, "killed": killed, "codes": codes, "s": round(time.time() - began),
            "trials": len(trials), "missing": max(0, wanted - len(trials)),
            "failed": sum(bool(trial.error) for trial in trials),
            "doubled": len(trials) - len({trial.arch_id for trial in trials}),
            "lost": sum(trial.sequence != i for i, trial in enumerate(trials)), "load": os.getloadavg()[0]}


def earlier(progress: Path) -> list[dict[str, Any]]:
    """Searches of a campaign that was stopped."""
    return [json.loads(line) for line in progress.read_text().splitlines()] if progress.exists() else []


def _drive(nodes: Nodes, folder: Path, name: str, arguments: list[str], killed: list[list[Any]],
           rng: random.Random, most: int = 1000) -> int:
    """The exit code; -1 where it had to be ended because nothing happened any more. Adds to `killed` when, what, and
    after how many seconds there was a sign of progress again."""
    with (folder / f"{name}.log").open("a") as log:
        driver = subprocess.Popen(
            command(*arguments, "--runs", str(folder / "runs"), "--address", nodes.cluster.address), cwd=ROOT,
            stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"RAY_AUTH_MODE": "disabled"})   # as the cluster
        began = seen_s = time.time()
        due_s, seen = math.inf, signs(folder / "runs" / name)
        while driver.poll() is None and time.time() - seen_s < PATIENCE_S:
            time.sleep(0.1)
            if (now := signs(folder / "runs" / name)) != seen:
                seen, seen_s = now, time.time()
                if killed and len(killed[-1]) == 2:
                    killed[-1].append(round(seen_s - began - killed[-1][0], 1))
                due_s = min(due_s, seen_s + rng.uniform(*GAP_S))
            if time.time() < due_s or len(killed) >= most:
                continue
            nodes.refill()
            due_s = math.inf
            if kind := nodes.kill(rng):
                killed.append([round(time.time() - began, 1), kind])
                log.write(f"--- killed a {kind} at {time.time() - began:.1f} s\n")
                log.flush()
        nodes.refill()
        if driver.poll() is None:
            driver.kill()
            driver.wait()
            return -1
        return int(driver.returncode)


def signs(run: Path) -> tuple[str, ...]:
    """What a run has left behind so far."""
    return tuple(sorted(str(path) for folder in ("latency", "trials", "checkpoints", "models")
                        for path in (run / folder).rglob("*") if not path.name.startswith(".")))


def report(rows: list[dict[str, Any]]) -> None:
    kinds = Counter(kind for row in rows for _, kind, *_ in row["killed"])
    print(f"{sum(kinds.values())} kills in {len(rows)} searches; seconds until the next sign of progress:")
    for kind, count in kinds.most_common():
        quiet_s = [kill[2] for row in rows for kill in row["killed"] if kill[1] == kind and len(kill) > 2]
        cost = f"median {np.median(quiet_s):.1f}, longest {max(quiet_s):.1f} ({len(quiet_s)})" if quiet_s else ""
        print(f"  {count:3d} {kind:20s} {cost}")
    for controller in dict.fromkeys(row["controller"] for row in rows):
        of_it = [row for row in rows if row["controller"] == controller]
        print(f"  {controller:10s} {len(of_it):3d} searches, {sum(len(row['killed']) for row in of_it):3d} kills, "
              f"{sum(row['trials'] for row in of_it)} trials")
    for what in ("missing", "lost", "doubled", "failed"):
        print(f"trials {what}: goal 0, ours {sum(row[what] for row in rows)}")
    person = [row["name"] for row in rows if row["codes"][0] != 0]
    print(f"searches that needed a person: goal 0, ours {len(person)} {' '.join(person)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--controllers", nargs="*", default=list(CONFIGS), choices=list(CONFIGS))
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    progress = folder / "kills.jsonl"
    rows = earlier(progress)
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}     # of the nodes too
    nodes = Nodes()
    try:
        while sum(len(row["killed"]) for row in rows) < arguments.kills:
            controller = arguments.controllers[len(rows) % len(arguments.controllers)]
            name = f"{controller}-{len(rows)}"
            shutil.rmtree(folder / "runs" / name, ignore_errors=True)   # of a campaign that was stopped in it
            rows.append(search(nodes, folder, name, controller, random.Random(f"{arguments.seed}-{len(rows)}")))
            with progress.open("a") as lines:
                lines.write(json.dumps(rows[-1]) + "\n")
            print(json.dumps(rows[-1]), flush=True)
    finally:
        nodes.cluster.shutdown()
    report(rows)


if __name__ == "__main__":
    sys.exit(main())
