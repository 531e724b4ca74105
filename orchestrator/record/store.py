"""The run folder: append-only Parquet parts and small JSON files, the single source of truth of a run.

Durability: every file is written under a temporary name, flushed to disk and renamed, so a reader (or a resumed run)
sees a file whole or not at all. A trial exists once its part is renamed; nothing is kept only in memory. One driver at
a time holds the run's lock; readers need none. A damaged part is set aside as `*.damaged` with a warning; the rest is
kept. Page checksums make damage detectable.
"""
from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import shlex
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.objectpath import AnyPath, ObjectPath, as_path, parquet_source
from actors.objectstore import ObjectStoreError
from actors.wholefile import remove_tree, set_aside
from orchestrator.config import RUN_NAME
from orchestrator.record import parts
from orchestrator.record.events import EventLog
from orchestrator.record.lock import RunLock
from searchspaces.errors import StoreError

log = logging.getLogger(__name__)

NARROW = "narrow"       # the run inside a run's folder that searched its space first
RUNS = Path("runs")     # where run folders lie unless --runs says otherwise
ROOM_MB = 1             # that must be free before a run begins; far less than it will need
TRIAL_SCHEMA = pa.schema([
    ("sequence", pa.int64()), ("arch_id", pa.string()), ("tokens", pa.list_(pa.int8())), ("space_id", pa.string()),
    ("controller", pa.string()), ("accuracy", pa.float64()), ("accuracy_source", pa.string()),
    ("weights_version", pa.int64()), ("latency_ms", pa.float64()), ("latency_source", pa.string()),
    ("target_id", pa.string()), ("madds", pa.int64()), ("params", pa.int64()), ("budget_ms", pa.float64()),
    ("reward", pa.float64()), ("seed", pa.int64()), ("started_at", pa.float64()), ("duration_s", pa.float64()),
    ("node", pa.string()), ("error", pa.string()), ("details", pa.string()),
    ("latencies", pa.list_(pa.struct([("target", pa.string()), ("target_id", pa.string()),
                                      ("latency_ms", pa.float64()), ("source", pa.string())]))),
    ("proposed_for", pa.string()),
])
# Columns of trials that runs of earlier versions lack; they read as null.
ADDED = frozenset({"details", "latencies", "proposed_for"})
LATENCY_SCHEMA = pa.schema([
    ("arch_id", pa.string()), ("tokens", pa.list_(pa.int8())), ("target_id", pa.string()),
    ("latency_ms", pa.float64()), ("predicted_ms", pa.float64()), ("reference_ms", pa.float64()),
    ("ratio", pa.float64()), ("stderr_ms", pa.float64()), ("rounds", pa.int64()), ("drift", pa.float64()),
    ("load", pa.float64()), ("candidate_rounds_ms", pa.list_(pa.list_(pa.float64()))),
    ("reference_rounds_ms", pa.list_(pa.list_(pa.float64()))), ("started_at", pa.float64()),
    ("duration_s", pa.float64()), ("details", pa.string()), ("source", pa.string()), ("error", pa.string()),
])


@dataclass(frozen=True)
class Trial:
    """One evaluation, one row of `trials/`. Accuracy 0..1 (None where `error` says why), latency in milliseconds.

    `latency_ms`, its source and `target_id` are of the run's first target; `latencies` holds one entry per target
    (`target` is its label). `budget_ms` is the one it was proposed for, of the goal `proposed_for`. `reward` is the
    controller's, where it has one; `details` is JSON of what the evaluator adds (epochs, hits of the knowledge pool).
    """

    sequence: int
    arch_id: str
    tokens: tuple[int, ...]
    space_id: str
    controller: str
    accuracy: float | None
    accuracy_source: str
    weights_version: int
    latency_ms: float | None
    latency_source: str
    target_id: str
    madds: int
    params: int
    budget_ms: float | None
    reward: float | None
    seed: int
    started_at: float
    duration_s: float
    node: str
    error: str = ""
    details: str | None = None
    latencies: tuple[Mapping[str, Any], ...] | None = None
    proposed_for: str | None = None


@contextlib.contextmanager
def write_atomically(path: AnyPath) -> Iterator[Path | Upload]:
    """Yields a temporary path; on success it is flushed and renamed to `path`, on failure removed (StoreError). For an
    object store it yields what is uploaded on success."""
    if isinstance(path, ObjectPath):
        upload = Upload()
        yield upload
        path.write_bytes(upload.getvalue())
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise _unwritable(path, error, "everything recorded so far is kept; free some space first") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


class Upload(io.BytesIO):
    """In memory, written to as a path is."""

    def write_bytes(self, content: bytes) -> None:
        self.write(content)

    def write_text(self, text: str) -> None:
        self.write(text.encode())


def _unwritable(path: AnyPath, error: OSError, advice: str) -> StoreError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return StoreError(f"{'the disk is full' if full else 'cannot write'} while writing {path} ({error}); {advice}")


def check_writable(folder: AnyPath) -> None:
    """StoreError where a run could not be written to this folder, which need not exist yet. Leaves nothing behind."""
    try:
        if isinstance(folder, ObjectPath):
            probe = folder / f"probe-{uuid.uuid4().hex}"
            probe.write_bytes(b"")
            return probe.unlink()
        existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(ROOM_MB * 10**6))
            file.flush()
            os.fsync(file.fileno())
    except ObjectStoreError:
        raise
    except OSError as error:
        raise _unwritable(folder, error, "free some space, correct the folder's permissions or choose another --runs "
                                         "folder") from error


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: AnyPath, text: str) -> None:
    with write_atomically(path) as temporary:
        temporary.write_text(text)


def write_json(path: AnyPath, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: AnyPath) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise StoreError(f"{path} does not exist; is this a run folder?") from None
    except ObjectStoreError:
        raise
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is damaged ({error}); restore it or start a new run") from error


class PartFolder:
    """Append-only table of Parquet parts `part-<first row number>.parquet`, rows in order of appending.

    One writer at a time. `append` returns after the rows are on disk; now and then it merges parts, which readers need
    not know (parts.py). Opening it checks every part once. `check` is called before writing and may raise.
    """

    def __init__(self, folder: AnyPath, schema: pa.Schema, check: Callable[[], None] = lambda: None) -> None:
        self.folder = folder
        self.schema = schema
        self._check = check
        folder.mkdir(parents=True, exist_ok=True)
        self._open()

    def _open(self) -> None:
        self.damaged: list[str] = []
        self._seen = parts.listed(self.folder)
        found, self._contained = parts.read_in_order(self.folder, self._intact)
        self._small = parts.mergeable(found)    # as they are on disk
        self.rows = max((parts.first_row(part) + table.num_rows for part, table in found), default=0)
        lost = [parts.first_row(path) + 1 for path in self.folder.glob("*.damaged")]
        self.rows = max([self.rows, *lost])

    def begin_writing(self) -> None:
        """By the one writer: takes in what another wrote since this was opened, and removes what a killed one left. A
        reader would take a living one's."""
        if self._seen != parts.listed(self.folder):
            self._open()
        for leftover in [*self.folder.glob(".*.part"), *self._contained]:
            leftover.unlink(missing_ok=True)
        if len(self._small) > parts.MOST_SMALL:     # of an earlier version, which merged nothing
            self._merge()

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes the rows as one new part; an empty sequence writes nothing."""
        if not rows:
            return
        self._check()
        table = pa.Table.from_pylist([dict(row) for row in rows], schema=self.schema)
        part = self._write(self.rows, table)
        self.rows += len(rows)
        self._small = parts.mergeable([*self._small, (part, table)])
        if len(self._small) > parts.MOST_SMALL:
            self._merge()

    def _write(self, first: int, table: pa.Table) -> AnyPath:
        part = self.folder / f"part-{first:09d}.parquet"
        with write_atomically(part) as temporary:
            pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
        return part

    def _merge(self) -> None:
        """Nothing is lost where this fails, and nothing has to be said: the next part will not be written either."""
        small, self._small = self._small, []
        with contextlib.suppress(StoreError, OSError):
            for group in parts.groups(small):
                whole = pa.concat_tables([table for _, table in group])
                part = self._write(parts.first_row(group[0][0]), whole)
                for contained, _ in group[1:]:
                    contained.unlink(missing_ok=True)
            self._small = parts.mergeable([(part, whole)])

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """All rows in order."""
        def read(part: AnyPath) -> pa.Table:
            return pq.read_table(parquet_source(part), columns=columns, schema=self.schema)

        found, _ = parts.read_in_order(self.folder, read)
        schema = self.schema if columns is None else pa.schema([self.schema.field(c) for c in columns])
        return pa.concat_tables([schema.empty_table(), *(table for _, table in found)])

    def _intact(self, part: AnyPath) -> pa.Table | None:
        """Its rows; None where it is damaged, and set aside."""
        try:
            file = pq.ParquetFile(parquet_source(part), page_checksum_verification=True)
            table = file.read(use_threads=False)    # quick if small
            known = [field for field in self.schema if field.name in table.schema.names or field.name not in ADDED]
            if not table.schema.equals(pa.schema(known)):
                raise pa.ArrowInvalid(f"its columns are {table.schema.names}")
        except (FileNotFoundError, ObjectStoreError):
            raise       # says nothing about the part
        except (OSError, pa.ArrowException) as error:
            log.warning("%s is damaged (%s); it is set aside as %s.damaged and the rest is kept",
                        part, str(error).split("\n")[0], part.name)
            set_aside(part)
            self.damaged.append(part.name)
            return None
        return parts.with_columns(table, self.schema)


class RunStore:
    """One run folder. `create` for a new run, `open` for an existing one; `lock` while driving it."""

    def __init__(self, path: AnyPath) -> None:
        self.path = path
        self._lock = RunLock()
        self.trials = PartFolder(path / "trials", TRIAL_SCHEMA, self._lock.check)
        self.latency = PartFolder(path / "latency", LATENCY_SCHEMA, self._lock.check)
        self._events = EventLog(path)
        self._state: dict[str, Any] | None = None   # of state.json as it is, while nobody else may write it

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def resume_command(self) -> str:
        """What a person types to go on with the run, from where it was started."""
        return resume_command(self.path.parent, self.name)

    @classmethod
    def create(cls, root: AnyPath, name: str, config_text: str, environment: Mapping[str, Any]) -> RunStore:
        path = run_path(root, name)
        claimed = None
        if isinstance(path, ObjectPath) and not path.exists():
            claimed = cls(path)
            claimed.lock()      # nothing else tells which of two came first
        if (path if claimed is None else path / "config.yaml").exists():
            raise StoreError(f"run '{name}' exists already in {root}; go on with '{resume_command(root, name)}' or "
                             "choose another --name")
        try:
            path.mkdir(parents=True)
        except OSError as error:
            raise StoreError(f"cannot create the run folder {path} ({error}); choose another --runs folder") from error
        try:
            write_text(path / "config.yaml", config_text)
            write_json(path / "environment.json", environment)
            return claimed or cls(path)
        except BaseException:
            if claimed is not None:
                claimed._lock.release()
            remove_folder(path)
            raise

    @classmethod
    def open(cls, root: AnyPath, name: str) -> RunStore:
        """By name under `root`, or by the path of the folder itself."""
        return cls(find_run(root, name))

    def lock(self) -> None:
        """Claims the run for this process (lock.py)."""
        if self._lock.held:
            return
        self._lock.take(self.path)
        self._state = None
        for table in (self.trials, self.latency):
            table.begin_writing()

    def unlock(self) -> None:
        """From here on others may drive the run."""
        self._lock.release()

    @property
    def recorded(self) -> bool:
        """Is there anything that a resumed run would not do again: a latency, a trial, a checkpoint?"""
        checkpoints, inner = self.path / "checkpoints", self.path / NARROW
        return (self.latency.rows + self.trials.rows > 0 or (checkpoints.exists() and any(checkpoints.iterdir()))
                or (inner.exists() and RunStore(inner).recorded))

    def discard(self) -> None:
        """Removes the folder, by whoever holds its lock. Only for a run that recorded nothing."""
        assert self._lock.held and not self.recorded
        if isinstance(self.path, ObjectPath):   # a lease would be renewed in there
            self._lock.release()
        remove_folder(self.path)
        self._lock.release()

    def replace_config(self, config_text: str) -> None:
        """The configuration, once what it left open is found."""
        write_text(self.path / "config.yaml", config_text)

    def append_trials(self, trials: Sequence[Trial]) -> None:
        self.trials.append([vars(trial) for trial in trials])

    def read_trials(self) -> list[Trial]:
        return [trial for trials in self.trials_by_part() for trial in trials]

    def trials_by_part(self) -> Iterator[list[Trial]]:
        """All trials in order, in lists of at most some thousands, for whoever need not hold them all at once."""
        table = self.trials.read([f.name for f in fields(Trial)])
        for batch in table.to_batches(max_chunksize=parts.FULL_ROWS):
            yield [Trial(**row | {"tokens": tuple(row["tokens"]),
                                  "latencies": row["latencies"] and tuple(row["latencies"])})
                   for row in batch.to_pylist()]

    def event(self, kind: str, **facts: Any) -> None:
        """Appends one line to events.jsonl: what happened when, for the report. Losing the last one is harmless."""
        self._lock.check()
        self._events.append(kind, facts)

    def state(self) -> dict[str, Any]:
        """state.json; whoever holds the lock reads it once per change. Its values are shared: not to be changed."""
        if self._state is None or not self._lock.held:
            path = self.path / "state.json"
            self._state = read_json(path) if path.exists() else {}
        return dict(self._state)

    def update_state(self, **facts: Any) -> None:
        self._lock.check()
        known = self.state()
        self._state = None      # read back from what was written, so that both are the same
        write_json(self.path / "state.json", known | facts)


def remove_folder(path: AnyPath) -> None:
    """What cannot be removed stays, with a warning: an error is on its way already."""
    try:
        remove_tree(path)
    except OSError as error:
        log.warning("the run folder %s holds nothing and cannot be removed (%s)", path, error)


def read_parts(folder: AnyPath, schema: pa.Schema) -> pa.Table:
    """All rows of another run's table, which may be growing: nothing is changed, what cannot be read is left out."""
    def readable(part: AnyPath) -> pa.Table | None:
        try:
            return pq.read_table(parquet_source(part), schema=schema, page_checksum_verification=True)
        except (FileNotFoundError, ObjectStoreError):
            raise
        except (OSError, pa.ArrowException) as error:
            log.warning("%s cannot be read (%s); its rows are left out", part, str(error).split("\n")[0])
            return None

    found, _ = parts.read_in_order(folder, readable)
    return pa.concat_tables([schema.empty_table(), *(table for _, table in found)])


def find_run(root: AnyPath, name: str) -> AnyPath:
    """The folder of an existing run, by name under `root` or by its own path."""
    direct = as_path(name)
    if direct.name != name and not (direct / "config.yaml").exists():
        raise StoreError(f"'{name}' is no folder of a run: it holds no config.yaml; give the path of a run's folder, "
                         "or its name and the folder of the runs")
    path = direct if (direct / "config.yaml").exists() else run_path(root, name)
    if not (path / "config.yaml").exists():
        known = sorted(p.parent.name for p in root.glob("*/config.yaml"))
        raise StoreError(f"there is no run '{name}' in {root}; known runs: {', '.join(known) or 'none'}")
    return path.resolve()


def resume_command(root: AnyPath, name: str) -> str:
    return f"paretoray resume {run_arguments(root / name)}"


def run_arguments(path: AnyPath) -> str:
    """How a person names a run's folder to a command."""
    root = path.parent
    if isinstance(root, Path) and root.resolve() == RUNS.resolve():
        return path.name
    return f"{path.name} --runs {shlex.quote(str(root) if isinstance(root, Path) else root.address)}"


def run_path(root: AnyPath, name: str) -> AnyPath:
    """The folder of a run; the name must be a plain folder name (no separators, no '..')."""
    if not RUN_NAME.fullmatch(name) or ".." in name:
        raise StoreError(f"'{name}' is not a usable run name; use letters, digits, '-', '_' and single '.', starting "
                         "with a letter or digit")
    return root / name
