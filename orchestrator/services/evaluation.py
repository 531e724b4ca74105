"""Having architectures measured and evaluated, and recording the outcome: the only writers of trials and latency."""
from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from actors.evaluator import Evaluation
from actors.latency.result import LatencyRequest, LatencyResult
from orchestrator.controllers.controller import Proposal
from orchestrator.record.goals import target_state
from orchestrator.record.records import latency_row
from orchestrator.record.store import Trial
from orchestrator.services.context import POLL_S, RunContext, RunTarget
from orchestrator.services.panel import Panel
from searchspaces.errors import EvaluationError, TargetError
from searchspaces.space import Tokens

FAILURES_BEFORE_GIVING_UP = 20  # with no success at all: then the fault is not the architectures'


def measure_architectures(run: RunContext, target: RunTarget, tokens_NT: Tokens,
                          advance: Callable[[int], None] = lambda count: None) -> None:
    """Measures and records what is not recorded yet; `advance` hears how many came back. TargetError if nothing at all
    can be measured."""
    distinct = {run.space.arch_id(row): row for row in tokens_NT}
    missing = [row for arch_id, row in distinct.items() if arch_id not in target.measured_ms]
    if not missing:
        return
    pool = run.services.latency(target.label)
    pool.submit([LatencyRequest(row) for row in missing])
    results: list[LatencyResult] = []
    while pool.outstanding:
        run.poll()
        run.metrics.devices(target.label, pool.activities(), pool.waiting)
        finished = pool.collect(timeout_s=POLL_S)
        record_latencies(run, target, finished)
        results += finished
        advance(len(finished))
    run.metrics.devices(target.label, pool.activities(), pool.waiting)
    if all(result.error for result in results) and not target.measured_ms:
        raise TargetError(f"none of {len(results)} networks could be measured on target {target.label}: "
                          f"{results[-1].error}")


def record_latencies(run: RunContext, target: RunTarget, results: Sequence[LatencyResult]) -> None:
    predictor = target.predictor
    predicted = predictor.predict(np.stack([r.tokens_T for r in results])) if predictor and results else None
    run.store.latency.append([latency_row(result, None if predicted is None else float(predicted[i]))
                              for i, result in enumerate(results)])
    target.measured_ms.update({r.arch_id: r.sample.latency_ms for r in results if r.sample is not None})
    run.metrics.latency_measurements(sum(result.source == "measured" for result in results))


def evaluate_architectures(run: RunContext, tokens_NT: Tokens) -> list[Trial]:
    """Trials of these architectures, in the order of the rows; evaluated and recorded where they are not yet."""
    recorded = {trial.arch_id: trial for trial in run.store.read_trials()}
    missing = {run.space.arch_id(row): row for row in tokens_NT if run.space.arch_id(row) not in recorded}
    if missing:
        rollouts = run.services.rollouts()
        rollouts.submit(list(missing.items()))
        done: dict[Hashable, Evaluation] = {}
        while rollouts.outstanding:
            run.poll()
            done |= dict(rollouts.collect(timeout_s=POLL_S))
            run.services.tell_of_missing_rollouts()
        fresh = record_trials(run, [(Proposal(row), done[arch_id]) for arch_id, row in missing.items()])
        recorded |= {trial.arch_id: trial for trial in fresh}
    return [recorded[run.space.arch_id(row)] for row in tokens_NT]


def record_trials(run: RunContext, finished: Sequence[tuple[Proposal, Evaluation]],
                  panel: Panel | None = None, proposed_for: Sequence[str | None] | None = None) -> list[Trial]:
    """Turns evaluations into trials and writes them; returns them in the order of the log. `panel` says what reward
    they are worth to the goals that they were `proposed_for`."""
    if not finished:
        return []
    tokens_NT = run.space.canonical(np.stack([proposal.tokens for proposal, _ in finished]))
    madds_N, params_N = run.space.cost(tokens_NT)
    arch_ids = [run.space.arch_id(row) for row in tokens_NT]
    latencies = [target.latencies(arch_ids, tokens_NT) for target in run.targets]   # [target][N]
    target_ids = [target_state(run.store, target.label)["target_id"] for target in run.targets]
    purposes = list(proposed_for or [None] * len(finished))
    rewards_N = _rewards(run, panel, purposes, tokens_NT, [e.accuracy for _, e in finished], latencies)
    first = run.store.trials.rows
    trials = []
    for i, (proposal, evaluation) in enumerate(finished):
        trials.append(Trial(
            sequence=first + i, arch_id=arch_ids[i], tokens=tuple(tokens_NT[i].tolist()),
            space_id=run.space.space_id, controller=run.config.controller.name,
            accuracy=None if evaluation.error else evaluation.accuracy, accuracy_source=evaluation.source,
            weights_version=evaluation.weights_version,
            latency_ms=latencies[0][i][0], latency_source=latencies[0][i][1], target_id=target_ids[0],
            madds=int(madds_N[i]), params=int(params_N[i]), budget_ms=proposal.budget_ms, reward=rewards_N[i],
            seed=run.config.seed, started_at=time.time() - evaluation.duration_s, duration_s=evaluation.duration_s,
            node=evaluation.node, error=evaluation.error, details=json.dumps(dict(evaluation.details)),
            latencies=tuple({"target": target.label, "target_id": target_id, "latency_ms": ms[i][0], "source": ms[i][1]}
                            for target, target_id, ms in zip(run.targets, target_ids, latencies)),
            proposed_for=purposes[i]))
    run.store.append_trials(trials)
    for trial in trials:
        run.metrics.trial(vars(trial))
        run.leaders.add(trial)
    _give_up_if_nothing_works(run)
    return trials


def _rewards(run: RunContext, panel: Panel | None, purposes: Sequence[str | None], tokens_NT: Tokens,
             accuracy_N: Sequence[float], latencies: Sequence[Sequence[tuple[float, str]]]) -> list[float | None]:
    if panel is None:
        return [None] * len(tokens_NT)
    by_target = {target.label: np.array([ms for ms, _ in column]) for target, column in zip(run.targets, latencies)}
    reward_N = panel.rewards(purposes, tokens_NT, np.array(accuracy_N), by_target)
    return [float(value) if math.isfinite(value) else None for value in reward_N]


def _give_up_if_nothing_works(run: RunContext) -> None:
    leaders = run.leaders
    if not leaders.successes and leaders.failures >= FAILURES_BEFORE_GIVING_UP:
        raise EvaluationError(f"the first {leaders.failures} evaluations all failed, the last with: "
                              f"{leaders.last_error}; the trials are kept, repair the cause and resume the run")
