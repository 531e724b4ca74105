"""Which architectures could be worth an evaluation, and which of them are chosen (DESIGN section 4).

Candidates come from the generator, from mutations of the best trials and from uniform sampling, so that spaces of any
size are covered. Each slot of a round stands for one random budget and takes the candidate with the largest optimistic
improvement that is likely to meet it, so that the whole front is explored where it is uncertain.

Shape legend: N candidates, T positions.
"""
from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from orchestrator.controllers.controller import LatencyModel, Proposal
from orchestrator.controllers.pnag.budgets import TrainingBudgets
from orchestrator.controllers.pnag.knowledge import Knowledge
from searchspaces.space import SearchSpace, Tokens

ELITE_BUDGETS = 20     # budgets across the range whose best trials are mutated
ELITES = 3             # trials per budget
LEAST_GAIN = 1e-3      # share of the accuracy, so that candidates are ordered also where none promises an improvement
DRAWS = 20             # times as many uniform samples are drawn as are wanted, where many are over the largest budget


def distinct(tokens_NT: Tokens, exclude: Collection[bytes] = ()) -> Tokens:
    """The first occurrence of every row that is not excluded, in order."""
    seen = set(exclude)
    keep = [not (row.tobytes() in seen or seen.add(row.tobytes())) for row in tokens_NT]  # type: ignore[func-returns-value]
    return tokens_NT[np.array(keep, dtype=bool)]


def seeing(space: SearchSpace, tokens_NT: Tokens) -> Tokens:
    """Without the networks whose output does not depend on the image: nobody has to try them to know."""
    return tokens_NT[~space.blind(tokens_NT)]


def initial_design(space: SearchSpace, latency: LatencyModel | None, largest_ms: float, count: int,
                   rng: np.random.Generator) -> list[Proposal]:
    """Distinct uniform samples; with known latency none over the largest budget, spread evenly over latency."""
    if latency is None:
        return [Proposal(row) for row in seeing(space, distinct(space.sample_uniform(rng, count * 2)))[:count]]
    pool_NT = seeing(space, distinct(np.concatenate([space.sample_uniform(rng, count * DRAWS),
                                                     near_extremes(space, count * 8, rng)])))
    latency_N = latency.predict(pool_NT)
    pool_NT, latency_N = pool_NT[latency_N <= largest_ms], latency_N[latency_N <= largest_ms]
    if len(pool_NT) <= count:
        return [Proposal(row) for row in pool_NT]
    chosen: list[int] = []
    free = np.ones(len(pool_NT), dtype=bool)
    for aim_ms in rng.permutation(np.linspace(np.percentile(latency_N, 2), latency_N.max(), count)):
        index = int(np.where(free, np.abs(latency_N - aim_ms), np.inf).argmin())
        free[index] = False
        chosen.append(index)
    return [Proposal(pool_NT[index]) for index in chosen]


def near_extremes(space: SearchSpace, count: int, rng: np.random.Generator) -> Tokens:
    """Mutations of the fastest and the slowest architecture, by few to many tokens: the ends of the latency range,
    which uniform samples of a large space never reach."""
    ends_NT = np.repeat(space.canonical(space.extremes()), -(-count // 8), axis=0)
    return np.concatenate([space.mutate(rng, ends_NT, share) for share in (0.05, 0.15, 0.3, 0.5)])


def elites(knowledge: Knowledge, budgets: TrainingBudgets, others_NT: Tokens | None = None) -> Tokens:
    """int8[*, T]: the best trials by posterior mean under budgets across the range, others among them."""
    tokens_NT, latency_N = knowledge.tokens_MT, knowledge.latency_M
    if others_NT is not None and len(others_NT):
        tokens_NT = distinct(np.concatenate([tokens_NT, others_NT]))
        latency_N = knowledge.latency_ms(tokens_NT)
    accuracy_N = knowledge.accuracy(tokens_NT)
    best: list[int] = [int(latency_N.argmin())]
    for budget_ms in np.linspace(budgets.values_ms[0], budgets.values_ms[-1], ELITE_BUDGETS):
        under = np.flatnonzero(latency_N <= budget_ms)
        best.extend(under[np.argsort(-accuracy_N[under], kind="stable")[:ELITES]].tolist())
    return tokens_NT[np.unique(best)]


def offspring(space: SearchSpace, parents_NT: Tokens, count: int, rng: np.random.Generator) -> Tokens:
    """Half mutations of few tokens, half crossovers."""
    a_NT, b_NT = (parents_NT[rng.integers(len(parents_NT), size=count // 2)] for _ in range(2))
    mutated_NT = space.mutate(rng, a_NT, 1.0 / a_NT.shape[1])
    return np.concatenate([mutated_NT, space.crossover(rng, a_NT, b_NT)])


def select(knowledge: Knowledge, candidates_NT: Tokens, slots_ms: NDArray[np.float64], largest_ms: float,
           optimism: float, rng: np.random.Generator) -> list[Proposal]:
    """One proposal per slot (fewer if there are no more candidates at or under the largest budget).

    The chosen candidate has the largest P(latency <= B) * (optimistic accuracy - best believed accuracy under B). Where
    the latency is predicted badly and the budget is hardly met yet, a long shot is worth more than a safe dud.
    """
    latency_N = knowledge.latency_ms(candidates_NT)
    candidates_NT, latency_N = candidates_NT[latency_N <= largest_ms], latency_N[latency_N <= largest_ms]
    upper_N = knowledge.believe(candidates_NT).upper_N(optimism)
    certain_N = knowledge.looked_up(candidates_NT)
    upper_N = upper_N + 1e-9 * rng.random(len(upper_N))  # ties are broken at random
    known_M = knowledge.accuracy(knowledge.tokens_MT)
    free_N = np.ones(len(candidates_NT), dtype=bool)
    proposals: list[Proposal] = []
    for budget_ms in slots_ms[:len(candidates_NT)]:
        incumbent = known_M[knowledge.latency_M <= budget_ms].max(initial=0.0)
        chance_N = np.where(certain_N, latency_N <= budget_ms, knowledge.chance(latency_N, budget_ms))
        gain_N = np.maximum(upper_N - incumbent, 0) + LEAST_GAIN * upper_N
        index = int(np.where(free_N, chance_N * gain_N, -np.inf).argmax())
        free_N[index] = False
        proposals.append(Proposal(candidates_NT[index], float(budget_ms)))
    return proposals


def budget_slots(budgets: TrainingBudgets, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """`count` random budgets, one in each of as many equal parts of the range, in random order; the smallest is B_1
    itself, where the fewest architectures are feasible and none is found by aiming a little higher."""
    places = (np.arange(count) + rng.random(count)) / count
    places[0] = 0
    return budgets.values_ms[0] + rng.permutation(places) * (budgets.values_ms[-1] - budgets.values_ms[0])
