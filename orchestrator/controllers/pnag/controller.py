"""PNAG, the Pareto-aware neural architecture generator, as a controller (specification pnag.md).

    1. random start: `warmup` architectures, evaluated                               (paper, stage 1)
    2. rounds of at least `batch` evaluations, each decided by what was observed before it     (ours)
         posterior and latency model from the trials -> evaluator R -> generator pi(.|B) -> candidates -> optimism
    3. `generate`: R and pi fitted on all trials; candidates and trials of a budget ranked by the posterior, or as in
       section 10 the generator's draws by R

A round is decided by the seed and the trials observed before it began alone, so that a controller that observes a
recorded log goes on where the original stood. A queue holds two rounds' worth of proposals; the second half
is handed out only while others are pending, so that no worker waits for the last of a round.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel
from threadpoolctl import threadpool_limits

from orchestrator.controllers.controller import Answer, Controller, Observation, Proposal, Task
from orchestrator.controllers.pnag.budgets import TrainingBudgets
from orchestrator.controllers.pnag.candidates import (
    budget_slots,
    distinct,
    elites,
    initial_design,
    near_extremes,
    offspring,
    seeing,
    select,
)
from orchestrator.controllers.pnag.earlier import Earlier
from orchestrator.controllers.pnag.evaluator import Triplets
from orchestrator.controllers.pnag.knowledge import Knowledge
from orchestrator.controllers.pnag.learner import Learner, learn, restore
from orchestrator.controllers.pnag.settings import PnagSettings
from searchspaces.space import SearchSpace, Tokens

LOOKAHEAD = 2            # rounds' worth of proposals in a queue
GENERATOR_BUDGETS = 64   # random budgets for which the generator proposes candidates


class Pnag(Controller):
    """See the module docstring and the contract in controller.py."""

    settings: PnagSettings
    uses_earlier_runs = True

    def __init__(self, space: SearchSpace, settings: PnagSettings, task: Task) -> None:
        super().__init__(space, settings.resolved(), task)
        self._earlier = Earlier(space, self.settings, task) if task.earlier else None
        self._trials: list[Observation] = []
        self._observed: set[bytes] = set()
        self._pending: set[bytes] = set()
        self._round = -2                       # of the queue; -1 is the random start
        self._queue: list[Proposal] = []
        self._round_size = 0
        self._knowledge: Knowledge | None = None
        self._learners: list[Learner] = []
        self._learnt_from = -1                 # trials behind `_learners`
        self._metrics: dict[str, float] = {}

    @classmethod
    def settings_model(cls) -> type[BaseModel]:
        return PnagSettings

    # --- collection ------------------------------------------------------------------------------------------------

    def propose(self, n: int) -> list[Proposal]:
        round_number = self._current_round()
        if round_number != self._round:
            with _one_thread():
                self._queue, self._round = self._plan(round_number), round_number
        taken: list[Proposal] = []
        for position, proposal in enumerate(self._queue):
            key = proposal.tokens.tobytes()
            if len(taken) == n or (position >= self._round_size and not self._pending):
                break
            if key not in self._observed and key not in self._pending:
                taken.append(proposal)
        self._pending.update(proposal.tokens.tobytes() for proposal in taken)
        return taken

    def observe(self, trials: Sequence[Observation]) -> None:
        if not trials:
            return
        tokens_NT = self.space.canonical(np.stack([np.asarray(trial.tokens, dtype=np.int8) for trial in trials]))
        for tokens_T, trial in zip(tokens_NT, trials):
            self._trials.append(Observation(tokens_T, trial.accuracy, trial.latency_ms, trial.error))
            self._observed.add(tokens_T.tobytes())
            self._pending.discard(tokens_T.tobytes())

    def _current_round(self) -> int:
        """-1 is the random start; round r begins once `_round_start(r)` trials are observed."""
        round_number = -1
        while len(self._trials) >= self._round_start(round_number + 1):
            round_number += 1
        return round_number

    def _round_start(self, round_number: int) -> int:
        """Trials that decide round r: rounds grow with what is known, so that learning stays a small part."""
        warmup = self.settings.collection.warmup
        start = min(self._earlier.warmup(warmup) if self._earlier else warmup, self.task.evaluations)
        for _ in range(round_number):
            start += self._batch(start)
        return start

    def _batch(self, known: int) -> int:
        collection = self.settings.collection
        return max(collection.batch, int(known * collection.growth))

    def _plan(self, round_number: int) -> list[Proposal]:
        """The queue of a round, from the seed and the first trials only."""
        count = self._round_start(max(0, round_number))
        rng = np.random.default_rng([self.task.seed, round_number + 1])
        largest_ms = max(self.task.budgets_ms)
        self._round_size = count if round_number < 0 else self._batch(count)
        known = {trial.tokens.tobytes() for trial in self._trials[:count]} if round_number >= 0 else set()
        known |= self._earlier.keys if self._earlier else set()
        knowledge = None
        random_only = self.settings.collection.random_only
        if round_number >= 0 and not random_only:
            knowledge = self._fit_knowledge(self._trials[:count])
        if knowledge is None:
            wanted = LOOKAHEAD * self._round_size + len(known)
            design = (self._earlier.start(wanted, rng) if self._earlier and not random_only else
                      initial_design(self.space, None if random_only else self.task.latency, largest_ms, wanted, rng))
            return [p for p in design if p.tokens.tobytes() not in known][:LOOKAHEAD * self._round_size]
        budgets = self._training_budgets(knowledge)
        learner = self._learn(knowledge, budgets, self.settings.for_rounds(), seed=int(rng.integers(2**31)))
        self._metrics = learner.metrics | knowledge.metrics() | {"round": float(round_number)}
        candidates_NT = seeing(self.space, distinct(self._candidates(knowledge, learner, budgets, rng), known))
        slots_ms = np.concatenate([budget_slots(budgets, self._round_size, rng) for _ in range(LOOKAHEAD)])
        return select(knowledge, candidates_NT, slots_ms, largest_ms, self.settings.posterior.optimism, rng)

    def _candidates(self, knowledge: Knowledge, learner: Learner, budgets: TrainingBudgets,
                    rng: np.random.Generator) -> Tokens:
        """A third each from the generator, the offspring of the best trials, and samples of space and latency range."""
        third = max(1, self.settings.collection.candidates // 3)
        asked_B = rng.uniform(budgets.values_ms[0], budgets.values_ms[-1], size=GENERATOR_BUDGETS)
        generated_NT = learner.sample(asked_B, -(-third // GENERATOR_BUDGETS), int(rng.integers(2**31)), greedy=False)
        parents_NT = elites(knowledge, budgets, self._earlier.tokens_NT if self._earlier else None)
        earlier = (parents_NT,) if self._earlier else ()        # some of them are no trials of this run yet
        parts = (*earlier, generated_NT.reshape(-1, parents_NT.shape[1]), offspring(self.space, parents_NT, third, rng),
                 self.space.sample_uniform(rng, third // 2), near_extremes(self.space, third // 2, rng))
        return np.concatenate(parts)

    # --- learning --------------------------------------------------------------------------------------------------

    def _fit_knowledge(self, trials: Sequence[Observation]) -> Knowledge | None:
        return Knowledge.fit(self.space, trials, self.settings.posterior, self.task.latency, self.task.seed,
                             self._earlier)

    def _training_budgets(self, knowledge: Knowledge) -> TrainingBudgets:
        """Section 5.1: the user's range, else from the task's budgets, else the 5th to 95th percentile of costs."""
        if self.settings.range_ms is not None:
            low, high = self.settings.range_ms
        elif self.settings.range_from == "task" and len(set(self.task.budgets_ms)) > 1:
            low, high = min(self.task.budgets_ms), max(self.task.budgets_ms)
        else:
            low, high = np.percentile(knowledge.latency_M, [5, 95])
        return TrainingBudgets.spread(float(low), float(high), self.settings.budgets)

    def _learn(self, knowledge: Knowledge, budgets: TrainingBudgets, settings: PnagSettings, seed: int) -> Learner:
        triplets = Triplets(self.space.onehot(knowledge.tokens_MT), knowledge.latency_M, knowledge.accuracy_M)
        pseudo = None
        if self.settings.evaluator.pseudo_triplets:
            rng = np.random.default_rng(seed)
            rows_NT = self._pseudo_rows(knowledge, budgets, rng)
            pseudo = Triplets(self.space.onehot(rows_NT), knowledge.latency_ms(rows_NT), knowledge.accuracy(rows_NT))
        return learn(self.space, settings, budgets, triplets, pseudo, knowledge.accuracy, knowledge.latency_ms,
                     settings.generator.updates, seed)

    def _pseudo_rows(self, knowledge: Knowledge, budgets: TrainingBudgets, rng: np.random.Generator) -> Tokens:
        """Half uniform, half near the best trials, where the ranking decides what is generated."""
        half = self.settings.evaluator.pseudo_triplets // 2
        return distinct(np.concatenate([self.space.sample_uniform(rng, half),
                                        offspring(self.space, elites(knowledge, budgets), half, rng)]))

    def learn(self) -> None:
        """Fits everything on all observed trials, unless that was done already."""
        if self._learnt_from >= len(self._trials):
            return
        with _one_thread():
            knowledge = self._fit_knowledge(self._trials)
            self._learners = []
            if knowledge is not None:
                self._learners = [self._learn(knowledge, budgets, self.settings, self.task.seed + index)
                                  for index, budgets in enumerate(self._budget_sets(knowledge))]
                self._metrics = self._learners[0].metrics | knowledge.metrics()
        self._knowledge, self._learnt_from = knowledge, len(self._trials)

    def _budget_sets(self, knowledge: Knowledge) -> list[TrainingBudgets]:
        """All training budgets for one joint learner, or each budget of the task for one of its own."""
        if self.settings.joint:
            return [self._training_budgets(knowledge)]
        return [TrainingBudgets((budget_ms,)) for budget_ms in sorted(set(self.task.budgets_ms))]

    def learner_for(self, budget_ms: float) -> Learner:
        """The joint learner, or the independent one trained for the closest budget."""
        return min(self._learners, key=lambda learner: min(abs(b - budget_ms) for b in learner.budgets.values_ms)
                   if len(self._learners) > 1 else 0.0)

    # --- answers ---------------------------------------------------------------------------------------------------

    def generate(self, budgets_ms: Sequence[float], alternatives: int = 1) -> list[list[Answer]]:
        self.learn()
        with _one_thread():
            return [self._answers(float(budget_ms), alternatives) for budget_ms in budgets_ms]

    def _answers(self, budget_ms: float, alternatives: int) -> list[Answer]:
        if self._knowledge is None:
            return [self._uninformed(budget_ms)]
        knowledge, learner = self._knowledge, self.learner_for(budget_ms)
        drawn_NT = learner.sample([budget_ms], self.settings.generate_samples, self.task.seed)[0]
        by_posterior = self.settings.answer == "posterior"
        pool_NT = distinct(np.concatenate([knowledge.tokens_MT, drawn_NT]) if by_posterior else drawn_NT)
        latency_N, row_N = knowledge.latency_ms(pool_NT), knowledge.rows(pool_NT)
        mean_N = knowledge.accuracy(pool_NT)
        score_N = mean_N if by_posterior else learner.scores(pool_NT, np.full(len(pool_NT), budget_ms))
        accuracy_N = np.where(row_N >= knowledge.borrowed, knowledge.accuracy_M[row_N], mean_N)
        feasible_N = latency_N <= budget_ms
        order = np.argsort(-score_N, kind="stable")
        order = order[feasible_N[order]][:alternatives] if feasible_N.any() else np.array([latency_N.argmin()])
        clamped = bool(learner.budgets.clamped([budget_ms])[0])
        return [Answer(budget_ms, pool_NT[i], float(latency_N[i]), float(accuracy_N[i]), float(score_N[i]),
                       bool(row_N[i] >= knowledge.borrowed), bool(feasible_N[i]), clamped) for i in order]

    def _uninformed(self, budget_ms: float) -> Answer:
        """Before anything could be learnt: the architecture that the space says is the fastest."""
        tokens_T = self.space.canonical(self.space.extremes())[0]
        latency_ms = float("nan") if self.task.latency is None else float(self.task.latency.predict(tokens_T[None])[0])
        return Answer(budget_ms, tokens_T, latency_ms, float("nan"), float("nan"), False, latency_ms <= budget_ms)

    def samples(self, budget_ms: float, count: int, seed: int = 0) -> NDArray[np.int8]:
        """int8[count, T] drawn from pi(. | B), unfiltered: what the paper's tables look at."""
        self.learn()
        return self.learner_for(budget_ms).sample([budget_ms], count, seed, greedy=False)[0]

    # --- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        self.learn()
        state: dict[str, Any] = {"learnt_from": self._learnt_from, "learners": len(self._learners)}
        if self._knowledge is not None:
            state |= {f"knowledge.{key}": value for key, value in self._knowledge.state_dict().items()}
        for index, learner in enumerate(self._learners):
            state[f"learner{index}.budgets_ms"] = np.array(learner.budgets.values_ms)
            state |= {f"learner{index}.{key}": value for key, value in learner.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._learnt_from = int(state["learnt_from"])
        self._learners = []
        self._knowledge = None
        if self._learnt_from and int(state["learners"]):
            self._knowledge = Knowledge.from_state(self.space, _part(state, "knowledge."), self.task.latency)
        for index in range(int(state["learners"])):
            part = _part(state, f"learner{index}.")
            budgets = TrainingBudgets(tuple(float(b) for b in np.asarray(part.pop("budgets_ms"))))
            self._learners.append(restore(self.space, self.settings, budgets, part))

    def metrics(self) -> dict[str, float]:
        return dict(self._metrics)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The networks are small: several threads only wait for each other, and their sums differ between machines."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def _part(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
