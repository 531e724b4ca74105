"""What a search for spaces found: for every aim the spaces it drew and the one it kept."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from searchspaces.bins import BinGroup


@dataclass(frozen=True)
class DrawnSpace:
    """One bin per group, its mean cost, that over the target less 1, and its log-probability."""

    bins: tuple[int, ...]
    mean: float
    deviation: float
    log_p: float


@dataclass(frozen=True)
class FoundSpace:
    """For one aim: the draws and which of them is the Elite Space. `target` is what was asked for, in `unit`, ms or
    madds; `aim` what the mean cost of a space can be of that."""

    target: float
    aim: float
    unit: str
    draws: tuple[DrawnSpace, ...]
    chosen: int

    @property
    def bins(self) -> tuple[int, ...]:
        return self.draws[self.chosen].bins

    @property
    def kept(self) -> DrawnSpace:
        return self.draws[self.chosen]

    def text(self, groups: Sequence[BinGroup]) -> str:
        """One sentence: target, mean, and the ranges by group."""
        amount = (lambda x: f"{x:.4g} ms") if self.unit == "ms" else (lambda x: f"{x / 1e6:.4g} M multiply-adds")
        reach = "" if self.aim == self.target else " (no space's mean is nearer)"
        ranges = ", ".join(f"{group.name} {group.labels[b]}" for group, b in zip(groups, self.bins))
        return (f"space for {amount(self.target)}: mean {amount(self.kept.mean)}, {self.kept.deviation:+.1%}{reach}; "
                f"{ranges}")

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> FoundSpace:
        draws = tuple(DrawnSpace(**{**draw, "bins": tuple(draw["bins"])}) for draw in raw["draws"])
        return FoundSpace(raw["target"], raw["aim"], raw["unit"], draws, raw["chosen"])
