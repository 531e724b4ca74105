"""What a hand-over chooses from: a controller's answers, measured; asked again where they were predicted too fast.

The answers for a budget are the best that the latency model lets under it, so its errors there are not random: what is
predicted too fast is chosen first. Where measuring shows that none of a budget's answers fits, the controller answers
again for a budget lowered by what the model was wrong.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from orchestrator.controllers.controller import Answer
from orchestrator.handover.delivered import Candidate
from orchestrator.handover.models import HandOver
from searchspaces.space import SearchSpace, Tokens

LOOKS = 3       # rounds of asking again
Ask = Callable[[Sequence[float]], list[list[Answer]]]


def measured_candidates(handover: HandOver, ask: Ask, budgets_ms: Sequence[float], answers: Sequence[Sequence[Answer]],
                        extra_NT: Tokens) -> tuple[list[list[Answer]], list[Candidate]]:
    """(answers per budget, those of later rounds last; every distinct candidate). `ask`: the controller's answers for
    budgets in ms. `extra_NT`: candidates for any budget."""
    space = handover.space
    all_answers = [list(options) for options in answers]
    known = {c.arch_id: c for c in handover.candidates(answers, extra_NT)}
    for _ in range(LOOKS):
        limits_ms = [budget_ms * (1 - handover.settings.margin) for budget_ms in budgets_ms]
        lower_ms = [lowered_ms(space, limit_ms, options, known) for limit_ms, options in zip(limits_ms, all_answers)]
        missed = [i for i, ms in enumerate(lower_ms) if ms is not None]
        fresh = [[answer for answer in options if space.arch_id(answer.tokens) not in known]
                 for options in ask([ms for ms in lower_ms if ms is not None])] if missed else []
        if not any(fresh):
            break
        for i, options in zip(missed, fresh):
            all_answers[i] += options
        known |= {c.arch_id: c for c in handover.candidates([f for f in fresh if f], extra_NT[:0])}
    return all_answers, list(known.values())


def lowered_ms(space: SearchSpace, limit_ms: float, answers: Sequence[Answer],
               known: dict[str, Candidate]) -> float | None:
    """The limit less what the latency model was wrong by; None where one of the answers fits or none was measured."""
    pairs = [(answer.latency_ms, known[arch_id].latency_ms) for answer in answers
             if (arch_id := space.arch_id(answer.tokens)) in known]
    if not pairs or any(measured <= limit_ms for _, measured in pairs):
        return None
    return limit_ms * min(1.0, float(np.median([predicted / measured for predicted, measured in pairs])))
