"""What goes into the latency pool and what comes out."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from actors.targets.target import LatencySample
from searchspaces.space import Tokens


@dataclass(frozen=True)
class LatencyRequest:
    """`visits` of the architecture are averaged; `client` is whose turn it takes in the queue."""

    tokens_T: Tokens
    client: str = ""
    visits: int = 1


@dataclass(frozen=True)
class LatencyResult:
    """`sample` is None where `error` says why."""

    arch_id: str
    tokens_T: Tokens
    source: Literal["measured", "cached"]
    sample: LatencySample | None
    error: str = ""

    @property
    def latency_ms(self) -> float:
        return self.sample.latency_ms if self.sample is not None else math.nan

    @property
    def stderr_ms(self) -> float:
        return self.sample.stderr_ms if self.sample is not None else math.nan
