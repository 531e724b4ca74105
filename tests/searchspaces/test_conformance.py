"""The suite certifies what we ship, and catches each way of breaking the contract."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from searchspaces.catalogue import SPACES, make_space
from searchspaces.conformance import check_space
from searchspaces.graph import Graph, GraphBuilder
from searchspaces.mobilenetv3.space import MobileNetV3S16
from searchspaces.network import GraphNetwork
from searchspaces.space import Choice, SearchSpace, Tokens
from searchspaces.supernet import Supernet


class Tiny(SearchSpace):
    """A perceptron of one or two hidden layers; the second width is dead with one layer and never 12 after 4."""

    choices = (Choice("depth", "depth", (1, 2)), Choice("first", "width", (4, 8)),  # type: ignore[assignment]
               Choice("second", "width", (4, 8, 12)))
    space_id = "tiny"  # type: ignore[assignment]

    def live_mask(self, tokens_NT: Tokens) -> NDArray[np.bool_]:
        live = np.ones(tokens_NT.shape, dtype=bool)
        live[:, 2] = tokens_NT[:, 0] == 1
        return live

    def valid(self, prefix: Sequence[int] | Tokens) -> NDArray[np.bool_]:
        mask = super().valid(prefix)
        if len(prefix) == 2 and prefix[1] == 0:
            mask[2] = False
        return mask

    def size(self) -> int:
        return 2 + 2 + 3

    def graph(self, tokens_T: Tokens) -> Graph:
        builder = GraphBuilder(self.channels, 6)
        builder.begin_block("body", 0, "body")
        x = builder.flatten("input", "flatten")
        for index in range(int(tokens_T[0]) + 1):
            width = self.choices[1 + index].values[int(tokens_T[1 + index])]
            x = builder.linear(x, f"layer{index}", int(width))
            x = builder.activation(x, f"act{index}", "relu")
        builder.begin_block("head", -1, "head")
        builder.linear(x, "head", self.classes)
        return builder.build()

    def make_supernet(self) -> Supernet:
        return TinySupernet(self)


class TinySupernet(Supernet):
    leak = 0.0  # what a broken supernet adds to its logits

    def __init__(self, space: Tiny) -> None:
        super().__init__()
        self.space = space
        self.layer0, self.layer1 = nn.Linear(space.channels * 36, 8), nn.Linear(8, 12)
        self.heads = nn.ModuleList([nn.Linear(8, space.classes), nn.Linear(12, space.classes)])
        self.set_active(space.extremes()[1])

    def set_active(self, tokens_T: Tokens) -> None:
        self._mixture = [torch.eye(len(c.values))[int(t)] for t, c in zip(tokens_T, self.space.choices)]
        self._tokens = tokens_T

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_mixture(images, self._mixture) + self.leak

    def forward_mixture(self, images: Tensor, mixture: Sequence[Tensor]) -> Tensor:
        one = self.layer0(images.flatten(1)).relu() * self._mask(1, mixture)
        two = self.layer1(one).relu() * self._mask(2, mixture)
        return mixture[0][0] * self.heads[0](one) + mixture[0][1] * self.heads[1](two)

    def _mask(self, position: int, mixture: Sequence[Tensor]) -> Tensor:
        widths = self.space.choices[position].values
        prefixes = torch.stack([torch.arange(int(widths[-1])) < int(width) for width in widths]).float()
        return mixture[position] @ prefixes

    def extract(self, tokens_T: Tokens) -> nn.Module:
        network = GraphNetwork(self.space.graph(tokens_T))
        sources = {"layer0": self.layer0, "layer1": self.layer1, "head": self.heads[int(tokens_T[0])]}
        state = {}
        for name, tensor in network.state_dict().items():
            scope, suffix = name.split(".")
            state[name] = getattr(sources[scope], suffix)[tuple(slice(size) for size in tensor.shape)]
        network.load_state_dict(state)
        return network


@pytest.mark.parametrize("name", SPACES)
def test_shipped_spaces_are_certified(name: str) -> None:
    smaller = {"mobilenetv3": {"resolution": 48}, "nasbench201": {"cells": 2},  # the same code in less time
               "darts": {"cells": 3, "width": 4, "resolution": 8},
               "proxylessnas": {"width": 0.25, "resolution": 64},
               "efficientnet_lite": {"width": 0.25, "resolution": [33, 48]},
               "expanded": {"depth": 8, "width": 64, "resolution": 8}}
    assert check_space(make_space(name, classes=7, channels=2, options=smaller.get(name, {}))) == []


def test_searched_resolution_is_certified() -> None:
    assert check_space(MobileNetV3S16(resolution=[12, 16])) == []


def test_own_space_is_certified() -> None:
    assert check_space(Tiny()) == []


class NoTokens(Tiny):
    choices = ()  # type: ignore[assignment]


class WrongType(Tiny):
    def sample_uniform(self, rng: np.random.Generator, n: int) -> Tokens:
        return super().sample_uniform(rng, n).astype(np.int64)  # type: ignore[return-value]


class OutOfRange(Tiny):
    def sample_uniform(self, rng: np.random.Generator, n: int) -> Tokens:
        return super().sample_uniform(rng, n) + np.int8(3)


class IgnoresValidity(Tiny):
    def sample_uniform(self, rng: np.random.Generator, n: int) -> Tokens:
        return self.canonical(rng.integers(0, self.vocabulary_sizes, size=(n, 3)).astype(np.int8))


class NotCanonical(Tiny):
    def sample_uniform(self, rng: np.random.Generator, n: int) -> Tokens:
        return rng.integers(0, 2, size=(n, 3)).astype(np.int8)


class OwnRandomness(Tiny):
    state = np.random.default_rng(0)

    def sample_uniform(self, rng: np.random.Generator, n: int) -> Tokens:
        return super().sample_uniform(self.state, n)


class CanonicalDrifts(Tiny):
    def canonical(self, tokens_NT: Tokens) -> Tokens:
        rows = super().canonical(tokens_NT)
        rows[:, 1] = (rows[:, 1] + 1) % 2
        return rows


class LivenessOfTheDead(Tiny):
    def live_mask(self, tokens_NT: Tokens) -> NDArray[np.bool_]:
        live = super().live_mask(tokens_NT)
        live[:, 1] = tokens_NT[:, 2] == 0
        return live


class MutatesInPlace(Tiny):
    def mutate(self, rng: np.random.Generator, tokens_NT: Tokens, probability: float) -> Tokens:
        tokens_NT[:] = super().mutate(rng, tokens_NT, probability)
        return tokens_NT


class MutatesIntoInvalid(Tiny):
    def mutate(self, rng: np.random.Generator, tokens_NT: Tokens, probability: float) -> Tokens:
        return np.tile(np.array([1, 0, 2], dtype=np.int8), (len(tokens_NT), 1))


class CrossoverOfHalf(Tiny):
    def crossover(self, rng: np.random.Generator, a_NT: Tokens, b_NT: Tokens) -> Tokens:
        return super().crossover(rng, a_NT, b_NT)[::2]


class ExtremesSwapped(Tiny):
    def extremes(self) -> Tokens:
        return super().extremes()[::-1]


class WrongSize(Tiny):
    def size(self) -> int:
        return 8


class SizeTooSmall(Tiny):
    def size(self) -> int:
        return 3


class BlindCode(Tiny):
    def onehot(self, tokens_NT: Tokens) -> NDArray[np.float32]:
        return super().onehot(tokens_NT)[:, :4]


class CodeOfBatch(Tiny):
    def onehot(self, tokens_NT: Tokens) -> NDArray[np.float32]:
        return super().onehot(tokens_NT) / np.float32(len(tokens_NT))


class SameText(Tiny):
    def text(self, tokens_T: Tokens) -> str:
        return f"depth {tokens_T[0]}"


class DeadTokenBuilds(Tiny):
    def graph(self, tokens_T: Tokens) -> Graph:
        graph = super().graph(tokens_T)
        return Graph(graph.nodes, graph.blocks[:1] * (1 + int(tokens_T[2])) + graph.blocks[1:])


class MergesDifferent(Tiny):
    def canonical(self, tokens_NT: Tokens) -> Tokens:
        rows = super().canonical(tokens_NT)
        rows[rows[:, 0] == 1, 1] = 1
        return rows

    def size(self) -> int:
        return 2 + 3


class ForgetsTheHead(Tiny):
    def cost(self, tokens_NT: Tokens) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        madds, params = super().cost(tokens_NT)
        return madds, params - 10


class NegativeFeatures(Tiny):
    def latency_features(self, tokens_NT: Tokens) -> NDArray[np.float32]:
        return -super().latency_features(tokens_NT)


class FeaturesOfTheDead(Tiny):
    def latency_features(self, tokens_NT: Tokens) -> NDArray[np.float32]:
        return tokens_NT.astype(np.float32)


class WrongClasses(Tiny):
    def graph(self, tokens_T: Tokens) -> Graph:
        return Tiny(self.classes + 1, self.channels).graph(tokens_T)


class WrongChannels(Tiny):
    def graph(self, tokens_T: Tokens) -> Graph:
        return Tiny(self.classes, 1).graph(tokens_T)


class LooseNodes(Tiny):
    def graph(self, tokens_T: Tokens) -> Graph:
        graph = super().graph(tokens_T)
        return Graph(graph.nodes, graph.blocks[1:])


class Unpicklable(Tiny):
    def __init__(self, classes: int = 10, channels: int = 3) -> None:
        super().__init__(classes, channels)
        self.function = lambda: None


class LeakySupernet(Tiny):
    def make_supernet(self) -> Supernet:
        supernet = TinySupernet(self)
        supernet.leak = 0.01
        return supernet


class DetachedMixture(Tiny):
    def make_supernet(self) -> Supernet:
        return Detached(self)


class Detached(TinySupernet):
    def forward_mixture(self, images: Tensor, mixture: Sequence[Tensor]) -> Tensor:
        return super().forward_mixture(images, [mixture[0].detach(), *mixture[1:]])


class SupernetCrashes(Tiny):
    def make_supernet(self) -> Supernet:
        raise TypeError("oops")


BROKEN: dict[type[SearchSpace], str] = {
    NoTokens: "choices is empty", WrongType: "int8", OutOfRange: "outside 0..", IgnoresValidity: "valid() excludes",
    NotCanonical: "not canonical", OwnRandomness: "equal generators", CanonicalDrifts: "not idempotent",
    LivenessOfTheDead: "live_mask changes", MutatesInPlace: "in place", MutatesIntoInvalid: "mutate gives value",
    CrossoverOfHalf: "crossover must give", ExtremesSwapped: "more multiply-adds", WrongSize: "enumeration finds 7",
    SizeTooSmall: "a sample alone holds", BlindCode: "canonical rows differ", CodeOfBatch: "same row of a batch",
    SameText: "text is the same", DeadTokenBuilds: "changes the graph",
    MergesDifferent: "making a row canonical changes the graph", ForgetsTheHead: "cost gives",
    NegativeFeatures: "not negative", FeaturesOfTheDead: "changes latency_features", WrongClasses: "10 classes",
    WrongChannels: "3 channels", LooseNodes: "exactly one block", Unpicklable: "pickles' raised",
    LeakySupernet: "extracted network differs", DetachedMixture: "no finite gradient",
    SupernetCrashes: "TypeError: oops",
}


@pytest.mark.parametrize("broken, expected", BROKEN.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_each_broken_space_is_caught(broken: type[SearchSpace], expected: str) -> None:
    problems = check_space(broken())
    assert any(expected in problem for problem in problems), problems
