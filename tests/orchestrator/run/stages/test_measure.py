"""Budgets that nobody named: spread over what a device reaches."""
from __future__ import annotations

import numpy as np
import pytest

from orchestrator.run.stages.measure import spread_budgets


def test_budgets_have_equal_ratios_from_a_tenth_above_the_fastest() -> None:
    budgets = spread_budgets([1.0, 2.0, *np.linspace(3, 10, 98)], 5)
    assert budgets[0] == 1.1
    assert budgets[-1] == pytest.approx(np.percentile([1.0, 2.0, *np.linspace(3, 10, 98)], 95), rel=0.005)
    ratios = np.divide(budgets[1:], budgets[:-1])
    assert ratios == pytest.approx(np.full(4, (budgets[-1] / budgets[0]) ** 0.25), rel=0.01)


def test_where_all_latencies_are_close_budgets_still_ascend() -> None:
    budgets = spread_budgets([1.0, 1.02, 1.04, 1.06], 3)
    assert budgets == sorted(set(budgets)) and budgets[0] > 1.0 and budgets[-1] <= 1.06
