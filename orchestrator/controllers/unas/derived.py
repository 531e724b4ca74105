"""UNAS with a supernet: the distributions are learned beside its weights (searchspaces/training/unas.py), and here they
become trials and answers (specification 9).

The first proposals are the derived architectures, the most probable choice of every decision, one per budget. Samples
of the distributions follow, budgets in turn: a distribution that is not yet sure is worth more than its mode. Answers
are the most accurate trials under a budget, so a budget nobody asked for before gets one too.

With earlier runs (`warm_start`) their best architecture under each budget is evaluated as well, with this run's
weights. The distributions themselves are not touched: they learn from weights, of which earlier runs have none to give.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from orchestrator.controllers.baselines.answers import TrialAnswers, within
from orchestrator.controllers.baselines.earlier import recommended
from orchestrator.controllers.controller import Proposal, Task
from orchestrator.controllers.unas.settings import UnasOptions
from searchspaces.space import SearchSpace, Tokens

ATTEMPTS = 40       # draws of a batch of samples before another budget has its turn
BATCH = 64
SURE = 0.5          # a decision whose most probable value has this chance is settled


class DerivedUnas(TrialAnswers):
    """`task.distributions`: logits float64[K_e] per decision, one list per budget."""

    def __init__(self, space: SearchSpace, settings: UnasOptions, task: Task) -> None:
        super().__init__(space, settings, task)
        self._probabilities = [[softmax(logits) for logits in of_budget] for of_budget in task.distributions]
        self._recommended = list(recommended(space, task, len(task.budgets_ms)))

    def propose(self, n: int) -> list[Proposal]:
        wanted: list[Proposal] = []
        for tokens_T, budget_ms in self._derived():
            if len(wanted) < n and self.is_new(tokens_T):
                wanted.append(self.take(tokens_T, budget_ms))
        while len(wanted) < n and (proposal := self._sampled()) is not None:
            wanted.append(proposal)
        return wanted

    def _derived(self) -> Iterator[tuple[Tokens, float]]:
        for budget_ms, probabilities in zip(self.task.budgets_ms, self._probabilities):
            tokens_T = self.space.most_probable(probabilities)
            if within(self.task, tokens_T[None], max(self.task.budgets_ms))[0]:
                yield tokens_T, budget_ms
        for budget_ms, tokens_T in zip(self.task.budgets_ms, self._recommended):
            yield tokens_T, budget_ms

    def _sampled(self) -> Proposal | None:
        """A new sample under its budget: random numbers depend on the seed and on what is observed or pending."""
        position = len(self._taken)
        rng = np.random.default_rng([self.task.seed, position])
        for attempt in range(ATTEMPTS):
            turn = (position + attempt) % len(self.task.budgets_ms)
            budget_ms = self.task.budgets_ms[turn]
            flat = attempt / ATTEMPTS           # a distribution that is sure has no new samples: flatten it
            rows_NT = self.space.canonical(sample(rng, self._probabilities[turn], BATCH, flat))
            for row in rows_NT[within(self.task, rows_NT, budget_ms)]:
                if self.is_new(row) and self._is_valid(row):
                    return self.take(row, budget_ms)
        return None

    def _is_valid(self, tokens_T: Tokens) -> bool:
        return all(self.space.valid(tokens_T[:position])[token] for position, token in enumerate(tokens_T))

    def metrics(self) -> dict[str, float]:
        return settled([p for probabilities in self._probabilities for p in probabilities])


def settled(probabilities: Sequence[NDArray[np.float64]]) -> dict[str, float]:
    """`entropy` in nats per decision and the share of decisions that are `settled`."""
    entropy = np.mean([-(p * np.log(np.maximum(p, 1e-300))).sum() for p in probabilities])
    return {"entropy": float(entropy), "settled": float(np.mean([p.max() >= SURE for p in probabilities]))}


def sample(rng: np.random.Generator, probabilities: Sequence[NDArray[np.float64]], n: int, flat: float) -> Tokens:
    """int8[n, T] from independent categoricals, mixed with `flat` of the uniform distribution over possible values."""
    columns = []
    for p in probabilities:
        possible = p > 1e-9
        mixed = (1 - flat) * p + flat * possible / possible.sum()
        columns.append(rng.choice(len(p), size=n, p=mixed / mixed.sum()))
    return np.stack(columns, axis=1).astype(np.int8)


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()
