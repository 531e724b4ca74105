"""What a user would have without the search, trained and measured by the same rules (`compare` in the configuration).

All resolutions of the fixed network are measured first, while nothing trains; what the budgets choose is then trained,
several at once, and becomes files as what is handed over does. Empty without `compare`.
"""
from __future__ import annotations

import contextlib
import math

import numpy as np

from actors.wholefile import remove_tree
from orchestrator.comparison.bench import FixedBench
from orchestrator.comparison.compared import FOLDER, Compared, Comparison
from orchestrator.comparison.fixed import FixedNetworks
from orchestrator.comparison.handover import FixedHandOver
from orchestrator.handover.architectures import makes_models
from orchestrator.handover.delivered import Candidate
from orchestrator.record.goals import Goal
from orchestrator.services.context import RunContext
from orchestrator.services.delivery import lineage


def compare(run: RunContext) -> None:
    if not run.config.compare:
        return
    fixed = FixedNetworks(run.config, run.space.classes, run.space.channels)
    bench, comparison = FixedBench(run, fixed), Comparison(run.store)
    goals = [goal for goal in run.goals if makes_models(run.config, goal)]
    _measure(run, bench, comparison, [label for goal in goals for label in goal.targets])
    made = [(goal, _handover(run, bench, goal), _candidates(fixed, comparison, goal)) for goal in goals]
    first = {candidate.arch_id: candidate.tokens for goal, handover, candidates in made
             for candidate in handover.unmade(goal.budgets_ms, candidates)}
    if first:
        bench.train_ahead(np.stack(list(first.values())))
    run.progress.stage("compare: files", total=sum(len(goal.budgets_ms) for goal in goals), done=0)
    for goal, handover, candidates in made:
        for model in handover.deliver(goal.budgets_ms, candidates):
            resolution = fixed.resolution(model.tokens) if model.feasible else None
            comparison.add(Compared(resolution, model))
            run.store.event("compared", target=goal.label, budget_ms=model.budget_ms, resolution=resolution)
            run.progress.advance(1, budget_ms=model.budget_ms,
                                 test_accuracy=math.nan if model.test_accuracy is None else model.test_accuracy)
            if not model.feasible:
                run.progress.note(f"fixed network: {model.reason}")
            run.stop.check()
    with contextlib.suppress(OSError):
        remove_tree(bench.folder)


def _measure(run: RunContext, bench: FixedBench, comparison: Comparison, labels: list[str]) -> None:
    """What compared.json lacks."""
    missing = [(label, resolution) for label in labels for resolution in bench.fixed.resolutions
               if resolution not in comparison.latencies_ms.get(label, {})]
    if missing:
        run.progress.stage("compare: measure", total=len(missing), done=0)
    for label, resolution in missing:
        comparison.add_latencies(label, {resolution: bench.latency_ms(label, resolution)})
        run.progress.advance(1)
        run.stop.check()


def _handover(run: RunContext, bench: FixedBench, goal: Goal) -> FixedHandOver:
    """Weights have no version: they are not the supernet's."""
    return FixedHandOver(bench.fixed.space, run.splits, run.preprocessing, bench, run.config.delivery, run.store.path,
                         lineage(run.store, run.config) | {"weights_version": 0}, goal, folder=FOLDER)


def _candidates(fixed: FixedNetworks, comparison: Comparison, goal: Goal) -> list[Candidate]:
    """The network at every resolution, with the goal's latency."""
    latency_N = goal.latency_ms({label: [comparison.latencies_ms[label][resolution] for resolution in fixed.resolutions]
                                 for label in goal.targets})
    rows = [fixed.tokens(resolution) for resolution in fixed.resolutions]
    return [Candidate(row, fixed.space.arch_id(row), math.nan, float(ms), float(ms))
            for row, ms in zip(rows, latency_N)]
