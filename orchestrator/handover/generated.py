"""generated.json: what a run has handed over, one entry per target and budget; and its entries for the final table."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from orchestrator.config import Config
from orchestrator.handover.delivered import Delivered
from orchestrator.record.files import read_json, write_json
from orchestrator.record.goals import read_goals
from orchestrator.record.progress import FinalRow
from orchestrator.record.store import RunStore


def record_entries(store: RunStore, entries: Sequence[Delivered], config: Config) -> None:
    """Adds entries to generated.json; a later entry for the same target and budget replaces the earlier one."""
    merged = {(entry.target, entry.budget_ms): entry for entry in [*delivered_entries(store, config), *entries]}
    order = {goal.label: number for number, goal in enumerate(read_goals(store, config))}
    keys = sorted(merged, key=lambda key: (order.get(key[0], len(order)), key[1]))
    write_json(store.path / "generated.json", [asdict(merged[key]) for key in keys])


def delivered_entries(store: RunStore, config: Config) -> list[Delivered]:
    """What generated.json holds; entries of an earlier version are of the run's only target."""
    path = store.path / "generated.json"
    if not path.exists():
        return []
    return [Delivered(**{"target": config.labels[0]} | entry | {"tokens": tuple(entry["tokens"])})
            for entry in read_json(path)]


def final_rows(entries: Sequence[Delivered]) -> list[FinalRow]:
    several = len({entry.target for entry in entries}) > 1
    return [FinalRow(e.budget_ms, e.text or e.reason, e.predicted_ms, e.latency_ms, e.latency_stderr_ms, e.accuracy,
                     e.test_accuracy, e.madds, e.params, e.onnx, e.feasible, e.target if several else "")
            for e in entries]
