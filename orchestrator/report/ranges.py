"""Spaces as pictures: a row per group of positions, its bins as cells from the smallest to the largest, filled where
they are kept."""
from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from searchspaces.bins import BinGroup
from searchspaces.elite.space import EliteSpace

LABELLED = 8            # bins whose labels fit into their cells
LETTERS = 56            # of all labels of a row together
WITH_CHANCE = 4         # bins that have room for their chance too

KEPT, PART, LEFT_OUT = "kept", "part", ""


def picture(names: Sequence[str], labels: Sequence[Sequence[str]], states: Sequence[Sequence[str]],
            chances: Sequence[Sequence[float]] | None = None) -> str:
    """HTML. `states` (KEPT, PART or LEFT_OUT) and `chances` per group and bin; chances shade what is not kept."""
    rows: list[str] = []
    stage: list[str] = []
    for k, (name, of_group) in enumerate(zip(names, labels)):
        number = re.findall(r"\d+", name)[:1]
        gap = " apart" if rows and number != stage else ""
        stage = number
        rows.append(_row(name, of_group, states[k], chances[k] if chances is not None else None, gap))
    return f'<div class="ranges">{"".join(rows)}</div>'


def _row(name: str, labels: Sequence[str], states: Sequence[str], chances: Sequence[float] | None, gap: str) -> str:
    named = len(labels) <= LABELLED and sum(map(len, labels)) <= LETTERS
    cells = "".join(_cell(label, state, None if chances is None else float(chances[b]), named, len(labels))
                    for b, (label, state) in enumerate(zip(labels, states)))
    kept = "; ".join(label for label, state in zip(labels, states) if state == KEPT)
    beside = "" if named else f'<span class="chosen">{escape(kept)}</span>'
    return (f'<div class="range{gap}"><span class="group">{escape(name)}</span><span class="bins">{cells}</span>'
            f"{beside}</div>")


def _cell(label: str, state: str, chance: float | None, named: bool, count: int) -> str:
    share = "" if chance is None else f"{chance:.0%}"
    title = escape(", ".join(part for part in (label, state and {KEPT: "kept", PART: "kept in part"}[state],
                                               share and f"chance {share}") if part), quote=True)
    text = escape(label) if named else ""
    beside = f" <small>{share}</small>" if named and share and count <= WITH_CHANCE else ""
    shade = f' style="--p:{chance:.3f}"' if chance is not None else ""
    return f'<i class="bin {state}" title="{title}"{shade}>{text}{beside}</i>'


def states_of_bins(labels: Sequence[Sequence[str]], bins: Sequence[int]) -> list[list[str]]:
    """One bin of every group is kept."""
    return [[KEPT if b == chosen else LEFT_OUT for b in range(len(of_group))] for of_group, chosen in zip(labels, bins)]


def states_of_space(groups: Sequence[BinGroup], space: EliteSpace) -> list[list[str]]:
    """Of the bins of its base: kept where all their values are left. Bins that overlap a kept one count as left out,
    unless something is left that no kept bin has."""
    return [_states(group, space) for group in groups]


def _states(group: BinGroup, space: EliteSpace) -> list[str]:
    left = {(i, token) for i, position in enumerate(group.positions) for token in space.tokens[position]}
    of_bins = [{(i, token) for i, tokens in enumerate(of_bin) for token in tokens} for of_bin in group.bins]
    kept = [of_bin <= left for of_bin in of_bins]
    covered: set[tuple[int, int]] = set().union(*(of_bin for of_bin, whole in zip(of_bins, kept) if whole))
    several = [i for i in range(len(group.positions)) if len({tuple(of_bin[i]) for of_bin in group.bins}) > 1]
    own = [{(i, token) for i, token in of_bin if i in several} for of_bin in of_bins]
    return [KEPT if whole else PART if mine & (left - covered) else LEFT_OUT for whole, mine in zip(kept, own)]

