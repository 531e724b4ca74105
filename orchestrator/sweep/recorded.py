"""What the searches of a sweep are compared by while they run: the hypervolume of the front of their recorded trials.

It is the share, 0..1, of the rectangle between 0 and the reference latency, and no accuracy and all. The reference is
one for the whole sweep: given, or the slowest network measured by the search that has measured first. It is kept in a
file, because searches and the sweep are processes of one node, and it must not change when a sweep is resumed. What a
trial imports is here and in trial.py; it stays small without torch.
"""
from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from enum import Enum
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from orchestrator.frontier import RunningFront

REFERENCE = "reference.json"


class State(Enum):
    """WAITING -> RUNNING -> DONE, STOPPED (it was behind the others) or FAILED. Resumed, a sweep goes on with what is
    not settled."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    STOPPED = "stopped early"
    FAILED = "failed"


SETTLED = frozenset({State.DONE, State.STOPPED})


def rungs(after: int, factor: float) -> Iterator[int]:
    """Numbers of evaluations at which searches are compared, without end."""
    return (math.ceil(after * factor**k) for k in count())


def reference_ms(sweep: Path) -> float | None:
    """None before it is known."""
    known = _json(sweep / REFERENCE)
    return float(known["latency_ms"]) if known else None


def settle_reference(sweep: Path, latency_ms: float, source: str) -> None:
    """Writes the reference, unless another search was first."""
    temporary = sweep / f".{REFERENCE}.{os.getpid()}.part"
    temporary.write_text(json.dumps({"latency_ms": latency_ms, "source": source}))
    try:
        os.link(temporary, sweep / REFERENCE)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


class Recorded:
    """The trials of one run as they are recorded, by any process: `look` reads what is new."""

    def __init__(self, sweep: Path, name: str) -> None:
        self._sweep, self._run = sweep, sweep / name
        self._parts: set[str] = set()
        self._front: RunningFront | None = None
        self._reference_ms = 1.0
        self.history: list[float] = []      # hypervolume after each evaluation, failed ones too

    def look(self) -> None:
        """Nothing is read before the reference is known."""
        if self._front is None and not self._bounded():
            return
        assert self._front is not None
        for part in sorted((self._run / "trials").glob("part-*.parquet")):
            if part.name in self._parts:
                continue
            table = pq.read_table(part, columns=["latency_ms", "accuracy"])
            self._parts.add(part.name)
            for row in table.to_pylist():
                self._front.add(_number(row["latency_ms"]), _number(row["accuracy"]))
                self.history.append(self._front.hypervolume / self._reference_ms)

    def _bounded(self) -> bool:
        known = reference_ms(self._sweep)
        if known is None and (slowest := self._slowest_ms()) is not None:
            settle_reference(self._sweep, slowest, self._run.name)
            known = reference_ms(self._sweep)
        if known is None:
            return False
        self._reference_ms, self._front = known, RunningFront(known)
        return True

    def _slowest_ms(self) -> float | None:
        """Of the run's first target, once that is measured."""
        targets = list(_json(self._run / "state.json").get("targets", {}).values())
        return targets[0].get("slowest_ms") if targets else None


def at(history: Sequence[float], evaluations: int) -> float:
    """Hypervolume after so many evaluations, of all where there are fewer; 0 before the first."""
    return history[min(evaluations, len(history)) - 1] if history and evaluations else 0.0


def stage(run: Path) -> str:
    """Where a run is; "" before it has begun."""
    return str(_json(run / "state.json").get("stage", ""))


def _json(path: Path) -> dict[str, Any]:
    """{} where there is no such file; all of these are renamed into place, and so whole."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return found


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
