"""The run folder: append-only Parquet parts and small JSON files, the single source of truth of a run.

Durability: every file is written under a temporary name, flushed to disk and renamed, so a reader (or a resumed run)
sees a file whole or not at all. A trial exists once its part is renamed; nothing is kept only in memory. One driver at
a time holds the run's lock; readers need none. A damaged part is set aside as `*.damaged` with a warning; the rest is
kept. Page checksums make damage detectable.
"""
from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from actors.objectpath import AnyPath, ObjectPath, as_path
from orchestrator.config import RUN_NAME
from orchestrator.record import parts
from orchestrator.record.events import EventLog
from orchestrator.record.files import read_json, remove_folder, write_json, write_text
from orchestrator.record.lock import RunLock
from orchestrator.record.partfolder import PartFolder
from searchspaces.errors import StoreError

log = logging.getLogger(__name__)

NARROW = "narrow"       # the run inside a run's folder that searched its space first
RUNS = Path("runs")     # where run folders lie unless --runs says otherwise
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
