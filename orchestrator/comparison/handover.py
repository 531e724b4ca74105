"""The same hand-over for the fixed network: per budget the largest resolution that meets it, not the most accurate."""
from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

from actors.targets.target import LatencySample
from orchestrator.comparison.compared import FIXED, NOTHING_FITS
from orchestrator.handover.delivered import Candidate, Delivered
from orchestrator.handover.models import HandOver
from searchspaces.errors import EvaluationError

log = logging.getLogger(__name__)


class FixedHandOver(HandOver):
    """Candidates are the network at every resolution; files are named after it."""

    def resolution(self, candidate: Candidate) -> int:
        return int(self.space.graph(candidate.tokens).input_shape[-1])

    def under(self, budget_ms: float, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Candidates that fit the budget less its margin, largest first; then those that fit it only just."""
        limit_ms = budget_ms * (1 - self.settings.margin)
        return sorted((c for c in candidates if c.latency_ms <= budget_ms),
                      key=lambda c: (c.latency_ms > limit_ms, -self.resolution(c)))

    def unmade(self, budgets_ms: Sequence[float], candidates: Sequence[Candidate]) -> list[Candidate]:
        """First choices of all budgets, each once, of which there is no model yet."""
        made = {known["arch_id"] for _, known in self._made_before()}
        ranked = [self.under(budget_ms, candidates) for budget_ms in budgets_ms]
        first = {fitting[0].arch_id: fitting[0] for fitting in ranked if fitting}
        return [candidate for arch_id, candidate in first.items() if arch_id not in made]

    def deliver(self, budgets_ms: Sequence[float], candidates: Sequence[Candidate]) -> Iterator[Delivered]:
        """One entry per budget, in ascending order. A resolution whose file misses the budget, or whose training
        diverges, makes room for the next one."""
        for budget_ms in sorted(budgets_ms):
            reason = self.miss(budget_ms, [], candidates)
            for candidate in self.under(budget_ms, candidates):
                try:
                    sidecar = self._model(candidate, budget_ms)
                except EvaluationError as error:
                    reason = f"{error}; at {self.resolution(candidate)} px"
                    log.warning("the fixed network is not compared at %d px (%s)", self.resolution(candidate), error)
                    continue
                if (latency_ms := self._latency_ms(sidecar)) <= budget_ms:
                    yield self._entry(budget_ms, sidecar)
                    break
                reason = self.miss(budget_ms, [latency_ms], candidates)
            else:
                yield Delivered(budget_ms, False, reason, target=self.goal.label,
                                budgets_ms=self.goal.budgets_at(budget_ms))

    def miss(self, budget_ms: float, too_slow: Sequence[float], candidates: Sequence[Candidate]) -> str:
        sizes = [self.resolution(c) for c in candidates]
        reach = ", ".join(f"{c.latency_ms:.4g} ms at {self.resolution(c)} px" for c in (
            min(candidates, key=self.resolution), max(candidates, key=self.resolution))[:len(set(sizes))])
        if too_slow:
            return (f"{NOTHING_FITS} {budget_ms:.4g} ms: the exported file took {too_slow[0]:.4g} ms; the fixed "
                    f"network takes {reach}")
        return f"{NOTHING_FITS} {budget_ms:.4g} ms: the fixed network takes {reach}"

    def _stem(self, candidate: Candidate, samples: Mapping[str, LatencySample]) -> str:
        return f"{FIXED}-r{self.resolution(candidate)}"
