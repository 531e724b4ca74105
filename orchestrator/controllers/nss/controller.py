"""NSS as a controller: the distributions over spaces that were learned beside the supernet's weights
(searchspaces/training/nss.py) become Elite Spaces, and their members become trials and answers.

Members of every Elite Space are proposed in turn, uniformly drawn ([S3 4.2]), and for comparison some networks of the
whole space; answers are the most accurate trials under a budget. What counts is `found`: spaces to search in.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel

from orchestrator.controllers.baselines.answers import TrialAnswers
from orchestrator.controllers.controller import LatencyModel, Proposal, Task
from orchestrator.controllers.nss.choice import choose
from orchestrator.controllers.nss.settings import NssOptions
from searchspaces.elite.found import FoundSpace
from searchspaces.errors import ConfigError
from searchspaces.space import SearchSpace, Tokens
from searchspaces.training.nss import NssSettings, SpaceAim
from searchspaces.training.spaces import SpaceCosts, SpaceOfSpaces
from searchspaces.training.training import TrainingMethod
from searchspaces.training.weights import WeightSettings

ATTEMPTS, BATCH = 20, 64    # draws before a space counts as exhausted
MILLION = 1e6


class Nss(TrialAnswers):
    """`task.distributions`: logits float64[B_k] per bin group, one list per aim."""

    trains_supernet = True
    finds_spaces = True

    def __init__(self, space: SearchSpace, settings: NssOptions, task: Task) -> None:
        super().__init__(space, settings, task)
        if not task.distributions:
            raise ConfigError("controller nss learns beside a supernet's weights; set accuracy: supernet, or choose "
                              "another controller")
        self.spaces = SpaceOfSpaces(space)
        self.found = self._choose()

    @classmethod
    def settings_model(cls) -> type[BaseModel]:
        return NssOptions

    @classmethod
    def training(cls, settings: Any, budgets_ms: Mapping[str, Sequence[float]], weights: WeightSettings,
                 parts: int, latency: Mapping[str, LatencyModel]) -> TrainingMethod | None:
        options: NssOptions = settings
        aims = tuple(SpaceAim(target, label if unit == "ms" else "")
                     for label, budgets in budgets_ms.items() for target, unit in targets(options, budgets))
        return NssSettings(
            aims=aims, latency={label: model.predict for label, model in latency.items()}, weights=weights,
            cost_weight=options.cost_weight, hinge=options.mode == "hinge", learning_rate=options.learning_rate,
            weight_decay=options.weight_decay, first_temperature=options.first_temperature,
            last_temperature=options.last_temperature, warm_up=options.warm_up, full=options.full, hard=options.hard,
            samples=options.samples, members=options.members, held_out_share=options.validation)

    @classmethod
    def distributions(cls, settings: Any, budgets_ms: Sequence[float]) -> int:
        return len(targets(settings, budgets_ms))

    def _choose(self) -> tuple[FoundSpace, ...]:
        """The Elite Space of every aim."""
        options, model = self.settings, self.task.latency
        cost = None if options.madds_m or model is None else model.predict
        costs = SpaceCosts(self.spaces, cost, self.task.seed)       # one for all: its range is found once
        aims = zip(targets(options, self.task.budgets_ms), self.task.distributions, strict=True)
        return tuple(choose(costs, logits, target, unit, options.draws, self.task.seed + a)
                     for a, ((target, unit), logits) in enumerate(aims))

    def propose(self, n: int) -> list[Proposal]:
        wanted: list[Proposal] = []
        while len(wanted) < n and (proposal := self._sampled()) is not None:
            wanted.append(proposal)
        return wanted

    def _sampled(self) -> Proposal | None:
        """A new member of the space whose turn it is, else of another, else any network: random numbers depend on the
        seed and on what is observed or pending."""
        position = len(self._taken)
        rng = np.random.default_rng([self.task.seed, position])
        before, after = (int(n * self.settings.outside) for n in (position, position + 1))   # outside so far
        order = [] if after > before else [(position - before + i) % len(self.found) for i in range(len(self.found))]
        for _ in range(ATTEMPTS):
            for a in [*order, None]:
                for row in self._members(rng, a):
                    if self.is_new(row):
                        return self.take(row)
        return None

    def _members(self, rng: np.random.Generator, a: int | None) -> Tokens:
        """int8[BATCH, T], canonical: of the Elite Space of aim `a`, or of the whole space."""
        if a is None:
            return self.space.sample_uniform(rng, BATCH)
        rows = self.spaces.sample(rng, np.tile(np.array(self.found[a].bins), (BATCH, 1)))
        return self.space.canonical(rows)

    def spaces_found(self) -> tuple[FoundSpace, ...]:
        return self.found

    def metrics(self) -> dict[str, float]:
        """How far the Elite Spaces' mean costs are from their targets, on average and at worst."""
        away = [abs(found.kept.deviation) for found in self.found]
        return {"deviation_mean": float(np.mean(away)), "deviation_worst": float(np.max(away))}


def targets(options: NssOptions, budgets_ms: Sequence[float]) -> list[tuple[float, str]]:
    """(target, unit) of every aim: multiply-adds where they are given, the budgets otherwise."""
    if options.madds_m:
        return [(MILLION * madds_m, "madds") for madds_m in options.madds_m]
    return [(float(budget_ms), "ms") for budget_ms in budgets_ms]
