"""Third stage: the controller proposes, rollout workers evaluate, the trial store remembers, the controller learns.

At most as many evaluations are under way as keep the workers busy. A trial is recorded before the controller sees it,
so a run that is killed anywhere replays the record into a fresh controller and goes on.
"""
from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import numpy as np

from orchestrator.controllers.catalogue import make_controller
from orchestrator.controllers.controller import Proposal, Task
from orchestrator.record.goals import goal_model
from orchestrator.record.progress import Best
from orchestrator.record.store import Trial
from orchestrator.services.batchlog import BatchLog
from orchestrator.services.context import POLL_S, Leaders, RunContext
from orchestrator.services.distributions import distributions
from orchestrator.services.elite import save_spaces
from orchestrator.services.evaluation import record_trials
from orchestrator.services.panel import Panel, nan_for_none
from orchestrator.services.states import save_state, state_name
from orchestrator.services.warmstart import earlier_runs, with_latencies


def explore(run: RunContext) -> None:
    with contextlib.closing(replayed_panel(run)) as panel:
        save_spaces(run, panel)
        _explore(run, panel)


def _explore(run: RunContext, panel: Panel) -> None:
    evaluations = run.config.search.evaluations
    run.progress.stage("search", total=evaluations, done=run.store.trials.rows, tell="the search")
    rollouts = run.services.rollouts()
    in_flight: dict[int, tuple[str, Proposal]] = {}
    ticket = 0
    history, batches = MetricsHistory(run, panel), BatchLog(run.store)
    while (done := run.store.trials.rows) < evaluations:
        run.poll()
        room = min(rollouts.capacity, evaluations - done - len(in_flight))
        proposals = panel.propose(room) if room > 0 else []
        history.note()
        if not proposals and not in_flight:
            run.progress.note(f"the controller has nothing left to propose after {done} evaluations")
            break
        fresh = dict(enumerate(proposals, start=ticket))
        ticket += len(proposals)
        in_flight |= fresh
        run.services.begin_batches([proposal for _, proposal in proposals])
        rollouts.submit([(number, proposal.tokens) for number, (_, proposal) in fresh.items()])
        run.metrics.in_flight(len(in_flight), left=evaluations - done)
        run.metrics.rollouts(rollouts.ready_workers, rollouts.restarts)
        finished = [(*in_flight.pop(int(str(number))), result) for number, result in rollouts.collect(timeout_s=POLL_S)]
        trials = record_trials(run, [(proposal, result) for _, proposal, result in finished], panel,
                               [label for label, _, _ in finished])
        panel.observe(trials)
        batches.add(trials, [proposal for _, proposal in in_flight.values()])
        _show(run, trials)
        run.services.tell_of_missing_rollouts()
    batches.add([], [])
    run.metrics.in_flight(0, left=max(0, evaluations - run.store.trials.rows))
    if statistics := run.services.knowledge_statistics():
        run.store.event("knowledge", **statistics)
    learn_and_save(run, panel)
    history.note()


def learn_and_save(run: RunContext, panel: Panel) -> None:
    """Has the controllers learn from all they observed, so that their saved states answer at once."""
    run.progress.stage("learn from all trials")
    for goal in panel.goals:
        panel.generate(goal, goal.budgets_ms)
    for label, state in panel.state_dicts().items():
        save_state(run.store, state_name("controller", label, run.config), state)


def replayed_panel(run: RunContext) -> Panel:
    """Fresh controllers that have observed every recorded trial."""
    goals, models, plugin = run.goals, run.predictors, run.config.controller
    controllers = []
    for goal in goals:
        model = goal_model(goal, models)
        earlier = tuple(with_latencies(e, model) for e in earlier_runs(run.store, run.config, run.space, goal))
        task = Task(goal.budgets_ms, run.config.search.evaluations, run.config.seed, model, earlier,
                    distributions(run, goal))
        controllers.append(make_controller(plugin.name, run.space, task, plugin.options))
    if controllers[0].task.earlier and not controllers[0].uses_earlier_runs:
        run.progress.note(f"controller {plugin.name} does not learn from earlier runs; their latency table is used")
    panel = Panel(goals, controllers, run.config.labels)
    run.leaders = Leaders(goals, run.config.labels)
    for trials in run.store.trials_by_part():
        panel.observe(trials)
        for trial in trials:
            run.metrics.replay(nan_for_none(trial.latency_ms), nan_for_none(trial.accuracy))
            run.leaders.add(trial)
    return panel


class MetricsHistory:
    """The controllers' metrics whenever they change: to TensorBoard, and to events.jsonl for the report."""

    def __init__(self, run: RunContext, panel: Panel) -> None:
        self._run, self._panel = run, panel
        self._last: dict[str, float] = {}

    def note(self) -> None:
        metrics = {name: float(value) for name, value in self._panel.metrics().items() if math.isfinite(value)}
        if metrics == self._last:
            return
        self._last = metrics
        trials = self._run.store.trials.rows
        self._run.store.event("controller", trials=trials, **metrics)
        for name, value in metrics.items():
            self._run.metrics.scalar(f"controller/{name}", value, trials)


def _show(run: RunContext, trials: Sequence[Trial]) -> None:
    if not trials:
        return
    several = len(run.leaders.goals) > 1
    rows = []
    for goal in run.leaders.goals:
        for budget_ms in goal.budgets_ms:
            leader, name = run.leaders.best.get((goal.label, budget_ms)), goal.label if several else ""
            if leader is None:
                rows.append(Best(budget_ms, target=name))
                continue
            trial, latency_ms = leader
            rows.append(Best(budget_ms, latency_ms, trial.accuracy,
                             run.space.text(np.array(trial.tokens, dtype=np.int8)), name))
    run.progress.best(rows)
    run.progress.advance(len(trials), hypervolume=run.metrics.hypervolume, best=run.metrics.best_accuracy)
