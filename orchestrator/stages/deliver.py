"""Last stage: the controller's choice for every budget becomes a trained, exported and re-measured model."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from orchestrator.config import Config
from orchestrator.context import RunContext, load_state
from orchestrator.controllers.catalogue import make_controller
from orchestrator.controllers.controller import Controller, Task
from orchestrator.handover import Delivered, HandOver
from orchestrator.predictors import LatencyPredictor
from orchestrator.progress import FinalRow
from orchestrator.store import RunStore, read_json, write_json
from orchestrator.workbench import cluster_bench
from searchspaces.space import SearchSpace, Tokens


def deliver(run: RunContext) -> None:
    controller = restored_controller(run.store, run.config, run.space)
    settings = run.config.delivery
    run.progress.stage("deliver", total=len(run.budgets_ms), done=0)
    handover = HandOver(run.space, run.splits, run.preprocessing, cluster_bench(run), settings, run.store.path,
                        lineage(run.store))
    answers = controller.generate(run.budgets_ms, settings.alternatives)
    candidates = handover.candidates(answers, fallbacks(run.store, run.space))
    if run.config.accuracy.source != "supernet":
        candidates = handover.finalists(run.budgets_ms, candidates, answers if controller.ranks_finalists else None)
        run.progress.stage("deliver", total=len(run.budgets_ms), done=0)
    entries: list[Delivered] = []
    for entry in handover.deliver(run.budgets_ms, candidates):
        run.stop.check()
        entries.append(entry)
        record_entries(run.store, entries)
        run.store.event("delivered", budget_ms=entry.budget_ms, feasible=entry.feasible, onnx=entry.onnx)
        run.progress.advance(1, budget_ms=entry.budget_ms, test_accuracy=entry.test_accuracy or 0.0)
        if not entry.feasible:
            run.progress.note(entry.reason)


def restored_controller(store: RunStore, config: Config, space: SearchSpace) -> Controller:
    """The controller with what it learned in the search; it answers without learning again."""
    predictor = LatencyPredictor.from_state(space, load_state(store, "predictor"))
    task = Task(tuple(store.state()["budgets_ms"]), config.search.evaluations, config.seed, predictor)
    controller = make_controller(config.controller.name, space, task, config.controller.options)
    controller.load_state_dict(load_state(store, "controller"))
    return controller


def fallbacks(store: RunStore, space: SearchSpace) -> Tokens:
    """Candidates for any budget that a run called reachable: the extremes, and the fastest network it measured."""
    rows = [row for row in store.latency.read(["tokens", "latency_ms", "error"]).to_pylist() if not row["error"]]
    fastest = min(rows, key=lambda row: float(row["latency_ms"]))
    return space.canonical(np.concatenate([space.extremes(), np.array([fastest["tokens"]], dtype=np.int8)]))


def lineage(store: RunStore) -> dict[str, object]:
    """What every sidecar says about where a model comes from."""
    state = store.state()
    environment = read_json(store.path / "environment.json")
    return {"run": store.name, "weights_version": state["weights_version"], "target": state["target"],
            "reference_ms": state["reference_ms"], "versions": environment.get("versions", {}),
            "commit": environment.get("commit")}


def record_entries(store: RunStore, entries: Sequence[Delivered]) -> None:
    """Adds entries to generated.json; a later entry for the same budget replaces the earlier one."""
    merged = {entry.budget_ms: entry for entry in [*delivered_entries(store), *entries]}
    write_json(store.path / "generated.json", [asdict(merged[budget]) for budget in sorted(merged)])


def delivered_entries(store: RunStore) -> list[Delivered]:
    path = store.path / "generated.json"
    if not path.exists():
        return []
    return [Delivered(**entry | {"tokens": tuple(entry["tokens"])}) for entry in read_json(path)]


def final_rows(entries: Sequence[Delivered]) -> list[FinalRow]:
    return [FinalRow(e.budget_ms, e.text or e.reason, e.predicted_ms, e.latency_ms, e.latency_stderr_ms, e.accuracy,
                     e.test_accuracy, e.madds, e.params, e.onnx, e.feasible) for e in entries]
