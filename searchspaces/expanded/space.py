"""The expanded search space of NSS: depth and width of three stages (specification 6; nss 1 and 6).

Nine tokens, all valid and live: per stage the depth 1..16, and the width 1..512 as a range of 32 and a place in it. NSS
narrows it: bins of 4 depths and ranges of 32 widths make (4 * 16)^3 = 262,144 spaces of the 2^39 architectures. The
skeleton is in skeleton.py, the weights of the supernet in supernet.py.

Legend: S = 3 stages; suffixes N, T as in space.py. m^d, m^w are means of depth and width, E[w^2] a second moment.
"""
from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from searchspaces.bins import BinGroup, group_of
from searchspaces.errors import SpaceError
from searchspaces.expanded.skeleton import STAGE_TOKENS, STAGES, ExpandedSkeleton
from searchspaces.space import Tokens
from searchspaces.vectorfeatures import VECTOR

if TYPE_CHECKING:
    from torch import Tensor

    from searchspaces.supernet import Supernet

PART = re.compile(r"d(\d+)w(\d+)")
DRAWS, ATTEMPTS = 16384, 400        # of sample_monotone: architectures per attempt, and attempts


class Expanded(ExpandedSkeleton):
    """See the skeleton for the options."""

    def text(self, tokens_T: Tokens) -> str:
        """`d2w16 d2w32 d2w64`: blocks and channels of each stage."""
        row = np.asarray(tokens_T)[None]
        return " ".join(f"d{d}w{w}" for d, w in zip(self.depths(row)[0], self.widths(row)[0]))

    def parse(self, text: str) -> Tokens:
        parts = [PART.fullmatch(part) for part in text.split()]
        if len(parts) != STAGES or not all(parts):
            raise SpaceError(f"'{text}' is not an architecture of expanded; write depth and width of {STAGES} stages, "
                             f"for example {self.text(self.extremes()[0])}")
        found = [(int(part[1]), int(part[2])) for part in parts if part]
        return self.row([depth for depth, _ in found], [width for _, width in found])

    def bin_groups(self) -> tuple[BinGroup, ...]:
        """Per stage its depth, in bins of `depth_bin`, and its width, each range with all its places."""
        places = tuple(range(self.width_bin))
        groups = []
        for stage in range(STAGES):
            depth, width, place = range(stage * STAGE_TOKENS, (stage + 1) * STAGE_TOKENS)
            bins = [range(start, start + self.depth_bin) for start in range(0, self.depth, self.depth_bin)]
            ranges = self.choices[width].values
            groups += [group_of(f"depth{stage}", (depth,), self.choices, bins),
                       BinGroup(f"width{stage}", (width, place), tuple(((b,), places) for b in range(len(ranges))),
                                tuple(str(label) for label in ranges))]
        return tuple(groups)

    def sample_uniform(self, rng: np.random.Generator, n: int) -> Tokens:
        return rng.integers(0, self.vocabulary_sizes, size=(n, len(self.choices))).astype(np.int8)

    def sample_monotone(self, rng: np.random.Generator, n: int, madds_window: tuple[int, int] | None = None) -> Tokens:
        """n rows, uniform over the architectures with d_1 <= d_2 <= d_3 and w_1 <= w_2 <= w_3 (specification 6.4, after
        RegNet) whose multiply-adds lie in the window, ends included. SpaceError where too few are found."""
        low, high = madds_window or (0, np.iinfo(np.int64).max)
        found: list[Tokens] = []
        for _ in range(ATTEMPTS):
            rows = self.rows(_ascending(rng, self.depth, DRAWS), _ascending(rng, self.width, DRAWS))
            madds = self.cost(rows)[0]
            found.append(rows[(low <= madds) & (madds <= high)])
            if sum(map(len, found)) >= n:
                return np.concatenate(found)[:n]
        raise SpaceError(f"of {n} architectures with ascending depths and widths and {low} to {high} multiply-adds "
                         f"only {sum(map(len, found))} were found in {ATTEMPTS * DRAWS} draws from {self.space_id}; "
                         "widen the window or ask for fewer")

    def repair(self, rng: np.random.Generator, rows: Tokens) -> Tokens:
        return rows  # every value is valid at every position, and live

    def make_supernet(self) -> Supernet:
        from searchspaces.expanded.supernet import ExpandedSupernet  # torch is needed for weights only

        return ExpandedSupernet(self)

    # --- closed forms ----------------------------------------------------------------------------------------------

    def cost(self, tokens_NT: Tokens) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        rows = self.check_tokens(tokens_NT)
        d, w = self.depths(rows), self.widths(rows)
        weights = _weights(self.stem, d, w)
        norms = 2 * w * (2 * d + 1)
        stem = 9 * self.channels * self.stem
        madds = stem * self.resolution ** 2 + weights @ np.array(self.sizes) ** 2 + w[:, -1] * self.classes
        params = stem + 2 * self.stem + (weights + norms).sum(axis=1) + (w[:, -1] + 1) * self.classes
        return madds, params

    def mean_madds(self, probabilities: Sequence[Tensor]) -> Tensor:
        """Exact, by the moments of depths and widths (nss 6, "Space mean"). `probabilities[t]` float[..., V_t]; their
        leading dimensions broadcast."""
        total = probabilities[0].new_tensor(9 * self.channels * self.stem * self.resolution ** 2)
        mean_before = probabilities[0].new_tensor(self.stem)
        for stage, size in enumerate(self.sizes):
            p_depth, p_range, p_place = probabilities[stage * STAGE_TOKENS:(stage + 1) * STAGE_TOKENS]
            d = p_depth.new_tensor(range(1, self.depth + 1))
            start = p_range.new_tensor(range(0, self.width, self.width_bin))    # w = start + place
            place = p_place.new_tensor(range(1, self.width_bin + 1))
            mean_d, mean_start, mean_place = p_depth @ d, p_range @ start, p_place @ place
            mean_w = mean_start + mean_place
            mean_w2 = p_range @ start ** 2 + 2 * mean_start * mean_place + p_place @ place ** 2
            total = total + size ** 2 * (10 * mean_before * mean_w + 9 * mean_w2 + (mean_d - 1) * 18 * mean_w2)
            mean_before = mean_w
        return total + mean_before * self.classes

    def latency_features(self, tokens_NT: Tokens) -> NDArray[np.float32]:
        """float32[N, 15]: per stage the mega multiply-adds of convolutions that run on vectors of channels, padded to
        whole ones, and of those that do not (`_on_vectors`); the mega elements that the latter copy into columns; mega
        elements of all maps; blocks.

        Of 95 measured networks 50 fitted ones predict the rest to 3.0 % with these and to 16 % without the distinction.
        """
        d, w = self.depths(tokens_NT), self.widths(tokens_NT)
        w_before = np.insert(w[:, :-1], 0, self.stem, axis=1)
        areas = np.array(self.sizes) ** 2 / 1e6
        parts = np.zeros((3, *w.shape))
        # Convolutions by what they read: the first 3x3 of a stage and its projection, then all the others.
        for w_in, layers, taps in ((w_before, 1, 10), (w, 2 * d - 1, 9)):
            vectors = _on_vectors(w_in)
            w_read = np.where(w_in < VECTOR, w_in, _padded(w_in))
            parts += layers * areas * np.stack([taps * w_read * _padded(w) * vectors, taps * w_in * w * ~vectors,
                                                9 * w_in * ~vectors])
        return np.concatenate([*parts, areas * w * (2 * d + 1), d], axis=1).astype(np.float32)

    def features(self, tokens_NT: Tokens) -> NDArray[np.float32]:
        """float32[N, 8]: depths and widths as shares of the largest, log multiply-adds and log parameters."""
        logs_N2 = np.log(np.stack(self.cost(tokens_NT), axis=1))
        parts = (self.depths(tokens_NT) / self.depth, self.widths(tokens_NT) / self.width, logs_N2)
        return np.concatenate(parts, axis=1).astype(np.float32)


def _weights(stem: int, depths_NS: NDArray[np.int64], widths_NS: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64[N, S]: weights of the convolutions of each stage. Every one is used once per pixel of the stage's maps."""
    w_before = np.insert(widths_NS[:, :-1], 0, stem, axis=1)
    return 10 * w_before * widths_NS + 9 * widths_NS ** 2 + (depths_NS - 1) * 18 * widths_NS ** 2


def _on_vectors(channels_in: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Does ONNX Runtime keep a convolution of so many input channels in its vector layout? All others take about twice
    as long."""
    return (channels_in < VECTOR) | (channels_in % 4 == 0)


def _padded(channels: NDArray[np.int64]) -> NDArray[np.int64]:
    return -(-channels // VECTOR) * VECTOR


def _ascending(rng: np.random.Generator, most: int, n: int) -> NDArray[np.int64]:
    """int64[n, 3], each row uniform over 1 <= a <= b <= c <= most: three distinct numbers below most + 2 (Floyd's
    algorithm), sorted, less 0, 1 and 2."""
    a, b, c = rng.integers(0, (most, most + 1, most + 2), size=(n, STAGES)).T
    b = np.where(b == a, most, b)
    c = np.where((c == a) | (c == b), most + 1, c)
    return np.sort(np.stack([a, b, c], axis=1), axis=1) - np.arange(STAGES) + 1


class ExpandedS16(Expanded):
    """For very small images such as scikit-learn's 8x8 digits: (2 * 4)^3 = 512 spaces of 2^21 architectures, final map
    4x4 (nss 15)."""

    def __init__(self, classes: int = 10, channels: int = 1, depth: int = 4, width: int = 32, depth_bin: int = 2,
                 width_bin: int = 8, stem: int = 8, resolution: int = 16, strides: Sequence[int] = (1, 2, 2)) -> None:
        super().__init__(classes, channels, depth, width, depth_bin, width_bin, stem, resolution, strides)
