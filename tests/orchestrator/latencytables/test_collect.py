"""`paretoray measure`: a whole, documented, resumable table that never mixes two targets."""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from actors.latency.pool import LatencyPool, LatencyPoolSettings, LatencyResult
from actors.targets.target import Claim, TargetIdentity
from orchestrator.interrupt import Interrupted, StopFlag
from orchestrator.latencytables.collect import SCHEMA, LatencyTable, measure_random
from orchestrator.record.records import latency_result
from searchspaces.catalogue import make_space
from searchspaces.errors import StoreError

SPACE = make_space("nasbench201", classes=10, channels=3, options={})
SCRIPTED = "tests.actors.latency.scripted:ScriptedTarget"


@pytest.fixture
def make_pool(ray_local: None, tmp_path: Path) -> Iterator[Callable[..., LatencyPool]]:
    pools: list[LatencyPool] = []

    def make(reference_ms: float | None = None, **options: Any) -> LatencyPool:
        pools.append(LatencyPool(SPACE, SCRIPTED, {"log": str(tmp_path / "log"), **options},
                                 devices=(Claim({"num_cpus": 0.1}),), settings=LatencyPoolSettings(retry_wait_s=0.1),
                                 reference_ms=reference_ms))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def visits(tmp_path: Path) -> int:
    return len((tmp_path / "log").read_text().split())


def test_table_holds_everything_and_is_continued(make_pool: Callable[..., LatencyPool], tmp_path: Path) -> None:
    path, seen = tmp_path / "deep" / "table.parquet", list[LatencyResult]()
    pool = make_pool()
    measure_random(pool, SPACE, 12, path, on_result=seen.append)
    assert len(seen) == visits(tmp_path) == 12
    table = pq.read_table(path)
    assert table.schema.remove_metadata().equals(SCHEMA) and table.num_rows == 12
    head = json.loads(table.schema.metadata[b"paretoray"])
    assert head["space_id"] == SPACE.space_id and head["reference_ms"] == pool.reference_ms()
    assert TargetIdentity(**head["target"] | {"input_shape": (3, 32, 32)}) == pool.identity()
    rows = table.to_pylist()
    assert len({row["arch_id"] for row in rows}) == 12
    np.testing.assert_array_equal([row["tokens"] for row in rows][:2], SPACE.canonical(SPACE.extremes()))
    for row in rows:
        tokens_T = np.array(row["tokens"], dtype=np.int8)
        assert row["latency_ms"] == pytest.approx((1 + tokens_T.sum()) * head["reference_ms"])
        assert row["madds"] == SPACE.graph(tokens_T).madds and row["params"] == SPACE.graph(tokens_T).params
        assert row["architecture"] == SPACE.text(tokens_T) and row["target_id"] == pool.identity().target_id
        assert row["candidate_rounds_ms"] and row["reference_rounds_ms"]
        assert latency_result(row).sample.ratio == row["ratio"]      # type: ignore[union-attr]

    again = make_pool(reference_ms=head["reference_ms"])
    assert len(measure_random(again, SPACE, 12, path).rows) == 12 and visits(tmp_path) == 12
    measure_random(again, SPACE, 20, path)
    assert visits(tmp_path) == 20 and pq.read_table(path).to_pylist()[:12] == rows


def test_stopping_keeps_what_was_measured(make_pool: Callable[..., LatencyPool], tmp_path: Path) -> None:
    path, stop = tmp_path / "table.parquet", StopFlag()
    with pytest.raises(Interrupted):
        measure_random(make_pool(), SPACE, 40, path, stop=stop, on_result=lambda result: stop.set(2))
    table = LatencyTable.read(path)
    assert table is not None and 1 <= len(table.rows) < 40
    measure_random(make_pool(table.head["reference_ms"]), SPACE, 40, path)
    assert len({row["arch_id"] for row in pq.read_table(path).to_pylist()}) == 40


def test_failed_architectures_are_in_the_table_and_tried_again(make_pool: Callable[..., LatencyPool],
                                                               tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    slowest = int(SPACE.extremes()[1].sum())
    rows = measure_random(make_pool(fail=slowest), SPACE, 5, path).rows
    failed = [row for row in pq.read_table(path).to_pylist() if row["error"]]
    assert len(rows) == 5 and len(failed) == 1 and failed[0]["latency_ms"] is None
    assert "does not run here" in failed[0]["error"]
    measure_random(make_pool(), SPACE, 5, path)
    assert not any(row["error"] for row in pq.read_table(path).to_pylist())


def test_other_tables_are_refused(make_pool: Callable[..., LatencyPool], tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    measure_random(make_pool(), SPACE, 2, path)
    before = path.read_bytes()
    with pytest.raises(StoreError, match="measured with another target"):
        measure_random(make_pool(spoilt=str(tmp_path / "claim"), how="odd"), SPACE, 3, path)
    space = make_space("nasbench201", classes=100, channels=3, options={})
    with pytest.raises(StoreError, match="measured with another search space"):
        measure_random(make_pool(), space, 3, path)
    assert path.read_bytes() == before
    for content in (before[:-200], b"", b"no table at all"):
        path.write_bytes(content)
        with pytest.raises(StoreError, match="damaged or not a latency table"):
            measure_random(make_pool(), SPACE, 3, path)
        assert path.read_bytes() == content
