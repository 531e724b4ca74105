"""What a run folder holds, read for the report at any stage of the run; whatever cannot be read is said, not raised."""
from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray

from actors.objectpath import AnyPath, matching, parquet_source
from orchestrator.frontier import pareto_mask
from orchestrator.record.events import FILE, read_lines
from orchestrator.record.partfolder import ADDED
from orchestrator.record.parts import read_in_order, with_columns
from orchestrator.record.store import LATENCY_SCHEMA, TRIAL_SCHEMA

TRIAL_COLUMNS = ["sequence", "arch_id", "tokens", "controller", "accuracy", "accuracy_source", "latency_ms",
                 "latency_source", "target_id", "madds", "params", "budget_ms", "started_at", "error", "latencies"]
LATENCY_COLUMNS = ["arch_id", "target_id", "latency_ms", "predicted_ms", "stderr_ms"]


@dataclass(frozen=True)
class RunView:
    """A run at one moment. `trials` in order of observation; `problems` are sentences for the reader."""

    path: AnyPath
    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    state: dict[str, Any]
    events: list[dict[str, Any]]
    trials: pa.Table
    latency: pa.Table
    generated: list[dict[str, Any]]
    problems: tuple[str, ...]
    elite: dict[str, Any]       # what a search for spaces found; empty for other runs
    narrowed: bool              # has it a search for spaces of its own, with a report?
    compared: list[dict[str, Any]]      # the fixed network, one row per target and budget; empty for other runs

    def numbers(self, column: str) -> NDArray[np.float64]:
        """A column of the trials as float64, nan for null."""
        return column_numbers(self.trials, column)

    @property
    def front(self) -> NDArray[np.int64]:
        """Indices of the trials on the Pareto front, fastest first."""
        latency_ms, accuracy = self.numbers("latency_ms"), self.numbers("accuracy")
        members = np.flatnonzero(pareto_mask(latency_ms, accuracy))
        return members[np.lexsort((accuracy[members], latency_ms[members]))]

    @property
    def models(self) -> list[dict[str, Any]]:
        """What was handed over: feasible, with a latency and an accuracy; smallest budget first."""
        rows = [row for row in self.generated if row.get("feasible") and _is_number(row.get("latency_ms"))
                and _is_number(row.get("accuracy"))]
        return sorted(rows, key=lambda row: (row["budget_ms"], row["latency_ms"]))

    @property
    def fixed(self) -> list[dict[str, Any]]:
        """The fixed network's models, each once, fastest first."""
        rows = {str(row["onnx"]): row for row in self.compared if row.get("onnx") and _is_number(row.get("latency_ms"))
                and _is_number(row.get("accuracy")) and _is_number(row.get("test_accuracy"))}
        return sorted(rows.values(), key=lambda row: float(row["latency_ms"]))

    @property
    def bare(self) -> bool:
        """Is all that was handed over architectures, without models? So it is where latencies are only looked up."""
        return bool(self.models) and not any(row.get("onnx") for row in self.models)

    @property
    def handed_over(self) -> str:
        """What one of them is called."""
        return "chosen architecture" if self.bare else "handed-over model"


def column_numbers(table: pa.Table, column: str) -> NDArray[np.float64]:
    values = table.column(column).cast(pa.float64())
    return np.asarray(values.to_numpy(zero_copy_only=False), dtype=np.float64)


def read_run(run_dir: AnyPath) -> RunView:
    problems: list[str] = []
    trials = _read_parts(run_dir, "trials", TRIAL_SCHEMA, TRIAL_COLUMNS, problems)
    latency = _read_parts(run_dir, "latency", LATENCY_SCHEMA, LATENCY_COLUMNS, problems)
    generated = _with_budgets(_read_file(run_dir / "generated.json", list, problems, optional=True), "generated.json",
                              problems)
    return RunView(
        path=run_dir, name=run_dir.resolve().name,
        config=_read_file(run_dir / "config.yaml", dict, problems),
        environment=_read_file(run_dir / "environment.json", dict, problems),
        state=_read_file(run_dir / "state.json", dict, problems, optional=True),
        events=_read_events(run_dir, problems),
        trials=trials.sort_by("sequence"), latency=latency, generated=generated,
        elite=_read_file(run_dir / "elite.json", dict, problems, optional=True),
        narrowed=(run_dir / "narrow" / "report.html").is_file(),
        compared=_fixed_rows(_read_file(run_dir / "compared.json", dict, problems, optional=True), problems),
        problems=tuple(problems))


def _with_budgets(rows: list[Any], name: str, problems: list[str]) -> list[dict[str, Any]]:
    entries = [row for row in rows if isinstance(row, dict) and _is_number(row.get("budget_ms"))]
    if len(entries) < len(rows):
        problems.append(f"{len(rows) - len(entries)} entries of {name} have no budget and are left out.")
    return entries


def _fixed_rows(compared: dict[str, Any], problems: list[str]) -> list[dict[str, Any]]:
    if not compared:
        return []
    fixed = compared.get("fixed")
    rows = fixed.get("entries") if isinstance(fixed, dict) else None
    if not isinstance(rows, list):
        problems.append("compared.json holds no entries of the fixed network.")
    return _with_budgets(rows if isinstance(rows, list) else [], "compared.json", problems)


def _read_file(path: AnyPath, kind: type, problems: list[str], optional: bool = False) -> Any:
    """YAML or JSON (which is YAML, but faster by its own reader) of the given kind; empty with a note otherwise."""
    try:
        text = path.read_text()
        value = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except FileNotFoundError:
        if not optional:
            problems.append(f"{path.name} is missing.")
        return kind()
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"{path.name} cannot be read ({str(error).splitlines()[0]}).")
        return kind()
    if not isinstance(value, kind):
        problems.append(f"{path.name} holds {type(value).__name__} instead of {kind.__name__}.")
        return kind()
    return value


def _read_events(run_dir: AnyPath, problems: list[str]) -> list[dict[str, Any]]:
    try:
        lines = read_lines(run_dir)
    except OSError as error:
        problems.append(f"{FILE} cannot be read ({error}).")
        return []
    events, bad = [], 0
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            bad += 1  # the last line of a killed run may be torn
            continue
        if isinstance(event, dict):
            events.append(event)
    if bad:
        problems.append(f"{bad} of {len(lines)} lines of {FILE} cannot be read.")
    return events


def _read_parts(run_dir: AnyPath, name: str, schema: pa.Schema, columns: list[str], problems: list[str]) -> pa.Table:
    wanted = pa.schema([schema.field(column) for column in columns])
    found: dict[str, str] = {}      # by part: a part may be looked at twice

    def readable(path: AnyPath) -> pa.Table | None:
        try:
            table = pq.read_table(parquet_source(path), page_checksum_verification=True)
            missing = [column for column in columns if column not in table.column_names and column not in ADDED]
            if missing:
                raise pa.ArrowInvalid(f"it has no column {missing[0]}")
            return with_columns(table, wanted)
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException) as error:
            found[path.name] = str(error).splitlines()[0]
            return None

    parts, _ = read_in_order(run_dir / name, readable)
    problems += [f"{name}/{part} cannot be read ({reason}); its rows are not shown." for part, reason in found.items()]
    for path in matching(run_dir / name, "*.damaged"):
        problems.append(f"{name}/{path.name} was damaged and set aside; its rows are not shown.")
    return pa.concat_tables([wanted.empty_table(), *(table for _, table in parts)])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))
