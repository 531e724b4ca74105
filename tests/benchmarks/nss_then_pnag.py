"""Whole runs: NSS then PNAG (section `narrow`) against PNAG, with the same epochs, evaluations and budgets.

    python -m tests.benchmarks.nss_then_pnag [--seeds 1] [--images 2000] [--epochs 12] [--evaluations 60]
        [--budgets-ms 0.1 0.2 0.4] [--space expanded-s16] [--folder DIR]

CIFAR-10 at 16 px, onnx_cpu. Two thirds of the epochs and a sixth of the evaluations go to the search for spaces, the
rest to PNAG in their union; PNAG alone trains and evaluates in the whole space all the time. An epoch of the sandwich
passes four subnets, one of NSS two mixtures, so equal epochs favour PNAG alone. The same command resumes runs that were
interrupted.
"""
from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from orchestrator.config import load_config
from orchestrator.frontier import hypervolume
from orchestrator.handover.delivered import Delivered
from orchestrator.handover.generated import delivered_entries
from orchestrator.record.store import RunStore
from orchestrator.run.search import Search
from searchspaces.errors import BudgetError

WAYS = ("pnag", "nss then pnag")


def configuration(options: argparse.Namespace, way: str, seed: int) -> dict[str, Any]:
    first = round(options.epochs * 2 / 3) if way != "pnag" else 0
    asked = options.evaluations // 6 if way != "pnag" else 0
    raw: dict[str, Any] = {
        "seed": seed, "space": options.space, "target": "onnx_cpu", "controller": "pnag",
        "data": {"name": "parquet", "train": str(options.data / "train.parquet"),
                 "test": str(options.data / "test.parquet"), "size": 16, "limit": options.images, "val_fraction": 0.25},
        "budgets": {"values_ms": options.budgets_ms},
        "latency": {"initial": 20, "maximum": 30},
        "supernet": {"epochs": options.epochs - first, "flip": True, "crop_padding": 2},
        "search": {"evaluations": options.evaluations - asked, "rollouts": 1, "calibration_images": 512},
        "delivery": {"alternatives": 3, "fine_tune_epochs": 5}, "cluster": {"cpus": 2}}
    if first:
        raw["narrow"] = {"epochs": first, "evaluations": asked, "controller": {"name": "nss", "learning_rate": 0.1}}
    return raw


def one_run(options: argparse.Namespace, way: str, seed: int) -> list[Delivered]:
    """What was handed over; from its folder where the run is finished."""
    runs, name = options.folder / "runs", f"{way.replace(' ', '-')}-{seed}"
    if (runs / name).exists():
        search = Search.resume(name, runs=runs)
    else:
        file = options.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(configuration(options, way, seed)))
        search = Search(load_config(file), runs=runs, name=name)
    try:
        return search.run()
    except BudgetError as missed:       # what met its budget is delivered all the same
        print(f"{name}: {missed}", flush=True)
        store = RunStore.open(runs, name)
        return delivered_entries(store, load_config(store.path / "config.yaml"))


def report(found: dict[tuple[str, int], list[Delivered]]) -> None:
    largest = max(entry.budget_ms for entries in found.values() for entry in entries)
    for (way, seed), entries in found.items():
        met = [entry for entry in entries if entry.feasible]
        areas = [hypervolume([entry.latency_ms or np.nan for entry in met],
                             [getattr(entry, name) or np.nan for entry in met], largest)
                 for name in ("accuracy", "test_accuracy")]
        for entry in entries:
            print(f"{way:14s} seed {seed}  {entry.budget_ms:7.4f} ms: " + (
                f"{entry.text:28s} {entry.latency_ms:7.4f} ms  {(entry.madds or 0) / 1e6:6.2f} M  validation "
                f"{entry.accuracy or np.nan:.2%}  test {entry.test_accuracy or np.nan:.2%}" if entry.feasible else
                entry.reason))
        print(f"{way:14s} seed {seed}  hypervolume up to {largest:.4f} ms, of what was handed over: validation "
              f"{areas[0] / largest:.4f}, test {areas[1] / largest:.4f} of the whole")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--seeds", 1), ("--images", 2000), ("--epochs", 12), ("--evaluations", 60)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--budgets-ms", nargs="+", type=float, default=[0.1, 0.2, 0.4])
    parser.add_argument("--space", default="expanded-s16")
    shared = Path(os.environ.get("PARETORAY_SHARED", "../shared/data"))
    parser.add_argument("--data", type=Path, default=shared / "cifar10")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/nss_then_pnag"))
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    found: dict[tuple[str, int], list[Delivered]] = {}
    for seed in range(options.seeds):
        for way in WAYS:
            start = time.perf_counter()
            found[way, seed] = one_run(options, way, seed)
            print(f"{way}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    report(found)


if __name__ == "__main__":
    main()
