"""Latencies from a Parquet table, and what is said about a table that does not fit."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.targets.catalogue import make_target
from actors.targets.target import Workload
from searchspaces.errors import ConfigError, DataError, TargetError
from searchspaces.graph import INPUT, GraphBuilder

COLUMNS = ["op_0", "op_1"]
SHAPE = (3, 32, 32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"arch_index": [0, 1, 2], "op_0": [0, 0, 4], "op_1": [1, 2, 3],
                             "phone_ms": [1.5, 2.5, 4.0], "broken_ms": [1.0, -1.0, 2.0]}), path)
    return path


def options(path: Path, **changes: object) -> dict[str, object]:
    return {"path": str(path), "column": "phone_ms", "token_columns": COLUMNS} | changes


def test_looks_up_by_tokens(path: Path) -> None:
    target = make_target("table", options(path), SHAPE)
    rows = [Workload(tokens_T=np.array(tokens)) for tokens in ([4, 3], [0, 1])]
    samples = target.measure(target.prepare(rows))
    assert [sample.latency_ms for sample in samples] == [4.0, 1.5]
    assert all(sample.stderr == 0 and sample.ratio * sample.reference_ms == sample.latency_ms for sample in samples)
    assert {sample.target_id for sample in samples} == {target.identity().target_id} and target.health().ok


def test_identity_follows_the_contents(path: Path) -> None:
    first = make_target("table", options(path), SHAPE).identity()
    table = pq.read_table(path)
    pq.write_table(table.set_column(3, "phone_ms", pa.array([1.5, 2.5, 4.5])), path)
    assert make_target("table", options(path), SHAPE).identity().target_id != first.target_id


def test_what_does_not_fit_is_named(path: Path, tmp_path: Path) -> None:
    target = make_target("table", options(path), SHAPE)
    with pytest.raises(TargetError, match=r"no row for tokens \[3, 3\]"):
        target.prepare([Workload(tokens_T=np.array([3, 3]))])
    builder = GraphBuilder(*SHAPE[:2])
    builder.begin_block("only", -1, "only")
    builder.flatten(INPUT, "flat")
    with pytest.raises(TargetError, match="by their tokens"):
        target.prepare([Workload(graph=builder.build())])
    with pytest.raises(DataError, match="does not exist"):
        make_target("table", options(tmp_path / "absent.parquet"), SHAPE)
    with pytest.raises(DataError, match="no column tablet_ms; it has arch_index, op_0"):
        make_target("table", options(path, column="tablet_ms"), SHAPE)
    with pytest.raises(DataError, match="not positive latencies"):
        make_target("table", options(path, column="broken_ms"), SHAPE)
    with pytest.raises(ConfigError, match="token_columns is empty"):
        make_target("table", options(path, token_columns=[]), SHAPE)
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        make_target("table", options(path), SHAPE)
