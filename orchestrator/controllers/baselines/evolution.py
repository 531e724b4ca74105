"""Regularised evolution (Real, Aggarwal, Huang and Le 2019, "Regularized Evolution for Image Classifier Architecture
Search", Algorithm 1).

    population <- P random architectures
    repeat: sample <- S of the population at random, with replacement
            parent <- the best of the sample; child <- one random mutation of the parent
            evaluate the child; it joins the population and the oldest member dies, however good it is

The paper has one objective. Ours serves all budgets B_1..B_K of a task in turn: proposal number i is made for budget
i mod K, and "the best" of its tournament is the most accurate member at or under that budget, the fastest member where
there is none.

The population is by definition the last P successful trials of the log, whoever proposed them, so a replayed log has
the same population; random numbers come from the seed, the number of observed and the number of pending trials.
Nobody waits: as in the paper's asynchronous runs a child is bred from whatever the population is now.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from orchestrator.controllers.baselines.answers import TrialAnswers, within
from orchestrator.controllers.baselines.random import distinct_samples
from orchestrator.controllers.controller import Observation, Proposal
from orchestrator.frontier import best_under
from orchestrator.settings import Section

STREAM = 1  # of random numbers, beside the random architectures'
BROOD = 32  # tournaments and children of which the first new one is proposed; if none is, a random architecture


class EvolutionSettings(Section):
    model_config = ConfigDict(frozen=True)

    population: int = Field(50, ge=2, le=1_000_000, description=(
        "P, 100 in the paper, whose searches are 20,000 evaluations long"))
    sample: int = Field(25, ge=1, le=1_000_000, description="S, of whom the best becomes a parent")
    further_mutations: float = Field(0.0, ge=0, le=1, description="chance that a token mutates beside the one that "
                                                                  "always does; 0 as in the paper")


class RegularisedEvolution(TrialAnswers):
    """See the module docstring."""

    settings: EvolutionSettings

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._random = filter(self.is_new, distinct_samples(self.space, self.task))

    @classmethod
    def settings_model(cls) -> type[BaseModel]:
        return EvolutionSettings

    @property
    def population(self) -> list[Observation]:
        return self.trials[-self.settings.population:]

    def propose(self, n: int) -> list[Proposal]:
        proposals: list[Proposal] = []
        while len(proposals) < n and (proposal := self._next()) is not None:
            proposals.append(proposal)
        return proposals

    def _next(self) -> Proposal | None:
        if len(self.trials) >= self.settings.population:
            number = self.observed + self.pending
            budget_ms = self.task.budgets_ms[number % len(self.task.budgets_ms)]
            rng = np.random.default_rng([self.task.seed, STREAM, self.observed, self.pending])
            if (child := self._child(budget_ms, rng)) is not None:
                return child
        sample_T = next(self._random, None)
        return None if sample_T is None else self.take(sample_T)

    def _child(self, budget_ms: float, rng: np.random.Generator) -> Proposal | None:
        """The first new child of a brood that meets the budget, as far as latency is predicted, else the fastest."""
        samples = rng.integers(len(self.population), size=(BROOD, self.settings.sample))
        parents_NT = np.stack([self.population[tournament(self.population, sample, budget_ms)].tokens
                               for sample in samples])
        children_NT = self.space.mutate(rng, parents_NT, self.settings.further_mutations)
        children_NT = children_NT[within(self.task, children_NT, max(self.task.budgets_ms))]
        if self.task.latency is not None and len(children_NT):
            over_N = np.maximum(self.task.latency.predict(children_NT) - budget_ms, 0)
            children_NT = children_NT[np.argsort(over_N, kind="stable")]
        return next((self.take(child_T, budget_ms) for child_T in children_NT if self.is_new(child_T)), None)

    def metrics(self) -> dict[str, float]:
        return {"population_accuracy": float(np.mean([t.accuracy for t in self.population]))} if self.trials else {}


def tournament(population: Sequence[Observation], sample: Sequence[int], budget_ms: float) -> int:
    """The index, among `sample`, of the most accurate member at or under the budget; of the fastest if there is none.

    Ties go to the faster, then to the earlier in the sample.
    """
    latency_S = [population[index].latency_ms for index in sample]
    best = best_under(budget_ms, latency_S, [population[index].accuracy for index in sample])
    return int(sample[best if best >= 0 else int(np.argmin(latency_S))])
