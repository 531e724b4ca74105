"""`paretoray merge`: tables of `paretoray measure` as one, where they are of one search space and one target.

Each network is one row. Visits in several tables are averaged (`merge_samples`), after every sample was brought to the
first table's `reference_ms`: a visit measures the ratio to the reference network, whose quiet value is only the unit. A
visit that is in several tables (equal `started_at`) counts once. Failures are kept where no table has the network.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from actors.targets.target import LatencySample, TargetIdentity, merge_samples
from orchestrator.latencytables.collect import SCHEMA, LatencyTable
from orchestrator.record.records import latency_result, latency_row
from searchspaces.errors import StoreError


@dataclass(frozen=True)
class Merged:
    """What came out: networks in all, those that several tables had visits of, those that only failed."""

    path: Path
    networks: int
    averaged: int
    failed: int


def merge_tables(paths: Sequence[Path], out: Path) -> Merged:
    """Writes `out` whole or not at all. StoreError where a table is missing, damaged or of another space or target, and
    where `out` would replace a file that is not given, by the same path, among the tables."""
    check_out(paths, out)
    tables = [_read(path) for path in paths]
    for table in tables[1:]:
        check_alike(tables[0], table)
    rows: dict[str, list[dict[str, Any]]] = {}
    for table in tables:
        for row in table.rows:
            rows.setdefault(row["arch_id"], []).append(row)
    reference_ms = float(tables[0].head["reference_ms"])
    merged = [merge_rows(same, reference_ms) for same in rows.values()]
    LatencyTable(out, tables[0].head, merged).write()
    failed = sum(bool(row["error"]) for row in merged)
    averaged = sum(len(_visits(same, reference_ms)) > 1 for same in rows.values())
    return Merged(out, len(merged) - failed, averaged, failed)


def merge_rows(rows: Sequence[dict[str, Any]], reference_ms: float) -> dict[str, Any]:
    """All rows of one network as one."""
    samples = _visits(rows, reference_ms)
    if not samples:
        return rows[0]
    measured = next(row for row in rows if not row["error"])
    merged = latency_row(replace(latency_result(measured), sample=merge_samples(samples)))
    return {name: merged.get(name, measured[name]) for name in SCHEMA.names}


def check_alike(first: LatencyTable, other: LatencyTable) -> None:
    """StoreError that names what differs."""
    if other.head["space_id"] != first.head["space_id"]:
        raise StoreError(f"{first.path} is of search space {first.head['space_id']} and {other.path} of "
                         f"{other.head['space_id']}; only tables of one space can be merged")
    ours, theirs = _identity(first), _identity(other)
    if ours != theirs:
        fields = [(name, value, asdict(theirs)[name]) for name, value in asdict(ours).items()
                  if value != asdict(theirs)[name]]
        difference = ", ".join(f"{name} {a} against {b}" for name, a, b in fields)
        raise StoreError(f"{first.path} was measured on {ours.target_id} and {other.path} on {theirs.target_id} "
                         f"({difference}); latencies of two targets are never mixed")


def check_out(paths: Sequence[Path], out: Path) -> None:
    """An existing file is replaced only where the user named it twice: among the tables and behind --out."""
    if out in paths or not out.exists():
        return
    alias = next((path for path in paths if path.exists() and path.samefile(out)), None)
    if alias is not None:
        raise StoreError(f"--out {out} is the table {alias} under another name; write --out {alias} to replace it")
    raise StoreError(f"{out} exists and is not among the tables; choose another --out, or merge it too")


def _read(path: Path) -> LatencyTable:
    table = LatencyTable.read(path)
    if table is None:
        raise StoreError(f"latency table {path} does not exist; give tables that 'paretoray measure' wrote")
    target_id = _identity(table).target_id
    strange = next((row["target_id"] for row in table.rows if not row["error"] and row["target_id"] != target_id), None)
    if strange is not None:
        raise StoreError(f"{path} says that it is of target {target_id} but holds rows of {strange}; measure it again")
    return table


def _identity(table: LatencyTable) -> TargetIdentity:
    fields = table.head["target"]
    try:
        return TargetIdentity(**{**fields, "input_shape": tuple(fields["input_shape"])})
    except (TypeError, KeyError) as error:
        raise StoreError(f"{table.path} does not say which target it is of ({error}); measure it again") from error


def _visits(rows: Sequence[dict[str, Any]], reference_ms: float) -> list[LatencySample]:
    """Samples in one unit, each visit once: of those that started together the one that holds most."""
    longest: dict[float, LatencySample] = {}
    for row in rows:
        sample = latency_result(row).sample
        if sample is None or row["error"]:
            continue
        known = longest.get(sample.started_at)
        if known is None or len(sample.candidate_ms) > len(known.candidate_ms):
            longest[sample.started_at] = replace(sample, latency_ms=sample.ratio * reference_ms,
                                                 reference_ms=reference_ms)
    return list(longest.values())
