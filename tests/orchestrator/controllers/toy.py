"""A tiny space whose optimum under every budget is known by enumeration."""
from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from orchestrator.controllers.controller import Observation
from searchspaces.graph import Graph
from searchspaces.space import Choice, SearchSpace, Tokens

WIDTHS = (1, 2, 3, 4)


class ToySpace(SearchSpace):
    """One depth (1..3), then a width and a kernel for each of three layers; layers beyond the depth are dead."""

    @property
    def space_id(self) -> str:
        return "toy"

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        layers = [choice for i in range(3) for choice in (Choice(f"width{i}", "width", WIDTHS),
                                                          Choice(f"kernel{i}", "kernel", (3, 5)))]
        return (Choice("depth", "depth", (1, 2, 3)), *layers)

    def live_mask(self, tokens_NT: Tokens) -> NDArray[np.bool_]:
        layer_T = np.array([-1, 0, 0, 1, 1, 2, 2])
        return layer_T <= np.asarray(tokens_NT)[:, :1]

    def graph(self, tokens_T: Tokens) -> Graph:
        raise NotImplementedError("the toy space is never built")

    def latency_features(self, tokens_NT: Tokens) -> NDArray[np.float32]:
        return self.onehot(tokens_NT)

    def everything(self) -> Tokens:
        rows = np.array(list(np.ndindex(*self.vocabulary_sizes)), dtype=np.int8)
        return np.unique(self.canonical(rows), axis=0)


class ToyLatency:
    """0.5 ms plus, per live layer, its width, half as much again for the large kernel."""

    def __init__(self, space: ToySpace) -> None:
        self.space = space

    def predict(self, tokens_NT: Tokens) -> NDArray[np.float64]:
        live = self.space.live_mask(tokens_NT)
        width = (1.0 + tokens_NT[:, 1::2]) * live[:, 1::2]
        return 0.5 + (width * (1 + 0.5 * tokens_NT[:, 2::2])).sum(axis=1)


def toy_accuracy(space: ToySpace, tokens_NT: Tokens) -> NDArray[np.float64]:
    """Saturating in width; the large kernel helps in the last layer only and harms elsewhere."""
    live = space.live_mask(tokens_NT)
    gain = np.sqrt(1.0 + tokens_NT[:, 1::2]) * live[:, 1::2]
    kernel = tokens_NT[:, 2::2] * live[:, 2::2] * np.array([-0.3, -0.1, 0.6])
    return 0.4 + 0.08 * (gain + kernel).sum(axis=1)


def toy_trials(space: ToySpace, tokens_NT: Tokens) -> list[Observation]:
    return [Observation(row, float(a), float(ms)) for row, a, ms in
            zip(tokens_NT, toy_accuracy(space, tokens_NT), ToyLatency(space).predict(tokens_NT), strict=True)]
