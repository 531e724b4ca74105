"""Last stage: the controller's choice for every budget becomes a trained, exported and re-measured model; where a
target only looks latencies up it stays an architecture."""
from __future__ import annotations

import math
from functools import partial

from orchestrator.record.goals import Goal
from orchestrator.services.context import RunContext
from orchestrator.services.delivery import Delivery, restored_controller
from orchestrator.services.workbench import cluster_bench


def deliver(run: RunContext) -> None:
    bench = cluster_bench(run)
    for goal in run.goals:
        _begin(run, goal)
        delivery = Delivery(run.config, run.store, run.space, run.splits, run.preprocessing, goal,
                            restored_controller(run.store, run.config, run.space, goal))
        answers = delivery.answers(goal.budgets_ms)
        for entry in delivery.entries(bench, goal.budgets_ms, answers, retrained=partial(_begin, run, goal)):
            run.store.event("delivered", target=goal.label, budget_ms=entry.budget_ms, feasible=entry.feasible,
                            onnx=entry.onnx)
            test_accuracy = math.nan if entry.test_accuracy is None else entry.test_accuracy
            run.progress.advance(1, budget_ms=entry.budget_ms, test_accuracy=test_accuracy)
            if not entry.feasible:
                run.progress.note(entry.reason)
            run.stop.check()


def _begin(run: RunContext, goal: Goal) -> None:
    title = "deliver" if len(run.goals) == 1 else f"deliver {goal.label}"
    run.progress.stage(title, total=len(goal.budgets_ms), done=0)
