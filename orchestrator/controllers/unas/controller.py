"""UNAS as a controller. With a supernet it reads the distributions that were learned beside the weights (derived.py;
searchspaces/training/unas.py is the algorithm itself); with any other source of accuracy its distributions follow the
observed trials (blackbox.py).
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from orchestrator.controllers.baselines.answers import TrialAnswers
from orchestrator.controllers.controller import Answer, Controller, LatencyModel, Observation, Proposal, Task
from orchestrator.controllers.unas.blackbox import BlackBoxUnas
from orchestrator.controllers.unas.derived import DerivedUnas
from orchestrator.controllers.unas.settings import UnasOptions
from searchspaces.space import SearchSpace
from searchspaces.training.latencyterm import Aim, LatencySettings
from searchspaces.training.training import TrainingMethod
from searchspaces.training.unas import UnasSettings
from searchspaces.training.weights import WeightSettings


class Unas(Controller):
    trains_supernet = True
    uses_earlier_runs = True

    def __init__(self, space: SearchSpace, settings: UnasOptions, task: Task) -> None:
        super().__init__(space, settings, task)
        self._search: TrialAnswers = (DerivedUnas(space, settings, task) if task.distributions
                                      else BlackBoxUnas(space, settings.black_box, task))

    @classmethod
    def settings_model(cls) -> type[BaseModel]:
        return UnasOptions

    @classmethod
    def training(cls, settings: Any, budgets_ms: Mapping[str, Sequence[float]], weights: WeightSettings,
                 parts: int, latency: Mapping[str, LatencyModel]) -> TrainingMethod | None:
        return training_settings(settings, budgets_ms, weights, parts)

    def propose(self, n: int) -> list[Proposal]:
        return self._search.propose(n)

    def observe(self, trials: Sequence[Observation]) -> None:
        self._search.observe(trials)

    def generate(self, budgets_ms: Sequence[float], alternatives: int = 1) -> list[list[Answer]]:
        return self._search.generate(budgets_ms, alternatives)

    def state_dict(self) -> dict[str, Any]:
        return self._search.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._search.load_state_dict(state)

    def metrics(self) -> dict[str, float]:
        return self._search.metrics()


def training_settings(options: UnasOptions, budgets_ms: Mapping[str, Sequence[float]], weights: WeightSettings,
                      parts: int) -> UnasSettings:
    """What travels to the supernet's actor; one aim per budget of every goal, in their order."""
    aims = tuple(Aim(label, budget_ms) for label, budgets in budgets_ms.items() for budget_ms in budgets)
    latency = options.latency
    return UnasSettings(
        aims=aims, weights=weights, temperature=options.temperature, learning_rate=options.learning_rate,
        latency=LatencySettings(latency.mode, latency.weight, latency.ramp, latency.samples, latency.networks),
        estimator=options.estimator, objective=options.objective, generalisation=options.generalisation,
        gap=options.gap, softening=options.softening, duplicates=options.duplicates, weights_at=options.weights_at,
        warm_up=options.warm_up, held_out_share=options.validation,
        architectures=parts if options.architectures == "auto" else options.architectures)
