"""The DARTS space as UNAS factorises it (specification 5): two cell types of four nodes with two inputs each.

32 tokens, all valid and live: per cell type and node in_a, op_a, in_b, op_b. A node is the sum of its two pairs (in,
op), so the canonical row has them in ascending order; they may coincide, and then the network holds the operation
twice. Size 6,203,943,900^2 = 3.85e19.

Options make the network, never the tokens: UNAS searches with 8 cells of width 16 and evaluates with 20 of width 36.
Any row found in one space is the same row in the other (`resized`).

Legend: K = 2 cell types, M = 4 nodes, S = 2 pairs of a node, O = 7 operations, C = 3 classes of edges, A quantities
that add up; suffixes N, T as in space.py.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from searchspaces.bins import BinGroup, group_of
from searchspaces.darts.skeleton import (
    CELL_TYPES,
    INPUTS,
    MAX,
    NODES,
    NORMAL,
    OPERATIONS,
    REDUCTION,
    SEP7,
    SKIP,
    DartsSkeleton,
)
from searchspaces.errors import SpaceError
from searchspaces.space import Tokens
from searchspaces.vectorfeatures import vector_features

if TYPE_CHECKING:
    from searchspaces.supernet import Supernet

SHORT = ("skip", "sep3", "max3", "dil3", "sep5", "avg3", "sep7")  # OPERATIONS in text
# Edges that cost the same: of normal cells, of reduction cells within the cell, and there on the cell's two inputs
NORMAL_EDGE, INNER_EDGE, STRIDED_EDGE = range(3)
EDGE_CLASSES = 3


class Darts(DartsSkeleton):
    """`width` channels per node in the first stage; `cells` in all, of which two are reduction cells."""

    def resized(self, cells: int = 20, width: int = 36) -> Darts:
        """The space of the same cells in networks of another size, as UNAS evaluates what a smaller network found.

        Rows carry over as they are; `arch_id` does not, because it names a network.
        """
        return Darts(self.classes, self.channels, width, cells, self.resolution)

    def size(self) -> int:
        """Unordered pairs with repetition of the m = 7 (node + 2) inputs and operations of each node."""
        pairs = [inputs * len(OPERATIONS) for inputs in INPUTS]
        return prod(m * (m + 1) // 2 for m in pairs) ** len(CELL_TYPES)

    def text(self, tokens_T: Tokens) -> str:
        """`normal sep3~0+sep3~1 ... / reduction ...`: per node the sum of operation ~ input."""
        pairs_KMS2 = self.by_pair(self.canonical(np.asarray(tokens_T)[None]))[0]
        cells = [" ".join("+".join(f"{SHORT[op]}~{source}" for source, op in pairs_S2) for pairs_S2 in pairs_MS2)
                 for pairs_MS2 in pairs_KMS2]
        return " / ".join(f"{name} {cell}" for name, cell in zip(CELL_TYPES, cells))

    def parse(self, text: str) -> Tokens:
        """Canonical tokens of a text."""
        try:
            row: list[int] = []
            for name, cell in zip(CELL_TYPES, text.split("/"), strict=True):
                first, *nodes = cell.split()
                pairs = [pair.split("~") for node in nodes for pair in node.split("+")]
                if first != name or [node.count("+") for node in nodes] != [1] * NODES:
                    raise ValueError(f"{name} and four nodes of two pairs are needed")
                for op, source in pairs:
                    row += [int(source), SHORT.index(op)]
            return self.canonical(self.check_tokens(np.array([row])))[0]
        except (ValueError, SpaceError) as error:
            raise SpaceError(f"'{text}' is no pair of cells of darts; write for example "
                             f"{self.text(self.extremes()[0])}") from error

    def extremes(self) -> Tokens:
        """Skips alone, except max pools on the inputs of reduction cells, where a skip is a convolution; and 7x7
        separable convolutions everywhere."""
        pairs = np.zeros((2, len(CELL_TYPES), NODES, 2, 2), dtype=np.int8)
        pairs[:, :, :, 1, 0] = 1  # all nodes read inputs 0 and 1
        fastest, slowest = pairs
        fastest[..., 1], slowest[..., 1] = SKIP, SEP7
        fastest[REDUCTION, 0, :, 1] = MAX
        fastest[REDUCTION, 1:, :, 0] = ((2, 2), (2, 3), (2, 3))
        return pairs.reshape(2, -1)

    def bin_groups(self) -> tuple[BinGroup, ...]:
        """Per node the operations of its two pairs together, since pairs have no order, and likewise their inputs where
        there are more than two."""
        groups = []
        for start in range(0, len(self.choices), 4):
            name = self.choices[start].name.partition(".")[0]
            if len(self.choices[start].values) > 2:
                groups.append(group_of(f"{name}.in", (start, start + 2), self.choices))
            groups.append(group_of(f"{name}.op", (start + 1, start + 3), self.choices))
        return tuple(groups)

    def most_probable(self, probabilities: Sequence[NDArray[np.float64]]) -> Tokens:
        """The most probable pairs; where both of a node coincide, the second is the next most probable pair of its own
        selectors (specification unas 9)."""
        row: list[int] = []
        for start in range(0, len(self.choices), 4):
            in_a, op_a, in_b, op_b = probabilities[start:start + 4]
            first = (int(np.argmax(in_a)), int(np.argmax(op_a)))
            second_IO = np.outer(in_b, op_b)
            if first == (int(np.argmax(in_b)), int(np.argmax(op_b))):
                second_IO[first] = -1.0
            row += [*first, *(int(index) for index in np.unravel_index(second_IO.argmax(), second_IO.shape))]
        return self.canonical(np.array([row], dtype=np.int8))[0]

    def onehot(self, tokens_NT: Tokens) -> NDArray[np.float32]:
        """float32[N, 168] of the canonical rows."""
        return super().onehot(self.canonical(tokens_NT))

    def make_supernet(self) -> Supernet:
        from searchspaces.darts.supernet import DartsSupernet  # torch is needed for weights only

        return DartsSupernet(self)

    # --- look-ups --------------------------------------------------------------------------------------------------

    def edge_counts(self, tokens_NT: Tokens) -> NDArray[np.int64]:
        """int64[N, C, O]: pairs of one cell of each type by class of edge and operation; 8 per type."""
        pairs_NKMS2 = self.by_pair(tokens_NT)
        source, op = pairs_NKMS2[..., 0], pairs_NKMS2[..., 1]
        reduction = np.where(source < 2, STRIDED_EDGE, INNER_EDGE)
        edge = np.where(np.arange(len(CELL_TYPES))[:, None, None] == NORMAL, NORMAL_EDGE, reduction)
        codes = (edge * len(OPERATIONS) + op).reshape(len(source), -1)
        counts = (codes[:, :, None] == np.arange(EDGE_CLASSES * len(OPERATIONS))).sum(axis=1)
        return counts.reshape(-1, EDGE_CLASSES, len(OPERATIONS))

    @cached_property
    def _tables(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(multiply-adds, parameters, vector features), A in all, of the network with max pools alone [A], and what a
        pair adds to it in place of a max pool [A, C, O], from 22 graphs."""
        pools = np.zeros((len(CELL_TYPES), NODES, 2, 2), dtype=np.int8)
        pools[..., 1] = MAX
        without = self._counted(pools)
        tables = np.zeros((len(without), EDGE_CLASSES, len(OPERATIONS)))
        for op in range(len(OPERATIONS)):
            for edge, kind, node, source in ((NORMAL_EDGE, NORMAL, 0, 0), (INNER_EDGE, REDUCTION, 1, 2),
                                             (STRIDED_EDGE, REDUCTION, 0, 0)):
                row = pools.copy()
                row[kind, node, 0] = (source, op)
                tables[:, edge, op] = self._counted(row) - without
        return without, tables

    def _counted(self, pairs: Tokens) -> NDArray[np.float64]:
        graph = self.graph(pairs.reshape(-1))
        return np.array([graph.madds, graph.params, *vector_features(graph)], dtype=np.float64)

    def _sums(self, tokens_NT: Tokens) -> NDArray[np.float64]:
        """float64[A, N]: additive, because what a pair adds depends on its operation and class of edge only."""
        without, tables = self._tables
        return np.einsum("nco,aco->an", self.edge_counts(self.check_tokens(tokens_NT)), tables) + without[:, None]

    def cost(self, tokens_NT: Tokens) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        madds_N, params_N = self._sums(tokens_NT)[:2]
        return np.rint(madds_N).astype(np.int64), np.rint(params_N).astype(np.int64)

    def latency_features(self, tokens_NT: Tokens) -> NDArray[np.float32]:
        """float32[N, 19]: the five `vector_features`, then how often each operation stands in one cell of either type.

        Few measurements suffice for the first, and the others say what an operation costs beyond them.
        """
        counts_NCO = self.edge_counts(tokens_NT)
        by_type = (counts_NCO[:, NORMAL_EDGE], counts_NCO[:, INNER_EDGE] + counts_NCO[:, STRIDED_EDGE])
        return np.concatenate([self._sums(tokens_NT)[2:].T, *by_type], axis=1).astype(np.float32)

    def features(self, tokens_NT: Tokens) -> NDArray[np.float32]:
        """float32[N, 202]: what decides the accuracy of a cell, for surrogates that see few of them.

        The one-hot; edge counts; per cell type how often each of the values 0 to 4 is read, and the longest path to
        its last node; log of the parameters.
        """
        rows = self.canonical(tokens_NT)
        source_NKMS = self.by_pair(rows)[..., 0]
        reads = [(source_NKMS == value).sum(axis=(2, 3)) for value in range(INPUTS[-1])]
        depth_NKV = np.zeros((len(rows), len(CELL_TYPES), INPUTS[-1] + 1), dtype=np.int64)
        for node, inputs in enumerate(INPUTS):
            before = np.take_along_axis(depth_NKV, source_NKMS[:, :, node].astype(np.int64), axis=2)
            depth_NKV[:, :, inputs] = before.max(axis=2) + 1
        parts = [self.onehot(rows), self.edge_counts(rows).reshape(len(rows), -1), *reads, depth_NKV[:, :, -1],
                 np.log(self.cost(rows)[1])[:, None]]
        return np.concatenate(parts, axis=1).astype(np.float32)


class DartsS16(Darts):
    """For very small images such as scikit-learn's 8x8 digits: 5 cells of width 8, quick on one core."""

    def __init__(self, classes: int = 10, channels: int = 1, width: int = 8, cells: int = 5,
                 resolution: int = 16) -> None:
        super().__init__(classes, channels, width, cells, resolution)
