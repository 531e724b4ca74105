"""Trained blocks on disk: one safetensors file per entry, and a Parquet index that says what they are.

    epochs-4/entries/2-1.0.1.0.2.1-18f3...-9b1c....safetensors     the tensors of one block
    epochs-4/index/part-18f3....parquet                            one row per entry, written after its file

Any number of processes on any number of machines may read and write one folder at the same time. Nothing is changed in
place: entries and index parts appear whole (written aside, flushed, renamed) under names of their own, and what is
newest counts. A writer that is killed leaves at most files that no row names yet. A reader that finds a file gone looks
at the index again.

One process at a time compacts: it holds a lock (which ends with its process; in an object store a lease), writes all
living rows into one part, adopts entries that no row names, and removes the oldest entries beyond the size limit. Where
the file system has no locks (some network ones) nobody compacts, and a warning says so.

Damaged files are set aside as `*.damaged` with a warning. Only that entry is lost; the rows of a damaged index part are
made again from the entries.
"""
from __future__ import annotations

import contextlib
import fcntl
import logging
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actors.knowledge.entry import BlockId, DamagedError, Entry, NewEntry, newest, read_index, write_index
from actors.lease import HeldError, Lease
from actors.objectpath import AnyPath
from actors.wholefile import set_aside, write_whole

log = logging.getLogger(__name__)
MAXIMUM_PARTS = 32              # more are compacted into one
ABANDONED_S = 3600.0            # a temporary file of this age has no writer any more
LISTINGS = 10


class KnowledgeStore:
    """See the module docstring. One object per process; not for several threads."""

    def __init__(self, folder: AnyPath, maximum_bytes: float) -> None:
        self._folder, self._maximum_bytes = folder, maximum_bytes
        self._entries, self._index = folder / "entries", folder / "index"
        self._parts: dict[str, list[Entry]] = {}    # what the index parts of the last look say
        self._gone: set[str] = set()                # files that were missing or damaged
        self.lost = 0                               # entries that were damaged
        self._entries.mkdir(parents=True, exist_ok=True)
        self._index.mkdir(exist_ok=True)
        self.compact()

    # --- reading -----------------------------------------------------------------------------------------------------

    def entries(self) -> dict[BlockId, Entry]:
        """The newest entry of every block, after a fresh look at the index."""
        self._look()
        return newest(entry for rows in self._parts.values() for entry in rows if entry.file not in self._gone)

    def read(self, entry: Entry) -> dict[str, NDArray[np.generic]] | None:
        """The tensors of an entry; None if its file is gone or damaged: look at `entries` again."""
        try:
            return entry.weights(self._entries)
        except FileNotFoundError:
            pass                                    # replaced or evicted by another process
        except OSError as error:
            log.warning("knowledge entry %s cannot be read (%s); the others are used", entry.file, error)
        except DamagedError as error:
            self._damaged(self._entries / entry.file, error)
        self._gone.add(entry.file)
        return None

    def _look(self) -> None:
        """Reads parts that are new and forgets those that are gone, until two listings agree: while another process
        compacts, one listing alone may miss both the old parts and the new one."""
        for _ in range(LISTINGS):
            names = self._part_names()
            self._parts = {name: rows for name, rows in self._parts.items() if name in names}
            for name in names - self._parts.keys():
                rows = self._read_part(self._index / name)
                if rows is not None:
                    self._parts[name] = rows
            if self._part_names() == names == self._parts.keys():
                return

    def _part_names(self) -> set[str]:
        return {path.name for path in self._index.glob("part-*.parquet")}

    def _read_part(self, path: AnyPath) -> list[Entry] | None:
        try:
            return read_index(path)
        except OSError as error:
            if path.exists():
                log.warning("knowledge index %s cannot be read (%s)", path, error)
        except DamagedError as error:
            log.warning("knowledge index %s is damaged (%s); set aside, its entries are read one by one", path, error)
            _set_aside(path)
            self.compact()
        return None

    # --- writing -----------------------------------------------------------------------------------------------------

    def write(self, new: Sequence[NewEntry]) -> bool:
        """Stores the entries, which replace older ones of the same blocks. All of them or, if the disk does not take
        them (False, with a warning), none, and no file is left behind."""
        known = self.entries()
        rows: list[Entry] = []
        # Strictly after everything that is known, whatever the clocks of other machines say.
        written_ns = max([time.time_ns(), *(entry.written_ns + 1 for entry in known.values())])
        try:
            for entry in new:
                row, content = entry.packed(written_ns)
                write_whole(self._entries / row.file, content)
                rows.append(row)
            self._write_part(rows)
        except OSError as error:
            self._remove(row.file for row in rows)
            log.warning("the knowledge pool %s cannot be written (%s); this network is not stored, the search goes on",
                        self._folder, error.strerror or error)
            return False
        self._remove(known[entry.block].file for entry in new if entry.block in known)
        total = sum(entry.size_bytes for entry in self.entries().values())
        if total > self._maximum_bytes or len(self._parts) > MAXIMUM_PARTS:
            self.compact()
        return True

    def _write_part(self, rows: Sequence[Entry]) -> None:
        write_index(self._index / f"part-{time.time_ns():x}-{uuid.uuid4().hex[:8]}.parquet", rows)

    def _remove(self, files: Iterable[str]) -> None:
        for file in files:
            with contextlib.suppress(OSError):      # what stays is removed by a later compaction
                (self._entries / file).unlink(missing_ok=True)

    # --- compaction --------------------------------------------------------------------------------------------------

    def compact(self, oldest_ns: int = 0) -> None:
        """See the module docstring; entries written before `oldest_ns` go too. Returns at once if another process is at
        it, or if the disk refuses."""
        try:
            with _alone(self._folder):
                self._compact(oldest_ns)
        except (BlockingIOError, HeldError):
            log.debug("another process compacts %s", self._folder)
        except OSError as error:
            log.warning("the knowledge pool %s cannot be compacted (%s)", self._folder, error.strerror or error)

    def _compact(self, oldest_ns: int) -> None:
        self._look()
        rows = [entry for part in self._parts.values() for entry in part]
        files = {path.name for path in self._entries.glob("*.safetensors")}     # after the rows: theirs are all there
        rows += filter(None, (self._adopted(name) for name in files - {row.file for row in rows}))
        living = newest(row for row in rows if row.file in files and row.file not in self._gone)
        kept = self._within_limit([entry for entry in living.values() if entry.written_ns >= oldest_ns])
        old_parts = set(self._parts)
        if len(old_parts) > 1 or set(kept) != {row for part in self._parts.values() for row in part}:
            self._write_part(kept)
            for name in old_parts:
                (self._index / name).unlink(missing_ok=True)
        self._remove({row.file for row in rows} - {row.file for row in kept})
        for path in (*self._entries.glob(".*"), *self._index.glob(".*")):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > ABANDONED_S:
                    path.unlink()

    def _within_limit(self, entries: Sequence[Entry]) -> list[Entry]:
        """The newest entries that fit into the size limit together, oldest first."""
        newest_first = sorted(entries, key=lambda entry: entry.written_ns, reverse=True)
        total = np.cumsum([entry.size_bytes for entry in newest_first])
        return newest_first[:int((total <= self._maximum_bytes).sum())][::-1]

    def _adopted(self, name: str) -> Entry | None:
        """The row of an entry that no part names: its writer died, or the part was damaged."""
        path = self._entries / name
        try:
            return Entry.of_file(path)
        except OSError:
            return None
        except DamagedError as error:
            self._damaged(path, error)
            return None

    def _damaged(self, path: AnyPath, error: DamagedError) -> None:
        log.warning("knowledge entry %s is damaged (%s); set aside, the others are used", path, error)
        self.lost += 1
        _set_aside(path)


@contextlib.contextmanager
def _alone(folder: AnyPath) -> Iterator[None]:
    """BlockingIOError or HeldError where another process is at it."""
    if isinstance(folder, Path):
        with open(folder / ".lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        return
    lease = Lease.claim(folder, patience_s=0.0)
    try:
        yield
    finally:
        lease.release()


def _set_aside(path: AnyPath) -> None:
    with contextlib.suppress(OSError):
        set_aside(path)
