"""Is an answer said to be best with chance p best in a share p of cases? Searches in the table of NAS-Bench-201.

    python -m tests.benchmarks.answer_calibration FOLDER [--table T] [--datasets cifar10 cifar100] [--devices ...]
        [--evaluations 50 100 200] [--seeds 10] [--first-seed 0] [--controller pnag] [--score]

A search sees `acc12_val_DATASET` and chooses for 20 budgets as a run that ends with architectures does; the candidates
of a budget are what it looked up under it. What is said of the choice is compared with `acc200_test_DATASET`: is it the
best of the candidates, and by how much does it beat the one said to be the runner-up? Every finished search is a line
of FOLDER/searches.jsonl and is not done again; a smaller number of evaluations is the beginning of the same search.
--score only reads what is there.

Prints, per number of evaluations: mean chance said, share that is best, Brier score, expected calibration error (mean
over ten equal bins of chance, weighted by answers, of |said - is|), its value for answers that are best exactly with
the chances said (a perfect forecast has one too, for want of answers), and expected against realised gain in points.
Answers of one search go together, so standard errors are over searches. FOLDER/calibration.html is the curve.
"""
from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pyarrow.parquet
from numpy.typing import NDArray

from orchestrator.handover.considered import searched_belief
from orchestrator.handover.delivered import Candidate, ranked_under
from searchspaces.nasbench201.space import NasBench201
from tests.benchmarks.nasbench201 import Table, search
from tests.benchmarks.nasbench201_regret import CHANCE, default_budgets_ms

DEVICES = ("pixel3", "gold_6226", "silver_4114", "1080ti_1")
BINS = 10
FILE = "searches.jsonl"
SPACE = NasBench201()


@dataclass(frozen=True)
class Said:
    """Of one answer, and what the table says: is it the best of its candidates, and its gain in points."""

    search: int
    evaluations: int
    probability: float
    best: bool
    expected_points: float
    realised_points: float


@functools.cache
def table_of(path: str, dataset: str, device: str) -> Table:
    return Table.read(path, f"acc12_val_{dataset}", f"latency_{device}")


@functools.cache
def test_of(path: str, dataset: str) -> NDArray[np.float64]:
    column = pyarrow.parquet.read_table(path, columns=[f"acc200_test_{dataset}"])[0]
    return np.asarray(column.to_numpy().astype(np.float64))


def searches(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Those asked for, found or made now; with --score only those that are there."""
    path = Path(options.folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {tuple(line["key"]): line for line in lines}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for dataset in options.datasets:
            for device in options.devices:
                key = (options.controller, dataset, device, seed, max(options.evaluations))
                if key not in known and not options.score:
                    table = table_of(options.table, dataset, device)
                    run = search(table, default_budgets_ms(table.latency_ms), key[-1], seed, options.controller)
                    known[key] = {"key": list(key), "rows": [int(row) for row in run.looked_up]}
                    with path.open("a") as file:
                        file.write(json.dumps(known[key]) + "\n")
                    print("searched", *key, flush=True)
                if key in known:
                    yield known[key]


def answers(path: str, number: int, found: dict[str, Any], evaluations: int) -> list[Said]:
    """What a run says at its end; budgets with fewer than two candidates have nothing to say."""
    _, dataset, device, *_ = found["key"]
    table, test = table_of(path, dataset, device), test_of(path, dataset)
    rows = {SPACE.arch_id(table.tokens_NT[row]): row for row in found["rows"][:evaluations]}
    candidates = [Candidate(table.tokens_NT[row], arch_id, float(table.accuracy[row]) / 100,
                            float(table.latency_ms[row]), float(table.latency_ms[row]))
                  for arch_id, row in rows.items()]
    budgets_ms = default_budgets_ms(table.latency_ms)
    ranked = [fitting for budget_ms in budgets_ms if len(fitting := ranked_under(budget_ms, candidates, 0.0)) > 1]
    belief = searched_belief(SPACE, ranked, table.tokens_NT[:0], np.empty(0))
    said = []
    for fitting in ranked:
        certainty = belief.certainty(fitting[0].arch_id, {c.arch_id for c in fitting}, ())
        truth = {c.arch_id: float(test[rows[c.arch_id]]) for c in fitting}
        mine = truth[fitting[0].arch_id]
        said.append(Said(number, evaluations, certainty.probability_best, mine == max(truth.values()),
                         100 * (certainty.expected_gain or 0.0), mine - truth[certainty.runner_up]))
    return said


def calibration_error(probability_A: NDArray[np.float64], best_A: NDArray[np.float64]) -> float:
    bin_A = bins_of(probability_A)
    return float(sum(abs((probability_A - best_A)[bin_A == b].sum()) for b in range(BINS)) / len(best_A))


def bins_of(probability_A: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.minimum((probability_A * BINS).astype(np.int64), BINS - 1)


def summary(some: Sequence[Said]) -> str:
    probability_A = np.array([one.probability for one in some])
    best_A = np.array([float(one.best) for one in some])
    chance = np.random.default_rng(0).random((200, len(some))) < probability_A
    ideal = float(np.mean([calibration_error(probability_A, row.astype(np.float64)) for row in chance]))
    excess = by_search(some, probability_A - best_A)
    expected, realised = ([getattr(one, f"{kind}_points") for one in some] for kind in ("expected", "realised"))
    return (f"{len(some):6d}   {probability_A.mean():.3f}   {best_A.mean():.3f}   {excess.mean():+.3f} "
            f"({excess.std(ddof=1) / np.sqrt(len(excess)):.3f})   {np.mean((probability_A - best_A) ** 2):.3f}   "
            f"{calibration_error(probability_A, best_A):.3f} / {ideal:.3f}   {np.mean(expected):+.2f} / "
            f"{np.mean(realised):+.2f}")


def by_search(some: Sequence[Said], values_A: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means per search."""
    number_A = np.array([one.search for one in some])
    return np.array([values_A[number_A == number].mean() for number in np.unique(number_A)])


def curve(said: Sequence[Said]) -> list[tuple[float, float, float, int]]:
    """Per bin: mean chance said, share that is best, its standard error over searches, answers."""
    points = []
    bin_A = bins_of(np.array([one.probability for one in said]))
    for b in range(BINS):
        some = [one for one, at in zip(said, bin_A) if at == b]
        if some:
            best_A = np.array([float(one.best) for one in some])
            rng, searched = np.random.default_rng(0), sorted({one.search for one in some})
            sums = np.array([[best_A[i], 1.0] for i in range(len(some))])
            per = np.array([sums[[one.search == number for one in some]].sum(axis=0) for number in searched])
            drawn = per[rng.integers(len(per), size=(500, len(per)))].sum(axis=1)
            points.append((float(np.mean([one.probability for one in some])), float(best_A.mean()),
                           float((drawn[:, 0] / drawn[:, 1]).std()), len(some)))
    return points


def figure(said: Sequence[Said]) -> go.Figure:
    x, y, error, count = zip(*curve(said))
    drawn = go.Figure(layout={"template": "plotly_white", "width": 620, "height": 460, "font": {"size": 14},
                              "margin": {"l": 70, "r": 20, "t": 20, "b": 60},
                              "xaxis": {"title": {"text": "chance said"}, "range": [0, 1], "tickformat": ".0%"},
                              "yaxis": {"title": {"text": "share that is best"}, "range": [0, 1.02],
                                        "tickformat": ".0%"}, "legend": {"x": 0.02, "y": 0.98}})
    drawn.add_scatter(x=[0, 1], y=[0, 1], mode="lines", name="calibrated", line={"color": "#e4e7eb", "width": 3})
    return drawn.add_scatter(x=x, y=y, mode="lines+markers+text", name="answers", text=[str(n) for n in count],
                             textposition="bottom right", textfont={"size": 11},
                             error_y={"type": "data", "array": error}, line={"color": "#0072B2"}, marker={"size": 9})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--table", default="../shared/data/nasbench201.parquet")
    parser.add_argument("--datasets", nargs="+", default=sorted(CHANCE), choices=sorted(CHANCE))
    parser.add_argument("--devices", nargs="+", default=list(DEVICES))
    parser.add_argument("--evaluations", nargs="+", type=int, default=[50, 100, 200])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0, help="1000 and up are those that choices were made with")
    parser.add_argument("--controller", default="pnag")
    parser.add_argument("--score", action="store_true")
    options = parser.parse_args()
    found = list(searches(options))
    said = [one for number, line in enumerate(found) for evaluations in options.evaluations
            for one in answers(options.table, number, line, evaluations)]
    print(f"{options.controller}, {len(found)} searches, seeds from {options.first_seed}\n\nevaluations   answers   "
          "said    is      said - is (s.e.)   Brier   error / ideal   gain expected / realised (points)")
    for evaluations in options.evaluations:
        print(f"{evaluations:11d}   {summary([one for one in said if one.evaluations == evaluations])}")
    print(f"        all   {summary(said)}\n\nsaid    is (s.e.)       answers")
    for probability, share, error, count in curve(said):
        print(f"{probability:.3f}   {share:.3f} ({error:.3f})   {count}")
    figure(said).write_html(Path(options.folder) / "calibration.html")


if __name__ == "__main__":
    main()
