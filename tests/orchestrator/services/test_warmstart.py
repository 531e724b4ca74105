"""Warm starts: what an earlier run knows arrives unchanged, and only where it means the same."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from rich.console import Console

from actors.data import Images, Splits
from actors.knowledge.pool import KnowledgePool
from orchestrator.config import Config, parse_config
from orchestrator.controllers.controller import EarlierRun
from orchestrator.record.files import write_json, write_text
from orchestrator.record.goals import Goal, target_state, update_target_state
from orchestrator.record.store import RunStore, Trial
from orchestrator.run.search import Search
from orchestrator.run.stages.measure import with_known
from orchestrator.services.warmstart import (
    check_earlier,
    earlier_devices,
    earlier_latencies,
    earlier_runs,
    freeze_earlier,
    is_frozen,
    with_latencies,
)
from searchspaces.errors import ConfigError, StoreError
from searchspaces.mnas.space import MnasS16
from searchspaces.nasbench201.space import NasBench201
from searchspaces.network import GraphNetwork
from searchspaces.space import Tokens
from tests.orchestrator.data.test_accuracy import cells_table

SPACE = NasBench201(classes=2, channels=1, width=4, cells=1, resolution=8)
NONE = Images(np.zeros((0, 8, 8, 1), np.uint8), np.zeros(0, np.int64))
SPLITS = Splits(NONE, NONE, NONE, ("a", "b"), "letters")
ROWS = SPACE.sample_uniform(np.random.default_rng(0), 4)
GOAL = Goal("onnx_cpu", ("onnx_cpu",), (1.0,))
CELLS = {"name": "nasbench201", "width": 4, "cells": 1, "resolution": 8}


def config(**changes: object) -> Config:
    return parse_config({"space": CELLS, "accuracy": "training"} | changes, "test")


def earlier_run(root: Path, name: str = "first", dataset: str = "letters", target_id: str = "cpu-1",
                **changes: object) -> RunStore:
    """Four trials (the third failed) and three measured networks (one in vain), as a run records them."""
    store = RunStore.create(root, name, json.dumps({"space": CELLS, "accuracy": "training"} | changes), {})
    store.update_state(dataset=dataset, classes=["a", "b"], channels=1)
    store.append_trials([Trial(
        i, SPACE.arch_id(row), tuple(int(t) for t in row), SPACE.space_id, "random", None if i == 2 else 0.5 + 0.1 * i,
        "proxy", 0, 1.0 + i, "predicted", target_id, 1, 1, None, None, 0, 0.0, 1.0, "host")
        for i, row in enumerate(ROWS)])
    store.latency.append([{
        "arch_id": SPACE.arch_id(row), "tokens": row.tolist(), "target_id": target_id, "latency_ms": 2.0 * (1 + i),
        "reference_ms": 2.0, "ratio": 1.0 + i, "stderr_ms": 0.02, "rounds": 6, "drift": 0.0, "load": 0.0,
        "candidate_rounds_ms": [[1.0]], "reference_rounds_ms": [[1.0]], "started_at": 0.0, "duration_s": 0.1,
        "details": "{}", "source": "measured", "error": ""} for i, row in enumerate(ROWS[:2])] + [
        {"arch_id": SPACE.arch_id(ROWS[2]), "tokens": ROWS[2].tolist(), "source": "measured", "error": "lost"}])
    return store


def warm(root: Path, wanted: Config, target_id: str = "cpu-1") -> RunStore:
    store = RunStore.create(root, "second", "{}", {})
    update_target_state(store, GOAL.label, target_id=target_id)
    freeze_earlier(store, check_earlier(wanted, root, SPACE, SPLITS), wanted, SPACE)
    return store


def test_trials_arrive_in_order_without_the_failed_ones(tmp_path: Path) -> None:
    earlier_run(tmp_path)
    wanted = config(warm_start=["first"])
    run, = earlier_runs(warm(tmp_path, wanted), wanted, SPACE, GOAL)
    assert (run.name, run.same_task) == ("first", True)
    assert np.array_equal(run.tokens_NT, ROWS[[0, 1, 3]])
    assert run.accuracy_N == pytest.approx([0.5, 0.6, 0.8])
    assert run.latency_ms_N == pytest.approx([1.0, 2.0, 4.0])


@pytest.mark.parametrize("changes", [{"dataset": "numbers"}, {"accuracy": {"source": "training", "epochs": 3}}])
def test_another_dataset_or_recipe_is_another_task(tmp_path: Path, changes: dict[str, object]) -> None:
    earlier_run(tmp_path, **changes)  # type: ignore[arg-type]
    wanted = config(warm_start=["first"])
    run, = earlier_runs(warm(tmp_path, wanted), wanted, SPACE, GOAL)
    assert not run.same_task
    assert run.accuracy_N == pytest.approx([0.5, 0.6, 0.8])


def test_latencies_of_the_same_device_are_in_this_runs_unit(tmp_path: Path) -> None:
    earlier_run(tmp_path)
    wanted = config(warm_start=["first"])
    found = earlier_latencies(warm(tmp_path, wanted), wanted, SPACE, "cpu-1", reference_ms=3.0)
    samples = [result.sample for result in found["first"]]
    assert [s.latency_ms for s in samples if s] == pytest.approx([3.0, 6.0])  # ratios 1 and 2 of a 3 ms reference
    assert [s.stderr_ms for s in samples if s] == pytest.approx([0.03, 0.03])


def test_latencies_of_another_device_are_not_used(tmp_path: Path) -> None:
    earlier_run(tmp_path, target_id="gpu-1")
    wanted = config(warm_start=["first"])
    store = warm(tmp_path, wanted)
    assert earlier_latencies(store, wanted, SPACE, "cpu-1", 3.0) == {"first": []}
    run, = earlier_runs(store, wanted, SPACE, GOAL)
    assert np.isnan(run.latency_ms_N).all() and np.isfinite(run.accuracy_N).all()


def test_another_device_of_an_earlier_run_is_a_model_that_helps(tmp_path: Path) -> None:
    first = earlier_run(tmp_path, target_id="gpu-1")
    rows = SPACE.sample_uniform(np.random.default_rng(5), 30)
    slow_N = 1.0 + SPACE.cost(rows)[0] / 1e4
    first.latency.append([{
        "arch_id": SPACE.arch_id(row), "tokens": row.tolist(), "target_id": "phone-1", "latency_ms": float(ms),
        "reference_ms": 1.0, "ratio": float(ms), "stderr_ms": 0.001, "error": ""} for row, ms in zip(rows, slow_N)])
    wanted = config(warm_start=["first"])
    store = warm(tmp_path, wanted)
    found = earlier_devices(store, wanted, SPACE, ["cpu-1"])
    assert list(found) == ["phone-1 of run first"], "two networks of gpu-1 are too few to learn from"
    assert np.corrcoef(found["phone-1 of run first"].predict(rows), slow_N)[0, 1] > 0.95
    assert earlier_devices(store, wanted, SPACE, ["cpu-1", "phone-1"]) == {}
    other = config(warm_start=["first"], space=CELLS | {"width": 8})
    wider = NasBench201(classes=2, channels=1, width=8, cells=1, resolution=8)
    assert earlier_devices(store, other, wider, ["cpu-1"]) == {}, "latencies of other networks"


def test_latencies_that_are_missing_are_predicted_for_this_device() -> None:
    class Doubled:
        def predict(self, tokens_NT: Tokens) -> NDArray[np.float64]:
            return 2.0 * tokens_NT.sum(axis=1)

    run = EarlierRun("first", True, ROWS, np.full(4, 0.5), np.array([1.0, np.nan, 3.0, np.nan]))
    sums = 2.0 * ROWS.sum(axis=1)
    assert with_latencies(run, Doubled()).latency_ms_N == pytest.approx([1.0, sums[1], 3.0, sums[3]])


def test_networks_of_another_width_share_accuracies_but_no_latencies(tmp_path: Path) -> None:
    earlier_run(tmp_path, space=CELLS | {"width": 8})
    wanted = config(warm_start=["first"])
    store = warm(tmp_path, wanted)
    assert earlier_latencies(store, wanted, SPACE, "cpu-1", 3.0) == {"first": []}
    assert np.isnan(earlier_runs(store, wanted, SPACE, GOAL)[0].latency_ms_N).all()


def test_another_kind_of_space_is_refused_naming_both(tmp_path: Path) -> None:
    earlier_run(tmp_path, space="mobilenetv3-s16")
    with pytest.raises(ConfigError, match=r"its space mobilenetv3\(.* other tokens than nasbench201\("):
        check_earlier(config(warm_start=["first"]), tmp_path, SPACE, SPLITS)


def test_unknown_and_ambiguous_runs_are_refused(tmp_path: Path) -> None:
    first = earlier_run(tmp_path)
    with pytest.raises(StoreError, match="no run 'firts'.*known runs: first"):
        check_earlier(config(warm_start=["firts"]), tmp_path, SPACE, SPLITS)
    with pytest.raises(ConfigError, match="two runs called 'first'"):
        check_earlier(config(warm_start=["first", str(first.path)]), tmp_path, SPACE, SPLITS)


def test_what_was_read_stays_when_the_earlier_run_changes(tmp_path: Path) -> None:
    first = earlier_run(tmp_path)
    wanted = config(warm_start=[str(first.path)])
    assert not is_frozen(RunStore.create(tmp_path, "other", "{}", {}), wanted)
    store = warm(tmp_path, wanted)
    before, = earlier_runs(store, wanted, SPACE, GOAL)
    first.append_trials([replace(first.read_trials()[0], sequence=4)])
    for part in (first.path / "latency").iterdir():
        part.unlink()
    write_text(first.path / "config.yaml", "space: mobilenetv3-s16")
    after, = earlier_runs(store, wanted, SPACE, GOAL)
    assert is_frozen(store, wanted)
    assert np.array_equal(before.tokens_NT, after.tokens_NT) and np.array_equal(before.accuracy_N, after.accuracy_N)
    assert len(earlier_latencies(store, wanted, SPACE, "cpu-1", 2.0)["first"]) == 2


def test_trained_blocks_of_an_earlier_run_start_the_next_pool(tmp_path: Path) -> None:
    space = MnasS16(classes=2, channels=1)
    tokens_T = space.sample_uniform(np.random.default_rng(0), 1)[0]
    weights = {k: v.numpy() for k, v in GraphNetwork(space.graph(tokens_T)).state_dict().items()}
    wanted = parse_config({"space": "mnas-s16", "warm_start": ["first"], "accuracy": {
        "source": "training", "epochs": 2, "knowledge": "own"}}, "test")
    for name, epochs in (("first", 2), ("longer", 3)):
        store = RunStore.create(tmp_path, name, "space: mnas-s16\naccuracy: training\n", {})
        KnowledgePool(store.path / "knowledge", space, epochs).insert(
            tokens_T, weights, 10, [10] * len(space.graph(tokens_T).blocks))
    store = RunStore.create(tmp_path, "second", "{}", {})
    notes = freeze_earlier(store, check_earlier(wanted, tmp_path, space, SPLITS), wanted, space)
    assert notes == ["run first gives 10 trained blocks to start from"]
    start = KnowledgePool(store.path / "knowledge", space, 2).start(tokens_T, active=True)
    assert (start.hits, start.queries) == (7, 7)
    # Blocks trained for another number of epochs would be an unfair start.
    wanted = wanted.model_copy(update={"warm_start": ["longer"]})
    store = RunStore.create(tmp_path, "third", "{}", {})
    notes = freeze_earlier(store, check_earlier(wanted, tmp_path, space, SPLITS), wanted, space)
    assert notes == ["no trained blocks come from run longer: its blocks were trained for 3 epochs, accuracy.epochs is "
                     "2 here"]
    assert KnowledgePool(store.path / "knowledge", space, 2).start(tokens_T, active=True).hits == 0
    # So would those of wider networks; and a run without a pool has none.
    wider = MnasS16(classes=2, channels=1, width=1.0)
    for name, width in (("wide", 1.0), ("none", None)):
        store = RunStore.create(tmp_path, name, "space: {name: mnas-s16, width: 1.0}\naccuracy: training\n", {})
        if width:
            KnowledgePool(store.path / "knowledge", wider, 2)
    wanted = wanted.model_copy(update={"warm_start": ["wide", "none"]})
    store = RunStore.create(tmp_path, "fourth", "{}", {})
    wide, none = freeze_earlier(store, check_earlier(wanted, tmp_path, space, SPLITS), wanted, space)
    assert "run wide:" in wide and "holds blocks of mnas(width=1," in wide and "not of mnas(width=0.25" in wide
    assert ";" not in wide
    assert none == "no trained blocks come from run none: it kept none (accuracy.knowledge)"


def test_known_networks_come_first_in_the_plan() -> None:
    plan_NT = SPACE.sample_uniform(np.random.default_rng(1), 6)
    plan, first = with_known(plan_NT, [plan_NT[0], plan_NT[4], ROWS[0]])
    assert first == 4  # two extremes, one of them known, and two more that are known
    assert np.array_equal(plan, np.stack([plan_NT[0], plan_NT[1], plan_NT[4], ROWS[0], plan_NT[2], plan_NT[3]]))
    plan, first = with_known(plan_NT[:2], list(ROWS))
    assert (len(plan), first) == (6, 6)


@pytest.mark.soak
def test_a_second_search_measures_nothing_again(tmp_path: Path, ray_local: None) -> None:
    (tmp_path / "c.yaml").write_text(cells_table(tmp_path / "t.parquet", unit=0.009))
    text = (tmp_path / "c.yaml").read_text().replace("limit: 300", "limit: 200")
    raw = yaml.safe_load(text)
    with (tmp_path / "log").open("w") as log:
        console = Console(file=log, width=200)
        for name, seed, before in (("first", 3, []), ("second", 4, ["first"])):
            wanted = parse_config(raw | {"seed": seed, "warm_start": before}, "test")
            Search(wanted, runs=tmp_path, name=name, console=console).run()
    first, second = (RunStore(tmp_path / name) for name in ("first", "second"))
    known = {row["arch_id"]: row["latency_ms"] for row in first.latency.read().to_pylist()}
    rows = {row["arch_id"]: row for row in second.latency.read().to_pylist()}
    assert known.keys() <= rows.keys()
    assert {rows[a]["source"] for a in known} == {"cached"}
    # One device, two quiet values of its reference: the ratios are kept.
    units = {target_state(second, "onnx_cpu")["reference_ms"] / target_state(first, "onnx_cpu")["reference_ms"]}
    assert [rows[a]["latency_ms"] / ms for a, ms in known.items()] == pytest.approx([*units] * len(known))
    events = [json.loads(line) for line in (second.path / "events.jsonl").read_text().splitlines()]
    assert next(e for e in events if e["kind"] == "predictor")["n"] == len(known)
    output = (tmp_path / "log").read_text()
    assert "networks of this space on this device: they are used" in output
    assert "controller random does not learn from earlier runs; their latency table is used" in output
    write_json(tmp_path / "first" / "config.yaml", {"space": "mobilenetv3-s16"})
    assert Search.resume("second", runs=tmp_path, console=Console(quiet=True)).run()  # the earlier run is not looked at
