"""`paretoray merge`: nothing measured is lost, nothing counts twice, and two devices are never mixed."""
from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import asdict, replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.latency.result import LatencyResult
from actors.targets.target import LatencySample, TargetIdentity
from orchestrator.config import load_config
from orchestrator.latencytables.collect import KEY, SCHEMA, LatencyTable, measure_table, table_row, with_target
from orchestrator.latencytables.merge import merge_tables
from orchestrator.record.records import latency_result
from searchspaces.catalogue import make_space
from searchspaces.errors import ConfigError, StoreError
from tests.orchestrator.run.test_search import PATIENCE_S, ROOT, TINY, command

SPACE = make_space("nasbench201", classes=10, channels=3, options={})
CELLS = SPACE.sample_uniform(np.random.default_rng(0), 12)
TARGET = TargetIdentity("scripted", "phone", "1", "none", 1, 1, (3, 32, 32))


def visit(tokens_T: np.ndarray, reference_ms: float, started_at: float, ratio: float | None = None) -> LatencyResult:
    ratio = 1.0 + tokens_T.sum() if ratio is None else ratio
    sample = LatencySample(TARGET.target_id, ratio * reference_ms, reference_ms, ratio, 0.01, 1, 0.1, 0.2,
                           ((ratio * reference_ms,),), ((reference_ms,),), started_at, 0.5, {"core": 3})
    return LatencyResult(SPACE.arch_id(tokens_T), tokens_T, "measured", sample)


def failure(tokens_T: np.ndarray) -> LatencyResult:
    return LatencyResult(SPACE.arch_id(tokens_T), tokens_T, "measured", None, "does not run here")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, results: list[LatencyResult], reference_ms: float = 2.0, **head: Any) -> Path:
        """A table as `paretoray measure` writes it."""
        content = {"space_id": SPACE.space_id, "target": json.loads(json.dumps(asdict(TARGET))),
                   "reference_ms": reference_ms, "version": 1} | head
        LatencyTable(tmp_path / name, content, [table_row(SPACE, result) for result in results]).write()
        return tmp_path / name

    return write


def test_two_halves_are_the_whole(write: Callable[..., Path], tmp_path: Path) -> None:
    results = [visit(cell, 2.0, 100.0 + i) for i, cell in enumerate(CELLS)]
    whole, out = write("whole.parquet", results), tmp_path / "deep" / "merged.parquet"
    halves = [write("a.parquet", results[:7]), write("b.parquet", results[7:])]
    before = [half.read_bytes() for half in halves]
    done = merge_tables(halves, out)
    assert (done.networks, done.averaged, done.failed) == (12, 0, 0)
    assert pq.read_table(out).equals(pq.read_table(whole), check_metadata=True)
    assert [half.read_bytes() for half in halves] == before
    merge_tables([out, *halves, out], out)      # the same visits again, into one of the tables
    assert pq.read_table(out).equals(pq.read_table(whole), check_metadata=True)


def test_visits_of_one_network_are_averaged_in_the_unit_of_the_first(write: Callable[..., Path],
                                                                      tmp_path: Path) -> None:
    """Ratios 5 and 7 to references of 2 and 3 ms: 6 * 2 ms."""
    a = write("a.parquet", [visit(CELLS[0], 2.0, 1.0, 5.0)], 2.0)
    b = write("b.parquet", [visit(CELLS[1], 3.0, 2.0, 4.0), visit(CELLS[0], 3.0, 3.0, 7.0)], 3.0)
    done = merge_tables([a, b], tmp_path / "out.parquet")
    assert (done.networks, done.averaged) == (2, 1)
    table = LatencyTable.read(tmp_path / "out.parquet")
    assert table is not None and table.head["reference_ms"] == 2.0
    both, only = table.rows
    assert both["ratio"] == 6.0 and both["latency_ms"] == 12.0 and both["reference_ms"] == 2.0
    assert both["stderr_ms"] == pytest.approx(2.0 * np.std([5, 7], ddof=1) / sqrt(2))
    assert both["candidate_rounds_ms"] == [[10.0], [21.0]] and both["rounds"] == 2 and both["duration_s"] == 1.0
    assert json.loads(both["details"]) == {"core": 3, "visits": 2}
    assert only["latency_ms"] == 8.0 and only["ratio"] == 4.0 and only["stderr_ms"] == pytest.approx(0.02)
    assert both["architecture"] == SPACE.text(CELLS[0]) and both["madds"] == SPACE.graph(CELLS[0]).madds
    assert latency_result(only).sample.latency_ms == 8.0     # type: ignore[union-attr]


def test_a_merged_table_does_not_count_its_first_part_twice(write: Callable[..., Path], tmp_path: Path) -> None:
    a, b = (write(f"{name}.parquet", [visit(CELLS[0], 2.0, started, ratio)])
            for name, started, ratio in (("a", 1.0, 5.0), ("b", 2.0, 7.0)))
    merge_tables([a, b], tmp_path / "out.parquet")
    merge_tables([a, tmp_path / "out.parquet"], tmp_path / "again.parquet")
    assert pq.read_table(tmp_path / "again.parquet").to_pylist()[0]["ratio"] == 6.0


def test_failures_give_way_to_measurements(write: Callable[..., Path], tmp_path: Path) -> None:
    a = write("a.parquet", [failure(CELLS[0]), failure(CELLS[1])])
    b = write("b.parquet", [visit(CELLS[0], 2.0, 1.0), failure(CELLS[1])])
    done = merge_tables([a, b], tmp_path / "out.parquet")
    first, second = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert first["error"] == "" and first["latency_ms"] == pytest.approx(2.0 * (1 + CELLS[0].sum()))
    assert second["error"] == "does not run here" and second["latency_ms"] is None
    assert (done.networks, done.averaged, done.failed) == (1, 0, 1)


def test_other_devices_and_spaces_are_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    a, other = write("a.parquet", [visit(CELLS[0], 2.0, 1.0)]), replace(TARGET, runtime="2")
    b = write("b.parquet", [], target=json.loads(json.dumps(asdict(other))))
    with pytest.raises(StoreError, match=f"a.parquet was measured on {TARGET.target_id} and .*b.parquet on "
                                         f"{other.target_id} .runtime 1 against 2.; latencies"):
        merge_tables([a, b], tmp_path / "out.parquet")
    c = write("c.parquet", [], space_id="another(space)")
    with pytest.raises(StoreError, match="a.parquet is of search space nasbench201.* and .*c.parquet of another.space"):
        merge_tables([a, c], tmp_path / "out.parquet")
    disguised = write("d.parquet", [visit(CELLS[0], 2.0, 1.0)], target=json.loads(json.dumps(asdict(other))))
    with pytest.raises(StoreError, match=f"of target {other.target_id} but holds rows of {TARGET.target_id}"):
        merge_tables([b, disguised], tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_damaged_and_missing_tables_are_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    a, b, out = write("a.parquet", [visit(CELLS[0], 2.0, 1.0)]), tmp_path / "b.parquet", tmp_path / "out.parquet"
    with pytest.raises(StoreError, match="b.parquet does not exist"):
        merge_tables([a, b], out)
    content = a.read_bytes()
    for damaged in (content[:-100], b"", bytes(content[:40]) + bytes(8) + content[48:]):
        b.write_bytes(damaged)
        with pytest.raises(StoreError, match="b.parquet is damaged or not a latency table"):
            merge_tables([a, b], out)
    rows, head = pq.read_table(a), json.dumps({"space_id": SPACE.space_id}).encode()
    for table in (rows.replace_schema_metadata({}), rows.replace_schema_metadata({KEY: head}),
                  rows.drop_columns(["ratio"]), pa.table({"x": [1]}, metadata=rows.schema.metadata)):
        pq.write_table(table, b)
        with pytest.raises(StoreError, match="b.parquet is damaged or not a latency table"):
            merge_tables([a, b], out)
    b = write("b.parquet", [], target={"kind": "scripted"})
    with pytest.raises(StoreError, match="does not say which target"):
        merge_tables([a, b], out)
    assert not out.exists() and a.read_bytes() == content


def test_only_a_file_that_is_named_twice_is_replaced(write: Callable[..., Path], tmp_path: Path) -> None:
    a, b = write("a.parquet", [visit(CELLS[0], 2.0, 1.0)]), write("b.parquet", [visit(CELLS[1], 2.0, 2.0)])
    link, foreign = tmp_path / "link.parquet", write("c.parquet", [])
    os.symlink(a, link)
    before = a.read_bytes()
    with pytest.raises(StoreError, match="is the table .*a.parquet under another name"):
        merge_tables([a, b], link)
    with pytest.raises(StoreError, match="c.parquet exists and is not among the tables"):
        merge_tables([a, b], foreign)
    assert a.read_bytes() == before and pq.read_table(foreign).num_rows == 0
    merge_tables([a, b], a)
    assert pq.read_table(a).num_rows == 2 and pq.read_table(b).num_rows == 1


def paretoray(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)


def published(tmp_path: Path) -> Callable[[str], str]:
    """A table of all cells; the text of a target that reads one of its columns."""
    cells = SPACE.all_tokens()      # type: ignore[attr-defined]
    columns = {f"op{i}": cells[:, i] for i in range(6)}
    pq.write_table(pa.table(columns | {"phone": 1.0 + cells.sum(axis=1), "tablet": 2.0 + cells.sum(axis=1)}),
                   tmp_path / "published.parquet")
    return lambda column: (f"{{name: table, label: {column}, path: {tmp_path / 'published.parquet'}, column: {column}, "
                           f"token_columns: [{', '.join(columns)}]}}")


@pytest.mark.soak
def test_measure_and_merge_as_a_user_types_them(tmp_path: Path) -> None:
    target = published(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY.replace("mobilenetv3-s16", "nasbench201"))
    a, b, out = (str(tmp_path / f"{name}.parquet") for name in ("a", "b", "out"))
    done = paretoray("measure", str(tmp_path / "tiny.yaml"), "--count", "5", "--out", a, "--target", "phone", "--set",
                     f"target={target('phone')}")
    assert done.returncode == 0, done.stdout + done.stderr
    table = LatencyTable.read(Path(a))
    assert table is not None and len(table.rows) == 5
    assert all(row["latency_ms"] == 1.0 + sum(row["tokens"]) for row in table.rows)

    LatencyTable(Path(b), table.head | {"target": table.head["target"] | {"device": "tablet"}}, []).write()
    refused = paretoray("merge", a, b, "--out", out)
    assert refused.returncode == 2 and "device phone against tablet" in refused.stderr
    assert "Traceback" not in refused.stderr and not Path(out).exists()
    done = paretoray("merge", a, a, "--out", out)
    assert done.returncode == 0 and "5 networks from 2 tables, 0 of them averaged" in done.stdout, done.stderr
    assert pq.read_table(out).schema.remove_metadata().equals(SCHEMA)
    text = paretoray("merge", "--help").stdout
    assert "TABLE" in text and "--out" in text and "one target" in text


def test_a_table_is_of_one_target(tmp_path: Path) -> None:
    target = published(tmp_path)
    (tmp_path / "two.yaml").write_text(TINY.replace("target: onnx_cpu", f"targets: [{target('phone')}, "
                                                                        f"{target('tablet')}]"))
    config = load_config(tmp_path / "two.yaml")
    assert with_target(config, "tablet").targets[0].options["column"] == "tablet"
    assert with_target(config, "tablet").labels == ["tablet"] and with_target(config, None) is config
    with pytest.raises(ConfigError, match="--target watch is not .* one of phone, tablet"):
        with_target(config, "watch")
    with pytest.raises(ConfigError, match="has phone, tablet; choose with --target LABEL"):
        measure_table(config, 5, tmp_path / "out.parquet", None)
