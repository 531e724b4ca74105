"""The search-quality command on the published table: its files, its counting, and that it needs no other column."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from searchspaces.nasbench201.space import NasBench201
from tests.benchmarks.nasbench201 import OP_COLUMNS, main
from tests.benchmarks.nasbench201_regret import regret


@pytest.fixture
def table(shared_data: Path, tmp_path: Path) -> Path:
    """Only the columns that the command is promised, rows shuffled."""
    columns = ["arch_index", *OP_COLUMNS, "acc12_val_cifar10", "latency_pixel3"]
    full = pyarrow.parquet.read_table(shared_data / "nasbench201.parquet", columns=columns)
    path = tmp_path / "table.parquet"
    pyarrow.parquet.write_table(full.take(np.random.default_rng(0).permutation(len(full))), path)
    return path


@pytest.mark.parametrize("controller", ["random", "pnag", "fnas", "evolution", "nsga2", "unas"])
def test_trace_and_generated(table: Path, tmp_path: Path, controller: str) -> None:
    budgets, trace, generated = tmp_path / "budgets.json", tmp_path / "trace.jsonl", tmp_path / "generated.json"
    budgets.write_text("[12.50, 20, 0.0001]")
    main(["--table", str(table), "--accuracy", "acc12_val_cifar10", "--latency", "latency_pixel3", "--seed", "1",
          "--evaluations", "25", "--budgets", str(budgets), "--trace", str(trace), "--generated", str(generated),
          "--controller", controller])
    looked_up = [json.loads(line)["arch_index"] for line in trace.read_text().splitlines()]
    assert len(looked_up) == 25 == len(set(looked_up))
    chosen = json.loads(generated.read_text())
    assert list(chosen) == ["12.50", "20", "0.0001"] and chosen["0.0001"] is None
    rows = pyarrow.parquet.read_table(table).to_pylist()
    latency = {row["arch_index"]: row["latency_pixel3"] for row in rows}
    assert latency[chosen["12.50"]] <= 12.5 and latency[chosen["20"]] <= 20
    assert {chosen["12.50"], chosen["20"]} <= set(looked_up)


def test_bad_input_is_one_sentence(table: Path, tmp_path: Path) -> None:
    budgets = tmp_path / "budgets.json"
    budgets.write_text("[1.0]")
    common = ["--evaluations", "5", "--seed", "1", "--budgets", str(budgets), "--trace", str(tmp_path / "t"),
              "--generated", str(tmp_path / "g"), "--table", str(table), "--latency", "latency_pixel3"]
    with pytest.raises(SystemExit, match="no column 'acc'|acc"):
        main([*common, "--accuracy", "acc"])
    with pytest.raises(SystemExit, match="there is no controller"):
        main([*common, "--accuracy", "acc12_val_cifar10", "--controller", "nothing"])
    budgets.write_text("{}[")
    with pytest.raises(SystemExit, match="cannot read budgets"):
        main([*common, "--accuracy", "acc12_val_cifar10"])


def test_regret_counts_missing_and_late_answers_as_chance() -> None:
    latency, test = np.array([1.0, 2.0, 3.0]), np.array([50.0, 70.0, 80.0])
    assert regret([0, 1, 2], [1.0, 2.0, 3.0], latency, test, 10.0) == 0
    assert regret([0, None, 2], [1.0, 2.0, 2.5], latency, test, 10.0) == pytest.approx((0 + 60 + 60) / 3)


def test_features_see_only_what_lies_on_a_path() -> None:
    """Cells that differ on dead edges have equal features; live differences show."""
    space = NasBench201()
    dead = np.array([[0, 0, 3, 3, 1, 2], [0, 0, 1, 3, 2, 4], [0, 0, 0, 3, 0, 0], [0, 0, 0, 2, 0, 0]], dtype=np.int8)
    features = space.features(dead)
    assert np.array_equal(features[0], features[2]) and np.array_equal(features[1], features[2])
    assert not np.array_equal(features[2], features[3])
