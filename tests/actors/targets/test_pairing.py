"""The arithmetic of the paired protocol against the worked numbers of the specification and closed forms."""
from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from actors.targets.pairing import (
    Protocol,
    Visit,
    enough,
    median_stderr,
    paired_ratios,
    percentile_25,
    quiet_ms,
    visit,
)
from actors.targets.target import LatencySample, TargetIdentity, merge_samples

PROTOCOL = Protocol()


class Network:
    """A timer whose runs take `base_ms` times a shared drift, slower while cold; counts what it is asked for."""

    def __init__(self, base_ms: float, drift: list[float]) -> None:
        self.base_ms, self.drift, self.calls = base_ms, drift, list[int]()

    def __call__(self, times: int) -> list[float]:
        self.calls.append(times)
        self.drift[0] *= 1.05
        cold = [1.4, 1.2, 1.1]
        return [self.base_ms * self.drift[0] * (cold[i] if i < len(cold) else 1.0) for i in range(times)]


def test_worked_example_of_the_specification() -> None:
    ratios = paired_ratios([[1.0], [1.1], [0.9]], [[2.0], [2.2], [1.8]])
    assert ratios == pytest.approx([2.0, 2.0, 2.0])
    result = Visit(((2.0,), (2.2,), (1.8,)), ((1.0,), (1.1,), (0.9,)))
    assert result.ratio == pytest.approx(2.0) and result.stderr == pytest.approx(0.0, abs=1e-12)
    assert result.drift == pytest.approx(1.1 / 0.9 - 1.0)


def test_25th_percentile_ignores_what_disturbs_a_minority() -> None:
    assert percentile_25([1.0, 1.0, 1.0, 50.0]) == 1.0
    assert percentile_25([0.0, 1.0, 2.0, 3.0, 4.0]) == 1.0


def test_standard_error_of_the_median() -> None:
    assert median_stderr([1.0, 2.0, 3.0, 4.0]) == pytest.approx(1.25 * math.sqrt(5.0 / 3.0) / 2.0)
    assert median_stderr([1.0]) == math.inf
    # by simulation: the median of n normal numbers spreads by about 1.25 sd / sqrt(n)
    medians = np.median(np.random.default_rng(0).normal(size=(4000, 25)), axis=1)
    assert medians.std() == pytest.approx(1.25 / math.sqrt(25), rel=0.05)


def test_stopping_rule() -> None:
    steady, wild = [2.0, 2.001] * 20, [1.0, 3.0] * 20
    assert not enough(steady[:5], PROTOCOL) and enough(steady[:6], PROTOCOL)
    assert not enough(wild[:29], PROTOCOL) and enough(wild[:30], PROTOCOL)
    # exactly at the limit: 1.25 sd / sqrt(n) = tolerance * median
    n, spread = 8, 0.015 * math.sqrt(8) / 1.25 * math.sqrt(7 / 8)
    ratios = [1.0 - spread, 1.0 + spread] * (n // 2)
    assert median_stderr(ratios) == pytest.approx(0.015)
    assert enough(ratios, replace(PROTOCOL, tolerance=0.0151))
    assert not enough(ratios, replace(PROTOCOL, tolerance=0.0149))
    assert enough(wild[:6], PROTOCOL, elapsed_s=21.0) and not enough(wild[:5], PROTOCOL, elapsed_s=21.0)


@pytest.mark.parametrize(("reference_ms", "candidate_ms", "runs"), [
    (5.0, 10.0, (4, 8)), (5.0, 0.4, (4, 12)), (0.4, 10.0, (12, 8)), (0.4, 0.4, (12, 12))])
def test_visit_cancels_drift_and_drops_cold_runs(reference_ms: float, candidate_ms: float,
                                                 runs: tuple[int, int]) -> None:
    drift = [1.0]
    reference, candidate = Network(reference_ms, drift), Network(candidate_ms, drift)
    result = visit(reference, candidate, PROTOCOL)
    # the drift of 5 % per call between reference and candidate is all that is left, plus cold runs of 4-run references
    cold = 1.15 if runs[0] == 4 else 1.0
    assert result.ratio == pytest.approx(1.05 * candidate_ms / reference_ms / cold, rel=0.1)
    assert reference.calls == [3] + [runs[0]] * 6 and candidate.calls == [3] + [runs[1]] * 6
    kept = {4: 3, 8: 5, 12: 7}
    assert {len(timings) for timings in result.candidate_ms} == {kept[runs[1]]}
    assert {len(timings) for timings in result.reference_ms} == {kept[runs[0]]}
    assert result.drift == pytest.approx(1.05**10 - 1.0)


def test_quiet_reference_ignores_bursts() -> None:
    bursts = itertools.cycle([1.0, 1.0, 1.0, 3.0])

    def timer(times: int) -> list[float]:
        factor = next(bursts)
        return [9.0] * 5 + [0.5 * factor] * (times - 5)

    assert quiet_ms(timer, pause_s=0.0) == pytest.approx(0.5)


def sample(ratio: float, stderr: float) -> LatencySample:
    return LatencySample("t", ratio * 2.0, 2.0, ratio, stderr, 6, 0.1 * ratio, 0.5, ((ratio,),), ((1.0,),), 1.0, 0.5)


def test_merged_visits() -> None:
    merged = merge_samples([sample(1.0, 0.003), sample(1.2, 0.004)])
    assert merged.ratio == pytest.approx(1.1) and merged.latency_ms == pytest.approx(2.2)
    assert merged.stderr == pytest.approx(0.1)      # sd of (1.0, 1.2) is 0.1414, over sqrt 2: more than the visits say
    assert merge_samples([sample(1.0, 0.3), sample(1.0, 0.4)]).stderr == pytest.approx(0.25)
    assert merged.rounds == 12 and merged.candidate_ms == ((1.0,), (1.2,)) and merged.details["visits"] == 2
    single = sample(1.0, 0.1)
    assert merge_samples([single]) is single


def test_every_field_of_the_identity_counts() -> None:
    identity = TargetIdentity("k", "d", "r", "p", 1, 1, (3, 32, 32), "h")
    others = [replace(identity, **{name: value}) for name, value in
              (("kind", "x"), ("device", "x"), ("runtime", "x"), ("precision", "x"), ("threads", 2), ("batch", 2),
               ("input_shape", (3, 32, 33)), ("reference", "x"))]
    assert len({i.target_id for i in [identity, *others]}) == 9
    assert identity.target_id == TargetIdentity("k", "d", "r", "p", 1, 1, (3, 32, 32), "h").target_id
