"""The EfficientNet-Lite space: depth, expand ratio, kernel and resolution of a network that starts from ImageNet.

30 tokens at depth 1: per stage its depth (1 to that of EfficientNet-Lite) and per layer an expand ratio and, where the
kernel is 5x5, whether it shrinks to 3x3; layers beyond the depth are dead; resolution last. Size 2.4e10 per resolution.
The skeleton is in skeleton.py, the shared weights in supernet.py, those from ImageNet in pretrained.py.

Legend: S = 6 stages, L = 15 layers, A quantities that add up, E, K, R as in the skeleton; N, T as in space.py.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from searchspaces.bins import BinGroup, group_of
from searchspaces.efficientnet_lite.skeleton import EXPANDS, KERNELS, STAGES, EfficientNetLiteSkeleton
from searchspaces.errors import SpaceError
from searchspaces.space import Tokens
from searchspaces.vectorfeatures import VECTOR_FEATURES, vector_features

if TYPE_CHECKING:
    from searchspaces.supernet import Supernet


class EfficientNetLite(EfficientNetLiteSkeleton):
    """See the skeleton for the options."""

    def size(self) -> int:
        total = len(self.resolutions)
        for stage, deepest in enumerate(self.depths):
            per_layer = [len(EXPANDS) * len(spec.kernels) for spec in self.layers if spec.stage == stage]
            total *= sum(prod(per_layer[:depth]) for depth in range(1, deepest + 1))
        return total

    def bin_groups(self) -> tuple[BinGroup, ...]:
        """Per stage its depth, all its expand ratios and all its kernels; the resolution."""
        groups = []
        depth, expand, kernel, resolution = self.positions
        for stage in range(len(STAGES)):
            own = [i for i, spec in enumerate(self.layers) if spec.stage == stage]
            for name, found in (("depth", [depth[stage]]), ("expand", [expand[i] for i in own]),
                                ("kernel", [kernel[i] for i in own])):
                if found[0] >= 0:
                    groups.append(group_of(f"{name}{stage}", found, self.choices))
        if resolution >= 0:
            groups.append(group_of("resolution", (resolution,), self.choices))
        return tuple(groups)

    def text(self, tokens_T: Tokens) -> str:
        """`3x3e6 3x3e4 / 5x5e6 / ...`, stage by stage; `/ r64` follows where resolution is searched."""
        row = np.asarray(tokens_T)[None]
        _, expand, kernel, resolution = (part[0] for part in self.split(row))
        live, stages = self.live_layers(row)[0], []
        for stage in range(len(STAGES)):
            own = [i for i, spec in enumerate(self.layers) if spec.stage == stage and live[i]]
            stages.append(" ".join(f"{KERNELS[kernel[i]]}x{KERNELS[kernel[i]]}e{EXPANDS[expand[i]]}" for i in own))
        tail = [f"r{self.resolutions[resolution]}"] if len(self.resolutions) > 1 else []
        return " / ".join([*stages, *tail])

    def parse(self, text: str) -> Tokens:
        """The canonical tokens of `text`."""
        try:
            parts = [part.split() for part in text.split("/")]
            row = self._row(parts[:len(STAGES)], parts[len(STAGES):])
        except (ValueError, IndexError) as error:
            raise SpaceError(f"'{text}' is not an architecture of {self.space_id}; write the layers of each stage, for "
                             f"example {self.text(np.zeros(len(self.choices), dtype=np.int8))}") from error
        return self.check_tokens(row[None])[0]

    def _row(self, stages: Sequence[Sequence[str]], tail: Sequence[Sequence[str]]) -> Tokens:
        """ValueError or IndexError where a value is not allowed."""
        depth_at, expand_at, kernel_at, resolution_at = self.positions
        row = np.zeros(len(self.choices) + 1, dtype=np.int8)    # -1 writes what is no token to the end
        for at, layers, deepest in zip(depth_at, stages, self.depths, strict=True):
            row[at] = range(1, deepest + 1).index(len(layers))
        for i, spec in enumerate(self.layers):
            if spec.index < len(stages[spec.stage]):
                kernel, _, expand = stages[spec.stage][spec.index].partition("e")
                row[expand_at[i]] = EXPANDS.index(int(expand))
                row[kernel_at[i]] = [f"{k}x{k}" for k in spec.kernels].index(kernel)
        if len(tail) != (len(self.resolutions) > 1):
            raise ValueError("one resolution where it is searched, none where it is fixed")
        for part in tail:
            row[resolution_at] = self.resolutions.index(int(part[0].removeprefix("r")))
        return row[:-1]

    def make_supernet(self) -> Supernet:
        from searchspaces.efficientnet_lite.supernet import EfficientNetLiteSupernet  # torch is for weights only

        return EfficientNetLiteSupernet(self)

    # --- look-ups --------------------------------------------------------------------------------------------------

    @cached_property
    def _tables(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(multiply-adds, parameters, vector features), A in all, of the network without searched layers [A, R] and of
        every layer [A, R, L, E, K], from one graph per resolution, expand ratio and kernel."""
        shape = (2 + len(VECTOR_FEATURES), len(self.resolutions))
        fixed, layers = np.zeros(shape), np.zeros((*shape, len(self.layers), len(EXPANDS), len(KERNELS)))
        depth_at, expand_at, kernel_at, resolution_at = self.positions
        for r, e, k in np.ndindex(len(self.resolutions), len(EXPANDS), len(KERNELS)):
            row = np.zeros(len(self.choices) + 1, dtype=np.int8)
            row[depth_at] = np.array(self.depths) - 1
            row[expand_at], row[kernel_at], row[resolution_at] = e, k, r
            graph = self.graph(row[:-1])
            parts = np.array([(block.madds, block.params, *vector_features(graph, block.nodes))
                              for block in graph.blocks], dtype=np.float64)
            searched = np.array([block.stage >= 0 for block in graph.blocks])
            layers[:, r, :, e, k] = parts[searched].T
            fixed[:, r] = parts[~searched].sum(axis=0)
        return fixed, layers

    def _sums(self, tokens_NT: Tokens) -> NDArray[np.float64]:
        """float64[A, N]: additive, because what a layer adds depends on its own choices and the resolution only."""
        rows = self.check_tokens(tokens_NT)
        _, expand_NL, kernel_NL, resolution_N = self.split(rows)
        fixed, layers = self._tables
        each_ANL = layers[:, resolution_N[:, None], np.arange(len(self.layers)), expand_NL, kernel_NL]
        return (each_ANL * self.live_layers(rows)).sum(axis=2) + fixed[:, resolution_N]

    def cost(self, tokens_NT: Tokens) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        madds_N, params_N = self._sums(tokens_NT)[:2]
        return madds_N.astype(np.int64), params_N.astype(np.int64)

    def latency_features(self, tokens_NT: Tokens) -> NDArray[np.float32]:
        """float32[N, 10]: the five `vector_features`, then the layers of each stage whose depth is searched."""
        depth_NS = self.split(tokens_NT)[0][:, :-1].astype(np.float64) + 1
        return np.concatenate([self._sums(tokens_NT)[2:].T, depth_NS], axis=1).astype(np.float32)

    def features(self, tokens_NT: Tokens) -> NDArray[np.float32]:
        """float32[N, 87]: the one-hot, log multiply-adds, log parameters and log resolution."""
        resolution_N = np.log(np.array(self.resolutions, dtype=np.float64))[self.split(tokens_NT)[3]]
        logs_NA = np.stack([*np.log(self._sums(tokens_NT)[:2]), resolution_N], axis=1)
        return np.concatenate([self.onehot(tokens_NT), logs_NA], axis=1).astype(np.float32)


class EfficientNetLiteS(EfficientNetLite):
    """For very small images such as scikit-learn's 8x8 digits: width 0.25, no stride in the stem."""

    def __init__(self, classes: int = 10, channels: int = 1, width: float = 0.25, depth: float = 1.0,
                 resolution: int | Sequence[int] = (12, 16, 24), stem_stride: int = 1) -> None:
        super().__init__(classes, channels, width, depth, resolution, stem_stride)
