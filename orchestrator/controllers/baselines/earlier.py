"""Which architectures of earlier runs (`warm_start`) are worth an evaluation here, without a model of anything."""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from orchestrator.controllers.controller import Task
from searchspaces.space import SearchSpace, Tokens


def recommended(space: SearchSpace, task: Task, count: int) -> Iterator[Tokens]:
    """int8[T] after int8[T], `count` at most, distinct: under budgets spread over the task's, the earlier runs in turn,
    what was the most accurate there and is not named yet. Latencies are this task's predictions, else those of the
    earlier runs; networks without one are left out."""
    runs = [(tokens_NT := space.canonical(run.tokens_NT),
             np.where(np.isfinite(run.accuracy_N), run.accuracy_N, -np.inf),
             run.latency_ms_N if task.latency is None else task.latency.predict(tokens_NT)) for run in task.earlier]
    named: set[bytes] = set()
    budgets_ms = np.linspace(min(task.budgets_ms), max(task.budgets_ms), max(1, count))
    for position, budget_ms in enumerate(budgets_ms if runs else ()):
        tokens_NT, accuracy_N, latency_N = runs[position % len(runs)]
        fresh_N = np.array([row.tobytes() not in named for row in tokens_NT], dtype=bool)
        usable_N = fresh_N & (latency_N <= budget_ms) & (accuracy_N > -np.inf)
        if usable_N.any():
            best_T = tokens_NT[int(np.where(usable_N, accuracy_N, -np.inf).argmax())]
            named.add(best_T.tobytes())
            yield best_T
