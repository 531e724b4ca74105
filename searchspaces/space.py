"""The SearchSpace contract: what can be built, as canonical token rows and graphs.

An architecture is a row of tokens, `int8[T]`: one index into the vocabulary of each position, left to right. Batches
are `int8[N, T]` and everything that can be vectorised takes the batch.

Shape legend: N architectures, T token positions, V largest vocabulary, D one-hot dimensions, F latency features.

Lifecycle: a space is built once from its options, is immutable and pickles; every process may hold its own copy. All
methods are pure. Two spaces with equal `space_id` give the same networks for the same tokens.

A space of your own subclasses `SearchSpace` and writes `space_id`, `choices`, `live_mask` (if some tokens can be dead)
and `graph`; cost, sampling, encoding, stand-alone networks, ONNX files and drawings follow. `make_supernet` is needed
for weight sharing. `paretoray check module:Class` runs the conformance suite on it (searchspaces/conformance.py).
"""
from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from searchspaces.bins import BinGroup, position_groups
from searchspaces.errors import SpaceError
from searchspaces.graph import Graph

if TYPE_CHECKING:
    from torch import Tensor

    from searchspaces.supernet import Supernet

Tokens = NDArray[np.int8]


@dataclass(frozen=True)
class Choice:
    """One token position: `kind` names the vocabulary (positions of one kind share embeddings and heads)."""

    name: str
    kind: str
    values: tuple[int | float | str, ...]


class SearchSpace(ABC):
    """See the module docstring. `classes`, `channels` come from the dataset, the rest from the configuration."""

    def __init__(self, classes: int = 10, channels: int = 3) -> None:
        self.classes = classes
        self.channels = channels

    def __getstate__(self) -> dict[str, Any]:
        """Without what was only computed once to be remembered: a space travels to every worker."""
        remembered = {name for kind in type(self).__mro__ for name, value in vars(kind).items()
                      if isinstance(value, cached_property)}
        return {name: value for name, value in self.__dict__.items() if name not in remembered}

    # --- what a space must say -------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def space_id(self) -> str:
        """Name and options, e.g. "mobilenetv3(width=0.5,resolution=32,classes=10)": part of every cache key."""

    @property
    @abstractmethod
    def choices(self) -> tuple[Choice, ...]:
        """The T token positions in the order in which a policy emits them."""

    @abstractmethod
    def graph(self, tokens_T: Tokens) -> Graph:
        """The network of one architecture. Dead tokens have no influence."""

    def live_mask(self, tokens_NT: Tokens) -> NDArray[np.bool_]:
        """bool[N, T]: does the token change the network? All live unless the space says otherwise."""
        return np.ones(tokens_NT.shape, dtype=bool)

    def make_supernet(self) -> Supernet:
        """One weight-shared network over the whole space, freshly initialised from torch's random state."""
        raise SpaceError(f"search space {self.space_id} has no supernet; use an accuracy source that needs none")

    def size(self) -> int:
        """Number of distinct canonical architectures (exact integer)."""
        return prod(len(choice.values) for choice in self.choices)

    def valid(self, prefix: Sequence[int] | Tokens) -> NDArray[np.bool_]:
        """bool[V]: which values may follow the prefix at position len(prefix)."""
        return np.ones(len(self.choices[len(prefix)].values), dtype=bool)

    def text(self, tokens_T: Tokens) -> str:
        """Short human-readable form of one architecture."""
        live = self.live_mask(tokens_T[None])[0]
        return ",".join(str(c.values[t]) for c, t, alive in zip(self.choices, tokens_T, live) if alive)

    # --- what follows ----------------------------------------------------------------------------------------------

    @cached_property
    def vocabulary_sizes(self) -> NDArray[np.int64]:
        return np.array([len(choice.values) for choice in self.choices])

    def check_tokens(self, tokens_NT: Tokens) -> Tokens:
        """The rows as int8[N, T], or SpaceError naming the first row and position that is out of range."""
        rows = np.asarray(tokens_NT)
        if rows.ndim != 2 or rows.shape[1] != len(self.choices):
            raise SpaceError(f"token rows of {self.space_id} have shape (N, {len(self.choices)}), got {rows.shape}")
        bad = np.argwhere((rows < 0) | (rows >= self.vocabulary_sizes))
        if len(bad):
            row, position = bad[0]
            raise SpaceError(f"token {rows[row, position]} at position {position} ({self.choices[position].name}) is "
                             f"outside 0..{self.vocabulary_sizes[position] - 1}")
        return rows.astype(np.int8)

    def canonical(self, tokens_NT: Tokens) -> Tokens:
        """Dead tokens set to 0. Equality, caching and database keys use this form only.

        A space in which live tokens can say the same in several ways overrides this and chooses one of them; all
        other methods must then give for a row what they give for its canonical form.
        """
        return np.where(self.live_mask(tokens_NT), tokens_NT, 0).astype(np.int8)

    def arch_id(self, tokens_T: Tokens) -> str:
        """16 hex digits identifying the canonical architecture within the space."""
        row = self.canonical(np.asarray(tokens_T, dtype=np.int8)[None])[0]
        return hashlib.sha256(self.space_id.encode() + b"\0" + row.tobytes()).hexdigest()[:16]

    def onehot(self, tokens_NT: Tokens) -> NDArray[np.float32]:
        """float32[N, D]: concatenated one-hots of the positions, dead positions all-zero (the expand embedding)."""
        live = self.live_mask(tokens_NT)
        columns = [np.eye(len(c.values), dtype=np.float32)[tokens_NT[:, t]] * live[:, t, None]
                   for t, c in enumerate(self.choices)]
        return np.concatenate(columns, axis=1)

    def features(self, tokens_NT: Tokens) -> NDArray[np.float32]:
        """float32[N, *]: what a surrogate of the accuracy should look at; the one-hot unless the space knows more."""
        return self.onehot(tokens_NT)

    def cost(self, tokens_NT: Tokens) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(madds[N], params[N]), exact. Spaces with additive cost override this with table look-ups."""
        graphs = [self.graph(row) for row in tokens_NT]
        return np.array([g.madds for g in graphs], dtype=np.int64), np.array([g.params for g in graphs], dtype=np.int64)

    def mean_madds(self, probabilities: Sequence[Tensor]) -> Tensor | None:
        """Expected multiply-adds of independent draws, value v of position t with `probabilities[t][v]`, float[V_t];
        exact and differentiable, where the space knows a closed form; None otherwise."""
        return None

    def latency_features(self, tokens_NT: Tokens) -> NDArray[np.float32]:
        """float32[N, F], non-negative, larger means slower: multiply-adds, node and block counts per stage."""
        return np.stack([stage_features(self.graph(row)) for row in tokens_NT])

    def blind(self, tokens_NT: Tokens) -> NDArray[np.bool_]:
        """bool[N]: networks whose output does not depend on the image, in spaces that hold such. They are the fastest
        of all and good for nothing, so budgets are not spread over their latencies."""
        return np.zeros(len(tokens_NT), dtype=bool)

    def bin_groups(self) -> tuple[BinGroup, ...]:
        """How the space is narrowed to smaller ones: positions that belong together, and bins of their values. Every
        position on its own, in contiguous ranges, unless the space knows better."""
        return position_groups(self.choices)

    def most_probable(self, probabilities: Sequence[NDArray[np.float64]]) -> Tokens:
        """int8[T], canonical: the architecture that a distribution stands for, the most probable value of every
        position. `probabilities[t]` float[V_t]. A space whose positions depend on each other overrides this."""
        row = np.zeros(len(self.choices), dtype=np.int8)
        for position, p in enumerate(probabilities):
            row[position] = np.argmax(np.where(self.valid(row[:position]), p, -1.0))
        return self.canonical(row[None])[0]

    def extremes(self) -> Tokens:
        """int8[2, T]: an architecture expected to be the fastest and one expected to be the slowest.

        All-first and all-last tokens; a space whose vocabularies are not ordered by cost overrides this.
        """
        return np.stack([np.zeros(len(self.choices)), self.vocabulary_sizes - 1]).astype(np.int8)

    def sample_uniform(self, rng: np.random.Generator, n: int) -> Tokens:
        """n rows, uniform over token values (not over distinct networks), canonical, respecting `valid`."""
        rows = np.zeros((n, len(self.choices)), dtype=np.int8)
        for row in rows:
            for position in range(len(row)):
                row[position] = rng.choice(np.flatnonzero(self.valid(row[:position])))
        return self.canonical(rows)

    def mutate(self, rng: np.random.Generator, tokens_NT: Tokens, probability: float) -> Tokens:
        """Each token is redrawn with the given probability among its other values; at least one live one per row.

        Tokens that come to life (a deeper unit) are random, not the canonical 0.
        """
        rows = self._redraw_dead(rng, tokens_NT)
        live = self.live_mask(rows)
        change = rng.random(rows.shape) < probability
        forced = rng.integers(rows.shape[1], size=len(rows)) % live.sum(axis=1)  # counted among the live positions
        live_first = np.argsort(~live, axis=1, kind="stable")
        change[np.arange(len(rows)), live_first[np.arange(len(rows)), forced]] = True
        shift = rng.integers(1, np.maximum(self.vocabulary_sizes, 2), size=rows.shape)
        rows = np.where(change, (rows + shift) % self.vocabulary_sizes, rows).astype(np.int8)
        return self.repair(rng, rows)

    def crossover(self, rng: np.random.Generator, a_NT: Tokens, b_NT: Tokens) -> Tokens:
        """Each token from one of the two parents with equal chance; tokens that come to life are random."""
        a_NT, b_NT = self._redraw_dead(rng, a_NT), self._redraw_dead(rng, b_NT)
        return self.repair(rng, np.where(rng.random(a_NT.shape) < 0.5, a_NT, b_NT).astype(np.int8))

    def _redraw_dead(self, rng: np.random.Generator, tokens_NT: Tokens) -> Tokens:
        live = self.live_mask(tokens_NT)
        if live.all():
            return np.array(tokens_NT, dtype=np.int8)
        random_NT = rng.integers(0, self.vocabulary_sizes, size=live.shape)
        return np.where(live, tokens_NT, random_NT).astype(np.int8)

    def repair(self, rng: np.random.Generator, rows: Tokens) -> Tokens:
        """Redraws tokens that are not valid after their prefix."""
        for row in rows:
            for position in range(len(row)):
                mask = self.valid(row[:position])
                if not mask[row[position]]:
                    row[position] = rng.choice(np.flatnonzero(mask))
        return self.canonical(rows)


class FreeSpace(SearchSpace):
    """A space in which every value is valid at every position: rows are drawn at once, and nothing needs repair."""

    def sample_uniform(self, rng: np.random.Generator, n: int) -> Tokens:
        rows = rng.integers(0, self.vocabulary_sizes, size=(n, len(self.choices)))
        return self.canonical(rows.astype(np.int8))

    def repair(self, rng: np.random.Generator, rows: Tokens) -> Tokens:
        return self.canonical(rows)


def stage_features(graph: Graph) -> NDArray[np.float32]:
    """Per stage (stem and head together first): mega multiply-adds, mega output elements, number of nodes."""
    stages = sorted({block.stage for block in graph.blocks})
    features = np.zeros((stages[-1] + 2, 3), dtype=np.float32)
    for block in graph.blocks:
        elements = prod(block.out_shape) * len(block.nodes)
        features[block.stage + 1] += (block.madds / 1e6, elements / 1e6, len(block.nodes))
    return features.ravel()
