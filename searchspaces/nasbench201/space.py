"""The NAS-Bench-201 cell space (specification 7): 4 nodes, 6 edges, 5 operations, 5^6 = 15,625 cells.

Every token is live and canonical: the six plain tokens are the key of the published tables. Operations on edges that
no longer connect input and output still count in the cost, as in the published numbers, because the published network
runs them; latency features count only what lies on a path from input to output, because a compiler removes the rest.
"""
from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from searchspaces.errors import SpaceError
from searchspaces.nasbench201.skeleton import CONV1, CONV3, EDGES, NONE, OPERATIONS, POOL, SKIP, NasBench201Skeleton
from searchspaces.space import Tokens

if TYPE_CHECKING:
    from searchspaces.supernet import Supernet

PATHS = ([3], [0, 4], [1, 5], [0, 2, 5])  # edges of the four paths from node 0 to node 3


class NasBench201(NasBench201Skeleton):
    """`width` channels in the first stage, doubled in the next two; `cells` per stage."""

    def text(self, tokens_T: Tokens) -> str:
        """The published form `|op~0|+|op~0|op~1|+|op~0|op~1|op~2|`."""
        nodes = []
        for node in (1, 2, 3):
            ops = [f"{OPERATIONS[token]}~{edge[0]}" for edge, token in zip(EDGES, tokens_T) if edge[1] == node]
            nodes.append(f"|{'|'.join(ops)}|")
        return "+".join(nodes)

    def parse(self, text: str) -> Tokens:
        """Tokens of a cell string."""
        try:
            edges = {}
            for node, part in enumerate(text.strip().split("+"), start=1):
                for item in part.strip("|").split("|"):
                    op, source = item.split("~")
                    edges[(int(source), node)] = OPERATIONS.index(op)
            if len(edges) != len(EDGES):
                raise ValueError("six edges are needed")
            return np.array([edges[edge] for edge in EDGES], dtype=np.int8)
        except (ValueError, KeyError) as error:
            raise SpaceError(f"'{text}' is not a cell of nasbench201; write for example "
                             f"{self.text(np.array([SKIP] * 6, dtype=np.int8))}") from error

    def extremes(self) -> Tokens:
        return np.array([[NONE] * 6, [CONV3] * 6], dtype=np.int8)

    def blind(self, tokens_NT: Tokens) -> NDArray[np.bool_]:
        """Cells without a path from input to output: none hands its image on."""
        rows = np.asarray(tokens_NT)
        there_PN = np.stack([(rows[:, path] != NONE).all(axis=1) for path in PATHS])
        return np.logical_not(there_PN.any(axis=0))

    def sample_uniform(self, rng: np.random.Generator, n: int) -> Tokens:
        return rng.integers(0, len(OPERATIONS), size=(n, len(EDGES)), dtype=np.int8)

    def all_tokens(self) -> Tokens:
        """int8[15625, 6]: every cell, in lexicographic order."""
        return np.array(list(np.ndindex(*[len(OPERATIONS)] * len(EDGES))), dtype=np.int8)

    def row_index(self, tokens_NT: Tokens) -> NDArray[np.int64]:
        """int64[N]: position of each cell in `all_tokens()`, to look rows up in a table."""
        radix = len(OPERATIONS) ** np.arange(len(EDGES))[::-1]
        return self.check_tokens(tokens_NT).astype(np.int64) @ radix

    def make_supernet(self) -> Supernet:
        from searchspaces.nasbench201.supernet import NasBench201Supernet  # torch is needed for weights only

        return NasBench201Supernet(self)

    # --- look-ups --------------------------------------------------------------------------------------------------

    @cached_property
    def _cost_terms(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(madds, params) as [fixed, per 1x1 conv edge, per 3x3 conv edge], from three graphs."""
        graphs = [self.graph(np.array([token] + [NONE] * 5, dtype=np.int8)) for token in (NONE, CONV1, CONV3)]
        terms = np.array([[g.madds for g in graphs], [g.params for g in graphs]], dtype=np.int64)
        terms[:, 1:] -= terms[:, :1]
        return terms[0], terms[1]

    def cost(self, tokens_NT: Tokens) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Depends only on the numbers of 1x1 and 3x3 convolutions: 28 distinct values."""
        rows = self.check_tokens(tokens_NT)
        counts = np.stack([np.ones(len(rows), dtype=np.int64), (rows == CONV1).sum(1), (rows == CONV3).sum(1)], axis=1)
        madds, params = self._cost_terms
        return counts @ madds, counts @ params

    def on_path(self, tokens_NT: Tokens) -> NDArray[np.bool_]:
        """bool[N, 6]: edges that carry something from the input to the output."""
        live = np.asarray(tokens_NT) != NONE
        forward = {0: np.ones(len(live), dtype=bool)}
        for node in (1, 2, 3):
            forward[node] = np.any([live[:, e] & forward[a] for e, (a, b) in enumerate(EDGES) if b == node], axis=0)
        backward = {3: np.ones(len(live), dtype=bool)}
        for node in (2, 1, 0):
            backward[node] = np.any([live[:, e] & backward[b] for e, (a, b) in enumerate(EDGES) if a == node], axis=0)
        return np.stack([live[:, e] & forward[a] & backward[b] for e, (a, b) in enumerate(EDGES)], axis=1)

    def latency_features(self, tokens_NT: Tokens) -> NDArray[np.float32]:
        """float32[N, 8]: numbers of skip, 1x1, 3x3 and pool edges on a path, additions, longest path, connected, 1.

        All stages repeat the same cell, so per-stage features would only be copies.
        """
        path = self.on_path(tokens_NT)
        counts = [((np.asarray(tokens_NT) == op) & path).sum(1) for op in (SKIP, CONV1, CONV3, POOL)]
        connected = path.any(axis=1)
        additions = sum(np.maximum(path[:, [e for e, (_, b) in enumerate(EDGES) if b == node]].sum(1) - 1, 0)
                        for node in (1, 2, 3))
        longest = {0: np.zeros(len(path), dtype=np.int64)}
        for node in (1, 2, 3):
            lengths = [(longest[a] + 1) * path[:, e] for e, (a, b) in enumerate(EDGES) if b == node]
            longest[node] = np.max(lengths, axis=0)
        return np.stack([*counts, additions, longest[3], connected, np.ones(len(path))], axis=1).astype(np.float32)

    def features(self, tokens_NT: Tokens) -> NDArray[np.float32]:
        """float32[N, 68]: what decides the accuracy of a cell, for surrogates that see few of them.

        One-hots of the edges that lie on a path from input to output; per path whether it is there and how many of
        each operation it holds; over all paths the numbers and extremes of convolutions, pools and lengths (depth,
        skip paths and gradient flow, whichever edges they run over); numbers of operations; log of the convolutions'
        cost, a 3x3 counting nine 1x1.
        """
        rows = np.asarray(tokens_NT)
        on_path = self.on_path(rows)
        onehot = np.eye(len(OPERATIONS))[rows] * on_path[:, :, None]
        there_NP = np.stack([(rows[:, path] != NONE).all(axis=1) for path in PATHS], axis=1)
        counts_NPO = np.stack([onehot[:, path, SKIP:].sum(axis=1) for path in PATHS], axis=1) * there_NP[:, :, None]
        convolutions, length = counts_NPO[:, :, [1, 2]].sum(axis=2), counts_NPO.sum(axis=2)
        large, pools = counts_NPO[:, :, 2], counts_NPO[:, :, 3]
        absent = np.where(there_NP, 0, len(PATHS))  # larger than any count
        over_paths = [there_NP.sum(1), convolutions.max(1), convolutions.sum(1), large.max(1), large.sum(1),
                      pools.max(1), pools.sum(1), (there_NP & (convolutions + pools == 0)).sum(1),
                      (there_NP & (convolutions == 0)).sum(1),
                      *((kind + absent).min(1) for kind in (convolutions, pools, length))]
        totals = onehot.sum(axis=1)
        cost = np.log1p(totals[:, CONV1] + 9 * totals[:, CONV3])
        parts = (onehot.reshape(len(rows), -1), there_NP, counts_NPO.reshape(len(rows), -1), np.stack(over_paths, 1),
                 totals, cost[:, None])
        return np.concatenate(parts, axis=1).astype(np.float32)
