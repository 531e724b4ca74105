"""What a hand-over chooses from, where the latency model was too hopeful at a budget."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from orchestrator.controllers.controller import Answer
from orchestrator.handover.candidates import LOOKS, lowered_ms, measured_candidates
from orchestrator.handover.delivered import Candidate
from tests.orchestrator.handover.test_handover import ROWS, SPACE, Bench, handover, ids


def answer(row: int, predicted_ms: float, budget_ms: float = 1.0) -> Answer:
    return Answer(budget_ms, ROWS[row], predicted_ms, 0.5, 0.5, True, True)


def known(latencies: dict[int, float]) -> dict[str, Candidate]:
    return {SPACE.arch_id(ROWS[i]): Candidate(ROWS[i], SPACE.arch_id(ROWS[i]), 0.5, ms, ms)
            for i, ms in latencies.items()}


def test_limit_is_lowered_by_the_median_error() -> None:
    answers = [answer(0, 0.9), answer(1, 0.8), answer(2, 0.98)]
    assert lowered_ms(SPACE, 0.98, answers, known({0: 1.8, 1: 1.0, 2: 1.0})) == pytest.approx(0.98 * 0.8)
    assert lowered_ms(SPACE, 0.98, answers, known({0: 1.8, 1: 0.98, 2: 1.0})) is None     # one fits
    assert lowered_ms(SPACE, 0.98, answers, {}) is None                                   # nothing is known
    assert lowered_ms(SPACE, 0.98, [answer(0, 1.5)], known({0: 1.0})) == 0.98             # never above the limit


def test_missed_budget_is_asked_for_again_and_only_it(tmp_path: Path) -> None:
    asked: list[Sequence[float]] = []

    def ask(budgets_ms: Sequence[float]) -> list[list[Answer]]:
        asked.append(budgets_ms)
        return [[answer(2, 0.7)] for _ in budgets_ms]

    bench = Bench(ids([1.25, 2.0, 0.9, 0.1]), {})
    answers, found = measured_candidates(handover(bench, tmp_path), ask, [1.0, 3.0],
                                         [[answer(0, 1.0)], [answer(1, 2.0, 3.0)]], ROWS[3:])
    assert asked == [[pytest.approx(1.0 * 0.98 / 1.25)]]
    assert [len(options) for options in answers] == [2, 1]
    assert {c.arch_id: c.latency_ms for c in found} == ids([1.25, 2.0, 0.9, 0.1])


@pytest.mark.parametrize(("fresh", "rounds"), [(0, 1), (1, LOOKS)])
def test_asking_ends_where_there_is_nothing_new_or_after_some_rounds(tmp_path: Path, fresh: int, rounds: int) -> None:
    asked: list[Sequence[float]] = []

    def ask(budgets_ms: Sequence[float]) -> list[list[Answer]]:
        asked.append(budgets_ms)
        return [[answer(min(len(asked) * fresh, 3), 0.9)]]

    bench = Bench(ids([1.5, 1.4, 1.3, 1.2]), {})
    measured_candidates(handover(bench, tmp_path), ask, [1.0], [[answer(0, 0.9)]], ROWS[:0])
    assert len(asked) == rounds
