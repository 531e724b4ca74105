"""The expanded space against the worked numbers of NSS (specification searchspaces 6; nss 1, 6, 13 and 14)."""
from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from searchspaces.bins import checked_groups
from searchspaces.errors import ConfigError, SpaceError
from searchspaces.expanded.space import Expanded, ExpandedS16
from searchspaces.graph import Graph, node_madds, node_params
from searchspaces.proxylessnas.space import ProxylessNasS16

SPACE = Expanded()
SMALL = ExpandedS16()


def narrowed(space: Expanded, bins: tuple[int, ...]) -> list[Tensor]:
    """The uniform distribution over the space of one bin per group, as weights of every position."""
    weights = [torch.zeros(int(size), dtype=torch.float64) for size in space.vocabulary_sizes]
    for group, b in zip(space.bin_groups(), bins, strict=True):
        for position, tokens in zip(group.positions, group.bins[b]):
            weights[position][list(tokens)] = 1.0 / len(tokens)
    return weights


# --- tokens --------------------------------------------------------------------------------------------------------


def test_tokens() -> None:
    assert SPACE.vocabulary_sizes.tolist() == [16, 16, 32] * 3
    assert SPACE.size() == 2 ** 39 and SMALL.size() == 2 ** 21
    assert SPACE.choices[1].values[1] == "33-64"
    row = SPACE.parse("d2w16 d16w33 d1w512")
    assert row.tolist() == [1, 0, 15, 15, 1, 0, 0, 15, 31]
    assert SPACE.text(row) == "d2w16 d16w33 d1w512"
    assert np.array_equal(SPACE.row((2, 16, 1), (16, 33, 512)), row)
    rows = SPACE.sample_uniform(np.random.default_rng(0), 200)
    assert np.array_equal(SPACE.rows(SPACE.depths(rows), SPACE.widths(rows)), rows)
    assert [SPACE.text(row) for row in SPACE.extremes()] == ["d1w1 d1w1 d1w1", "d16w512 d16w512 d16w512"]


def test_bins_are_the_grid_of_nss() -> None:
    groups = checked_groups(SPACE)
    assert [len(group) for group in groups] == [4, 16] * 3          # 60 logits
    assert np.prod([len(group) for group in groups]) == 262_144
    assert groups[0].labels == ("1-4", "5-8", "9-12", "13-16") and groups[3].labels[1] == "33-64"
    assert groups[3].positions == (4, 5) and groups[3].bins[1] == ((1,), tuple(range(32)))
    assert [len(group) for group in checked_groups(SMALL)] == [2, 4] * 3


def test_bad_options_and_texts() -> None:
    for options, expected in (({"width": 500}, "width of expanded is 500 in bins of 32"),
                              ({"depth": 4}, "depth of expanded is 4 in bins of 4"),
                              ({"width_bin": 2}, "width / width_bin of expanded is 256"),
                              ({"strides": (1, 2)}, "strides of expanded are \\[1, 2\\]; give 3"),
                              ({"stem": 0}, "0 channels in its stem")):
        with pytest.raises(ConfigError, match=expected):
            Expanded(**options)  # type: ignore[arg-type]
    with pytest.raises(SpaceError, match="for example d1w1 d1w1 d1w1"):
        SPACE.parse("d2w16 d2w32")
    with pytest.raises(SpaceError, match="each in 1..512"):
        SPACE.parse("d2w16 d2w513 d2w16")


# --- cost ----------------------------------------------------------------------------------------------------------


def test_worked_costs() -> None:
    rows = np.stack([SPACE.row((2, 2, 2), (16, 32, 64)), SPACE.row((3, 3, 3), (16, 32, 64)), *SPACE.extremes()])
    madds, params = SPACE.cost(rows)
    assert madds[0] == 26_919_552
    assert madds[2:] / 1e9 == pytest.approx([0.00062, 99.2], rel=5e-3)
    assert params[3] == pytest.approx(224.8e6, rel=5e-4)
    for row, without, params_without in ((rows[0], 26_657_408, None), (rows[1], 40_813_184, 272_474)):  # ResNet-20
        graph = SPACE.graph(row)
        shapes = {node.name: node.shape for node in graph.nodes}
        projection = [node for node in graph.nodes if node.name.startswith("stage0.block0.shortcut")]
        assert graph.madds - sum(node_madds(n, shapes[n.inputs[0]]) for n in projection) == without
        assert params_without in (None, graph.params - sum(node_params(n, shapes[n.inputs[0]]) for n in projection))


def counted_features(graph: Graph) -> NDArray[np.float64]:
    """The features of `Expanded.latency_features`, convolution by convolution."""
    shapes = {node.name: node.shape for node in graph.nodes}
    sums = np.zeros((5, 3))
    for block in graph.blocks:
        sums[4, block.stage] += block.stage >= 0
        for node in graph.nodes:
            if node.op == "conv" and node.name in block.nodes and block.stage >= 0:
                (c_in, *_), (c_out, height, width) = shapes[node.inputs[0]], node.shape
                kernel, pixels = int(node.attributes["kernel"]), height * width / 1e6
                if c_in < 16 or c_in % 4 == 0:
                    padded_in = c_in if c_in < 16 else -(-c_in // 16) * 16
                    sums[0, block.stage] += kernel ** 2 * padded_in * -(-c_out // 16) * 16 * pixels
                else:
                    sums[1, block.stage] += kernel ** 2 * c_in * c_out * pixels
                    sums[2, block.stage] += 9 * c_in * pixels * (kernel == 3)
                sums[3, block.stage] += c_out * pixels
    return sums.ravel()


@pytest.mark.parametrize("space", [SPACE, SMALL, ExpandedS16(channels=3, classes=7, resolution=9, strides=(2, 1, 2))])
def test_cost_and_features_are_those_of_the_graphs(space: Expanded) -> None:
    rows = np.concatenate([space.extremes(), space.sample_uniform(np.random.default_rng(0), 20)])
    graphs = [space.graph(row) for row in rows]
    assert np.array_equal(space.cost(rows), [[graph.madds for graph in graphs], [graph.params for graph in graphs]])
    features = space.latency_features(rows)
    assert features == pytest.approx(np.array([counted_features(graph) for graph in graphs]), rel=1e-5)
    assert space.features(rows)[1, :6].tolist() == [1.0] * 6


# --- the mean of a space -------------------------------------------------------------------------------------------


def test_mean_of_the_worked_space() -> None:
    weights = narrowed(SPACE, (1, 1, 2, 3, 1, 2))  # depths 5-8, 9-12, 5-8, widths 33-64, 97-128, 65-96
    assert round(float(SPACE.mean_madds(weights))) == 930_230_469
    assert ProxylessNasS16().mean_madds(weights) is None


def means_of_all_spaces() -> NDArray[np.float64]:
    """float64[4, 16, 4, 16, 4, 16]: every position's leading dimensions are its own axis, so that they broadcast."""
    groups, weights = SPACE.bin_groups(), [torch.zeros(0)] * 9
    for axis, group in enumerate(groups):
        for i, position in enumerate(group.positions):
            table = torch.zeros(len(group), int(SPACE.vocabulary_sizes[position]), dtype=torch.float64)
            for b, tokens in enumerate(group.bins):
                table[b, list(tokens[i])] = 1.0 / len(tokens[i])
            weights[position] = table.reshape([len(group) if a == axis else 1 for a in range(len(groups))] + [-1])
    return SPACE.mean_madds(weights).numpy()


def test_means_of_all_spaces() -> None:
    means = means_of_all_spaces()
    assert means.size == 262_144
    assert means.min() == pytest.approx(21.3e6, abs=0.05e6) and means.max() == pytest.approx(84.39e9, abs=0.005e9)
    assert np.median(means) == pytest.approx(11.81e9, abs=0.005e9)
    within = {target: int((np.abs(means / target - 1) < 0.1).sum()) for target in (600e6, 200e6, 4e9)}
    assert within == {600e6: 980, 200e6: 183, 4e9: 10_683}


def test_mean_is_that_of_all_members_and_has_its_gradient() -> None:
    space = ExpandedS16(depth=2, depth_bin=1, width=6, width_bin=3)
    weights = [torch.rand(int(size), dtype=torch.float64) for size in space.vocabulary_sizes]
    weights = [(w / w.sum()).requires_grad_() for w in weights]
    rows = np.array(list(itertools.product(*(range(v) for v in space.vocabulary_sizes))), dtype=np.int8)
    chances = torch.ones(len(rows), dtype=torch.float64)
    for position, weight in enumerate(weights):
        chances = chances * weight[rows[:, position].astype(np.int64)]
    brute, mean = chances @ torch.tensor(space.cost(rows)[0], dtype=torch.float64), space.mean_madds(weights)
    assert float(mean.detach()) == pytest.approx(float(brute.detach()), rel=1e-12)
    for weight, a, b in zip(weights, torch.autograd.grad(brute, weights), torch.autograd.grad(mean, weights)):
        along = torch.eye(len(weight), dtype=torch.float64) - 1.0 / len(weight)  # weights keep their sum of 1
        assert torch.allclose(along @ a, along @ b, rtol=1e-9)


# --- ascending architectures ---------------------------------------------------------------------------------------


def test_monotone_samples_are_uniform_and_in_the_window() -> None:
    rng = np.random.default_rng(0)
    rows = SPACE.check_tokens(SPACE.sample_monotone(rng, 300, (360_000_000, 400_000_000)))
    madds = SPACE.cost(rows)[0]
    assert len(rows) == 300 and madds.min() >= 360_000_000 and madds.max() <= 400_000_000
    assert (np.diff(SPACE.depths(rows)) >= 0).all() and (np.diff(SPACE.widths(rows)) >= 0).all()
    free = SMALL.sample_monotone(rng, 20_000)
    depths, counts = np.unique(SMALL.depths(free), axis=0, return_counts=True)
    assert len(depths) == 20                                             # of 4 depths, with repetition
    assert (np.abs(counts - 1000) < 5 * 1000 ** 0.5).all()


def test_a_window_that_nothing_meets_is_an_error_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("searchspaces.expanded.space.ATTEMPTS", 3)
    with pytest.raises(SpaceError, match="only 0 were found in 49152 draws"):
        SMALL.sample_monotone(np.random.default_rng(0), 1, (1, 2))
