"""What a hand-over chooses from, and what it hands over: one entry per budget in generated.json."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.config import DeliverySettings
from searchspaces.errors import BudgetError
from searchspaces.space import Tokens


@dataclass(frozen=True)
class Final:
    """Validation accuracy of weights trained for the hand-over, and which images they have right, as paired.py packs
    it; "" where an earlier version trained them."""

    accuracy: float
    hits: str = ""


@dataclass(frozen=True)
class Candidate:
    """An architecture with its measured latency (of the goal) and the validation accuracy it is ranked by.

    `searched`: the accuracy that it had in the search, None where it had none; `final`: None where nothing is trained.
    """

    tokens: Tokens
    arch_id: str
    accuracy: float
    latency_ms: float
    predicted_ms: float
    searched: float | None = None
    final: Final | None = None


@dataclass(frozen=True)
class Delivered:
    """One entry of generated.json. Where nothing meets the budget `feasible` is False and `reason` says why; `onnx` is
    empty then, and for an architecture without a model (orchestrator/handover/architectures.py).

    `target` is the goal's label. `latency_ms` is what the budget bounds, `latencies_ms` what each target of the goal
    measured and `budgets_ms` what each was allowed. `clamped`: the budget is above the slowest network that was
    measured, and so met by the most accurate one.

    The last five say how sure the choice is (orchestrator/handover/certainty.py); None in entries of an earlier
    version.
    """

    budget_ms: float
    feasible: bool
    reason: str = ""
    tokens: tuple[int, ...] = ()
    arch_id: str = ""
    text: str = ""
    latency_ms: float | None = None
    latency_stderr_ms: float | None = None
    predicted_ms: float | None = None
    accuracy: float | None = None
    test_accuracy: float | None = None
    madds: int | None = None
    params: int | None = None
    onnx: str = ""
    target: str = ""
    latencies_ms: Mapping[str, float] = field(default_factory=dict)
    budgets_ms: Mapping[str, float] = field(default_factory=dict)
    clamped: bool = False
    probability_best: float | None = None
    expected_gain: float | None = None
    runner_up: str = ""
    considered: int | None = None
    considered_trained: int | None = None


def ranked_under(budget_ms: float, candidates: Sequence[Candidate], margin: float) -> list[Candidate]:
    """Candidates that fit the budget less its margin, most accurate first; then those that fit it only just."""
    fitting = [c for c in candidates if c.latency_ms <= budget_ms]
    return sorted(fitting, key=lambda c: (c.latency_ms > budget_ms * (1 - margin), -c.accuracy, c.latency_ms))


def shortlist(budgets_ms: Sequence[float], candidates: Sequence[Candidate],
              settings: DeliverySettings) -> list[list[Candidate]]:
    """Per budget the candidates that are tried for it, most promising first."""
    return [ranked_under(budget_ms, candidates, settings.margin)[:settings.alternatives] for budget_ms in budgets_ms]


def contenders(budget_ms: float, candidates: Sequence[Candidate], settings: DeliverySettings,
               images: int) -> list[Candidate]:
    """The shortlist of a budget where `settings.fine_tuned` of it are trained, of which validation chooses.

    Behind the most accurate comes the slowest of those that `images` validation images cannot tell from it (one
    standard error): weights that are shared favour neither, and of equals the larger network gains more by a training
    of its own.
    """
    ranked = ranked_under(budget_ms, candidates, settings.margin)
    if settings.fine_tuned > 1 and ranked:
        best, limit_ms = ranked[0], budget_ms * (1 - settings.margin)
        error = math.sqrt(max(0.0, best.accuracy * (1 - best.accuracy)) / images)
        equals = [c for c in ranked if c.accuracy >= best.accuracy - error and c.latency_ms <= limit_ms]
        slowest = max(equals, key=lambda c: c.latency_ms, default=best)
        ranked = [best, *(c for c in ranked if c is slowest and c is not best),
                  *(c for c in ranked if c is not best and c is not slowest)]
    return ranked[:settings.alternatives]


def in_order(chosen: Sequence[Candidate], arch_ids: Sequence[str], limit_ms: float) -> list[Candidate]:
    """Candidates for one budget in the order of `arch_ids`, the others behind; those over `limit_ms` stay last."""
    rank = {arch_id: i for i, arch_id in enumerate(arch_ids)}
    return sorted(chosen, key=lambda c: (c.latency_ms > limit_ms, rank.get(c.arch_id, len(rank))))


def refuse_missed(entries: Sequence[Delivered]) -> None:
    """BudgetError with every reason where a budget got no model."""
    missed = [entry.reason for entry in entries if not entry.feasible]
    if missed:
        raise BudgetError("; ".join(missed))
