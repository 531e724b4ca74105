"""What all searches of a sweep are told."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Workplace:
    """`directory` is where the sweep was started, for relative paths;
    `after` and `factor` give the rungs, None without."""

    sweep: Path
    directory: str
    address: str | None
    share: int
    after: int | None = None
    factor: float = 1.0
