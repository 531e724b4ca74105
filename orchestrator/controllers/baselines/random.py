"""Uniform random search: the baseline that every other controller has to beat."""
from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from orchestrator.controllers.baselines.answers import TrialAnswers, within
from orchestrator.controllers.controller import Proposal, Task
from searchspaces.space import SearchSpace, Tokens

BLOCK = 256                             # architectures drawn at a time; block b is a function of (seed, b)
BARREN_BLOCKS = 20                      # in a row, without a single new architecture: the space is exhausted
MUTATION_SHARES = (0.05, 0.15, 0.3, 0.5)


class RandomSearch(TrialAnswers):
    """Proposes distinct uniform samples; answers with the best trial under the budget. Nothing is learnt."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._samples = distinct_samples(self.space, self.task)

    def propose(self, n: int) -> list[Proposal]:
        return [self.take(tokens_T) for tokens_T in islice(filter(self.is_new, self._samples), n)]


def distinct_samples(space: SearchSpace, task: Task) -> Iterator[Tokens]:
    """int8[T] after int8[T]: distinct uniform samples at or under the largest budget, a fixed sequence per seed.

    Whoever takes the first that is new to him proposes the same after a replay. Ends where the space is exhausted.
    """
    seen: set[bytes] = set()
    block = barren = 0
    while barren < BARREN_BLOCKS:
        barren += 1
        for tokens_T in _block(space, task, np.random.default_rng([task.seed, block])):
            if tokens_T.tobytes() not in seen:
                seen.add(tokens_T.tobytes())
                barren = 0
                yield tokens_T
        block += 1


def _block(space: SearchSpace, task: Task, rng: np.random.Generator) -> Tokens:
    """Uniform samples; where none of a block meets the largest budget, mutations of the fastest architecture."""
    rows_NT = space.sample_uniform(rng, BLOCK)
    rows_NT = rows_NT[within(task, rows_NT, max(task.budgets_ms))]
    if len(rows_NT):
        return rows_NT
    fastest_NT = np.repeat(space.canonical(space.extremes())[:1], BLOCK // len(MUTATION_SHARES), axis=0)
    rows_NT = np.concatenate([fastest_NT[:1], *(space.mutate(rng, fastest_NT, share) for share in MUTATION_SHARES)])
    return rows_NT[within(task, rows_NT, max(task.budgets_ms))]
