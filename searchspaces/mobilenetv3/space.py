"""The MobileNetV3 space of Once-for-all, searched by PNAG (specification 2).

Five units of two to four inverted residual layers; per layer an expand ratio and a depthwise kernel. 45 tokens, unit by
unit: the depth, then (expand, kernel) of four layers; layers beyond the depth are dead. A list of resolutions adds a
46th token. Size 7371^5 = 2.18e19 per resolution. The skeleton is in skeleton.py, the shared weights in supernet.py.

Legend: U = 5 units, L = 20 layers (4 per unit), R resolutions; suffixes N, T, D, F as in searchspaces/space.py.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from searchspaces.bins import BinGroup, group_of
from searchspaces.mobilenetv3.skeleton import (
    DEPTHS,
    EXPANDS,
    KERNELS,
    UNIT_LAYERS,
    UNIT_TOKENS,
    UNITS,
    MobileNetV3Skeleton,
)
from searchspaces.space import Tokens

if TYPE_CHECKING:
    from searchspaces.supernet import Supernet


class MobileNetV3(MobileNetV3Skeleton):
    """`resolution` is one number, or a list that becomes a searched token. `width` scales every channel count."""

    def size(self) -> int:
        per_layer = len(EXPANDS) * len(KERNELS)
        return int(sum(per_layer ** depth for depth in DEPTHS)) ** UNITS * len(self.resolutions)

    def bin_groups(self) -> tuple[BinGroup, ...]:
        """Per unit its depth, all its expand ratios and all its kernels; the resolution."""
        groups = []
        for u in range(UNITS):
            start = u * UNIT_TOKENS
            groups += [group_of(f"depth{u}", (start,), self.choices),
                       group_of(f"expand{u}", range(start + 1, start + UNIT_TOKENS, 2), self.choices),
                       group_of(f"kernel{u}", range(start + 2, start + UNIT_TOKENS, 2), self.choices)]
        if len(self.resolutions) > 1:
            groups.append(group_of("resolution", (UNITS * UNIT_TOKENS,), self.choices))
        return tuple(groups)

    def onehot(self, tokens_NT: Tokens) -> NDArray[np.float32]:
        """float32[N, 120 (+R)]: 20 kernel one-hots, then 20 expand one-hots (PNAG core/mlp.py), resolution last.

        The depth is implicit: a dead layer is zero in both halves.
        """
        _, expand_NL, kernel_NL, resolution_N = self.split(tokens_NT)
        live_NL1 = self.live_layers(tokens_NT)[:, :, None]
        eye = np.eye(3, dtype=np.float32)
        parts = [(eye[tokens] * live_NL1).reshape(len(tokens_NT), -1) for tokens in (kernel_NL, expand_NL)]
        if len(self.resolutions) > 1:
            parts.append(np.eye(len(self.resolutions), dtype=np.float32)[resolution_N])
        return np.concatenate(parts, axis=1)

    def make_supernet(self) -> Supernet:
        from searchspaces.mobilenetv3.supernet import MobileNetV3Supernet  # torch is needed for weights only

        return MobileNetV3Supernet(self)

    # --- look-ups --------------------------------------------------------------------------------------------------

    @cached_property
    def _cost_tables(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(madds, params) of the layers [2, R, L, expand, kernel] and of the rest [2, R], from nine graphs each."""
        layers = np.zeros((2, len(self.resolutions), UNITS * UNIT_LAYERS, len(EXPANDS), len(KERNELS)), dtype=np.int64)
        fixed = np.zeros((2, len(self.resolutions)), dtype=np.int64)
        tail = [[r] for r in range(len(self.resolutions))] if len(self.resolutions) > 1 else [[]]
        for r, e, k in np.ndindex(len(self.resolutions), len(EXPANDS), len(KERNELS)):
            row = ([len(DEPTHS) - 1] + [e, k] * UNIT_LAYERS) * UNITS + tail[r]
            blocks = self.graph(np.array(row, dtype=np.int8)).blocks
            searched = [block for block in blocks if block.stage >= 0]
            layers[:, r, :, e, k] = np.array([(block.madds, block.params) for block in searched]).T
            fixed[:, r] = np.sum([(block.madds, block.params) for block in blocks if block.stage < 0], axis=0)
        return layers, fixed

    def cost(self, tokens_NT: Tokens) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Exact and additive: a layer's cost depends on its own expand and kernel and on the resolution only."""
        rows = self.check_tokens(tokens_NT)
        _, expand_NL, kernel_NL, resolution_N = self.split(rows)
        layers, fixed = self._cost_tables
        each_2NL = layers[:, resolution_N[:, None], np.arange(UNITS * UNIT_LAYERS), expand_NL, kernel_NL]
        total_2N = (each_2NL * self.live_layers(rows)).sum(axis=2) + fixed[:, resolution_N]
        return total_2N[0], total_2N[1]

    def latency_features(self, tokens_NT: Tokens) -> NDArray[np.float32]:
        """float32[N, 26]: per unit, sums of expand and expand*k^2 of its first layer and of the rest, count of the
        rest; then 1. With searched resolutions the same 26 follow again, scaled by the image area."""
        _, expand_NL, kernel_NL, resolution_N = self.split(tokens_NT)
        live = self.live_layers(tokens_NT).reshape(-1, UNITS, UNIT_LAYERS)
        expand = np.array(EXPANDS)[expand_NL].reshape(live.shape) * live
        taps = expand * np.array(KERNELS)[kernel_NL].reshape(live.shape) ** 2
        parts = [expand[:, :, 0], taps[:, :, 0], expand[:, :, 1:].sum(axis=2), taps[:, :, 1:].sum(axis=2),
                 live[:, :, 1:].sum(axis=2)]
        features = np.concatenate([*parts, np.ones((len(live), 1))], axis=1).astype(np.float32)
        if len(self.resolutions) == 1:
            return features
        area = (np.array(self.resolutions, dtype=np.float32) / self.resolutions[-1]) ** 2
        return np.concatenate([features, features * area[resolution_N, None]], axis=1)


class MobileNetV3S32(MobileNetV3):
    """The CIFAR variant (specification 2.6): width 0.5, no stride in stem, final map 4x4 at 32 pixels."""

    def __init__(self, classes: int = 10, channels: int = 3, width: float = 0.5,
                 resolution: int | Sequence[int] = 32, stem_stride: int = 1,
                 unit_strides: Sequence[int] = (1, 2, 2, 1, 2)) -> None:
        super().__init__(classes, channels, width, resolution, stem_stride, unit_strides)


class MobileNetV3S16(MobileNetV3):
    """The variant for very small images such as scikit-learn's 8x8 digits, trained within a minute on one core."""

    def __init__(self, classes: int = 10, channels: int = 1, width: float = 0.5,
                 resolution: int | Sequence[int] = 16, stem_stride: int = 1,
                 unit_strides: Sequence[int] = (2, 1, 2, 1, 2)) -> None:
        super().__init__(classes, channels, width, resolution, stem_stride, unit_strides)
