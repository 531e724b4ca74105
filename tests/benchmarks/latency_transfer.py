"""How many measurements a new device needs, with and without help from devices that are known.

    python -m tests.benchmarks.latency_transfer --table ../shared/data/nasbench201.parquet     # about two minutes
    python -m tests.benchmarks.latency_transfer --table T --known 200     # the others measured 200 cells, not all

Every device of the table is the new one in turn, the others are known: as whole tables, or with --known as predictors
of that many measured cells. `choose_to_measure` picks what is measured, by the known devices' latencies with help and
by multiply-adds without. Spearman is over all rows of the new device except those under 0.2 ms (209 cells that pixel3's
compiler removed); these are not measured either. A level counts as reached at the first number of measurements where
it holds there and at the next larger number tried. "misled": help from one table whose rows were shuffled, on the cells
that are measured without help.

HELP (Lee et al., NeurIPS 2021) publishes 10 measurements per new device on this space.
"""
from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from threadpoolctl import threadpool_limits

from orchestrator.controllers.controller import LatencyModel
from orchestrator.prediction.predictor import LatencyPredictor
from orchestrator.prediction.transfer import LookedUp, choose_to_measure
from searchspaces.errors import ParetorayError
from searchspaces.nasbench201.space import NasBench201
from searchspaces.space import Tokens
from tests.benchmarks.nasbench201 import Table

DEVICES = ("pixel3", "gold_6226", "1080ti_1", "silver_4114")
SIZES = (4, 5, 6, 8, 10, 12, 15, 20, 30, 50, 100)
LEVELS = (0.95, 0.98)
REMOVED_MS = 0.2
SPACE = NasBench201()


@dataclass(frozen=True)
class Device:
    """Its rows that count."""

    name: str
    tokens_NT: Tokens
    latency_N: NDArray[np.float64]

    @classmethod
    def read(cls, table: str, name: str) -> tuple[Device, LookedUp]:
        """What is asked of a new device, and the whole table for when it is a known one."""
        rows = Table.read(table, "acc12_val_cifar10", f"latency_{name}")
        kept = rows.latency_ms >= REMOVED_MS
        return (cls(name, rows.tokens_NT[kept], rows.latency_ms[kept]), LookedUp(rows.tokens_NT, rows.latency_ms))

    def learnt(self, count: int) -> LatencyPredictor:
        """From `count` cells measured without help."""
        rows = choose_to_measure(SPACE, self.tokens_NT, (), count, seed=count)
        return LatencyPredictor.fit(SPACE, self.tokens_NT[rows], self.latency_N[rows])

    def try_out(self, known: Sequence[LatencyModel], chosen_by: Sequence[LatencyModel], count: int,
                seed: int) -> tuple[float, float]:
        """(Spearman, mean absolute percentage error) over all rows after `count` measurements."""
        rows = choose_to_measure(SPACE, self.tokens_NT, chosen_by, count, seed)
        predictor = LatencyPredictor.fit(SPACE, self.tokens_NT[rows], self.latency_N[rows], known=known)
        predicted_N = predictor.predict(self.tokens_NT)
        return (float(spearmanr(predicted_N, self.latency_N).statistic),
                float(np.mean(np.abs(predicted_N / self.latency_N - 1.0))))


def first_reached(spearman_S: NDArray[np.float64], level: float) -> float:
    """The number of measurements, inf where it is never reached."""
    held = spearman_S >= level
    both = held & np.append(held[1:], held[-1:])
    return float(SIZES[int(np.argmax(both))]) if both.any() else np.inf


def reached_text(spearman_RS: NDArray[np.float64], level: float) -> str:
    """Median over seeds (quartiles)."""
    counts = np.sort([first_reached(spearman_S, level) for spearman_S in spearman_RS])
    low, middle, high = (counts[round(share * (len(counts) - 1))] for share in (0.25, 0.5, 0.75))
    return "-".ljust(4) if np.isinf(middle) else \
        f"{middle:.0f} ({low:.0f}-{'never' if np.isinf(high) else f'{high:.0f}'})"


def spread_text(values_R: NDArray[np.float64]) -> str:
    return f"{np.median(values_R):.3f} ({values_R.min():.3f}-{values_R.max():.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", required=True, type=str)
    parser.add_argument("--known", type=int, default=0, metavar="N", help="cells measured on each known device; 0: all")
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args()
    if not Path(arguments.table).exists():
        sys.exit(f"error: {arguments.table} does not exist; see README.md for the public tables")
    print(f"{shlex.join(['python', '-m', 'tests.benchmarks.latency_transfer', *sys.argv[1:]])}\n"
          f"{SPACE.space_id}, known devices: {f'{arguments.known} cells each' if arguments.known else 'whole tables'}, "
          f"{arguments.seeds} seeds: median (quartiles) of measurements, median (range) of Spearman\n"
          "HELP: 10 measurements. Noise floor: none, the table holds one number per cell and no error.\n")
    print(f"{'new device':12s} {'rows':>6s} {'':8s} {'to 0.95':14s} {'to 0.98':14s} {'Spearman at 5':22s} "
          f"{'Spearman at 10':22s} {'error at 10':>11s} {'Spearman at 100':>22s}")
    try:
        with threadpool_limits(1):
            report(arguments.table, arguments.known, arguments.seeds)
    except ParetorayError as error:
        sys.exit(f"error: {error}")


def report(table: str, known_cells: int, seeds: int) -> None:
    read = {name: Device.read(table, name) for name in DEVICES}
    models = {name: device.learnt(known_cells) if known_cells else whole for name, (device, whole) in read.items()}
    for name, (device, whole) in read.items():
        others = [models[other] for other in DEVICES if other != name]
        all_N = whole.predict(SPACE.all_tokens())
        shuffled = LookedUp(SPACE.all_tokens(), np.random.default_rng(0).permutation(all_N))
        for title, known, chosen_by, sizes in (("alone", [], [], SIZES), ("helped", others, others, SIZES),
                                               ("misled", [shuffled], [], (5, 10))):
            tried = np.array([[device.try_out(known, chosen_by, size, seed) for size in sizes]
                              for seed in range(seeds)])
            spearman_RS, ten = tried[:, :, 0], sizes.index(10)
            levels = [reached_text(spearman_RS, level) if sizes == SIZES else "" for level in LEVELS]
            most = spread_text(spearman_RS[:, -1]) if sizes == SIZES else ""
            print(f"{name:12s} {len(device.latency_N):6d} {title:8s} {levels[0]:14s} {levels[1]:14s} "
                  f"{spread_text(spearman_RS[:, sizes.index(5)]):22s} {spread_text(spearman_RS[:, ten]):22s} "
                  f"{np.median(tried[:, ten, 1]):11.1%} {most:>22s}", flush=True)


if __name__ == "__main__":
    main()
