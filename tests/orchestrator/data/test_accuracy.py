"""Sources of accuracies: what is refused before a run exists, and whole small runs without a supernet."""
from __future__ import annotations

import itertools
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from rich.console import Console

from actors.data import Preprocessing
from actors.knowledge.pool import KnowledgePool
from orchestrator.config import dump_config, load_config, parse_config
from orchestrator.controllers.controller import Proposal
from orchestrator.data.accuracy import TableAccuracy
from orchestrator.data.datasets import DataSettings
from orchestrator.data.sources import read_table
from orchestrator.record.store import RunStore
from orchestrator.run.generate import generate_models
from orchestrator.run.search import Search
from orchestrator.services.context import data_and_space
from orchestrator.services.services import Services
from searchspaces.errors import ConfigError, DataError, ParetorayError, StoreError
from searchspaces.mnas.space import MnasS16
from searchspaces.nasbench201.space import NasBench201
from searchspaces.network import GraphNetwork
from tests.orchestrator.run.test_search import finish, parts, stage, start, when

COLUMNS = list("abcdef")
CELLS = """
seed: 3
data: {name: digits, limit: 300}
space: {name: nasbench201, width: 4, cells: 1, resolution: 8}
target: onnx_cpu
budgets: {count: 2}
latency: {initial: 10, maximum: 10, visits: 1}
controller: random
search: {evaluations: 12}
delivery: {alternatives: 2, retrain_epochs: 1}
"""
PROXY = CELLS + "accuracy: {source: training, epochs: 2, batch_size: 32, knowledge: own}\n"


def cells_table(path: Path, **changes: Any) -> str:
    """All cells with made-up accuracies in per cent; the configuration that searches in it."""
    rows = np.array(list(itertools.product(range(5), repeat=6)), dtype=np.int8)
    columns = {name: rows[:, i] for i, name in enumerate(COLUMNS)}
    pq.write_table(pa.table({**columns, "val": 20.0 + rows @ np.arange(1, 7)}), path)
    section = {"source": "table", "path": str(path), "token_columns": COLUMNS, "accuracy_column": "val"} | changes
    return CELLS + f"accuracy: {json.dumps(section)}\n"


def table_settings(file: Path, **changes: Any) -> TableAccuracy:
    cells_table(file)
    return TableAccuracy(path=file, token_columns=COLUMNS, accuracy_column="val").model_copy(update=changes)


@pytest.mark.parametrize(("accuracy", "message"), [
    ("tabel", "'accuracy' = 'tabel' is not a source; choose one of 'supernet', 'training', 'table'"),
    ("table", "'accuracy.path' is missing"),
    ({"source": "training", "epohs": 2}, "unknown key 'accuracy.epohs'; did you mean 'epochs'"),
    ({"source": "training", "epochs": 0}, "'accuracy.epochs' = 0 is not allowed"),
    ({"source": "supernet", "path": "x"}, "unknown key 'accuracy.path'"),
])
def test_mistakes_in_the_section_are_named(accuracy: object, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config({"accuracy": accuracy}, "mine.yaml")
    assert message in str(error.value)


def test_a_space_without_supernet_names_the_sources_that_work(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: {name: digits, limit: 300}\nspace: mnas-s16\n")
    with pytest.raises(ConfigError, match="has no supernet.*training.*or table"):
        Search(load_config(tmp_path / "c.yaml"), runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_pool_of_another_space_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    KnowledgePool(tmp_path / "pool", MnasS16(width=1.0), 1)
    text = f"""
data: {{name: digits, limit: 300}}
space: mnas-s16
accuracy: {{source: training, knowledge: {tmp_path / "pool"}}}
controller: fnas
"""
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(StoreError, match="holds blocks of mnas.width=1,.*name another folder"):
        Search(load_config(tmp_path / "c.yaml"), runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "c.yaml").write_text(text.replace(str(tmp_path / "pool"), str(tmp_path / "new")))
    Search(load_config(tmp_path / "c.yaml"), runs=tmp_path / "runs")
    assert not (tmp_path / "new").exists(), "a run that was only checked leaves nothing behind"


def test_the_sections_options_reach_the_pool(tmp_path: Path, ray_local: None) -> None:
    """Size, and when it is switched on: after one network of seven blocks that are all known."""
    config = parse_config({"space": "mnas-s16", "accuracy": {
        "source": "training", "knowledge": "own", "knowledge_mb": 1.5, "knowledge_window": 7}}, "test")
    splits, space = data_and_space(config.model_copy(update={"data": DataSettings(limit=300)}))
    store = RunStore.create(tmp_path, "run", dump_config(config), {})
    services = Services(config, space, splits, Preprocessing.fit(splits.train, 16), store, local=True)
    try:
        pool = services._trainer(config.accuracy).knowledge  # type: ignore[arg-type]
        inserted = 0
        for seed, row in enumerate(space.sample_uniform(np.random.default_rng(0), 8)):
            torch.manual_seed(seed)
            weights = {k: v.numpy() for k, v in GraphNetwork(space.graph(row)).state_dict().items()}
            inserted += sum(array.nbytes for array in weights.values())
            ray.get(pool.insert.remote(row, weights, 10, [10] * len(space.graph(row).blocks)), timeout=60)
        assert 0 < services.knowledge_statistics()["megabytes"] <= 1.5 < inserted / 1e6
        assert services.knowledge_statistics()["active"] == 0
        assert ray.get(pool.start.remote(row), timeout=60).hits == 7
        assert services.knowledge_statistics()["active"] == 1
        services.begin_batches([Proposal(row, batch=3)])
        start = ray.get(pool.start.remote(row), timeout=60)
        assert (start.active, start.batch) == (True, 3)
    finally:
        services.close()


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"accuracy_column": "test"}, DataError, "has no column 'test'; it has a, b, c, d, e, f, val"),
    ({"path": Path("nowhere.parquet")}, DataError, "nowhere.parquet cannot be used"),
    ({"token_columns": COLUMNS[:5]}, ConfigError, "names 5 columns; .* has 6 tokens"),
    ({"token_columns": ["val", *COLUMNS[:5]]}, DataError, "at position 0"),
    ({"unit": 1.0}, DataError, "goes from 20 to 104 in units of 1; .* correct accuracy.unit"),
])
def test_unusable_tables_are_refused(tmp_path: Path, changes: dict[str, Any], error: type[ParetorayError],
                                     message: str) -> None:
    settings = table_settings(tmp_path / "t.parquet", **{"unit": 0.009} | changes)
    with pytest.raises(error, match=message):
        read_table(settings, NasBench201())


def test_a_table_answers_with_its_own_numbers(tmp_path: Path) -> None:
    evaluator = read_table(table_settings(tmp_path / "t.parquet", unit=0.009), NasBench201())()
    found, = evaluator.evaluate(np.array([[4, 0, 1, 0, 0, 2]], dtype=np.int8))
    assert (found.accuracy, found.source) == (pytest.approx(0.009 * (20 + 4 + 3 + 12)), "table")


def handed_over(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries with a model. The smallest budget is a tenth above the fastest network, which takes microseconds here: on
    a busy machine nobody may meet it, and that is said. The largest budget of a target always has one."""
    for target in {entry["target"] for entry in entries}:
        *smaller, largest = [entry for entry in entries if entry["target"] == target]
        assert largest["feasible"], largest["reason"]
        assert all(entry["feasible"] or "candidates reach" in entry["reason"] for entry in smaller)
    return [entry for entry in entries if entry["feasible"]]


def check_models(run: Path, epochs: int) -> None:
    """Every model retrained from scratch, within its budget; no supernet anywhere."""
    for entry in handed_over(json.loads((run / "generated.json").read_text())):
        assert entry["latency_ms"] <= entry["budget_ms"]
        sidecar = json.loads((run / entry["onnx"]).with_suffix(".json").read_text())
        assert sidecar["retrain_epochs"] == epochs
        assert sidecar["accuracy"]["validation"] == entry["accuracy"]
    assert not list((run / "checkpoints").glob("supernet*"))


@pytest.mark.soak
def test_a_search_in_a_table_retrains_what_it_hands_over(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(cells_table(tmp_path / "t.parquet", unit=0.009))
    process = start("search", str(tmp_path / "c.yaml"), "--name", "cells", "--runs", str(tmp_path))
    output = finish(process)
    assert process.returncode == 0, output
    assert "accuracies come from table: no supernet is trained" in output
    run = tmp_path / "cells"
    trials = RunStore(run).read_trials()
    weights = np.arange(1, 7)
    assert [t.accuracy for t in trials] == [pytest.approx(0.009 * (20 + np.array(t.tokens) @ weights)) for t in trials]
    assert {t.accuracy_source for t in trials} == {"table"}
    check_models(run, epochs=1)
    # A finalist is trained once, however many budgets it is a finalist for; the best of them by validation is chosen.
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    retrained = [e["arch_id"] for e in events if e["kind"] == "retrained"]
    assert len(retrained) == len(set(retrained)) >= 2
    # A new budget between the two needs no training: a retrained architecture is there.
    before = {path.name for path in (run / "checkpoints").glob("retrained-*.json")}
    budgets = [entry["budget_ms"] for entry in json.loads((run / "generated.json").read_text())]
    entry, = generate_models("cells", [1.01 * budgets[-1]], runs=tmp_path, console=Console(quiet=True))
    assert entry.feasible and {path.name for path in (run / "checkpoints").glob("retrained-*.json")} == before
    # Without any, the most promising one is trained here.
    for path in (run / "checkpoints").glob("retrained-*"):
        path.unlink()
    for path in (run / "models").iterdir():
        path.unlink()
    entry, = generate_models("cells", [budgets[-1]], runs=tmp_path, console=Console(quiet=True))
    assert entry.feasible and len(list((run / "checkpoints").glob("retrained-*.json"))) == 1


@pytest.mark.soak
def test_proxy_training_killed_and_resumed_has_every_trial_once(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(PROXY)
    run, options = tmp_path / "proxy", ("--runs", str(tmp_path))
    process = start("search", str(tmp_path / "c.yaml"), "--name", "proxy", *options)
    when(process, lambda: stage(run) == "search" and parts(run / "trials") >= 3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    recorded = RunStore(run).read_trials()
    process = start("resume", "proxy", *options)
    when(process, lambda: any((run / "checkpoints").glob("retrained-*.json")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    finals = {path.name: path.stat().st_mtime_ns for path in (run / "checkpoints").glob("retrained-*.json")}
    process = start("resume", "proxy", *options)
    output = finish(process)
    assert process.returncode == 0, output
    trials = RunStore(run).read_trials()
    assert trials[:len(recorded)] == recorded
    assert [t.sequence for t in trials] == list(range(len(trials)))
    assert len({t.arch_id for t in trials}) == len(trials) >= 12
    assert {t.accuracy_source for t in trials} == {"proxy"}
    details = [json.loads(t.details or "{}") for t in trials]
    assert {d["epochs"] for d in details} == {2} and all("lineage_max" in d for d in details)
    assert any((run / "knowledge").rglob("*.safetensors"))
    assert {n: (run / "checkpoints" / n).stat().st_mtime_ns for n in finals} == finals, "nothing is retrained twice"
    check_models(run, epochs=1)
