"""After the search: models for new budgets, the report, the list of runs."""
from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from actors.data import Preprocessing, Splits
from actors.latency.worker import input_shape
from actors.objectpath import AnyPath, as_path, matching
from orchestrator.cluster.joining import connected
from orchestrator.cluster.ownmodules import own_modules
from orchestrator.cluster.sharing import check_shared
from orchestrator.config import Config, load_config
from orchestrator.handover.architectures import announcements, makes_models
from orchestrator.handover.delivered import Delivered, refuse_missed
from orchestrator.handover.generated import delivered_entries, final_rows
from orchestrator.interrupt import StopFlag
from orchestrator.record.files import read_json
from orchestrator.record.goals import Goal, goal_named, read_goals, target_state
from orchestrator.record.metrics import RunMetrics
from orchestrator.record.progress import Progress
from orchestrator.record.store import RUNS, RunStore
from orchestrator.report.page import write_report
from orchestrator.run.stages.measure import above_slowest
from orchestrator.services.context import RunContext, data_and_space
from orchestrator.services.delivery import Delivery, restored_controller, slowest_ms
from orchestrator.services.pretrained import preprocessing_for
from orchestrator.services.services import Services
from orchestrator.services.workbench import cluster_bench, local_bench
from searchspaces.errors import BudgetError, StoreError
from searchspaces.space import SearchSpace


def generate_models(name: str, budgets_ms: Sequence[float], *, target: str | None = None, runs: str | AnyPath = RUNS,
                    address: str | None = None, console: Console | None = None) -> list[Delivered]:
    """Trained, measured ONNX files of a finished run for new budgets, on the machine that is the run's target, or with
    the devices and workers of the cluster at `address`. Architectures where a target only looks latencies up.

    `target`: the label whose budgets they are, needed where a run has several. Raises BudgetError, with the reachable
    range, for a budget below the fastest known architecture (before anything is done) and for one that no candidate
    meets (after the others are delivered).
    """
    console = console or Console()
    store = RunStore.open(as_path(runs), name)
    check_finished(store)
    store.lock()
    config = load_config(store.path / "config.yaml")
    goal = goal_named(read_goals(store, config), target)
    check_budgets(store, goal, budgets_ms, console)
    splits, space = data_and_space(config)
    preprocessing = preprocessing_for(config, space, splits.train, input_shape(space)[1], store)
    delivery = Delivery(config, store, space, splits, preprocessing, goal,
                        restored_controller(store, config, space, goal))
    started = time.perf_counter()
    answers = delivery.answers(budgets_ms)
    then = "training, exporting and measuring them now" if makes_models(config, goal) else "; ".join(
        announcements(config))
    console.print(f"generated architectures for {len(budgets_ms)} budget(s) in "
                  f"{1e3 * (time.perf_counter() - started):.0f} ms; {then}", highlight=False, soft_wrap=True)
    entries: list[Delivered] = []
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(console, title=f"paretoray {store.name}"))
        if address is None:
            bench = local_bench(config, space, splits, preprocessing, store, goal)
        else:
            bench = cluster_bench(_joined(stack, config, store, space, splits, preprocessing, progress, address))
        progress.stage("deliver", total=len(budgets_ms))
        for entry in delivery.entries(bench, budgets_ms, answers):
            entries.append(entry)
            progress.advance(1)
    progress.final_table(final_rows(entries))
    write_report(store.path, space)
    refuse_missed(entries)
    return entries


def _joined(stack: contextlib.ExitStack, config: Config, store: RunStore, space: SearchSpace, splits: Splits,
            preprocessing: Preprocessing, progress: Progress, address: str) -> RunContext:
    """The run on the cluster's services, until the stack closes."""
    stop = StopFlag()
    stack.enter_context(connected(config.cluster, address, own=own_modules(config)))
    stack.enter_context(stop.installed())
    check_shared(store.path, progress.note)
    services = stack.enter_context(contextlib.closing(
        Services(config, space, splits, preprocessing, store, local=False, check=stop.check)))
    metrics = stack.enter_context(contextlib.closing(RunMetrics(store.path, store.name)))
    return RunContext(config, store, space, splits, preprocessing, services, progress, stop, metrics)


def check_budgets(store: RunStore, goal: Goal, budgets_ms: Sequence[float], console: Console) -> None:
    """BudgetError for a budget below the fastest network measured; a note for one above the slowest."""
    for budget_ms in budgets_ms:
        for label, allowed_ms in goal.budgets_at(budget_ms).items():
            state = target_state(store, label)
            fastest, slowest = state["fastest_ms"], state["slowest_ms"]
            if allowed_ms < fastest:
                raise BudgetError(f"budget {allowed_ms:.4g} ms is below the fastest architecture of run {store.name} "
                                  f"on {label}; the reachable range is {fastest:.4g} to {slowest:.4g} ms")
        if budget_ms > slowest_ms(store, goal):
            console.print(above_slowest(budget_ms, slowest_ms(store, goal), goal.label), highlight=False,
                          soft_wrap=True)


def check_finished(store: RunStore) -> None:
    stage = store.state().get("stage")
    if stage != "done":
        raise StoreError(f"run {store.name} is not finished (stage '{stage or 'measure'}'); finish it first with: "
                         f"{store.resume_command}")


def write_run_report(name: str, runs: str | AnyPath = RUNS) -> AnyPath:
    """report.html of a run in any state."""
    store = RunStore.open(as_path(runs), name)
    _, space = data_and_space(load_config(store.path / "config.yaml"))
    return write_report(store.path, space)


def run_rows(runs: str | AnyPath = RUNS) -> list[dict[str, str]]:
    """One row per run for `paretoray runs`."""
    runs = as_path(runs)
    if not runs.is_dir():
        raise StoreError(f"there is no folder '{runs}'; give the folder of your runs with --runs, or start one with: "
                         "paretoray search configs/quickstart.yaml")
    rows = []
    for path in sorted(matching(runs, "*/config.yaml"), key=lambda path: path.stat().st_mtime):
        state_file = path.parent / "state.json"
        state = read_json(state_file) if state_file.exists() else {}
        store = RunStore(path.parent)
        entries = [entry for entry in delivered_entries(store, load_config(path)) if entry.feasible]
        best = max((entry.test_accuracy for entry in entries if entry.test_accuracy is not None), default=None)
        rows.append({"run": store.name, "stage": state.get("stage", "measure"), "trials": str(store.trials.rows),
                     "models": _count(entries), "best test accuracy": "" if best is None else f"{best:.4f}",
                     "changed": time.strftime("%Y-%m-%d %H:%M", time.localtime(np.max(
                         [file.stat().st_mtime for file in path.parent.iterdir()])))})
    return rows


def _count(entries: Sequence[Delivered]) -> str:
    """Of models; of architectures where they have none."""
    models = sum(bool(entry.onnx) for entry in entries)
    bare = len(entries) - models
    return " + ".join([str(models)] * (models > 0 or not bare) + [f"{bare} architectures"] * (bare > 0))
