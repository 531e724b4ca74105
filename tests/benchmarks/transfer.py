"""What earlier runs on another dataset give a new one (`warm_start`), and what misleading ones cost.

    python -m tests.benchmarks.transfer [--table T] [--folder transfer] [--controllers pnag]
        [--datasets cifar100 cifar10] [--devices pixel3 gold_6226] [--evaluations 50 100] [--seeds 10]
        [--signals none true shuffled reversed] [--first-seed 0] [--quick]

NAS-Bench-201: two searches by pnag with 200 evaluations each on the other of two datasets, same device (so their
latencies are known), then one with few evaluations on this dataset; regret as in nasbench201_regret.py. The earlier
runs' accuracies are true, shuffled among their networks, or reversed (largest plus smallest minus each); `none`: there
are no earlier runs. Resumable: every finished run is a file in --folder. `--quick`: pnag's networks are tiny and hardly
trained, in the earlier runs as well, so that its candidates are mutations and samples; a third of the time.
"""
from __future__ import annotations

import argparse
import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from numpy.typing import NDArray

from orchestrator.controllers.controller import EarlierRun
from tests.benchmarks.nasbench201 import Table, search
from tests.benchmarks.nasbench201_regret import CHANCE, default_budgets_ms, regret

EARLIER_SEEDS, EARLIER_EVALUATIONS = (1000, 1001), 200
QUICK = {"evaluator": {"epochs": 1, "least_steps": 1, "hidden": 8, "pseudo_triplets": 0},
         "generator": {"updates": 1, "round_updates": 1, "hidden": 4, "samples_per_budget": 1}}
OTHER = {"cifar10": "cifar100", "cifar100": "cifar10"}


class Bench:
    def __init__(self, table: str, folder: Path, quick: bool) -> None:
        self._path, self._folder = table, folder / "quick" if quick else folder
        self._options: dict[str, dict[str, Any]] = {"pnag": QUICK} if quick else {}
        self._folder.mkdir(parents=True, exist_ok=True)

    def regret(self, controller: str, dataset: str, device: str, evaluations: int, seed: int, signal: str) -> float:
        file = self._folder / f"{controller}-{dataset}-{device}-{evaluations}-{seed}-{signal}.json"
        if not file.exists():
            table = self._table(dataset, device)
            earlier = [] if signal == "none" else [self._earlier(OTHER[dataset], device, s, signal, seed)
                                                   for s in EARLIER_SEEDS]
            budgets_ms = default_budgets_ms(table.latency_ms)
            run = search(table, budgets_ms, evaluations, seed, controller, earlier=earlier,
                         options=self._options.get(controller))
            column = pyarrow.parquet.read_table(self._path, columns=[f"acc200_test_{dataset}"])[0]
            test: NDArray[np.float64] = column.to_numpy().astype(np.float64)
            value = regret(run.chosen, budgets_ms, table.latency_ms, test, CHANCE[dataset])
            file.write_text(json.dumps({"regret": value, "looked_up": run.looked_up}))
        return float(json.loads(file.read_text())["regret"])

    def _earlier(self, dataset: str, device: str, earlier_seed: int, signal: str, seed: int) -> EarlierRun:
        """Searched once for all."""
        file, table = self._folder / f"earlier-{dataset}-{device}-{earlier_seed}.json", self._table(dataset, device)
        if not file.exists():
            run = search(table, default_budgets_ms(table.latency_ms), EARLIER_EVALUATIONS, earlier_seed, "pnag",
                         options=self._options.get("pnag"))
            file.write_text(json.dumps(run.looked_up))
        rows = np.array(json.loads(file.read_text()))
        accuracy_N = table.accuracy[rows] / 100
        if signal == "shuffled":
            accuracy_N = np.random.default_rng([seed, earlier_seed]).permutation(accuracy_N)
        if signal == "reversed":
            accuracy_N = accuracy_N.max() + accuracy_N.min() - accuracy_N
        return EarlierRun(f"{dataset}-{earlier_seed}", False, table.tokens_NT[rows], accuracy_N,
                          table.latency_ms[rows])

    def _table(self, dataset: str, device: str) -> Table:
        return Table.read(self._path, f"acc12_val_{dataset}", f"latency_{device}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", default="../shared/data/nasbench201.parquet")
    parser.add_argument("--folder", type=Path, default=Path("transfer"))
    parser.add_argument("--controllers", nargs="+", default=["pnag"])
    parser.add_argument("--datasets", nargs="+", default=["cifar100", "cifar10"], choices=sorted(OTHER))
    parser.add_argument("--devices", nargs="+", default=["pixel3", "gold_6226"])
    parser.add_argument("--evaluations", nargs="+", type=int, default=[50, 100])
    parser.add_argument("--signals", nargs="+", default=["none", "true", "shuffled", "reversed"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0, help="others than those that settings were chosen with")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    bench = Bench(options.table, options.folder, options.quick)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    print(f"{options.seeds} seeds, {', '.join(options.devices)}: mean regret (standard error over seeds), worst seed")
    for controller, dataset, evaluations, signal in product(options.controllers, options.datasets,
                                                            options.evaluations, options.signals):
        by_seed = np.array([np.mean([bench.regret(controller, dataset, device, evaluations, seed, signal)
                                     for device in options.devices]) for seed in seeds])
        error = float(by_seed.std(ddof=1) / math.sqrt(len(by_seed))) if len(by_seed) > 1 else math.nan
        print(f"{controller:8s} {dataset:8s} N = {evaluations:3d}  {signal:8s}  {by_seed.mean():5.2f} ({error:.2f})  "
              f"{by_seed.max():5.2f}", flush=True)


if __name__ == "__main__":
    main()
