"""What happened when in a run, for its report: lines of JSON, in order.

On a disk they are appended to events.jsonl. An object cannot be appended to: in an object store there are
events-00000.jsonl, events-00001.jsonl, ..., the last of which is written again with every line until it is full. Each
process that drives the run begins one of its own.
"""
from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actors.objectpath import AnyPath, ObjectPath, matching
from searchspaces.errors import StoreError

FILE, OBJECTS = "events.jsonl", "events-*.jsonl"
FULL_BYTES = 50_000


class EventLog:
    """Of the one process that drives the run."""

    def __init__(self, run_dir: AnyPath) -> None:
        self._run_dir = run_dir
        self._number: int | None = None     # of the object that is being filled
        self._lines: list[bytes] = []       # which it holds

    def append(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Losing the last line to a crash is harmless. StoreError."""
        line = json.dumps({"time": time.time(), "kind": kind, **facts}, default=str) + "\n"
        if isinstance(self._run_dir, ObjectPath):
            return self._append_object(self._run_dir, line.encode())
        try:
            with (self._run_dir / FILE).open("a") as handle:
                handle.write(line)
        except OSError as error:
            raise StoreError(f"cannot write {self._run_dir / FILE} ({error}); everything recorded so far "
                             "is kept; free some space first") from error

    def _append_object(self, run_dir: ObjectPath, line: bytes) -> None:
        if self._number is None:
            self._number = 1 + max((int(path.stem.split("-")[1]) for path in run_dir.glob(OBJECTS)), default=-1)
        elif sum(map(len, self._lines)) > FULL_BYTES:
            self._number, self._lines = self._number + 1, []
        self._lines.append(line)
        (run_dir / f"events-{self._number:05d}.jsonl").write_bytes(b"".join(self._lines))


def read_lines(run_dir: AnyPath) -> list[str]:
    """[] where nothing happened yet. A line that a crash cut short is not JSON. OSError where it cannot be read."""
    files: list[AnyPath] = [run_dir / FILE] if isinstance(run_dir, Path) else []
    files += matching(run_dir, OBJECTS)
    return [line for file in files if isinstance(file, ObjectPath) or file.exists()
            for line in file.read_text(errors="replace").splitlines()]
