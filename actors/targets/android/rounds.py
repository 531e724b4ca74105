"""One network's rounds, collected over runner calls, as a sample. Pure."""
from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from actors.targets.android.runners import Timings
from actors.targets.android.state import State
from actors.targets.pairing import Protocol, Rounds, Visit, enough, median_stderr, percentile_25
from actors.targets.target import LatencySample, TargetIdentity
from searchspaces.errors import TargetError

log = logging.getLogger(__name__)
DISCARDS = 3            # calls whose rounds may be discarded before the phone is given up


@dataclass
class Progress:
    """What the calls for one network gave so far; `state` is the phone's after the last one that counts."""

    serial: str
    protocol: Protocol
    max_drift: float
    calls: list[Timings] = field(default_factory=list)
    discarded: int = 0
    load: float = 0.0
    state: State | None = None

    @property
    def visit(self) -> Visit:
        return Visit(tuple(ms for call in self.calls for ms in call.candidate_ms),
                     tuple(ms for call in self.calls for ms in call.reference_ms))

    def enough(self, elapsed_s: float) -> bool:
        return enough(self.visit.ratios, self.protocol, elapsed_s)

    def take_in(self, timings: Timings, runtime: str, load: float, state: State) -> None:
        """Keeps the rounds without their cold runs, or discards them where the reference drifted.

        TargetError after too many of those, and where the runner's runtime is not `runtime`.
        """
        if timings.runtime not in ("", runtime):
            raise TargetError(f"the runner on phone {self.serial} now says {timings.runtime}, and {runtime} before; "
                              "latencies of two targets are never mixed")
        if timings.single:
            timings = replace(timings, candidate_ms=self._warm(timings.candidate_ms),
                              reference_ms=self._warm(timings.reference_ms))
        drift = Visit(timings.candidate_ms, timings.reference_ms).drift
        if drift <= self.max_drift:
            self.calls.append(timings)
            self.load, self.state = load, state
            return
        self.discarded += 1
        log.info("phone %s: rounds discarded, the reference drifted by %.1f %%", self.serial, 100 * drift)
        if self.discarded > DISCARDS:
            raise TargetError(f"the reference network drifted by {drift:.0%} on phone {self.serial} in "
                              f"{self.discarded} calls, above max_drift {self.max_drift:.0%}; close what runs on "
                              "the phone, cool it, or raise max_drift")

    def sample(self, identity: TargetIdentity, reference_ms: float, cores: Sequence[int], where: Mapping[str, Any],
               started_at: float, duration_s: float) -> LatencySample:
        assert self.state is not None and self.calls
        visit = self.visit
        details = {**self.calls[-1].details, **where, "cores": list(cores), "calls": len(self.calls),
                   "discarded": self.discarded, "clocks_khz": self.state.clock_details(cores),
                   "thermal_status": self.state.thermal_status, "battery_c": self.state.battery_c}
        return LatencySample(
            identity.target_id, visit.ratio * reference_ms, reference_ms, visit.ratio, median_stderr(visit.ratios),
            len(visit.ratios), visit.drift, self.load, visit.candidate_ms, visit.reference_ms, started_at, duration_s,
            details)

    def _warm(self, rounds: Rounds) -> Rounds:
        return tuple(without_cold(timings, self.protocol) for timings in rounds)


def without_cold(timings: tuple[float, ...], protocol: Protocol) -> tuple[float, ...]:
    """One round without the first runs after the switch of network; a small network needs more of them dropped."""
    drop = protocol.small_drop if percentile_25(timings) < protocol.small_ms else protocol.candidate_drop
    return timings[min(drop, len(timings) - 1):]
