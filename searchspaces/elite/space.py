"""A space restricted to some values of each position: what a search for spaces finds (specification nss 7).

    space = EliteSpace(base, restricted(base, groups, [[2], [0, 1], ...]))

Its architectures are the base's, with tokens of their own: positions that are left one value are gone, the others count
the values that are left. Networks, cost and features are the base's; the supernet is the base's too, so weights trained
for all of it go on (`EliteSupernet.base`).
"""
from __future__ import annotations

import difflib
import hashlib
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from searchspaces.bins import BinGroup, possible_tokens
from searchspaces.errors import ConfigError, SpaceError
from searchspaces.graph import Graph
from searchspaces.space import Choice, FreeSpace, SearchSpace, Tokens

if TYPE_CHECKING:
    from torch import Tensor

    from searchspaces.supernet import Supernet

COUNTABLE = 50_000      # rows that are enumerated to count networks; of more, rows are counted


class EliteSpace(FreeSpace):
    """`tokens[t]` are the base's tokens left to its position t. SpaceError where that leaves none, or one network."""

    def __init__(self, base: SearchSpace, tokens: Sequence[Collection[int]]) -> None:
        super().__init__(base.classes, base.channels)
        self.base = base
        self.tokens = tuple(tuple(sorted({int(token) for token in of_one})) for of_one in tokens)
        self._check()
        self._kept = np.array([t for t, of_one in enumerate(self.tokens) if len(of_one) > 1])
        if not len(self._kept):
            raise SpaceError(f"the ranges leave one architecture of {base.space_id}; there is nothing to search")
        self._first = np.array([of_one[0] for of_one in self.tokens], dtype=np.int8)
        longest = int(base.vocabulary_sizes.max())
        self._own = np.full((len(self.tokens), longest), -1, dtype=np.int8)      # own token of a base's, -1: excluded
        self._bases = np.zeros((len(self._kept), longest), dtype=np.int8)        # base's token of an own one
        for t, of_one in enumerate(self.tokens):
            self._own[t, list(of_one)] = np.arange(len(of_one))
        for k, t in enumerate(self._kept):
            self._bases[k, :len(self.tokens[t])] = self.tokens[t]

    def _check(self) -> None:
        possible = possible_tokens(self.base)
        if len(self.tokens) != len(possible):
            raise SpaceError(f"ranges are given for {len(self.tokens)} positions, {self.base.space_id} has "
                             f"{len(possible)}; give one list of tokens for each")
        for choice, of_one, allowed in zip(self.base.choices, self.tokens, possible):
            wrong = [token for token in of_one if not (0 <= token < len(allowed) and allowed[token])]
            if wrong or not of_one:
                raise SpaceError(f"the range of {choice.name} is {list(of_one)}; {self.base.space_id} allows tokens "
                                 f"{np.flatnonzero(allowed).tolist()} there, and at least one is needed")

    # --- tokens ----------------------------------------------------------------------------------------------------

    @property
    def space_id(self) -> str:
        ranges = hashlib.sha256(repr(self.tokens).encode()).hexdigest()[:8]
        return f"elite({ranges},{self.base.space_id})"

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """Positions of one kind have the same vocabulary, so a kind is split where they are left different values."""
        found = []
        for t in self._kept:
            choice, of_one = self.base.choices[t], self.tokens[t]
            whole = len(of_one) == len(choice.values)
            kind = choice.kind if whole else f"{choice.kind}:{','.join(str(token) for token in of_one)}"
            found.append(Choice(choice.name, kind, tuple(choice.values[token] for token in of_one)))
        return tuple(found)

    def widened(self, tokens_NT: Tokens) -> Tokens:
        """The base's rows, int8[N, T of the base]."""
        rows = np.asarray(tokens_NT)
        base_NT = np.tile(self._first, (len(rows), 1))
        base_NT[:, self._kept] = self._bases[np.arange(len(self._kept)), rows]
        return base_NT

    def narrowed(self, base_NT: Tokens) -> Tokens:
        """Own rows of the base's, int8[N, T], not yet canonical. A live token outside the ranges is a SpaceError, a
        dead one becomes 0."""
        own_NT = self._own[np.arange(len(self.tokens)), np.asarray(base_NT)]
        outside = np.argwhere((own_NT < 0) & self.base.live_mask(base_NT))
        if len(outside):
            row, position = outside[0]
            raise SpaceError(f"{self.base.text(base_NT[row])} has {self.base.choices[position].name} outside the "
                             f"ranges of {self.space_id}")
        return np.maximum(own_NT[:, self._kept], 0).astype(np.int8)

    def contains(self, base_NT: Tokens) -> NDArray[np.bool_]:
        """bool[N]: which of the base's rows lie inside?"""
        own_NT = self._own[np.arange(len(self.tokens)), np.asarray(base_NT)]
        return np.asarray(((own_NT >= 0) | ~self.base.live_mask(base_NT)).all(axis=1))

    def live_mask(self, tokens_NT: Tokens) -> NDArray[np.bool_]:
        return self.base.live_mask(self.widened(tokens_NT))[:, self._kept]

    def canonical(self, tokens_NT: Tokens) -> Tokens:
        """The base's canonical form, wherever that lies inside. Ranges that part what the base calls equal (in darts,
        other inputs for one pair of a node than for the other) can leave a network several rows; bins never do."""
        rows = np.where(self.live_mask(tokens_NT), tokens_NT, 0).astype(np.int8)
        base_NT = self.base.canonical(self.widened(rows))
        inside_N = self.contains(base_NT)
        rows[inside_N] = self.narrowed(base_NT[inside_N])
        return np.where(self.live_mask(rows), rows, 0).astype(np.int8)

    def valid(self, prefix: Sequence[int] | Tokens) -> NDArray[np.bool_]:
        """As in the base, whose validity must not depend on the tokens before: what it excludes is left out already."""
        return np.ones(len(self.choices[len(prefix)].values), dtype=bool)

    def size(self) -> int:
        """Networks; above 50,000 rows the rows, dead tokens and symmetries not deducted."""
        rows = prod(int(size) for size in self.vocabulary_sizes)
        if rows > COUNTABLE:
            return rows
        every = np.array(list(product(*(range(size) for size in self.vocabulary_sizes))), dtype=np.int8)
        return len(np.unique(self.canonical(every), axis=0))

    def most_probable(self, probabilities: Sequence[NDArray[np.float64]]) -> Tokens:
        """The base's, which knows what its positions say together, wherever that lies inside."""
        own = iter(probabilities)
        widened = [np.zeros(int(size)) for size in self.base.vocabulary_sizes]
        for p, of_one in zip(widened, self.tokens):
            p[list(of_one)] = next(own) if len(of_one) > 1 else 1.0
        base_1T = self.base.most_probable(widened)[None]
        if not self.contains(base_1T)[0]:
            return super().most_probable(probabilities)
        return self.canonical(self.narrowed(base_1T))[0]

    @cached_property
    def _extremes(self) -> Tokens:
        """From the base's extremes, as far as they lie inside, position by position to the cheapest and the dearest
        value that is left."""
        nearest = [[int(np.abs(np.array(of_one) - token).argmin()) for token in pair]
                   for of_one, pair in zip(self.tokens, self.base.extremes().T)]
        ends = np.array(nearest, dtype=np.int8).T[:, self._kept]
        for row, sign in zip(ends, (1, -1)):
            for position, size in enumerate(self.vocabulary_sizes):
                rows = np.tile(row, (int(size), 1))
                rows[:, position] = np.arange(size)
                madds_V = self.cost(rows)[0]
                best = sign * madds_V
                if best.min() < best[row[position]]:
                    row[position] = int(best.argmin())
        return self.canonical(ends)

    def extremes(self) -> Tokens:
        return self._extremes.copy()

    # --- networks --------------------------------------------------------------------------------------------------

    def graph(self, tokens_T: Tokens) -> Graph:
        return self.base.graph(self.widened(np.asarray(tokens_T)[None])[0])

    def text(self, tokens_T: Tokens) -> str:
        return self.base.text(self.widened(np.asarray(tokens_T)[None])[0])

    def onehot(self, tokens_NT: Tokens) -> NDArray[np.float32]:
        return super().onehot(self.canonical(tokens_NT))

    def cost(self, tokens_NT: Tokens) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return self.base.cost(self.widened(self.check_tokens(tokens_NT)))

    def mean_madds(self, probabilities: Sequence[Tensor]) -> Tensor | None:
        own = iter(probabilities)
        widened = []
        for of_one, size in zip(self.tokens, self.base.vocabulary_sizes):
            p = next(own) if len(of_one) > 1 else probabilities[0].new_ones(1)
            widened.append(p.new_zeros(int(size)).index_add(0, p.new_tensor(of_one).long(), p))
        return self.base.mean_madds(widened)

    def features(self, tokens_NT: Tokens) -> NDArray[np.float32]:
        return self.base.features(self.widened(tokens_NT))

    def latency_features(self, tokens_NT: Tokens) -> NDArray[np.float32]:
        return self.base.latency_features(self.widened(tokens_NT))

    def blind(self, tokens_NT: Tokens) -> NDArray[np.bool_]:
        return self.base.blind(self.widened(tokens_NT))

    def make_supernet(self) -> Supernet:
        from searchspaces.elite.supernet import EliteSupernet  # torch is needed for weights only

        return EliteSupernet(self)


def restricted(space: SearchSpace, groups: Sequence[BinGroup],
               chosen: Sequence[Collection[int]]) -> list[tuple[int, ...]]:
    """Tokens left to every position by the chosen bins of every group, together where there are several; positions
    outside all groups keep what is possible. `groups` as from `bins.checked_groups`."""
    left = [tuple(int(token) for token in np.flatnonzero(allowed)) for allowed in possible_tokens(space)]
    for group, bins in zip(groups, chosen, strict=True):
        for i, position in enumerate(group.positions):
            left[position] = tuple(sorted({token for b in bins for token in group.bins[b][i]}))
    return left


def ranges_of_tokens(space: SearchSpace, tokens: Sequence[Collection[int]]) -> dict[str, list[int | float | str]]:
    """By name of a position the values that are left to it, where that is not all of them."""
    return {choice.name: [choice.values[token] for token in sorted(of_one)]
            for choice, of_one in zip(space.choices, tokens) if len(of_one) < len(choice.values)}


def tokens_of_ranges(space: SearchSpace, ranges: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """The inverse; positions that are not named keep what is possible. ConfigError names what the space does not have.
    """
    names = [choice.name for choice in space.choices]
    for name, values in ranges.items():
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"its positions are {', '.join(names[:12])}"
            raise ConfigError(f"ranges name '{name}', which is no position of {space.space_id}; {hint}")
        known = space.choices[names.index(name)].values
        wrong = [value for value in values if value not in known] if isinstance(values, list | tuple) else [values]
        if wrong or not values:
            raise ConfigError(f"the range of {name} is {values!r}; give a list of some of {list(known)}")
    left = [tuple(int(token) for token in np.flatnonzero(allowed)) for allowed in possible_tokens(space)]
    return [tuple(sorted(choice.values.index(value) for value in ranges[choice.name])) if choice.name in ranges else of
            for choice, of in zip(space.choices, left)]
