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
from orchestrator.record.goals import Goal
from orchestrator.record.store import RunStore
from orchestrator.services.context import RunContext, intact_state, load_state, save_state
from orchestrator.services.recipes import own_training

NAME = "distribution"
Logits = tuple[NDArray[np.float64], ...]    # one per token position


def save_distributions(run: RunContext) -> None:
    """Does nothing where the supernet is trained without distributions."""
    learned = run.wait(run.services.supernet().distribution.remote())
    if learned:
        save_state(run.store, NAME, {name: np.array(logits) for name, logits in learned.items()})  # not the store's


def distributions(run: RunContext, goal: Goal) -> tuple[Logits, ...]:
    """One per budget of the goal, in its order; () where the controller brings no training of its own."""
    if own_training(run.config, run.goals) is None:
        return ()
    if intact_state(run.store, NAME) is None:
        run.progress.note("the learned distributions are damaged or missing: they are read from the supernet again")
        save_distributions(run)
    return of_goal(load_state(run.store, NAME), run.goals, goal)


def recorded_distributions(store: RunStore, config: Config, goals: Sequence[Goal], goal: Goal) -> tuple[Logits, ...]:
    """The same of a finished run, whose supernet is not running."""
    return () if own_training(config, goals) is None else of_goal(load_state(store, NAME), goals, goal)


def of_goal(state: Mapping[str, Any], goals: Sequence[Goal], goal: Goal) -> tuple[Logits, ...]:
    first = sum(len(other.budgets_ms) for other in goals[:goals.index(goal)])
    positions = len([name for name in state if name.startswith("0.")])
    return tuple(tuple(np.asarray(state[f"{b}.{e}"], dtype=np.float64) for e in range(positions))
                 for b in range(first, first + len(goal.budgets_ms)))
