"""Work that is done ahead, by processes of this one's: torch's DataLoader, with one batch (or chunk) as its item.

An item is a pure function of its key, so that it does not matter which process makes it, nor whether one does.
"""
from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import shutil
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from searchspaces.errors import DataError, ParetorayError

Key = TypeVar("Key")
Item = TypeVar("Item")
AHEAD = 2               # items of each process that wait in shared memory
COPIES = 2              # further ones it holds while it makes the next
PROCESS_MB = 128.0      # a process by itself: what it does not share with the fork server it comes from
TIME_OUT_S = 600.0      # for one item
LOOK_S = 2.0            # between two looks whether the processes live
SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True)
class Crew:
    """So many processes, each with so many threads. None: this process does the work itself, when it is asked for."""

    workers: int
    threads: int


def crew(item_mb: float, memory_mb: float, cpus: int, shared_mb: float) -> Crew:
    """For `cpus` of this process, one of which is kept for what the items are for.

    With one core there are no processes: they would take turns with the training on it, and cost memory. Where memory
    or shared memory bounds the processes, each has more threads: decoding is most of the work, and threads share it.
    """
    by_memory = memory_mb // (PROCESS_MB + (AHEAD + COPIES) * item_mb)
    by_shared = shared_mb / 2 // (AHEAD * item_mb)      # others use it too, Ray's object store above all
    workers = int(max(0, min(cpus - 1, by_memory, by_shared)))
    return Crew(workers, (cpus - 1) // workers if workers else cpus)


def ahead(make: Callable[[Key], Item], keys: Sequence[Key], item_mb: float, memory_mb: float) -> Iterator[Item]:
    """`make(key)` for each of the keys, in order. `memory_mb` bounds what the processes hold; 0: no processes, as for
    what is in memory anyway. They end with this process, with the iterator, and with the first error.

    A ParetorayError of `make` is raised as it is; DataError where a process dies or takes longer than TIME_OUT_S.
    """
    chosen = crew(item_mb, memory_mb, torch.get_num_threads(), _shared_mb())
    if not chosen.workers or len(keys) < 2:
        yield from map(make, keys)
        return
    # Not fork: Ray's actors have threads, which may hold locks that nobody would release in the child.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["actors.streamed"])     # torch is imported once, and its memory shared
    loader: DataLoader[Any] = DataLoader(
        _Made(make, keys), batch_size=None, num_workers=chosen.workers, prefetch_factor=AHEAD, collate_fn=_as_it_is,
        multiprocessing_context=context, timeout=LOOK_S, worker_init_fn=functools.partial(_begin, chosen.threads),
        generator=torch.Generator())    # or each loader would draw from the training's random numbers
    with _nameless_main():
        items = iter(loader)
    for _ in keys:
        item = _next(items, memory_mb)
        if isinstance(item, ParetorayError):
            raise item
        yield item


def _next(items: Iterator[Any], memory_mb: float) -> Any:
    """The loader notices a lost process only where its time-out is over: a short one, and asked again."""
    deadline = time.monotonic() + TIME_OUT_S
    while True:
        try:
            return next(items)
        except RuntimeError as error:
            if "timed out" not in str(error) or time.monotonic() > deadline:
                raise DataError(f"a process that decodes images was lost ({str(error).splitlines()[0]}); if memory ran "
                                f"out, lower data.memory_mb, now {memory_mb:g}") from error


class _Made(Dataset[Any]):
    """Map-style: item i is made of key i. An error is an item, because the loader would make a traceback its text."""

    def __init__(self, make: Callable[[Any], Any], keys: Sequence[Any]) -> None:
        self._make, self._keys = make, keys

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Any:
        try:
            return self._make(self._keys[index])
        except ParetorayError as error:
            return error


def _begin(threads: int, worker: int) -> None:
    """In a new process. It is a child of the fork server, so nobody else ends it if the process it works for dies."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _as_it_is(item: Any) -> Any:
    return item


@contextlib.contextmanager
def _nameless_main() -> Iterator[None]:
    """New processes would import this process's main module: Ray's worker, or a user's script without a guard, which
    would run again."""
    kept = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = kept


def _shared_mb() -> float:
    try:
        return shutil.disk_usage(SHARED_MEMORY).free / 1e6
    except OSError:     # not Linux: no such bound
        return float("inf")
