"""Whole runs where latencies are only looked up: they end with architectures, and nothing is trained or exported."""
from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from orchestrator.config import Config, parse_config
from orchestrator.handover.architectures import announcements
from orchestrator.record import store as store_module
from orchestrator.record.store import RunStore
from orchestrator.run.generate import generate_models, run_rows
from orchestrator.run.search import Search
from searchspaces.errors import BudgetError, DataError
from searchspaces.nasbench201.space import NasBench201
from tests.orchestrator.data.test_accuracy import CELLS, COLUMNS

ROWS = np.array(list(itertools.product(range(5), repeat=6)), dtype=np.int8)
VALIDATION = 20.0 + ROWS @ np.arange(1, 7)                      # per cent
TEST = VALIDATION - 3.0
LATENCY_MS = 1.0 + 0.1 * (ROWS != 0).sum(axis=1) + 0.001 * ROWS.sum(axis=1)
NOTE = "target table only looks latencies up: the run ends with architectures, without models"
RUN_NOTE = "target table only looks latencies up: it gets architectures, without models"


def table_config(path: Path, **changes: Any) -> Config:
    pq.write_table(pa.table({**{name: ROWS[:, i] for i, name in enumerate(COLUMNS)}, "val": VALIDATION, "test": TEST,
                             "ms": LATENCY_MS}), path)
    where = {"path": str(path), "token_columns": COLUMNS}
    return parse_config(yaml.safe_load(CELLS) | {
        "target": {"name": "table", "column": "ms", **where},
        "accuracy": {"source": "table", "accuracy_column": "val", "test_column": "test", "unit": 0.009, **where},
    } | changes, "test")


def search(config: Config, runs: Path, name: str) -> tuple[Path, str]:
    with (runs / f"{name}.log").open("w") as log:
        Search(config, runs=runs, name=name, console=Console(file=log, width=160)).run()
    return runs / name, (runs / f"{name}.log").read_text()


def entries_of(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run / "generated.json").read_text())
    return found


def check_looked_up(entry: dict[str, Any], tokens_NT: Any, latency_N: Any, validation_N: Any, test_N: Any) -> None:
    """The table's own numbers, within the budget, and no model."""
    at = int(np.flatnonzero((tokens_NT == np.array(entry["tokens"])).all(axis=1))[0])
    assert entry["feasible"] and entry["onnx"] == "" and entry["latency_stderr_ms"] is None
    assert entry["latency_ms"] == pytest.approx(latency_N[at]) and entry["latency_ms"] <= entry["budget_ms"]
    assert entry["latencies_ms"] == {"table": entry["latency_ms"]}
    assert (entry["accuracy"], entry["test_accuracy"]) == pytest.approx((validation_N[at], test_N[at]))
    assert entry["madds"] > 0 and entry["params"] > 0


def check_best_known(run: Path, entry: dict[str, Any]) -> None:
    """No trial is more accurate whose latency in the table meets the budget, whatever was predicted."""
    store = RunStore(run)
    measured = {row["arch_id"]: row["latency_ms"] for row in store.latency.read().to_pylist()}
    trials = store.read_trials()
    assert {trial.arch_id for trial in trials} <= measured.keys()
    assert entry["accuracy"] == max(t.accuracy or 0.0 for t in trials if measured[t.arch_id] <= entry["budget_ms"])


def check_nothing_was_made(run: Path) -> None:
    assert not (run / "models").exists() and not list(run.rglob("*.onnx"))
    assert not list((run / "checkpoints").glob("retrain*"))


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the JSON files that stores read and write from now on, in order."""
    log: list[str] = []
    read, write = store_module.read_json, store_module.write_json
    monkeypatch.setattr(store_module, "read_json", lambda path: (log.append(f"read {path.name}"), read(path))[1])
    monkeypatch.setattr(store_module, "write_json",
                        lambda path, value: (log.append(f"write {path.name}"), write(path, value))[1])
    return log


def test_tables_of_latency_and_accuracy_give_architectures(ray_local: None, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    log = count_reads(monkeypatch)
    run, output = search(table_config(tmp_path / "t.parquet"), tmp_path, "cells")
    assert output.index(NOTE) < output.index("measure: started")
    assert "looked up" in output and "no file: the target only looks latencies up" in output
    entries = entries_of(run)
    assert len(entries) == 2 and entries[0]["accuracy"] <= entries[1]["accuracy"]
    for entry in entries:
        check_looked_up(entry, ROWS, LATENCY_MS, 0.009 * VALIDATION, 0.009 * TEST)
        check_best_known(run, entry)
    reads, writes = log.count("read state.json"), log.count("write state.json")
    assert reads <= writes + 1, f"state.json was read {reads} times for {writes} changes"

    for entry in entries:
        assert 0 < entry["probability_best"] <= 1 and entry["considered"] > 1 and entry["considered_trained"] == 0
        assert entry["runner_up"] not in ("", entry["arch_id"]) and entry["expected_gain"] > -0.05

    between = [1.01 * entries[0]["budget_ms"], 2 * max(LATENCY_MS)]
    made = generate_models("cells", between, runs=tmp_path, console=Console(quiet=True))
    assert [entry.clamped for entry in made] == [False, True]
    assert all(entry.probability_best for entry in made)
    assert entries[0]["accuracy"] <= made[0].accuracy and entries[1]["accuracy"] <= made[1].accuracy  # type: ignore
    for entry in entries_of(run):
        check_looked_up(entry, ROWS, LATENCY_MS, 0.009 * VALIDATION, 0.009 * TEST)
    check_nothing_was_made(run)
    row, = run_rows(tmp_path)
    assert (row["stage"], row["models"]) == ("done", "4 architectures")
    assert row["best test accuracy"] == f"{max(e['test_accuracy'] for e in entries_of(run)):.4f}"
    page = (run / "report.html").read_text()
    assert "none of the other architectures considered" in page and f"(of {made[1].considered})" in page
    assert "Chosen architectures" in page and "Handed-over models" not in page.partition("<script")[0]
    with pytest.raises(BudgetError, match="reachable range"):
        generate_models("cells", [0.5], runs=tmp_path, console=Console(quiet=True))


def test_a_missing_column_to_report_is_refused_before_a_run_exists(tmp_path: Path) -> None:
    config = table_config(tmp_path / "t.parquet")
    accuracy = config.accuracy.model_copy(update={"test_column": "tset"})
    with pytest.raises(DataError, match="has no column 'tset'"):
        Search(config.model_copy(update={"accuracy": accuracy}), runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_what_a_run_ends_with_is_said_for_every_target(tmp_path: Path) -> None:
    config = table_config(tmp_path / "t.parquet")
    table = config.targets[0]
    cpu = parse_config({"target": "onnx_cpu"}, "test")
    both = cpu.model_copy(update={"targets": [*cpu.targets, table]})
    together = both.model_copy(update={"budgets": both.budgets.model_copy(update={"together": True})})
    assert [announcements(c) for c in (config, cpu, both, together)] == [[NOTE], [], [RUN_NOTE], [NOTE]]


@pytest.mark.slow
def test_beside_a_device_only_the_devices_budgets_get_models(ray_local: None, tmp_path: Path) -> None:
    table = table_config(tmp_path / "t.parquet").targets[0].model_dump()
    raw = table_config(tmp_path / "t.parquet").model_dump(mode="json")
    raw["accuracy"]["test_column"] = None
    weighing = {"name": "tests.orchestrator.plugins:Weighing", "unit": 0.001, "label": "scale"}
    run, output = search(parse_config(raw | {"targets": [weighing, table]}, "test"), tmp_path, "two")
    assert RUN_NOTE in output and NOTE not in output
    entries = entries_of(run)
    assert [(e["target"], bool(e["onnx"])) for e in entries] == [("scale", True)] * 2 + [("table", False)] * 2
    for entry in entries[2:]:
        assert entry["test_accuracy"] is None
        check_looked_up(entry | {"test_accuracy": entry["accuracy"]}, ROWS, LATENCY_MS, *2 * [0.009 * VALIDATION])
    assert run_rows(tmp_path)[0]["models"] == "2 + 2 architectures"
    models = {path.name for path in (run / "models").iterdir()}
    made, = generate_models("two", [1.01 * entries[2]["budget_ms"]], target="table", runs=tmp_path,
                            console=Console(quiet=True))
    assert made.feasible and not made.onnx and {path.name for path in (run / "models").iterdir()} == models


def test_the_published_table(ray_local: None, shared_data: Path, tmp_path: Path) -> None:
    """NAS-Bench-201 on CIFAR-10 and a phone: its own numbers, near the best that the table knows."""
    path = shared_data / "nasbench201.parquet"
    columns = ["op_01", "op_02", "op_12", "op_03", "op_13", "op_23"]
    where = {"path": str(path), "token_columns": columns}
    config = parse_config(yaml.safe_load(CELLS) | {
        "target": {"name": "table", "column": "latency_pixel3", **where}, "budgets": {"count": 3},
        "latency": {"initial": 50, "maximum": 50}, "search": {"evaluations": 100},
        "controller": "unas",
        "accuracy": {"source": "table", "accuracy_column": "acc12_val_cifar10", "test_column": "acc200_test_cifar10",
                     **where}}, "test")
    run, _ = search(config, tmp_path, "phone")
    table = pq.read_table(path)
    tokens_NT = np.stack([table[name].to_numpy() for name in columns], axis=1)
    latency_N, validation_N, test_N = (table[name].to_numpy().astype(np.float64) for name in (
        "latency_pixel3", "acc12_val_cifar10", "acc200_test_cifar10"))
    entries = entries_of(run)
    assert len(entries) == 3
    for entry in entries:
        check_looked_up(entry, tokens_NT, latency_N, validation_N / 100, test_N / 100)
        check_best_known(run, entry)
        assert entry["accuracy"] > validation_N[latency_N <= entry["budget_ms"]].max() / 100 - 0.1
        assert not NasBench201().blind(np.array([entry["tokens"]])).any()   # no budget is for these alone
    check_nothing_was_made(run)
