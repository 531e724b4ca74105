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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.objectpath import AnyPath, ObjectPath, as_path, matching, parquet_source
from actors.objectstore import ObjectStoreError
from actors.wholefile import remove_tree, set_aside
from orchestrator.config import RUN_NAME
from orchestrator.record.events import EventLog
from orchestrator.record.lock import RunLock
from searchspaces.errors import StoreError

log = logging.getLogger(__name__)

NARROW = "narrow"       # the run inside a run's folder that searched its space first
RUNS = Path("runs")     # where run folders lie unless --runs says otherwise
AT_ONCE = 16            # requests to an object store
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

    One writer at a time. `append` returns after the rows are on disk. Opening it checks every part once. `check` is
    called before writing and may raise.
    """

    def __init__(self, folder: AnyPath, schema: pa.Schema, check: Callable[[], None] = lambda: None) -> None:
        self.folder = folder
        self.schema = schema
        self._check = check
        folder.mkdir(parents=True, exist_ok=True)
        parts = self._parts()
        rows = dict(zip(parts, self._each(self._intact_rows, parts)))
        self.damaged = [part.name for part, count in rows.items() if count is None]
        self.rows = max((self._first(part) + count for part, count in rows.items() if count is not None), default=0)
        lost = [self._first(path) + 1 for path in folder.glob("*.damaged")]
        self.rows = max([self.rows, *lost])

    def remove_leftovers(self) -> None:
        """Parts that a killed writer began. Only for the one writer: a reader would take a living one's."""
        for leftover in self.folder.glob(".*.part"):
            leftover.unlink(missing_ok=True)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes the rows as one new part; an empty sequence writes nothing."""
        if not rows:
            return
        self._check()
        table = pa.Table.from_pylist([dict(row) for row in rows], schema=self.schema)
        with write_atomically(self.folder / f"part-{self.rows:09d}.parquet") as temporary:
            pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
        self.rows += len(rows)

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """All rows in order."""
        def read(part: AnyPath) -> pa.Table:
            return pq.read_table(parquet_source(part), columns=columns, schema=self.schema)

        tables = self._each(read, self._parts())
        schema = self.schema if columns is None else pa.schema([self.schema.field(c) for c in columns])
        return pa.concat_tables(tables) if tables else schema.empty_table()

    def _each(self, work: Callable[[AnyPath], Any], parts: Sequence[AnyPath]) -> list[Any]:
        """Of an object store several at once: each is a request that takes its time."""
        if isinstance(self.folder, Path) or not parts:
            return [work(part) for part in parts]
        with ThreadPoolExecutor(min(AT_ONCE, len(parts))) as threads:
            return list(threads.map(work, parts))

    def _parts(self) -> list[AnyPath]:
        return matching(self.folder, "part-*.parquet")

    @staticmethod
    def _first(path: AnyPath) -> int:
        return int(path.name.split("-")[1].split(".")[0])

    def _intact_rows(self, part: AnyPath) -> int | None:
        """Of a part; None for a damaged one."""
        try:
            table = pq.read_table(parquet_source(part), page_checksum_verification=True)
            known = [field for field in self.schema if field.name in table.schema.names or field.name not in ADDED]
            if not table.schema.equals(pa.schema(known)):
                raise pa.ArrowInvalid(f"its columns are {table.schema.names}")
            return int(table.num_rows)
        except ObjectStoreError:
            raise       # says nothing about the part
        except (OSError, pa.ArrowException) as error:
            log.warning("%s is damaged (%s); it is set aside as %s.damaged and the rest is kept",
                        part, str(error).split("\n")[0], part.name)
            set_aside(part)
            return None


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
            table.remove_leftovers()

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
        self.trials.append([asdict(trial) for trial in trials])

    def read_trials(self) -> list[Trial]:
        rows: list[dict[str, Any]] = self.trials.read([f.name for f in fields(Trial)]).to_pylist()
        return [Trial(**row | {"tokens": tuple(row["tokens"]),
                               "latencies": row["latencies"] and tuple(row["latencies"])}) for row in rows]

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
    tables = [schema.empty_table()]
    for part in matching(folder, "part-*.parquet"):
        try:
            tables.append(pq.read_table(parquet_source(part), schema=schema, page_checksum_verification=True))
        except (OSError, pa.ArrowException) as error:
            log.warning("%s cannot be read (%s); its rows are left out", part, str(error).split("\n")[0])
    return pa.concat_tables(tables)


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
