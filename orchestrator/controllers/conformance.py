"""The suite that every controller passes, ours or a user's: `paretoray check module:Class`.

It runs the real contract of controllers/controller.py on a small space with made-up accuracies and latencies, once with
a latency model (a device) and once without (a table), and returns one sentence per broken promise.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.controllers.catalogue import make_controller
from orchestrator.controllers.controller import Answer, Controller, Observation, Proposal, Task
from searchspaces.nasbench201.space import NasBench201
from searchspaces.space import SearchSpace, Tokens

EVALUATIONS = 40
STEP = 8
BUDGETS_MS = (4.0, 6.0, 9.0)
IDLE_LIMIT = 3       # empty answers in a row, with nothing pending, before a controller counts as finished


class SyntheticLatency:
    """Milliseconds that grow with the values of the tokens: 1 to 1 + 2T."""

    def predict(self, tokens_NT: Tokens) -> NDArray[np.float64]:
        return 1.0 + 0.5 * np.asarray(tokens_NT, dtype=np.float64).sum(axis=1)


def synthetic_trials(space: SearchSpace, tokens_NT: Tokens, fail_every: int = 13) -> list[Observation]:
    """Accuracy rises with the cost, with a fixed preference per token; every thirteenth architecture fails."""
    latency_N = SyntheticLatency().predict(tokens_NT)
    weights_T = np.random.default_rng(7).uniform(0.2, 1.0, tokens_NT.shape[1])
    accuracy_N = 0.3 + 0.6 * np.tanh(np.asarray(tokens_NT) @ weights_T / tokens_NT.shape[1])
    failed = [int(space.arch_id(row), 16) % fail_every == 0 for row in tokens_NT]
    return [Observation(row, math.nan, math.nan, "made to fail") if bad else Observation(row, float(a), float(ms))
            for row, a, ms, bad in zip(tokens_NT, accuracy_N, latency_N, failed, strict=True)]


def check_controller(reference: str, options: Mapping[str, Any] | None = None) -> list[str]:
    """Problems of the controller `reference` (a shipped name or module:Class); none: certified."""
    space = NasBench201()
    problems: list[str] = []
    for latency in (SyntheticLatency(), None):
        task = Task(BUDGETS_MS, EVALUATIONS, seed=3, latency=latency)
        where = "with a latency model" if latency else "without a latency model"

        def fresh(task: Task = task) -> Controller:
            return make_controller(reference, space, task, options or {})

        controller, found = fresh(), []
        found += _check_answers(controller.generate(BUDGETS_MS), BUDGETS_MS, 1, "before any trial")
        log, issues = _run(controller, space, task)
        found += issues + _check_replay(fresh, log)
        found += _check_generate(controller, fresh(), log, task)
        problems += [f"{problem} ({where})" for problem in found]
    return problems


def _run(controller: Controller, space: SearchSpace, task: Task) -> tuple[list[Observation], list[str]]:
    """The whole search; batches come back in reversed order, and a foreign trial is mixed in."""
    log: list[Observation] = []
    seen: set[bytes] = set()
    problems: list[str] = []
    idle = 0
    while len(log) < task.evaluations and idle < IDLE_LIMIT:
        proposals = controller.propose(min(STEP, task.evaluations - len(log)))
        idle = 0 if proposals else idle + 1
        problems += _check_proposals(proposals, space, task, seen)
        if not proposals:
            continue
        trials = synthetic_trials(space, np.stack([p.tokens for p in proposals]))[::-1]
        if not log:
            trials += synthetic_trials(space, space.canonical(space.extremes())[:1])
        seen.update(np.asarray(trial.tokens, dtype=np.int8).tobytes() for trial in trials)
        controller.observe(trials)
        log += trials
    if len(log) < task.evaluations:
        problems.append(f"stopped proposing after {len(log)} of {task.evaluations} evaluations although the space has "
                        f"{space.size()} architectures")
    return log, list(dict.fromkeys(problems))


def _check_proposals(proposals: Sequence[Proposal], space: SearchSpace, task: Task, seen: set[bytes]) -> list[str]:
    if not proposals:
        return []
    rows_NT = space.check_tokens(np.stack([proposal.tokens for proposal in proposals]))
    keys = [row.tobytes() for row in rows_NT]
    problems = []
    if len(proposals) > STEP:
        problems.append(f"propose({STEP}) returned {len(proposals)} proposals")
    if len(set(keys)) < len(keys):
        problems.append("proposed an architecture twice in one call")
    if seen & set(keys):
        problems.append("proposed an architecture that was observed already")
    if not np.array_equal(space.canonical(rows_NT), rows_NT):
        problems.append("proposed tokens that are not canonical")
    if task.latency is not None and (task.latency.predict(rows_NT) > max(task.budgets_ms)).any():
        problems.append(f"proposed an architecture over the largest budget of {max(task.budgets_ms)} ms although its "
                        "latency is known")
    return problems


def _check_replay(fresh: Callable[[], Controller], log: Sequence[Observation]) -> list[str]:
    """A controller that observes the log at once, and one that observes it in pieces, propose the same next."""
    problems = []
    for length in (0, len(log) - 1):
        at_once, in_pieces, again = fresh(), fresh(), fresh()
        at_once.observe(log[:length])
        again.observe(log[:length])
        for start in range(0, length, STEP):
            in_pieces.observe(log[start:min(start + STEP, length)])
        first, second, third = ([p.tokens.tolist() for p in c.propose(4)] for c in (at_once, in_pieces, again))
        if first != third:
            problems.append(f"two fresh controllers propose differently after the same {length} trials")
        elif first != second:
            problems.append(f"proposals after {length} trials depend on how the log was cut into observe() calls")
    return problems


def _check_generate(controller: Controller, restored: Controller, log: Sequence[Observation],
                    task: Task) -> list[str]:
    unseen = [*task.budgets_ms, 5.0, 1e-6, 1e6]
    answers = controller.generate(unseen, alternatives=3)
    problems = _check_answers(answers, unseen, 3, "after the search")
    if any(answer.feasible for answer in answers[-2]):
        problems.append("an answer for a budget of 0.000001 ms is called feasible")
    if not all(answer.feasible for answer in answers[-1]):
        problems.append("an answer for a budget of 1000000 ms is called infeasible")
    restored.observe(log)
    restored.load_state_dict(controller.state_dict())
    if _comparable(restored.generate(unseen, 3)) != _comparable(answers):
        problems.append("answers differ after state_dict and load_state_dict")
    for name, value in controller.metrics().items():
        if not isinstance(value, float | int):
            problems.append(f"metric {name} is {type(value).__name__}, not a number")
    return problems


def _check_answers(answers: Sequence[Sequence[Answer]], budgets_ms: Sequence[float], alternatives: int,
                   when: str) -> list[str]:
    if len(answers) != len(budgets_ms):
        return [f"generate returned {len(answers)} entries for {len(budgets_ms)} budgets {when}"]
    problems = []
    for budget_ms, options in zip(budgets_ms, answers, strict=True):
        if not 1 <= len(options) <= alternatives:
            problems.append(f"generate returned {len(options)} answers where 1 to {alternatives} were asked {when}")
        if any(answer.budget_ms != budget_ms for answer in options):
            problems.append(f"an answer names another budget than {budget_ms} ms {when}")
        if any(answer.feasible and not answer.latency_ms <= budget_ms for answer in options):
            problems.append(f"an answer over the budget of {budget_ms} ms is called feasible {when}")
    return problems


def _comparable(answers: Sequence[Sequence[Answer]]) -> list[list[tuple[object, ...]]]:
    return [[(a.tokens.tolist(), round(a.latency_ms, 9), round(a.accuracy, 9), a.observed, a.feasible, a.clamped)
             for a in options] for options in answers]
