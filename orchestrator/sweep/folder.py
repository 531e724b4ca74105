"""The folder of a sweep: what was asked, what has become of each search, and the run folders of them all.

    RUNS/NAME/  sweep.yaml (resolved)  sweep.json (state, reference, searches)  report.html
                001-.../ 002-.../  an ordinary run folder each      logs/001-....log  what it would have printed

One process drives a sweep and is the only one that writes sweep.json. The searches record what they do in their own run
folders, so nothing is lost with that process.
"""
from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from actors.objectpath import AnyPath, as_path
from orchestrator.config import read_mapping
from orchestrator.record.files import read_json, remove_folder, write_json, write_text
from orchestrator.record.lock import FILE, RunLock, claimed
from orchestrator.record.store import run_arguments, run_path
from orchestrator.sweep.recorded import SETTLED, State
from orchestrator.sweep.settings import SweepSettings, Values, parse_sweep
from searchspaces.errors import StoreError

SETTINGS, STATE, LOGS, TUNE = "sweep.yaml", "sweep.json", "logs", ".tune"
NAME_LENGTH = 60
POLL_S = 0.2


@dataclass(frozen=True)
class Member:
    """One search of a sweep: the name of its run folder, the values of the varied keys, and what has become of it.
    `evaluations` and `hypervolume` (0..1, see recorded.py) are the last that it told; `note` is an error's sentence."""

    name: str
    values: Values
    state: State = State.WAITING
    evaluations: int = 0
    hypervolume: float = 0.0
    note: str = ""

    @property
    def settled(self) -> bool:
        return self.state in SETTLED


class SweepFolder:
    """`create` for a new sweep, `open` for an existing one; `lock` while driving it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = RunLock()
        self._members: dict[str, Member] = {}
        for row in self.facts().get("searches", []):
            member = Member(**row | {"state": State(row["state"])})
            self._members[member.name] = member

    @classmethod
    def create(cls, root: Path, name: str, settings: SweepSettings) -> SweepFolder:
        path = _named(root, name)
        if path.exists():
            how = (f"go on with '{resume_command(path)}' or " if (path / STATE).exists() else "")
            raise StoreError(f"'{name}' exists already in {root}; {how}choose another --name")
        try:
            path.mkdir(parents=True)
        except OSError as error:
            raise StoreError(f"cannot create the folder {path} ({error}); choose another --runs folder") from error
        write_text(path / SETTINGS, yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
        write_json(path / STATE, {"searches": []})
        return cls(path)

    @classmethod
    def open(cls, root: Path, name: str) -> SweepFolder:
        """By name under `root`, or by the path of the folder itself."""
        path = Path(name) if (Path(name) / STATE).exists() else _named(root, name)
        if (path / "config.yaml").exists():
            raise StoreError(f"'{name}' is a single run, not a sweep; go on with it with: paretoray resume {name}")
        if not (path / STATE).exists():
            known = ", ".join(folder.name for folder in sweeps(root)) or "none"
            raise StoreError(f"there is no sweep '{name}' in {root}; known sweeps: {known}")
        return cls(path.resolve())

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def settings(self) -> SweepSettings:
        return parse_sweep(read_mapping(self.path / SETTINGS), str(self.path / SETTINGS))

    @property
    def members(self) -> list[Member]:
        """In order of their start."""
        return list(self._members.values())

    def member(self, name: str) -> Member:
        return self._members[name]

    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = read_json(self.path / STATE)
        return found

    def lock(self) -> None:
        """Claims the sweep for this process, until it ends."""
        self._lock.take(self.path, "sweep")

    def discard(self) -> None:
        """Removes the folder of a sweep of which no search has begun."""
        assert not self._members
        remove_folder(self.path)
        self._lock.release()

    def add(self, *members: Member) -> None:
        """All at once, so that a killed sweep knows all of them or none."""
        self._members |= {member.name: member for member in members}
        self._write()

    def update(self, name: str, **changes: Any) -> Member:
        self._members[name] = member = replace(self._members[name], **changes)
        self._write()
        return member

    def conclude(self, **facts: Any) -> None:
        """Adds to sweep.json what holds for the sweep as a whole."""
        self._write(**facts)

    def free_name(self, values: Values) -> str:
        """For one more search."""
        return member_name(len(self._members) + 1, values)

    def _write(self, **facts: Any) -> None:
        rows = [asdict(member) | {"state": member.state.value} for member in self.members]
        write_json(self.path / STATE, self.facts() | facts | {"searches": rows})


def member_name(number: int, values: Mapping[str, Any]) -> str:
    """A folder's name that tells the values, as far as they fit: 003-pnag-0.05."""
    texts = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values.values()]
    told = re.sub(r"[-.]{2,}", "-", re.sub(r"[^A-Za-z0-9._]", "-", "-".join(texts))).strip("-._")
    return f"{number:03d}-{told}"[:NAME_LENGTH].rstrip("-._")


def _named(root: Path, name: str) -> Path:
    run_path(root, name)    # refuses a name that is no folder's
    return root / name


def on_disk(root: str | AnyPath) -> Path:
    """The folder of the runs. StoreError where it is not on a disk, which the lock and the rungs of a sweep need."""
    path = as_path(root)
    if not isinstance(path, Path):
        raise StoreError(f"a sweep needs a folder on a disk for its runs, and --runs is {path}; give one that all "
                         "nodes share, or search one configuration after the other")
    return path


def is_sweep(root: str | AnyPath, name: str) -> bool:
    """By name under `root`, or by the path of the folder itself."""
    root = as_path(root)
    return isinstance(root, Path) and any((path / STATE).exists() for path in (Path(name), root / name))


def sweeps(root: Path) -> list[Path]:
    """Folders of sweeps, oldest first."""
    found = sorted(root.glob(f"*/{STATE}"), key=lambda path: path.stat().st_mtime)
    return [path.parent for path in found]


def resume_command(path: Path) -> str:
    """What a person types to go on with a sweep."""
    return f"paretoray sweep --resume {run_arguments(path)}"


def wait_until_free(run: Path, patience_s: float) -> None:
    """Until no process drives this run, at most `patience_s`: a search whose sweep was killed ends a moment later."""
    deadline = time.monotonic() + patience_s
    with contextlib.suppress(FileNotFoundError), (run / FILE).open("r+") as handle:
        while not claimed(handle) and time.monotonic() < deadline:
            time.sleep(POLL_S)
