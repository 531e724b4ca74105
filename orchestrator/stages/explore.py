"""Third stage: the controller proposes, rollout workers evaluate, the trial store remembers, the controller learns.

At most as many evaluations are under way as keep the workers busy. A trial is recorded before the controller sees it,
so a run that is killed anywhere replays the record into a fresh controller and goes on.
"""
from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import numpy as np

from orchestrator.batchlog import BatchLog
from orchestrator.context import POLL_S, Leaders, RunContext
from orchestrator.controllers.catalogue import make_controller
from orchestrator.controllers.controller import Controller, Proposal, Task
from orchestrator.evaluation import nan_for_none, observation, record_trials
from orchestrator.progress import Best
from orchestrator.store import Trial
from orchestrator.warmstart import earlier_runs, with_latencies


def explore(run: RunContext) -> None:
    controller = replayed_controller(run)
    with contextlib.closing(controller):
        _explore(run, controller)


def _explore(run: RunContext, controller: Controller) -> None:
    evaluations = run.config.search.evaluations
    run.progress.stage("search", total=evaluations, done=run.store.trials.rows)
    rollouts = run.services.rollouts()
    in_flight: dict[int, Proposal] = {}
    ticket = 0
    history, batches = MetricsHistory(run, controller), BatchLog(run.store)
    while (done := run.store.trials.rows) < evaluations:
        run.stop.check()
        room = min(rollouts.capacity, evaluations - done - len(in_flight))
        proposals = controller.propose(room) if room > 0 else []
        history.note()
        if not proposals and not in_flight:
            run.progress.note(f"the controller has nothing left to propose after {done} evaluations")
            break
        fresh = dict(enumerate(proposals, start=ticket))
        ticket += len(proposals)
        in_flight |= fresh
        run.services.begin_batches(proposals)
        rollouts.submit([(number, proposal.tokens) for number, proposal in fresh.items()])
        run.metrics.in_flight(len(in_flight))
        finished = rollouts.collect(timeout_s=POLL_S)
        trials = record_trials(run, [(in_flight.pop(int(str(number))), result) for number, result in finished],
                               controller)
        controller.observe([observation(trial) for trial in trials])
        batches.add(trials, in_flight.values())
        _show(run, trials)
    batches.add([], [])
    if statistics := run.services.knowledge_statistics():
        run.store.event("knowledge", **statistics)
    run.progress.stage("learn from all trials")
    controller.generate(run.budgets_ms)  # the last fit, so that the saved state answers at once
    history.note()
    run.save_controller(controller)


def replayed_controller(run: RunContext) -> Controller:
    """A fresh controller that has observed every recorded trial."""
    assert run.predictor is not None, "measuring comes before searching"
    earlier = tuple(with_latencies(e, run.predictor) for e in earlier_runs(run.store, run.config, run.space))
    task = Task(tuple(run.budgets_ms), run.config.search.evaluations, run.config.seed, run.predictor, earlier)
    name = run.config.controller.name
    controller = make_controller(name, run.space, task, run.config.controller.options)
    if earlier and not controller.uses_earlier_runs:
        run.progress.note(f"controller {name} does not learn from earlier runs; their latency table is used")
    trials = run.store.read_trials()
    controller.observe([observation(trial) for trial in trials])
    run.leaders = Leaders(run.budgets_ms)
    for trial in trials:
        run.metrics.replay(nan_for_none(trial.latency_ms), nan_for_none(trial.accuracy))
        run.leaders.add(trial)
    return controller


class MetricsHistory:
    """The controller's metrics whenever they change: to TensorBoard, and to events.jsonl for the report."""

    def __init__(self, run: RunContext, controller: Controller) -> None:
        self._run, self._controller = run, controller
        self._last: dict[str, float] = {}

    def note(self) -> None:
        metrics = {name: float(value) for name, value in self._controller.metrics().items() if math.isfinite(value)}
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
    run.progress.best([Best(b, t.latency_ms, t.accuracy, run.space.text(np.array(t.tokens, dtype=np.int8)))
                       if (t := run.leaders.best.get(b)) else Best(b) for b in run.leaders.budgets_ms])
    run.progress.advance(len(trials), hypervolume=run.metrics.hypervolume, best=run.metrics.best_accuracy)
