"""Results in order, and never more items taken than wait for a thread."""
from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from actors.threads import QUEUED, in_threads


@pytest.mark.parametrize("threads", [1, 4])
def test_results_are_in_order_and_errors_arrive(threads: int) -> None:
    assert list(in_threads(lambda i: i * i, range(3 * QUEUED // 2), threads)) == [i * i for i in range(3 * QUEUED // 2)]
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda i: 1 // i, [2, 1, 0], threads))


def test_an_endless_list_is_not_taken_at_once_and_threads_are_several() -> None:
    taken = 0

    def endless() -> Iterator[int]:
        nonlocal taken
        while True:
            taken += 1
            yield taken

    meeting = threading.Barrier(2)

    def met(item: int) -> int:
        if item <= 2:   # passes only where two threads work
            meeting.wait(30)
        return item

    results = in_threads(met, endless(), 2)
    assert [next(results) for _ in range(4)] == [1, 2, 3, 4]
    assert taken == QUEUED
    results.close()
