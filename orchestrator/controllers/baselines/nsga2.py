"""NSGA-II (Deb, Pratap, Agarwal and Meyarivan 2002) through pymoo: the Pareto front by non-dominated sorting.

    population_0 <- the first P trials
    generation g: tournaments by dominance, then crowding -> crossover -> mutation -> children
                  population_g <- the P best of population_{g-1} and the next P trials, by front, then crowding

Objectives: 1 - accuracy and latency; an architecture over the task's largest budget violates a constraint.

pymoo owns selection and survival (its `ask` and `tell`), the search space owns crossover and mutation. A generation is
P successful trials of the log in their order, whoever proposed them, and its children are a fixed sequence for the
seed, so a replayed log has the same population and the same next children. The sequence is longer than P:
with many workers nobody waits for the last child of a generation; late children count in the next one.

With earlier runs (`warm_start`) population_0 begins with their best under the task's budgets, evaluated again.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.crossover import Crossover
from pymoo.core.mutation import Mutation
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.core.termination import NoTermination

from orchestrator.controllers.baselines.answers import TrialAnswers, within
from orchestrator.controllers.baselines.earlier import recommended
from orchestrator.controllers.baselines.random import distinct_samples
from orchestrator.controllers.controller import Observation, Proposal
from orchestrator.settings import Section
from searchspaces.space import SearchSpace, Tokens

STREAM = 1   # of random numbers, beside the random architectures'
BROODS = 50  # of P children each: then a generation has no new child to offer and random architectures are proposed


class Nsga2Settings(Section):
    model_config = ConfigDict(frozen=True)

    population: int = Field(12, ge=2, le=1_000_000, description=(
        "P; 100 in the paper, whose searches are 25,000 evaluations long"))
    crossover: float = Field(0.9, ge=0, le=1, description="chance that a child has two parents")
    further_mutations: float = Field(0.0, ge=0, le=1, description="chance that a token mutates beside the one that "
                                                                  "always does")


class Nsga2(TrialAnswers):
    """See the module docstring."""

    settings: Nsga2Settings
    uses_earlier_runs = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.algorithm = _algorithm(self.space, self.settings, len(self.space.choices))
        self.generation = 0                    # populations that were formed
        best_before = recommended(self.space, self.task, self.settings.population)
        self._random = filter(self.is_new, chain(best_before, distinct_samples(self.space, self.task)))
        self._children: Iterator[Tokens] = iter(())

    @classmethod
    def settings_model(cls) -> type[BaseModel]:
        return Nsga2Settings

    def propose(self, n: int) -> list[Proposal]:
        size = self.settings.population
        while len(self.trials) >= (self.generation + 1) * size:
            self._survive(self.trials[self.generation * size:][:size])
        fresh = chain(filter(self.is_new, self._children), self._random)
        return [self.take(tokens_T) for tokens_T in islice(fresh, n)]

    def _survive(self, generation: Sequence[Observation]) -> None:
        """Environmental selection among the population and a complete generation; one random stream per generation."""
        self.generation += 1
        self.algorithm.random_state = np.random.default_rng([self.task.seed, STREAM, self.generation])
        self.algorithm.tell(infills=individuals(generation, max(self.task.budgets_ms)))
        self._children = self._brood()

    def _brood(self) -> Iterator[Tokens]:
        """int8[T] after int8[T]: children of the current population, drawn from what survival left of its stream."""
        for _ in range(BROODS):
            children_NT = self.algorithm.ask().get("X").astype(np.int8)
            yield from children_NT[within(self.task, children_NT, max(self.task.budgets_ms))]

    def metrics(self) -> dict[str, float]:
        if not self.generation:
            return {}
        front = float(np.sum(self.algorithm.pop.get("rank") == 0))
        return {"generation": float(self.generation), "front_in_population": front}


def individuals(trials: Sequence[Observation], largest_ms: float) -> Population:
    """pymoo's evaluated individuals: F (N, 2) to be minimised, G (N, 1) at most 0 where the constraint is met."""
    latency_N = np.array([t.latency_ms for t in trials])
    objectives = np.column_stack([[1 - t.accuracy for t in trials], latency_N])
    return Population.new(X=np.stack([t.tokens for t in trials]), F=objectives, G=latency_N[:, None] - largest_ms)


class TokenCrossover(Crossover):
    """Two parents, one child: the space's crossover."""

    def __init__(self, space: SearchSpace, probability: float) -> None:
        super().__init__(n_parents=2, n_offsprings=1, prob=probability)
        self.space = space

    def _do(self, problem: Problem, X: NDArray[np.int8], *args: Any, random_state: Any = None,
            **kwargs: Any) -> NDArray[np.int8]:
        """X (2, N, T) -> (1, N, T)."""
        return self.space.crossover(random_state, X[0], X[1])[None]


class TokenMutation(Mutation):
    """The space's mutation: at least one live token changes."""

    def __init__(self, space: SearchSpace, share: float) -> None:
        super().__init__(prob=1.0)
        self.space, self.share = space, share

    def _do(self, problem: Problem, X: Tokens, *args: Any, random_state: Any = None, **kwargs: Any) -> Tokens:
        return self.space.mutate(random_state, X, self.share)


def _algorithm(space: SearchSpace, settings: Nsga2Settings, positions: int) -> NSGA2:
    """pymoo's NSGA-II; it is told the first generation, so it needs no sampling, and it never stops by itself (the
    constructor overwrites a given termination).

    Children that are known are dropped by the controller, which knows all trials and not only the population.
    """
    algorithm = NSGA2(pop_size=settings.population, sampling=None, crossover=TokenCrossover(space, settings.crossover),
                      mutation=TokenMutation(space, settings.further_mutations), eliminate_duplicates=False,
                      output=None)
    algorithm.setup(Problem(n_var=positions, n_obj=2, n_ieq_constr=1))
    algorithm.termination = NoTermination()
    return algorithm
