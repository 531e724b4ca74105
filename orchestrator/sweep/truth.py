"""Regret: where tables hold accuracy and latency of every architecture, the best under any budget is known.

As in the benchmarks on NAS-Bench-201: of the column to report, where there is one; an answer over its budget, or none,
has accuracy 0.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from actors.targets.catalogue import target_class
from actors.targets.table import TableTarget
from orchestrator.config import Config
from orchestrator.data.accuracy import TableAccuracy
from searchspaces.errors import ParetorayError


@dataclass(frozen=True, eq=False)
class Truth:
    """The rows that both tables have, N of them, accuracy 0..1."""

    rows: Mapping[bytes, int]       # of the tokens as int8
    latency_N: NDArray[np.float64]
    accuracy_N: NDArray[np.float64]

    def regret(self, generated: Sequence[Mapping[str, Any]]) -> float | None:
        """Mean over the entries of generated.json; None without any that some row could meet."""
        losses = []
        for entry in generated:
            under = self.latency_N <= float(entry["budget_ms"])
            if under.any():
                losses.append(float(self.accuracy_N[under].max()) - self._reached(entry))
        return float(np.mean(losses)) if losses else None

    def _reached(self, entry: Mapping[str, Any]) -> float:
        row = self.rows.get(np.asarray(entry.get("tokens") or (), dtype=np.int8).tobytes())
        met = row is not None and entry.get("feasible") and self.latency_N[row] <= float(entry["budget_ms"])
        return float(self.accuracy_N[row]) if met else 0.0


def read_truth(config: Config) -> Truth | None:
    """Of a search whose accuracies and only target are tables; None for others, and where a file has gone."""
    accuracy, target = config.accuracy, config.targets[0]
    if not isinstance(accuracy, TableAccuracy) or len(config.targets) > 1 \
            or not issubclass(target_class(target.name), TableTarget):
        return None
    options = target.options
    try:
        accuracies = _column(str(accuracy.path), accuracy.token_columns, accuracy.test_column or
                             accuracy.accuracy_column)
        latencies = _column(options["path"], options["token_columns"], options["column"])
    except (OSError, ParetorayError, ValueError, KeyError):
        return None
    both = [tokens for tokens in accuracies if tokens in latencies]
    return Truth({tokens: row for row, tokens in enumerate(both)}, np.array([latencies[tokens] for tokens in both]),
                 accuracy.unit * np.array([accuracies[tokens] for tokens in both]))


def _column(path: str, token_columns: Sequence[str], column: str) -> dict[bytes, float]:
    table = pq.read_table(path, columns=[*token_columns, column])
    tokens_NT = np.stack([table[name].to_numpy() for name in token_columns], axis=1).astype(np.int8)
    return {row.tobytes(): float(value) for row, value in zip(tokens_NT, table[column].to_numpy())}
