"""Latencies that somebody else measured: one row of a Parquet table per architecture.

For benchmarks on published tables and for tests. The columns `token_columns` hold the tokens of one architecture, in
the order of the search space's positions; `column` holds its latency in ms. Samples have no timings and no error.
"""
from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from actors.targets.target import Claim, Health, LatencySample, LatencyTarget, TargetIdentity, Workload
from searchspaces.errors import ConfigError, DataError, TargetError


class TableTarget(LatencyTarget):
    """`reference_ms` is 1: the ratio is the latency. Needs the tokens of a workload, not its graph."""

    times_files = False

    def __init__(self, input_shape: tuple[int, ...], reference_ms: float | None = None, *, path: str, column: str,
                 token_columns: Sequence[str]) -> None:
        if not token_columns:
            raise ConfigError("target table: token_columns is empty; name the columns that hold the tokens")
        table = _read(Path(path), [*token_columns, column])
        tokens = np.stack([table[name].to_numpy() for name in token_columns], axis=1).astype(np.int8)
        latencies = table[column].to_numpy().astype(np.float64)
        if not (np.isfinite(latencies).all() and (latencies > 0).all()):
            raise DataError(f"column {column} of {path} holds values that are not positive latencies in ms")
        self._latency_ms = {row.tobytes(): float(value) for row, value in zip(tokens, latencies)}
        digest = hashlib.sha256(tokens.tobytes() + latencies.tobytes()).hexdigest()[:12]
        self._identity = TargetIdentity("table", column, f"table {digest}", "unknown", 1, 1, tuple(input_shape))

    @classmethod
    def announced(cls, options: Mapping[str, Any]) -> dict[str, float]:
        return {}

    @classmethod
    def claims(cls, options: Mapping[str, Any], offered: Mapping[str, float]) -> list[Claim]:
        """Any process can read a table."""
        return [Claim({"num_cpus": 0})]

    def identity(self) -> TargetIdentity:
        return self._identity

    def health(self) -> Health:
        return Health(True)

    def reference_ms(self) -> float:
        return 1.0

    def prepare(self, workloads: Sequence[Workload]) -> list[Any]:
        return [self._look_up(workload) for workload in workloads]

    def measure(self, handles: Sequence[Any]) -> list[LatencySample]:
        return [LatencySample(self._identity.target_id, latency_ms, 1.0, latency_ms, 0.0, 1, 0.0, 0.0,
                              ((latency_ms,),), ((1.0,),), time.time(), 0.0) for latency_ms in handles]

    def close(self) -> None:
        pass

    def _look_up(self, workload: Workload) -> float:
        if workload.tokens_T is None:
            raise TargetError("target table looks architectures up by their tokens and cannot time a graph or a file")
        tokens = np.asarray(workload.tokens_T, dtype=np.int8)
        if tokens.tobytes() not in self._latency_ms:
            raise TargetError(f"the latency table has no row for tokens {tokens.tolist()}")
        return self._latency_ms[tokens.tobytes()]


def _read(path: Path, columns: list[str]) -> pyarrow.Table:
    if not path.exists():
        raise DataError(f"latency table {path} does not exist; give the path of a Parquet file")
    try:
        present = pyarrow.parquet.read_schema(path).names
        missing = [name for name in columns if name not in present]
        if missing:
            raise DataError(f"latency table {path} has no column {missing[0]}; it has {', '.join(present)}")
        return pyarrow.parquet.read_table(path, columns=columns)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"latency table {path} is not a readable Parquet file: {error}") from error
