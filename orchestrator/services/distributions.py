"""What a gradient system learned beside the supernet's weights, on its way from the supernet's actor to controllers.

The logits of all goals' budgets lie in one checkpoint, numbered in the order of the goals and their budgets. It is made
again from the actor's newest weights where it is damaged.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.config import Config
from orchestrator.controllers.catalogue import check_controller_options, controller_class
from orchestrator.record.goals import Goal
from orchestrator.record.store import RunStore
from orchestrator.services.context import RunContext
from orchestrator.services.recipes import trains_itself
from orchestrator.services.states import intact_state, load_state, save_state

NAME = "distribution"
Logits = tuple[NDArray[np.float64], ...]    # one per decision


def save_distributions(run: RunContext) -> None:
    """Does nothing where the supernet is trained without distributions."""
    learned = run.wait(run.services.supernet().distribution.remote())
    if learned:
        save_state(run.store, NAME, {name: np.array(logits) for name, logits in learned.items()})  # not the store's


def distributions(run: RunContext, goal: Goal) -> tuple[Logits, ...]:
    """One per budget (or space) of the goal, in its order; () where the controller brings no training of its own."""
    if not trains_itself(run.config):
        return ()
    if intact_state(run.store, NAME) is None:
        run.progress.note("the learned distributions are damaged or missing: they are read from the supernet again")
        save_distributions(run)
    return of_goal(load_state(run.store, NAME), run.config, run.goals, goal)


def recorded_distributions(store: RunStore, config: Config, goals: Sequence[Goal], goal: Goal) -> tuple[Logits, ...]:
    """The same of a finished run, whose supernet is not running."""
    return of_goal(load_state(store, NAME), config, goals, goal) if trains_itself(config) else ()


def of_goal(state: Mapping[str, Any], config: Config, goals: Sequence[Goal], goal: Goal) -> tuple[Logits, ...]:
    name, options = config.controller.name, config.controller.options
    kind, settings = controller_class(name), check_controller_options(name, options)
    counts = [kind.distributions(settings, other.budgets_ms) for other in goals]
    at = goals.index(goal)
    first, rows = sum(counts[:at]), len([key for key in state if key.startswith("0.")])
    return tuple(tuple(np.asarray(state[f"{b}.{e}"], dtype=np.float64) for e in range(rows))
                 for b in range(first, first + counts[at]))
