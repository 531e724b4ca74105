"""What the searches of a sweep found, side by side: one reference, the same budgets, and how far from the truth."""
from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from actors.objectpath import AnyPath, as_path
from orchestrator.config import Config
from orchestrator.frontier import best_under
from orchestrator.report.data import RunView, read_run
from orchestrator.sweep.folder import STATE, Member, SweepFolder, sweeps
from orchestrator.sweep.recorded import Recorded, State, reference_ms
from orchestrator.sweep.settings import Values
from orchestrator.sweep.truth import Truth, read_truth

BUDGETS = 4         # under which searches are compared where nobody asked for any
BUDGETS_TOLD = 3    # in the terminal's table


@dataclass(frozen=True)
class Result:
    """One search. Hypervolume 0..1 of all its trials; `best` is the validation accuracy (0..1) of the best trial under
    each budget of the sweep, None without one; `regret` is the mean over the run's own budgets of the accuracy (0..1)
    that its answers lack, None where no table tells."""

    name: str
    values: Values
    state: State
    trials: int
    hypervolume: float
    best: tuple[float | None, ...]
    test_accuracy: float | None
    regret: float | None
    note: str = ""


@dataclass(frozen=True)
class Results:
    """All of them, and what they share: `reference_ms` of the hypervolumes (None before it is known), `budgets_ms`.
    `problems` are sentences for the reader."""

    name: str
    searches: tuple[Result, ...]
    reference_ms: float | None
    budgets_ms: tuple[float, ...]
    problems: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        rows = [asdict(result) | {"state": result.state.value} for result in self.searches]
        return asdict(self) | {"searches": rows}

    @property
    def leader(self) -> str:
        """Name of the search with the largest hypervolume; "" while none has any."""
        best = max(self.searches, key=lambda result: result.hypervolume, default=None)
        return best.name if best is not None and best.hypervolume > 0 else ""


def read_results(folder: SweepFolder) -> Results:
    """Of a sweep in any state."""
    views = {member.name: read_run(folder.path / member.name) for member in folder.members
             if (folder.path / member.name / "config.yaml").exists()}
    budgets_ms = common_budgets(list(views.values()))
    settings, truths = folder.settings, dict[str, Truth | None]()
    results = []
    for member in folder.members:
        view = views.get(member.name)
        config = settings.config(member.values)
        key = config.model_dump_json(include={"accuracy", "targets", "space"})
        if key not in truths:
            truths[key] = read_truth(config)
        results.append(_result(folder, member, view, budgets_ms, truths[key]))
    return Results(folder.name, tuple(results), reference_ms(folder.path), budgets_ms,
                   tuple(_problems(list(views.values()), [settings.config(m.values) for m in folder.members])))


def common_budgets(views: Sequence[RunView]) -> tuple[float, ...]:
    """Those that every search was asked for; otherwise spread over what their fronts reach."""
    asked = [{round(float(row["budget_ms"]), 9) for row in view.generated} for view in views if view.generated]
    if asked and (common := set.intersection(*asked)):
        return tuple(sorted(common))
    reached = [view.numbers("latency_ms")[view.front] for view in views if len(view.front)]
    if not reached:
        return ()
    low, high = max(latency[0] for latency in reached), max(latency[-1] for latency in reached)
    return tuple(float(f"{budget:.3g}") for budget in np.linspace(low, high, BUDGETS + 1)[1:])


def _result(folder: SweepFolder, member: Member, view: RunView | None, budgets_ms: Sequence[float],
            truth: Truth | None) -> Result:
    recorded = Recorded(folder.path, member.name)
    recorded.look()
    if view is None:
        return Result(member.name, member.values, member.state, 0, 0.0, tuple(None for _ in budgets_ms), None, None,
                      member.note)
    latency_ms, accuracy = view.numbers("latency_ms"), view.numbers("accuracy")
    found = [best_under(budget_ms, latency_ms, accuracy) for budget_ms in budgets_ms]
    tested = [row["test_accuracy"] for row in view.models if isinstance(row.get("test_accuracy"), int | float)]
    return Result(member.name, member.values, member.state, len(latency_ms),
                  recorded.history[-1] if recorded.history else 0.0,
                  tuple(float(accuracy[i]) if i >= 0 else None for i in found), max(tested, default=None),
                  None if truth is None else truth.regret(view.generated), member.note)


def _problems(views: Sequence[RunView], configs: Sequence[Config]) -> list[str]:
    """Why the numbers of the searches may not compare."""
    targets = {name for view in views for name in view.trials.column("target_id").to_pylist()[:1] if name}
    sources = {config.accuracy.source for config in configs}
    problems = []
    if len(targets) > 1:
        problems.append(f"The searches measured on {len(targets)} different targets, whose latencies do not compare.")
    if len(sources) > 1:
        problems.append(f"Accuracies come from {' and '.join(sorted(sources))}, and do not compare.")
    if any(len(view.config.get("targets") or ()) > 1 for view in views):
        problems.append("Searches with several targets are compared by the latencies of their first.")
    return problems


def sweep_rows(runs: str | AnyPath) -> list[dict[str, str]]:
    """One row per sweep for `paretoray runs`; the runs in its folder are listed with --runs."""
    rows = []
    root = as_path(runs)
    for path in sweeps(root) if isinstance(root, Path) else []:
        members = SweepFolder(path).members
        settled = sum(member.settled for member in members)
        rows.append({"run": f"{path.name}/ (sweep)", "stage": f"{settled} of {len(members)} searches done",
                     "trials": str(sum(member.evaluations for member in members)), "models": "",
                     "best test accuracy": "",
                     "changed": time.strftime("%Y-%m-%d %H:%M", time.localtime((path / STATE).stat().st_mtime))})
    return rows


def results_table(results: Results) -> Table:
    """For a terminal: the best hypervolume in bold."""
    columns = budget_columns(results, BUDGETS_TOLD)
    known = any(result.regret is not None for result in results.searches)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1), pad_edge=False)
    table.add_column("search", no_wrap=True)
    for name in ("state", "trials", "hyper-\nvolume", *(f"best at\n{results.budgets_ms[i]:.3g} ms" for i in columns),
                 "best\ntest", *(["regret\npoints"] if known else [])):
        table.add_column(name, justify="left" if name == "state" else "right")
    for result in results.searches:
        cells = [result.state.value, f"{result.trials:,}", f"{result.hypervolume:.4f}",
                 *(share(result.best[i]) for i in columns), share(result.test_accuracy),
                 *([points(result.regret)] if known else [])]
        table.add_row(Text(result.name), *cells, style="bold" if result.name == results.leader else "")
    return table


def budget_columns(results: Results, most: int) -> list[int]:
    """Which of the budgets have a column, at most so many, spread from the first to the last."""
    count = len(results.budgets_ms)
    return sorted(set(np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()))


def share(value: float | None) -> str:
    return "?" if value is None else f"{value:.2%}"


def points(value: float | None) -> str:
    """Percentage points."""
    return "?" if value is None else f"{100 * value:.2f}"
