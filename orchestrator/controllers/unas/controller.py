"""UNAS as a controller: with a supernet it reads the distributions that were learned beside the weights.

See derived.py, and searchspaces/training/unas.py for the algorithm itself.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from orchestrator.controllers.unas.derived import DerivedUnas
from orchestrator.controllers.unas.settings import UnasOptions
from searchspaces.training.latencyterm import Aim, LatencySettings
from searchspaces.training.training import TrainingMethod
from searchspaces.training.unas import UnasSettings
from searchspaces.training.weights import WeightSettings


class Unas(DerivedUnas):
    needs_supernet = True

    @classmethod
    def settings_model(cls) -> type[BaseModel]:
        return UnasOptions

    @classmethod
    def training(cls, settings: Any, budgets_ms: Mapping[str, Sequence[float]], weights: WeightSettings,
                 workers: int) -> TrainingMethod | None:
        return training_settings(settings, budgets_ms, weights, workers)


def training_settings(options: UnasOptions, budgets_ms: Mapping[str, Sequence[float]], weights: WeightSettings,
                      workers: int) -> UnasSettings:
    """What travels to the supernet's actor; one aim per budget of every goal, in their order."""
    aims = tuple(Aim(label, budget_ms) for label, budgets in budgets_ms.items() for budget_ms in budgets)
    latency = options.latency
    return UnasSettings(
        aims=aims, weights=weights, temperature=options.temperature, learning_rate=options.learning_rate,
        latency=LatencySettings(latency.mode, latency.weight, latency.ramp, latency.samples, latency.networks),
        estimator=options.estimator, objective=options.objective, generalisation=options.generalisation,
        gap=options.gap, softening=options.softening, duplicates=options.duplicates, weights_at=options.weights_at,
        warm_up=options.warm_up, held_out_share=options.validation,
        architectures=workers if options.architectures == "auto" else options.architectures)
