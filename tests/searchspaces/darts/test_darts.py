"""Tokens, networks and published costs of the factorised cell (specification section 5)."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from searchspaces.darts.skeleton import (
    AVG,
    DIL3,
    INPUTS,
    MAX,
    OPERATIONS,
    REDUCTION,
    SEP3,
    SEP5,
    SEP7,
    SKIP,
    _operation,
)
from searchspaces.darts.space import Darts, DartsS16
from searchspaces.errors import ConfigError, SpaceError
from searchspaces.graph import INPUT, GraphBuilder
from searchspaces.network import GraphNetwork
from searchspaces.space import Tokens
from searchspaces.trained.blockweights import sort_channels
from searchspaces.vectorfeatures import vector_features

Cells = Sequence[Sequence[tuple[int, int]]]
SPACE, SMALL = Darts(), DartsS16()
# UNAS_CIFAR10 as published, inputs and operations of each node (specification 5.4)
UNAS_INPUTS = ((0, 0), (0, 1), (0, 1), (1, 0), (0, 0), (1, 0), (1, 0), (3, 1))
UNAS_OPS = ((4, 0), (0, 3), (1, 3), (1, 3), (1, 4), (0, 1), (5, 0), (4, 5))
DARTS_V2 = (((0, SEP3), (1, SEP3)), ((0, SEP3), (1, SEP3)), ((1, SEP3), (0, SKIP)), ((0, SKIP), (2, DIL3)),
            ((0, MAX), (1, MAX)), ((2, SKIP), (1, MAX)), ((0, MAX), (2, SKIP)), ((2, SKIP), (1, MAX)))


def row_of(nodes: Cells) -> Tokens:
    """Tokens of eight nodes of two pairs (input, operation), in the order they are given in."""
    return np.array(nodes, dtype=np.int8).reshape(-1)


UNAS = row_of([tuple(zip(inputs, ops)) for inputs, ops in zip(UNAS_INPUTS, UNAS_OPS)])


def swapped(rows_NT: Tokens) -> Tokens:
    """The same cells with the two pairs of every node exchanged."""
    return SPACE.by_pair(rows_NT)[:, :, :, ::-1].reshape(rows_NT.shape)


@pytest.mark.parametrize("row, madds, params, published", [
    (UNAS, 516_304_512, 3_330_766, (516.3, 3.331)), (row_of(DARTS_V2), 528_359_040, 3_349_342, (528.4, 3.349))],
    ids=["UNAS_CIFAR10", "DARTS_V2"])
def test_published_cells(row: Tokens, madds: int, params: int, published: tuple[float, float]) -> None:
    graph = SPACE.graph(row)
    assert (graph.madds, graph.params) == (madds, params)
    assert [int(v[0]) for v in SPACE.cost(row[None])] == [madds, params]
    assert (round(madds / 1e6, 1), round(params / 1e6, 3)) == published


def test_range_of_costs() -> None:
    for space, cheapest, largest in ((SPACE, (227_272_320, 1_370_134), (977_086_080, 5_807_638)),
                                     (SMALL, (843_008, 15_026), (6_167_808, 141_874))):
        madds, params = space.cost(space.extremes())
        assert (int(madds[0]), int(params[0])) == cheapest and (int(madds[1]), int(params[1])) == largest
        sampled = space.cost(space.sample_uniform(np.random.default_rng(0), 1000))
        for values, low, high in zip(sampled, cheapest, largest):
            assert low <= values.min() and values.max() <= high


@pytest.mark.parametrize("space", [SPACE, SMALL, Darts(cells=3, width=3, resolution=12)], ids=lambda s: str(s.cells))
def test_cost_equals_the_graph(space: Darts) -> None:
    drawn = np.random.default_rng(0).integers(0, space.vocabulary_sizes, size=(12, 32)).astype(np.int8)
    every_pair_twice = row_of([((node, op),) * 2 for node, op in zip((0, 1, 2, 3) * 2, (*range(7), SKIP))])
    rows = np.concatenate([drawn, swapped(drawn[:2]), every_pair_twice[None]])
    madds, params = space.cost(rows)
    graphs = [space.graph(row) for row in rows]
    assert madds.tolist() == [graph.madds for graph in graphs]
    assert params.tolist() == [graph.params for graph in graphs]


def test_size_by_enumeration_of_each_node() -> None:
    counts = []
    for node, inputs in enumerate(INPUTS):
        rows = np.zeros(((inputs * 7) ** 2, 32), dtype=np.int8)
        rows[:, node * 4:node * 4 + 4] = list(np.ndindex(inputs, 7, inputs, 7))
        counts.append(len(np.unique(SPACE.canonical(rows), axis=0)))
    assert counts == [105, 231, 406, 630]
    assert SPACE.size() == SMALL.size() == int(np.prod(counts)) ** 2 == 6_203_943_900 ** 2


def test_the_order_of_pairs_is_nothing() -> None:
    drawn = np.random.default_rng(0).integers(0, SPACE.vocabulary_sizes, size=(50, 32)).astype(np.int8)
    rows = SPACE.canonical(drawn)
    pairs = SPACE.by_pair(rows)
    assert (pairs[..., 0, 0] * 7 + pairs[..., 0, 1] <= pairs[..., 1, 0] * 7 + pairs[..., 1, 1]).all()
    assert SPACE.live_mask(rows).all()
    for other in (drawn, swapped(rows)):
        assert not np.array_equal(other, rows)
        for function in (SPACE.canonical, SPACE.onehot, SPACE.features, SPACE.latency_features):
            assert np.array_equal(function(other), function(rows))
        assert [SPACE.arch_id(row) for row in other] == [SPACE.arch_id(row) for row in rows]
        assert [SPACE.text(row) for row in other] == [SPACE.text(row) for row in rows]
    assert SMALL.graph(drawn[0]) == SMALL.graph(rows[0])


def test_variation_stays_canonical_and_moves() -> None:
    rng = np.random.default_rng(0)
    rows = SPACE.sample_uniform(rng, 200)
    mutated = SPACE.mutate(rng, rows, 0.0)  # one token each: never the same cells in another order
    crossed = SPACE.crossover(rng, rows, rows[::-1])
    for some in (rows, mutated, crossed):
        assert np.array_equal(SPACE.canonical(SPACE.check_tokens(some)), some)
    assert (mutated != rows).any(axis=1).all() and (crossed != rows).any(axis=1).all()
    assert np.array_equal(SPACE.crossover(rng, rows, rows), rows)


def test_expand_embedding() -> None:
    codes = SPACE.onehot(SPACE.sample_uniform(np.random.default_rng(0), 20))
    assert codes.shape == (20, 168) and (codes.sum(axis=1) == 32).all()


def test_text_both_ways() -> None:
    assert SPACE.text(row_of(DARTS_V2)) == (
        "normal sep3~0+sep3~1 sep3~0+sep3~1 skip~0+sep3~1 skip~0+dil3~2 / "
        "reduction max3~0+max3~1 max3~1+skip~2 max3~0+skip~2 max3~1+skip~2")
    for row in SPACE.sample_uniform(np.random.default_rng(0), 20):
        assert np.array_equal(SPACE.parse(SPACE.text(row)), row)
    text = SPACE.text(UNAS)
    assert np.array_equal(SPACE.parse(text.replace("skip~0+dil3~1", "dil3~1+skip~0")), SPACE.canonical(UNAS[None])[0])
    for wrong in ("", text.split(" / ")[0], text.replace("skip", "none", 1), text.replace("sep5~3", "sep5~5"),
                  text.replace("normal", "reduction"), text.replace("+avg3~1", "", 1), f"{text} skip~0+skip~1"):
        with pytest.raises(SpaceError, match="no pair of cells"):
            SPACE.parse(wrong)


def test_layout_of_search_and_evaluation_network() -> None:
    search = Darts(cells=8, width=16)
    for space, at in ((search, [2, 5]), (SPACE, [6, 13]), (Darts(cells=3), [1, 2])):
        assert [i for i, spec in enumerate(space.layout) if spec.kind == REDUCTION] == at
        assert [i for i, spec in enumerate(space.layout) if spec.after_reduction] == [i + 1 for i in at
                                                                                    if i + 1 < space.cells]
        widths = [spec.channels for spec in space.layout]
        assert widths[0] == space.width and widths[-1] == 4 * space.width and widths == sorted(widths)
    evaluation = search.resized()
    assert evaluation.space_id == SPACE.space_id and evaluation.arch_id(UNAS) != search.arch_id(UNAS)
    assert [choice.values for choice in evaluation.choices] == [choice.values for choice in search.choices]
    shapes = [block.out_shape for block in SPACE.graph(UNAS).blocks]
    assert shapes[0] == (108, 32, 32) and shapes[1] == (144, 32, 32) and shapes[7] == (288, 16, 16)
    assert shapes[14] == shapes[-2] == (576, 8, 8) and shapes[-1] == (10,)


def test_a_block_tells_its_operations_and_key() -> None:
    normal, reduction = (SPACE.graph(UNAS).blocks[1 + index] for index in (0, 6))
    assert normal.label == "normal cell" and reduction.label == "reduction cell"
    assert list(normal.settings)[1:4] == ["node0a from 0", "node0b from 0", "node1a from 0"]
    assert list(normal.settings.values())[1:3] == ["skip_connect", "sep_conv_5x5"]
    row = SPACE.canonical(UNAS[None])[0].tolist()
    assert normal.key == (0, *row[:16]) and reduction.key == (1, *row[16:])


def operation(op: int, stride: int) -> GraphNetwork:
    """One operation on 2 channels of 8x8 pixels, all weights 1, batch norms neutral."""
    builder = GraphBuilder(2, 8)
    builder.begin_block("op", -1, "op")
    builder.flatten(_operation(builder, INPUT, "op", op, stride), "flat")
    network = GraphNetwork(builder.build()).eval()
    for name, tensor in network.state_dict().items():
        tensor.fill_(0.0 if name.endswith(("bias", "running_mean")) else 1.0)
    return network


@pytest.mark.parametrize("op, reach", [(SEP3, (-2, -1, 0, 1, 2)), (SEP5, tuple(range(-4, 5))), (DIL3, (-2, 0, 2)),
                                       (SEP7, tuple(range(-6, 7))), (AVG, (-1, 0, 1)), (MAX, (-1, 0, 1))])
def test_what_an_operation_sees(op: int, reach: tuple[int, ...]) -> None:
    """Where the response to one bright pixel is not zero, at stride 1 and every second of these places at stride 2."""
    images = torch.zeros(1, 2, 8, 8)
    images[:, :, 4, 4] = 1
    response = operation(op, 1)(images).reshape(2, 8, 8)
    seen = [4 + step for step in reach if 0 <= 4 + step < 8]
    assert torch.equal(response.nonzero()[:, 1].unique(), torch.tensor(seen))
    assert torch.equal(response != 0, (response != 0).transpose(1, 2))
    strided = operation(op, 2)(images).reshape(2, 4, 4)
    if op in (DIL3, AVG, MAX):  # one convolution, or none
        assert torch.allclose(strided, response[:, ::2, ::2])


def test_skip_of_stride_2_sees_two_pixels_of_each_patch() -> None:
    images = torch.arange(128.0).reshape(1, 2, 8, 8)
    assert torch.equal(operation(SKIP, 1)(images), images.flatten(1))
    halves = operation(SKIP, 2)(images).reshape(2, 4, 4)
    expected = torch.stack([images[0].sum(0)[::2, ::2], images[0].sum(0)[1::2, 1::2]])
    assert torch.allclose(halves, expected, rtol=1e-4)


def test_pools_have_no_batch_norm_and_convolutions_no_bias() -> None:
    for op in range(len(OPERATIONS)):
        kinds = [node.op for node in operation(op, 2).graph.nodes]
        assert kinds.count("batch_norm") == {SKIP: 2, SEP3: 2, SEP5: 2, SEP7: 2, DIL3: 1}.get(op, 0)
    nodes = SMALL.graph(UNAS).nodes
    assert not any(node.attributes["bias"] for node in nodes if node.op == "conv")


def test_sorted_channels_compute_the_same() -> None:
    torch.manual_seed(0)
    graph = SMALL.graph(UNAS)
    network = GraphNetwork(graph).eval()
    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    ordered = sort_channels(graph, weights)
    assert any(not np.array_equal(ordered[name], array) for name, array in weights.items())
    other = GraphNetwork(graph, {name: torch.from_numpy(array) for name, array in ordered.items()}).eval()
    images = torch.randn(2, 1, 16, 16)
    assert torch.allclose(other(images), network(images), atol=1e-5)


def test_latency_features_are_those_of_the_graph_and_counts() -> None:
    rows = np.concatenate([SMALL.sample_uniform(np.random.default_rng(0), 6), SMALL.canonical(UNAS[None])])
    features = SMALL.latency_features(rows)
    assert np.allclose(features[:, :5], [vector_features(SMALL.graph(row)) for row in rows], rtol=1e-5)
    #                                    skip sep3 max3 dil3 sep5 avg3 sep7 of one normal, of one reduction cell
    assert features[-1, 5:].tolist() == [2, 2, 0, 3, 1, 0, 0, 2, 2, 0, 0, 2, 2, 0]


def test_features_know_what_is_read_and_how_deep() -> None:
    chain = row_of([((0, SEP3), (1, SEP3)), ((2, SEP3), (2, SKIP)), ((3, SEP3), (3, SKIP)), ((4, SEP3), (4, SKIP))] * 2)
    features = SPACE.features(np.stack([chain, SPACE.canonical(row_of(DARTS_V2)[None])[0]]))
    assert features.shape == (2, 202)
    counts, reads, depth = features[:, 168:189], features[:, 189:199].reshape(2, 5, 2), features[:, 199:201]
    assert counts[0].reshape(3, 7)[:, [SKIP, SEP3]].tolist() == [[3, 5], [3, 3], [0, 2]]
    assert reads[0, :, 0].tolist() == reads[0, :, 1].tolist() == [1, 1, 2, 2, 2]
    assert reads[1, :, 0].tolist() == [4, 3, 1, 0, 0] and reads[1, :, 1].tolist() == [2, 3, 3, 0, 0]
    assert depth.tolist() == [[4, 4], [2, 2]]
    assert np.allclose(np.exp(features[:, 201]), SPACE.cost(np.stack([chain, row_of(DARTS_V2)]))[1], rtol=1e-4)


@pytest.mark.parametrize("options, expected", [
    ({"cells": 2}, "at least 3"), ({"width": 0}, "at least 1"), ({"resolution": 2}, "at least 4"),
    ({"resolution": 30}, "multiple of 4")])
def test_mistakes(options: dict[str, int], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        Darts(**options)


def test_most_probable_network_has_no_edge_twice() -> None:
    """By hand for the first node (two inputs, seven operations); all pairs of the others point at one edge."""
    space = Darts()
    probabilities = [np.full(len(choice.values), 1 / len(choice.values)) for choice in space.choices]
    probabilities[0:4] = [np.array([0.3, 0.7]), np.array([0.1, 0.6, 0.3, 0, 0, 0, 0]),
                          np.array([0.45, 0.55]), np.array([0.1, 0.5, 0.4, 0, 0, 0, 0])]
    pairs = space.by_pair(space.most_probable(probabilities)[None])[0].reshape(-1, 2, 2)
    # a: (1, 1); b: (1, 1) is taken, next are (0, 1) 0.225, (1, 2) 0.22
    assert pairs[0].tolist() == [[0, 1], [1, 1]]
    assert all(a.tolist() != b.tolist() for a, b in pairs)
    probabilities[2] = np.array([0.6, 0.4])     # now b's own most probable pair is another one
    assert space.by_pair(space.most_probable(probabilities)[None])[0, 0, 0].tolist() == [[0, 1], [1, 1]]
