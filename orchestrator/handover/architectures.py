"""What a run ends with where a target only looks latencies up: architectures, for nobody can time a file there.

Nothing is trained or exported. Each budget gets the most accurate candidate that meets it, with the latencies of the
targets and the accuracies of the search. Every goal goes its own way: where budgets are separate, targets that time
files get models.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from actors.targets.catalogue import target_class
from orchestrator.config import Config
from orchestrator.handover.considered import searched_belief
from orchestrator.handover.delivered import Candidate, Delivered, ranked_under
from orchestrator.handover.models import HandOver
from orchestrator.record.goals import Goal
from searchspaces.space import Tokens


def makes_models(config: Config, goal: Goal) -> bool:
    """Can a file be timed on all of the goal's targets?"""
    return not set(goal.targets) & set(look_ups(config))


def look_ups(config: Config) -> list[str]:
    """Labels of the targets that only look latencies up."""
    return [target.label for target in config.targets if not target_class(target.name).times_files]


def announcements(config: Config) -> list[str]:
    """What a person should know before such a run begins."""
    found = look_ups(config)
    if found and (len(found) == len(config.targets) or config.budgets.together):
        return [f"target {found[0]} only looks latencies up: the run ends with architectures, without models"]
    return [f"target {label} only looks latencies up: it gets architectures, without models" for label in found]


def architectures(handover: HandOver, budgets_ms: Sequence[float], candidates: Sequence[Candidate],
                  test_accuracies: Callable[[Tokens], Sequence[float | None]],
                  trials: tuple[Tokens, NDArray[np.float64]]) -> Iterator[Delivered]:
    """One entry per budget, in ascending order. No margin is kept: what is looked up has no noise. `trials`: what else
    the search evaluated, and its accuracies."""
    ranked = {budget_ms: ranked_under(budget_ms, candidates, margin=0.0) for budget_ms in sorted(budgets_ms)}
    belief = searched_belief(handover.space, list(ranked.values()), *trials) if any(ranked.values()) else None
    for budget_ms, fitting in ranked.items():
        if fitting:
            assert belief is not None   # a candidate fits
            certainty = belief.certainty(fitting[0].arch_id, {c.arch_id for c in fitting}, ())
            yield replace(_entry(handover, budget_ms, fitting[0], test_accuracies), **vars(certainty))
        else:
            yield Delivered(budget_ms, False, handover.miss(budget_ms, [], candidates), target=handover.goal.label,
                            budgets_ms=handover.goal.budgets_at(budget_ms))


def _entry(handover: HandOver, budget_ms: float, chosen: Candidate,
           test_accuracies: Callable[[Tokens], Sequence[float | None]]) -> Delivered:
    space, goal, tokens_1T = handover.space, handover.goal, chosen.tokens[None]
    madds, params = space.cost(tokens_1T)
    latencies_ms = {label: handover.bench.latencies_ms(label, tokens_1T)[0] for label in goal.targets}
    return Delivered(
        budget_ms, True, "", tuple(int(t) for t in chosen.tokens), chosen.arch_id, space.text(chosen.tokens),
        chosen.latency_ms, None, chosen.predicted_ms, chosen.accuracy, test_accuracies(tokens_1T)[0], int(madds[0]),
        int(params[0]), "", goal.label, {label: ms for label, ms in latencies_ms.items() if ms is not None},
        goal.budgets_at(budget_ms), budget_ms > handover.slowest_ms)
