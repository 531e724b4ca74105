"""Work in threads whose results come in order, however long the list is."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

QUEUED = 2048   # items that wait for a thread; each is held until its result is taken
MANY = min(8, os.cpu_count() or 1)

T = TypeVar("T")
R = TypeVar("R")


def in_threads(work: Callable[[T], R], items: Iterable[T], threads: int = MANY) -> Iterator[R]:
    """`map` in threads. `pool.map` would take all items at once and hold them with their results."""
    if threads == 1:
        yield from map(work, items)
        return
    waiting = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        while some := list(islice(waiting, QUEUED)):
            yield from pool.map(work, some)
