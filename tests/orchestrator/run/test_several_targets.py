"""Whole small runs for two targets: one network at a time on the CPU, and four at a time."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import yaml
from rich.console import Console

from orchestrator.config import parse_config
from orchestrator.record.goals import read_goals, target_state
from orchestrator.record.store import RunStore
from orchestrator.run.generate import generate_models
from orchestrator.run.search import Search
from searchspaces.errors import BudgetError
from tests.orchestrator.data.test_accuracy import cells_table, handed_over

TARGETS = ["onnx_cpu", {"name": "onnx_cpu", "batch": 4, "label": "batch4"}]


def run(tmp_path: Path, name: str = "two", **changes: Any) -> tuple[RunStore, str]:
    raw = yaml.safe_load(cells_table(tmp_path / "cells.parquet", unit=0.009))
    del raw["target"]
    config = parse_config(raw | {"targets": TARGETS} | changes, "test")
    with (tmp_path / "log").open("w") as log:
        Search(config, runs=tmp_path, name=name, console=Console(file=log, width=160)).run()
    return RunStore(tmp_path / name), (tmp_path / "log").read_text()


@pytest.mark.slow
def test_every_target_gets_its_own_models_from_one_search(ray_local: None, tmp_path: Path) -> None:
    store, output = run(tmp_path)
    ids = {label: target_state(store, label)["target_id"] for label in ("onnx_cpu", "batch4")}
    assert len(set(ids.values())) == 2
    measured = store.latency.read().to_pylist()
    by_target = {label: {row["arch_id"] for row in measured if row["target_id"] == i} for label, i in ids.items()}
    assert by_target["onnx_cpu"] & by_target["batch4"]      # the same networks, so that rankings can be compared
    trials = store.read_trials()
    assert len({trial.arch_id for trial in trials}) == len(trials) >= 12    # the search's, and what is never proposed
    assert {trial.proposed_for for trial in trials[:12]} == {"onnx_cpu", "batch4"}
    for trial in trials:
        assert [entry["target"] for entry in trial.latencies or ()] == ["onnx_cpu", "batch4"]
        assert (trial.latencies or ())[0]["latency_ms"] == trial.latency_ms
    entries = json.loads((store.path / "generated.json").read_text())
    assert [entry["target"] for entry in entries] == ["onnx_cpu"] * 2 + ["batch4"] * 2
    for entry in handed_over(entries):
        assert list(entry["latencies_ms"]) == [entry["target"]]
        assert entry["latencies_ms"][entry["target"]] == entry["latency_ms"] <= entry["budget_ms"]
        sidecar = json.loads((store.path / entry["onnx"]).with_suffix(".json").read_text())
        sample = sidecar["latencies"][entry["target"]]
        assert sample["target_id"] == ids[entry["target"]] == sidecar["targets"][entry["target"]]["target_id"]
        batch = {"onnx_cpu": 1, "batch4": 4}[entry["target"]]
        assert onnxruntime.InferenceSession(store.path / entry["onnx"]).get_inputs()[0].shape[0] == batch
    assert "measure batch4" in output and "deliver batch4" in output
    assert "measured before: onnx_cpu; that helps to predict latencies of batch4" in output
    with pytest.raises(BudgetError, match="models for onnx_cpu, batch4, and 'phone' is not one of them"):
        generate_models("two", [1.0], target="phone", runs=tmp_path)
    with pytest.raises(BudgetError, match="needs to say which one it is for; add --target onnx_cpu"):
        generate_models("two", [1.0], runs=tmp_path)
    budget_ms = 0.99 * target_state(store, "batch4")["slowest_ms"]
    entry = generate_models("two", [budget_ms], target="batch4", runs=tmp_path, console=Console(quiet=True))[0]
    assert entry.feasible and entry.target == "batch4" and not entry.clamped
    (tmp_path / "two" / "state.json").write_text(json.dumps(store.state() | {"stage": "deliver"}))
    again = Search.resume("two", runs=tmp_path, console=Console(quiet=True)).run()
    assert {(e.target, e.budget_ms) for e in again} >= {(e["target"], e["budget_ms"]) for e in entries}


@pytest.mark.soak
def test_budgets_that_hold_together_are_met_on_every_target(ray_local: None, tmp_path: Path) -> None:
    store, _ = run(tmp_path, budgets={"together": True, "count": 2})
    goal, = read_goals(store, parse_config({"targets": TARGETS}, "test"))
    assert goal.targets == ("onnx_cpu", "batch4") and len(goal.tuples_ms) == 2
    entries = json.loads((store.path / "generated.json").read_text())
    assert len(entries) == 2
    assert [entry["budget_ms"] for entry in entries] == list(goal.budgets_ms)
    for entry in handed_over(entries):
        budgets = goal.tuples_ms[goal.budgets_ms.index(entry["budget_ms"])]
        assert entry["budgets_ms"] == pytest.approx(dict(zip(goal.targets, budgets)))
        assert set(entry["latencies_ms"]) == set(goal.targets)
        sidecar = json.loads((store.path / entry["onnx"].replace("-batch1.onnx", ".json")).read_text())
        assert {batch: onnxruntime.InferenceSession(store.path / file).get_inputs()[0].shape[0]
                for batch, file in sidecar["files"].items()} == {"1": 1, "4": 4}
        for label, budget_ms in entry["budgets_ms"].items():
            assert entry["latencies_ms"][label] <= budget_ms


@pytest.mark.soak
def test_budgets_out_of_reach_are_refused_or_said(ray_local: None, tmp_path: Path) -> None:
    store, _ = run(tmp_path)
    fastest, slowest = (target_state(store, "batch4")[key] for key in ("fastest_ms", "slowest_ms"))
    with pytest.raises(BudgetError, match="below the fastest architecture .* reachable range"):
        run(tmp_path, "hopeless", budgets={"batch4": [0.5 * fastest, slowest]})
    done, output = run(tmp_path, "generous", budgets={"count": 1, "batch4": [2 * slowest]})
    assert "above the slowest measured architecture" in output
    entry = json.loads((done.path / "generated.json").read_text())[-1]
    assert (entry["target"], entry["clamped"], entry["feasible"]) == ("batch4", True, True)
