"""Latency results as rows of a latency table (`store.LATENCY_SCHEMA`) and back: nothing of a sample is lost."""
from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from actors.latency.result import LatencyResult
from actors.targets.target import LatencySample


def latency_row(result: LatencyResult, predicted_ms: float | None = None) -> dict[str, Any]:
    """One row; `predicted_ms` is what the predictor said before the measurement."""
    row: dict[str, Any] = {"arch_id": result.arch_id, "tokens": [int(t) for t in result.tokens_T],
                           "source": result.source, "error": result.error, "predicted_ms": predicted_ms}
    sample = result.sample
    if sample is None:
        return row
    return row | {
        "target_id": sample.target_id, "latency_ms": sample.latency_ms, "reference_ms": sample.reference_ms,
        "ratio": sample.ratio, "stderr_ms": sample.stderr_ms, "rounds": sample.rounds, "drift": sample.drift,
        "load": sample.load, "candidate_rounds_ms": [list(r) for r in sample.candidate_ms],
        "reference_rounds_ms": [list(r) for r in sample.reference_ms_rounds], "started_at": sample.started_at,
        "duration_s": sample.duration_s, "details": json.dumps(dict(sample.details))}


def latency_result(row: Mapping[str, Any]) -> LatencyResult:
    """The inverse of `latency_row`; columns that are not its own are ignored."""
    sample = None
    if row["latency_ms"] is not None:
        sample = LatencySample(
            target_id=row["target_id"], latency_ms=row["latency_ms"], reference_ms=row["reference_ms"],
            ratio=row["ratio"], stderr=row["stderr_ms"] / row["reference_ms"], rounds=row["rounds"],
            drift=row["drift"], load=row["load"],
            candidate_ms=tuple(tuple(r) for r in row["candidate_rounds_ms"]),
            reference_ms_rounds=tuple(tuple(r) for r in row["reference_rounds_ms"]),
            started_at=row["started_at"], duration_s=row["duration_s"], details=json.loads(row["details"]))
    return LatencyResult(row["arch_id"], np.array(row["tokens"], dtype=np.int8), row["source"], sample,
                         row["error"] or "")
