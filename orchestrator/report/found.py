"""What elite.json says, for a reader: the spaces that were found, in words and as a table of draws."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from orchestrator.report.data import RunView
from searchspaces.elite.found import FoundSpace

HEAD = ("Draws", "Mean cost", "Off target", "Chance", "Differs from the kept one in")


@dataclass(frozen=True)
class Spaces:
    """Of elite.json: the groups' names and their bins' labels, and for each aim its goal's label and what was found."""

    names: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...]
    found: tuple[tuple[str, FoundSpace], ...]


def read_spaces(run: RunView, problems: list[str]) -> Spaces | None:
    """None where there are none, or nothing that can be read; the latter becomes a problem."""
    if not run.elite:
        return None
    try:
        groups = run.elite["groups"]
        found = tuple((str(one["goal"]), FoundSpace.from_json({k: v for k, v in one.items() if k != "goal"}))
                      for one in run.elite["spaces"])
        spaces = Spaces(tuple(str(group["name"]) for group in groups),
                        tuple(tuple(map(str, group["labels"])) for group in groups), found)
        for _, one in found:
            _check(spaces, one)
        return spaces
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        problems.append(f"elite.json is not what this version writes ({type(error).__name__}: {error}); the spaces "
                        "are not shown.")
        return None


def _check(spaces: Spaces, found: FoundSpace) -> None:
    for draw in (found.kept, *found.draws):
        if len(draw.bins) != len(spaces.labels) or any(not 0 <= b < len(of) for b, of in zip(draw.bins, spaces.labels)):
            raise ValueError(f"bins {list(draw.bins)} are not of its groups")


def amount(cost: float, unit: str) -> str:
    return f"{cost:.4g} ms" if unit == "ms" else f"{cost / 1e6:.4g} M multiply-adds"


def title(spaces: Spaces, label: str, found: FoundSpace) -> str:
    several = len({label for label, _ in spaces.found}) > 1
    return (f"{label}, " if several else "") + amount(found.target, found.unit)


def sentence(found: FoundSpace) -> str:
    kept = found.kept
    reach = "" if found.aim == found.target else (" No space's mean reaches the target, so the nearest was aimed at, "
                                                  f"{amount(found.aim, found.unit)}.")
    return f"Its networks cost {amount(kept.mean, found.unit)} on average, {_away(kept.deviation)}.{reach}"


def _away(deviation: float) -> str:
    return f"{abs(deviation):.1%} {'above' if deviation >= 0 else 'below'} the target"


def draws_table(spaces: Spaces, found: FoundSpace) -> str:
    """Equal draws in one row, the kept one marked."""
    rows: dict[tuple[int, ...], int] = {}
    for draw in found.draws:
        rows[draw.bins] = rows.get(draw.bins, 0) + 1
    by_bins = {draw.bins: draw for draw in found.draws}
    body = "".join(
        f'<tr{" class=chosen" if bins == found.bins else ""}><td>{count}</td>'
        f"<td>{amount(by_bins[bins].mean, found.unit).removesuffix(' multiply-adds')}</td>"
        f"<td>{by_bins[bins].deviation:+.1%}</td>"
        f"<td>{_chance(by_bins[bins].log_p)}</td><td>{escape(_differences(spaces, bins, found.bins))}</td></tr>"
        for bins, count in rows.items())
    head = "".join(f"<th>{name}</th>" for name in HEAD)
    return (f'<div class="scroll"><table class="draws"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
            "</div>")


def _chance(log_p: float) -> str:
    p = math.exp(log_p)
    return f"{p:.0%}" if p >= 0.1 else f"{p:.1g}" if p < 0.001 else f"{p:.1%}"


def _differences(spaces: Spaces, bins: Sequence[int], kept: Sequence[int]) -> str:
    """What is not as in the kept one."""
    if tuple(bins) == tuple(kept):
        return "kept"
    return ", ".join(f"{name} {of_group[b]}" for name, of_group, b, other
                     in zip(spaces.names, spaces.labels, bins, kept) if b != other)
