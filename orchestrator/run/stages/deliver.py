"""Last stage: the controller's choice for every budget becomes a trained, exported and re-measured model."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from orchestrator.config import Config
from orchestrator.controllers.catalogue import make_controller
from orchestrator.controllers.controller import Controller, Task
from orchestrator.handover.delivered import Delivered
from orchestrator.handover.models import HandOver
from orchestrator.record.goals import Goal, goal_model, read_goals, target_state
from orchestrator.record.progress import FinalRow
from orchestrator.record.store import RunStore, read_json, write_json
from orchestrator.services.context import RunContext, load_predictor, load_state, state_name
from orchestrator.services.workbench import cluster_bench
from searchspaces.space import SearchSpace, Tokens


def deliver(run: RunContext) -> None:
    settings = run.config.delivery
    bench = cluster_bench(run)
    for goal in run.goals:
        title = "deliver" if len(run.goals) == 1 else f"deliver {goal.label}"
        run.progress.stage(title, total=len(goal.budgets_ms), done=0)
        controller = restored_controller(run.store, run.config, run.space, goal)
        handover = HandOver(run.space, run.splits, run.preprocessing, bench, settings, run.store.path,
                            lineage(run.store, run.config), goal, slowest_ms(run.store, goal))
        answers = controller.generate(goal.budgets_ms, settings.alternatives)
        candidates = handover.candidates(answers, fallbacks(run.store, run.space, goal))
        if run.config.accuracy.source != "supernet":
            candidates = handover.finalists(goal.budgets_ms, candidates,
                                            answers if controller.ranks_finalists else None)
            run.progress.stage(title, total=len(goal.budgets_ms), done=0)
        for entry in handover.deliver(goal.budgets_ms, candidates):
            run.stop.check()
            record_entries(run.store, [entry], run.config)
            run.store.event("delivered", target=goal.label, budget_ms=entry.budget_ms, feasible=entry.feasible,
                            onnx=entry.onnx)
            run.progress.advance(1, budget_ms=entry.budget_ms, test_accuracy=entry.test_accuracy or 0.0)
            if not entry.feasible:
                run.progress.note(entry.reason)


def restored_controller(store: RunStore, config: Config, space: SearchSpace, goal: Goal) -> Controller:
    """The goal's controller with what it learned in the search; it answers without learning again."""
    models = {label: load_predictor(store, config, space, label) for label in goal.targets}
    model = goal_model(goal, {label: found for label, found in models.items() if found is not None})
    task = Task(goal.budgets_ms, config.search.evaluations, config.seed, model)
    controller = make_controller(config.controller.name, space, task, config.controller.options)
    controller.load_state_dict(load_state(store, state_name("controller", goal.label, config)))
    return controller


def fallbacks(store: RunStore, space: SearchSpace, goal: Goal) -> Tokens:
    """Candidates for any budget that a run called reachable: the extremes, and the fastest network measured on each of
    the goal's targets."""
    rows = [row for row in store.latency.read(["tokens", "target_id", "latency_ms", "error"]).to_pylist()
            if not row["error"]]
    fastest = [min((row for row in rows if row["target_id"] == target_state(store, label)["target_id"]),
                   key=lambda row: float(row["latency_ms"]))["tokens"] for label in goal.targets]
    return space.canonical(np.concatenate([space.extremes(), np.array(fastest, dtype=np.int8)]))


def slowest_ms(store: RunStore, goal: Goal) -> float:
    """The goal's latency of a network as slow as the slowest that was measured."""
    return float(goal.latency_ms({label: [target_state(store, label)["slowest_ms"]] for label in goal.targets})[0])


def lineage(store: RunStore, config: Config) -> dict[str, object]:
    """What every sidecar says about where a model comes from."""
    environment = read_json(store.path / "environment.json")
    targets = {label: target_state(store, label) for label in config.labels}
    return {"run": store.name, "weights_version": store.state()["weights_version"],
            "targets": {label: {key: state[key] for key in ("target_id", "target", "reference_ms")}
                        for label, state in targets.items()},
            "versions": environment.get("versions", {}), "commit": environment.get("commit")}


def record_entries(store: RunStore, entries: Sequence[Delivered], config: Config) -> None:
    """Adds entries to generated.json; a later entry for the same target and budget replaces the earlier one."""
    merged = {(entry.target, entry.budget_ms): entry for entry in [*delivered_entries(store, config), *entries]}
    order = {goal.label: number for number, goal in enumerate(read_goals(store, config))}
    keys = sorted(merged, key=lambda key: (order.get(key[0], len(order)), key[1]))
    write_json(store.path / "generated.json", [asdict(merged[key]) for key in keys])


def delivered_entries(store: RunStore, config: Config) -> list[Delivered]:
    """What generated.json holds; entries of an earlier version are of the run's only target."""
    path = store.path / "generated.json"
    if not path.exists():
        return []
    return [Delivered(**{"target": config.labels[0]} | entry | {"tokens": tuple(entry["tokens"])})
            for entry in read_json(path)]


def final_rows(entries: Sequence[Delivered]) -> list[FinalRow]:
    several = len({entry.target for entry in entries}) > 1
    return [FinalRow(e.budget_ms, e.text or e.reason, e.predicted_ms, e.latency_ms, e.latency_stderr_ms, e.accuracy,
                     e.test_accuracy, e.madds, e.params, e.onnx, e.feasible, e.target if several else "")
            for e in entries]
