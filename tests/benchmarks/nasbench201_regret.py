"""Search quality over seeds, devices and numbers of evaluations: mean regret in percentage points, beside the peers.

    python -m tests.benchmarks.nasbench201_regret [--table T] [--dataset cifar100] [--devices pixel3 gold_6226]
        [--evaluations 100 200 400] [--seeds 10] [--first-seed 0] [--controller pnag | --controllers random nsga2 ...]
        [--workers 1]

The search sees `acc12_val_DATASET`; an answer is judged by `acc200_test_DATASET`: regret = the table's best under the
budget minus the answer's, mean over 20 budgets evenly spaced between the 5th and 95th percentile of the latency. No
answer, or one over its budget, counts as chance accuracy. `--controllers` prints one row per controller (mean over
devices and seeds, standard error over seeds).
"""
from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
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


def all_runs(pool: Executor, options: argparse.Namespace, evaluations: int, controller: str) -> NDArray[np.float64]:
    """float64[seeds, devices, 2]: regret and seconds."""
    jobs = [(options.table, options.dataset, device, evaluations, seed, controller)
            for seed in range(options.first_seed, options.first_seed + options.seeds) for device in options.devices]
    results = np.array(list(pool.map(one_run, *zip(*jobs))))
    return results.reshape(options.seeds, len(options.devices), 2)


def mean_and_error(results: NDArray[np.float64]) -> tuple[float, float]:
    """Mean regret and its standard error over seeds (nan for one seed)."""
    by_seed = results[:, :, 0].mean(axis=1)
    return float(by_seed.mean()), float(by_seed.std(ddof=1) / np.sqrt(len(by_seed))) if len(by_seed) > 1 else math.nan


def one_controller(pool: Executor, options: argparse.Namespace) -> None:
    """A row per number of evaluations, beside the peers."""
    print("evaluations   best peer   target     ours          per device          seconds per run")
    for evaluations in options.evaluations:
        results = all_runs(pool, options, evaluations, options.controller)
        mean, error = mean_and_error(results)
        by_device = " ".join(f"{value:8.2f}" for value in results[:, :, 0].mean(axis=0))
        print(f"{evaluations:11d} {_cell(PEERS, evaluations):>11} {_cell(TARGET, evaluations):>8}  "
              f"{mean:5.2f} ({error:.2f})   {by_device}   {results[:, :, 1].mean():12.1f}", flush=True)


def compare(pool: Executor, options: argparse.Namespace) -> None:
    """A row per controller, a column per number of evaluations."""
    columns = "".join(f"   N = {evaluations:<7d}" for evaluations in options.evaluations)
    print(f"{'controller':16s}{columns}   seconds per run")
    for controller in options.controllers:
        runs = [all_runs(pool, options, evaluations, controller) for evaluations in options.evaluations]
        cells = "".join("   {:5.2f} ({:.2f})".format(*mean_and_error(results)) for results in runs)
        seconds = " ".join(f"{results[:, :, 1].mean():6.1f}" for results in runs)
        print(f"{controller:16s}{cells}   {seconds}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", default="../shared/data/nasbench201.parquet")
    parser.add_argument("--dataset", default="cifar100", choices=sorted(CHANCE))
    parser.add_argument("--devices", nargs="+", default=["pixel3", "gold_6226"])
    parser.add_argument("--evaluations", nargs="+", type=int, default=[100, 200, 400])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0, help="others than those that settings were chosen with")
    parser.add_argument("--controller", default="pnag")
    parser.add_argument("--controllers", nargs="+", metavar="NAME", help="one table for these instead")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    signal = np.mean([oracle(options.table, options.dataset, device) for device in options.devices])
    names = ", ".join(options.controllers or [options.controller])
    print(f"{names} on {options.dataset}, {', '.join(options.devices)}, {options.seeds} seeds: regret in percentage "
          f"points (standard error); picking from all 15,625 by the search signal: {signal:.2f}")
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        (compare if options.controllers else one_controller)(pool, options)


def _cell(figures: dict[int, float], evaluations: int) -> str:
    return f"{figures[evaluations]:.2f}" if evaluations in figures else "-"


if __name__ == "__main__":
    main()
