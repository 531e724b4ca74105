"""The paired protocol: candidate and reference timed in the same visit (latency.md section 3). Pure but for the timers.

Machine drift moves both networks alike, so their ratio stands where each alone moves by 8 to 40 %:
    round i:  r_i = p25(candidate timings of round i) / p25(reference timings of round i)
    ratio   = median_i r_i,     stderr = 1.25 sd(r) / sqrt(rounds)      (1.25: the median of a normal sample)
    latency_ms = ratio * reference_ms
The first runs after a switch of network are dropped: caches are cold (run 1 +37 %, run 4 +9 %, run 6 +3 % on small
networks). A small reference needs that as much as a small candidate: with 4 runs, 1 dropped, a reference of 0.45 ms
timed against itself gave the ratio 0.91 and spread by 4 % between visits; with 12 runs, 5 dropped, 1.00 and 0.6 %.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, sqrt

import numpy as np

Timer = Callable[[int], list[float]]    # runs a network n times and returns n timings in ms
Rounds = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Protocol:
    """The numbers of latency.md section 3. `long_s` ends a visit of a slow network after its least rounds."""

    warm_up: int = 3
    reference_runs: int = 4
    reference_drop: int = 1
    candidate_runs: int = 8
    candidate_drop: int = 3
    small_runs: int = 12        # for networks faster than `small_ms`, the reference included
    small_drop: int = 5
    small_ms: float = 1.0
    least_rounds: int = 6
    most_rounds: int = 30
    tolerance: float = 0.015
    long_s: float = 20.0


@dataclass(frozen=True)
class Visit:
    candidate_ms: Rounds
    reference_ms: Rounds

    @property
    def ratios(self) -> list[float]:
        return paired_ratios(self.reference_ms, self.candidate_ms)

    @property
    def ratio(self) -> float:
        return float(np.median(self.ratios))

    @property
    def stderr(self) -> float:
        return median_stderr(self.ratios)

    @property
    def drift(self) -> float:
        """max / min - 1 of the reference's 25th percentiles."""
        quartiles = [percentile_25(timings) for timings in self.reference_ms]
        return max(quartiles) / min(quartiles) - 1.0


def percentile_25(timings: Sequence[float]) -> float:
    return float(np.percentile(timings, 25))


def paired_ratios(reference_ms: Sequence[Sequence[float]], candidate_ms: Sequence[Sequence[float]]) -> list[float]:
    return [percentile_25(c) / percentile_25(r) for r, c in zip(reference_ms, candidate_ms, strict=True)]


def median_stderr(ratios: Sequence[float]) -> float:
    """Standard error of the median, infinite while there are less than two."""
    return 1.25 * float(np.std(ratios, ddof=1)) / sqrt(len(ratios)) if len(ratios) > 1 else inf


def enough(ratios: Sequence[float], protocol: Protocol, elapsed_s: float = 0.0) -> bool:
    """The stopping rule: 1.25 sd / sqrt(rounds) under `tolerance` of the median, within the bounds on rounds."""
    if len(ratios) < protocol.least_rounds:
        return False
    if len(ratios) >= protocol.most_rounds or elapsed_s > protocol.long_s:
        return True
    return median_stderr(ratios) < protocol.tolerance * float(np.median(ratios))


def visit(reference: Timer, candidate: Timer, protocol: Protocol) -> Visit:
    """Alternates reference and candidate until the stopping rule holds."""
    started = time.monotonic()
    reference_plan = _plan(reference, protocol, (protocol.reference_runs, protocol.reference_drop))
    candidate_plan = _plan(candidate, protocol, (protocol.candidate_runs, protocol.candidate_drop))
    reference_ms: list[tuple[float, ...]] = []
    candidate_ms: list[tuple[float, ...]] = []
    while not enough(paired_ratios(reference_ms, candidate_ms), protocol, time.monotonic() - started):
        reference_ms.append(_kept(reference, reference_plan))
        candidate_ms.append(_kept(candidate, candidate_plan))
    return Visit(tuple(candidate_ms), tuple(reference_ms))


def _plan(timer: Timer, protocol: Protocol, usual: tuple[int, int]) -> tuple[int, int]:
    """Warms the network up; runs per round and how many of them are dropped."""
    small = min(timer(protocol.warm_up)) < protocol.small_ms
    return (protocol.small_runs, protocol.small_drop) if small else usual


def _kept(timer: Timer, plan: tuple[int, int]) -> tuple[float, ...]:
    runs, drop = plan
    return tuple(timer(runs)[drop:])


def quiet_ms(reference: Timer, *, groups: int = 20, runs: int = 12, drop: int = 5, pause_s: float = 0.02) -> float:
    """The reference's latency in a quiet state: the lower quartile over groups of the groups' 25th percentiles.

    The pauses spread the groups over about half a second, so that a burst of foreign load spoils few of them.
    """
    quartiles = []
    for _ in range(groups):
        quartiles.append(percentile_25(reference(runs)[drop:]))
        time.sleep(pause_s)
    return percentile_25(quartiles)
