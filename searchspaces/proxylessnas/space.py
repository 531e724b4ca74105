"""The ProxylessNAS space as UNAS searches it (specification 3): one operation for each of 21 layers.

21 tokens, all valid and live: an inverted residual layer of kernel 3, 5 or 7 and expand ratio 3 or 6, or in the 15
layers that keep their shape `skip`, which leaves the layer out. Size 7^15 * 6^6 = 2.2e17. The skeleton is in
skeleton.py, the weights of the supernet in supernet.py.

Legend: L = 21 layers, S = 6 stages, O = 7 operations, A quantities that add up; suffixes N, T as in space.py.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from searchspaces.errors import SpaceError
from searchspaces.graph import Graph
from searchspaces.proxylessnas.skeleton import LAYERS, OPERATIONS, STAGE_LAYERS, STAGES, ProxylessNasSkeleton
from searchspaces.space import Tokens
from searchspaces.vectorfeatures import VECTOR_FEATURES, vector_features

if TYPE_CHECKING:
    from searchspaces.supernet import Supernet


class ProxylessNas(ProxylessNasSkeleton):
    """See the skeleton for the options."""

    def size(self) -> int:
        return prod(int(size) for size in self.vocabulary_sizes)

    def text(self, tokens_T: Tokens) -> str:
        """`5x5e3 skip skip skip 7x7e3 ...`, layer by layer."""
        return " ".join(OPERATIONS[operation] for operation in self.operations(np.asarray(tokens_T)[None])[0])

    def parse(self, text: str) -> Tokens:
        try:
            operations = [spec.operations.index(name) for spec, name in zip(self.layers, text.split(), strict=True)]
            return self.check_tokens(np.array([operations]))[0]
        except ValueError as error:
            raise SpaceError(f"'{text}' is not an architecture of proxylessnas; name the operations of its {LAYERS} "
                             f"layers, for example {self.text(self.extremes()[0])}") from error

    def sample_uniform(self, rng: np.random.Generator, n: int) -> Tokens:
        return rng.integers(0, self.vocabulary_sizes, size=(n, LAYERS)).astype(np.int8)

    def repair(self, rng: np.random.Generator, rows: Tokens) -> Tokens:
        return rows  # every value is valid at every position, and live

    def make_supernet(self) -> Supernet:
        from searchspaces.proxylessnas.supernet import ProxylessNasSupernet  # torch is needed for weights only

        return ProxylessNasSupernet(self)

    # --- look-ups --------------------------------------------------------------------------------------------------

    @cached_property
    def _tables(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(multiply-adds, parameters, vector features), A in all, of the network without searched layers [A], and of
        every layer and operation [A, L, O], from one graph per operation."""
        tables = np.zeros((2 + len(VECTOR_FEATURES), LAYERS, len(OPERATIONS)))
        for operation in range(1, len(OPERATIONS)):
            row = np.array([spec.operations.index(OPERATIONS[operation]) for spec in self.layers], dtype=np.int8)
            graph = self.graph(row)
            parts = _counted_by_block(graph)
            searched = [block.stage >= 0 for block in graph.blocks]
            tables[:, :, operation] = parts[searched].T
            fixed = parts[np.logical_not(searched)].sum(axis=0)
        return fixed, tables

    def _sums(self, tokens_NT: Tokens) -> NDArray[np.float64]:
        """float64[A, N]: additive, because what a layer adds depends on its own operation only."""
        fixed, tables = self._tables
        operations_NL = self.operations(self.check_tokens(tokens_NT))
        return tables[:, np.arange(LAYERS), operations_NL].sum(axis=2) + fixed[:, None]

    def cost(self, tokens_NT: Tokens) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        madds_N, params_N = self._sums(tokens_NT)[:2]
        return madds_N.astype(np.int64), params_N.astype(np.int64)

    def kept_layers(self, tokens_NT: Tokens) -> NDArray[np.int64]:
        """int64[N, S]: how many layers of each stage are not skipped; always 1 in the last."""
        kept = self.operations(tokens_NT) > 0
        starts = np.cumsum((0, *STAGE_LAYERS[:-1]))
        return np.add.reduceat(kept.astype(np.int64), starts, axis=1)

    def latency_features(self, tokens_NT: Tokens) -> NDArray[np.float32]:
        """float32[N, 10]: the five `vector_features`, then the layers kept in each stage of more than one.

        Few measurements suffice for these; the one-hot, which UNAS fits, needs thousands.
        """
        kept_NS = self.kept_layers(tokens_NT)[:, :STAGES - 1]
        return np.concatenate([self._sums(tokens_NT)[2:].T, kept_NS], axis=1).astype(np.float32)

    def features(self, tokens_NT: Tokens) -> NDArray[np.float32]:
        """float32[N, 148]: the one-hot, the layers kept in each stage but the last, log multiply-adds and log
        parameters."""
        kept_NS = self.kept_layers(tokens_NT)[:, :STAGES - 1]
        logs_N2 = np.log(self._sums(tokens_NT)[:2]).T
        return np.concatenate([self.onehot(tokens_NT), kept_NS, logs_N2], axis=1).astype(np.float32)


def _counted_by_block(graph: Graph) -> NDArray[np.float64]:
    """float64[blocks, A]."""
    return np.array([(block.madds, block.params, *vector_features(graph, block.nodes)) for block in graph.blocks],
                    dtype=np.float64)


class ProxylessNasS32(ProxylessNas):
    """For 32x32 images such as CIFAR-10: UNAS' narrow channels, final map 4x4."""

    def __init__(self, classes: int = 10, channels: int = 3, width: float = 1.0, narrow: bool = True,
                 resolution: int = 32, stem_stride: int = 1, stage_strides: Sequence[int] = (1, 2, 2, 1, 2, 1),
                 shared: bool = True) -> None:
        super().__init__(classes, channels, width, narrow, resolution, stem_stride, stage_strides, shared)


class ProxylessNasS16(ProxylessNas):
    """For very small images such as scikit-learn's 8x8 digits: half the narrow channels, final map 2x2."""

    def __init__(self, classes: int = 10, channels: int = 1, width: float = 0.5, narrow: bool = True,
                 resolution: int = 16, stem_stride: int = 1, stage_strides: Sequence[int] = (2, 1, 2, 1, 2, 1),
                 shared: bool = True) -> None:
        super().__init__(classes, channels, width, narrow, resolution, stem_stride, stage_strides, shared)
