"""Search quality over seeds, devices and numbers of evaluations: mean regret in percentage points, beside the peers.

    python -m tests.benchmarks.nasbench201_regret [--table T] [--dataset cifar100] [--devices pixel3 gold_6226]
        [--evaluations 100 200 400] [--seeds 10] [--controller pnag] [--workers 1]

The search sees `acc12_val_DATASET`; an answer is judged by `acc200_test_DATASET`: regret = the table's best under the
budget minus the answer's, mean over 20 budgets evenly spaced between the 5th and 95th percentile of the latency. No
answer, or one over its budget, counts as chance accuracy.
"""
from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pyarrow.parquet
from numpy.typing import NDArray

from tests.benchmarks.nasbench201 import Run, Table, search

BUDGETS = 20
CHANCE = {"cifar10": 10.0, "cifar100": 1.0}
PEERS = {100: 1.30, 200: 0.86, 400: 0.75}      # best of 17 optimisers, CIFAR-100, pixel3 and gold_6226
TARGET = {100: 0.95, 200: 0.70, 400: 0.62}


def default_budgets_ms(latency_ms: NDArray[np.float64]) -> list[float]:
    return [float(b) for b in np.linspace(*np.percentile(latency_ms, [5, 95]), BUDGETS)]


def regret(chosen: Sequence[int | None], budgets_ms: Sequence[float], latency_ms: NDArray[np.float64],
           test: NDArray[np.float64], chance: float) -> float:
    """Percentage points, mean over the budgets."""
    losses = []
    for row, budget_ms in zip(chosen, budgets_ms, strict=True):
        met = row is not None and latency_ms[row] <= budget_ms
        losses.append(test[latency_ms <= budget_ms].max() - (test[row] if met else chance))
    return float(np.mean(losses))


def one_run(path: str, dataset: str, device: str, evaluations: int, seed: int, controller: str) -> tuple[float, float]:
    """(regret, seconds)."""
    table = Table.read(path, f"acc12_val_{dataset}", f"latency_{device}")
    test = pyarrow.parquet.read_table(path, columns=[f"acc200_test_{dataset}"])[0].to_numpy().astype(np.float64)
    budgets_ms = default_budgets_ms(table.latency_ms)
    start = time.perf_counter()
    run: Run = search(table, budgets_ms, evaluations, seed, controller)
    seconds = time.perf_counter() - start
    return regret(run.chosen, budgets_ms, table.latency_ms, test, CHANCE[dataset]), seconds


def oracle(path: str, dataset: str, device: str) -> float:
    """Regret of picking from all cells by the search signal."""
    table = Table.read(path, f"acc12_val_{dataset}", f"latency_{device}")
    test = pyarrow.parquet.read_table(path, columns=[f"acc200_test_{dataset}"])[0].to_numpy().astype(np.float64)
    budgets_ms = default_budgets_ms(table.latency_ms)
    chosen = [int(np.where(table.latency_ms <= b, table.accuracy, -np.inf).argmax()) for b in budgets_ms]
    return regret(chosen, budgets_ms, table.latency_ms, test, CHANCE[dataset])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", default="../shared/data/nasbench201.parquet")
    parser.add_argument("--dataset", default="cifar100", choices=sorted(CHANCE))
    parser.add_argument("--devices", nargs="+", default=["pixel3", "gold_6226"])
    parser.add_argument("--evaluations", nargs="+", type=int, default=[100, 200, 400])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--controller", default="pnag")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    signal = np.mean([oracle(options.table, options.dataset, device) for device in options.devices])
    print(f"{options.controller} on {options.dataset}, {', '.join(options.devices)}, {options.seeds} seeds: regret in "
          f"percentage points (standard error); picking from all 15,625 by the search signal: {signal:.2f}")
    print("evaluations   best peer   target     ours          per device          seconds per run")
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for evaluations in options.evaluations:
            jobs = [(options.table, options.dataset, device, evaluations, seed, options.controller)
                    for seed in range(options.seeds) for device in options.devices]
            results = np.array(list(pool.map(one_run, *zip(*jobs)))).reshape(options.seeds, len(options.devices), 2)
            by_seed, by_device = results[:, :, 0].mean(axis=1), results[:, :, 0].mean(axis=0)
            spread = by_seed.std(ddof=1) / np.sqrt(len(by_seed)) if len(by_seed) > 1 else float("nan")
            print(f"{evaluations:11d} {_cell(PEERS, evaluations):>11} {_cell(TARGET, evaluations):>8}  "
                  f"{by_seed.mean():5.2f} ({spread:.2f})   {' '.join(f'{value:8.2f}' for value in by_device)}   "
                  f"{results[:, :, 1].mean():12.1f}", flush=True)


def _cell(figures: dict[int, float], evaluations: int) -> str:
    return f"{figures[evaluations]:.2f}" if evaluations in figures else "-"


if __name__ == "__main__":
    main()
