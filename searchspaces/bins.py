"""Which spaces lie inside a space: groups of token positions and the bins of values that each may be narrowed to.

A space of spaces is the product of its groups: one bin of every group makes a smaller space (specification nss 1). A
space says what its groups are (`SearchSpace.bin_groups`); whoever narrows it needs to know nothing else.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from searchspaces.errors import SpaceError

if TYPE_CHECKING:
    from searchspaces.space import Choice, SearchSpace

TOKENS_PER_BIN = 4      # about, where a vocabulary is large enough


@dataclass(frozen=True)
class BinGroup:
    """Positions that are narrowed together. `bins[b][i]` are the tokens that bin b leaves to `positions[i]`; bins may
    overlap. `labels[b]` is what a reader calls bin b."""

    name: str
    positions: tuple[int, ...]
    bins: tuple[tuple[tuple[int, ...], ...], ...]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.bins)


def group_of(name: str, positions: Sequence[int], choices: Sequence[Choice],
             bins: Sequence[Sequence[int]] | None = None) -> BinGroup:
    """A group of positions of one vocabulary, each left the same tokens by a bin; `bins`: contiguous ones."""
    values = choices[positions[0]].values
    bins = bins or contiguous_bins(len(values))
    return BinGroup(name, tuple(positions), tuple((tuple(tokens),) * len(positions) for tokens in bins),
                    tuple(_label([values[token] for token in tokens]) for tokens in bins))


def contiguous_bins(count: int) -> list[range]:
    """At least two ranges of neighbouring tokens: of about four each; of three tokens the first and the last two, so
    that something is left to choose; of two tokens each on its own."""
    if count < 2:
        raise SpaceError(f"a vocabulary of {count} value cannot be narrowed")
    if count == 3:
        return [range(2), range(1, 3)]
    ends = np.linspace(0, count, max(2, count // TOKENS_PER_BIN) + 1).round().astype(int)
    return [range(int(start), int(end)) for start, end in zip(ends, ends[1:])]


def position_groups(choices: Sequence[Choice]) -> tuple[BinGroup, ...]:
    """One group for each position that has something to choose."""
    return tuple(group_of(choice.name, (position,), choices) for position, choice in enumerate(choices)
                 if len(choice.values) > 1)


def checked_groups(space: SearchSpace) -> tuple[BinGroup, ...]:
    """The space's groups without tokens that it excludes. SpaceError where a position is in two of them, or a bin would
    hold no architecture."""
    possible = possible_tokens(space)
    groups = []
    seen: set[int] = set()
    for group in space.bin_groups():
        if len(group) < 2 or len(group.labels) != len(group):
            raise SpaceError(f"bin group '{group.name}' of {space.space_id} has {len(group)} bins and "
                             f"{len(group.labels)} labels; give at least two bins, each with a label")
        own = set(group.positions)
        if not own or len(own) < len(group.positions) or seen & own or not own <= set(range(len(possible))):
            raise SpaceError(f"bin group '{group.name}' of {space.space_id} has positions {list(group.positions)}; it "
                             f"needs at least one, and a position lies in 0..{len(possible) - 1} and belongs to one "
                             "group")
        seen |= own
        groups.append(_without_excluded(space, group, possible))
    if not groups:
        raise SpaceError(f"{space.space_id} has no bins, so there is nothing to narrow; override bin_groups, or search "
                         "it as it is")
    return tuple(groups)


def possible_tokens(space: SearchSpace) -> list[NDArray[np.bool_]]:
    """bool[V] per position. Validity must not depend on the tokens before."""
    prefix = np.zeros(len(space.choices), dtype=np.int8)
    return [space.valid(prefix[:position]) for position in range(len(space.choices))]


def _without_excluded(space: SearchSpace, group: BinGroup, possible: Sequence[NDArray[np.bool_]]) -> BinGroup:
    """A bin that loses values is called by those that are left."""
    bins = tuple(_possible_bin(space, group, b, possible) for b in range(len(group)))
    values = space.choices[group.positions[0]].values
    labels = tuple(label if set(kept[0]) == set(given[0]) else _label([values[token] for token in kept[0]])
                   for label, kept, given in zip(group.labels, bins, group.bins))
    return BinGroup(group.name, group.positions, bins, labels)


def _possible_bin(space: SearchSpace, group: BinGroup, b: int,
                  possible: Sequence[NDArray[np.bool_]]) -> tuple[tuple[int, ...], ...]:
    if len(group.bins[b]) != len(group.positions):
        raise SpaceError(f"bin '{group.labels[b]}' of group '{group.name}' of {space.space_id} gives tokens for "
                         f"{len(group.bins[b])} positions, its group has {len(group.positions)}")
    kept = []
    for position, tokens in zip(group.positions, group.bins[b]):
        allowed = set(np.flatnonzero(possible[position]).tolist())
        kept.append(tuple(sorted(allowed & set(tokens))))
        if not kept[-1]:
            raise SpaceError(f"bin '{group.labels[b]}' of group '{group.name}' of {space.space_id} leaves no valid "
                             f"value to {space.choices[position].name}, so it holds no architecture; leave the bin "
                             "out of bin_groups")
    return tuple(kept)


def _label(values: Sequence[int | float | str]) -> str:
    if len(values) == 1 or isinstance(values[0], str):
        return ", ".join(str(value) for value in values)
    return f"{values[0]} to {values[-1]}" if values[0] < 0 else f"{values[0]}-{values[-1]}"
