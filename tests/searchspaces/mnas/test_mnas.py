"""The mnas space against specification section 4: costs, sizes, channels, masks, keys, and its networks in torch and
ONNX Runtime."""
from __future__ import annotations

import itertools
import pickle
from collections.abc import Sequence
from math import prod

import numpy as np
import onnxruntime
import pytest
import torch

from searchspaces.errors import ConfigError, SpaceError
from searchspaces.graph import INPUT, Block, GraphBuilder
from searchspaces.mnas.space import BLOCK_TOKENS, BLOCKS, LAYER, OP, SKIP, Mnas, MnasS16, MnasS32
from searchspaces.network import GraphNetwork, recalibrate_batch_norm
from searchspaces.onnxgraph import to_onnx
from searchspaces.space import Tokens
from searchspaces.vectorfeatures import VECTOR_FEATURES, vector_features

CONV, SEP, MB3, MB6 = range(4)
NONE, IDENTITY, POOL = range(3)
BASE = {"op": CONV, "kernel": 0, "se": 0, "skip": NONE, "filters": 1, "layers": 1}


def row_of(*blocks: dict[str, int]) -> Tokens:
    """Seven blocks, each by what differs from a conv 3x3 of base channels and repeats."""
    return np.array([token for block in blocks for token in (BASE | block).values()], dtype=np.int8)


def same(**tokens: int) -> Tokens:
    return row_of(*[tokens] * BLOCKS)


MOBILENET_V2 = row_of({"op": SEP}, *[{"op": MB6, "skip": IDENTITY}] * 6)
SMALL = {"op": MB3, "kernel": 1, "se": 1, "skip": IDENTITY, "filters": 0}
SECOND = row_of({"op": SEP}, *[SMALL | {"layers": 0}] * 5, SMALL)


def searched(space: Mnas, row: Tokens) -> list[Block]:
    return [block for block in space.graph(row).blocks if block.stage >= 0]


def nodes(space: Mnas, row: Tokens, block: int) -> list[str]:
    """Names within the block."""
    return [name.removeprefix(f"block{block}.") for name in searched(space, row)[block].nodes]


# --- numbers of the specification ----------------------------------------------------------------------------------


@pytest.mark.parametrize("row, madds, params", [(MOBILENET_V2, 300_774_272, 3_504_872),
                                                (SECOND, 100_385_536, 2_067_833)])
def test_reference_networks(row: Tokens, madds: int, params: int) -> None:
    """MobileNetV2: 300.77M and 3.505M, which is torchvision's mobilenet_v2; the other 100.39M and 2.068M."""
    space = Mnas(classes=1000)
    assert [int(value[0]) for value in space.cost(row[None])] == [madds, params]


def test_one_layer_of_each_op_by_hand() -> None:
    """Block 0 at width 1 has 32 input and 16 output channels on a 112x112 map; squeeze and excitation 8 inner ones."""
    space, norm = Mnas(), 2
    conv, sep, mb6, se = (searched(space, row_of(block, *[{}] * 6))[0] for block in (
        {}, {"op": SEP, "kernel": 1}, {"op": MB6}, {"op": MB3, "se": 1}))
    assert (conv.madds, conv.params) == (32 * 16 * 9 * 112**2, 32 * 16 * 9 + norm * 16)
    assert (sep.madds, sep.params) == ((32 * 25 + 32 * 16) * 112**2, 32 * 25 + 32 * 16 + norm * (32 + 16))
    assert mb6.madds == (32 * 192 + 192 * 9 + 192 * 16) * 112**2
    assert se.madds == (32 * 96 + 96 * 9 + 96 * 16) * 112**2 + 2 * 96 * 8
    assert se.params == 32 * 96 + 96 * 9 + 96 * 16 + norm * (96 + 96 + 16) + (96 * 8 + 8) + (8 * 96 + 96)


def test_channels() -> None:
    assert Mnas().block_channels.tolist() == [[12, 16, 20], [20, 24, 32], [24, 32, 40], [48, 64, 80], [72, 96, 120],
                                              [120, 160, 200], [240, 320, 400]]
    assert MnasS16().block_channels.tolist() == [[12, 16, 20]] * 4 + [[20, 24, 32], [32, 40, 52], [60, 80, 100]]
    for width in (0.25, 0.37, 0.5, 0.71, 1.4, 4.0):
        channels = Mnas(width=width).block_channels
        assert (np.diff(channels) > 0).all(), "two values of filters give the same channels"
        assert (channels % 4 == 0).all()


def test_sizes() -> None:
    """432 settings per block; 288 where -1 layers is invalid; 1.248e18 rows. Networks: a dead skip counts once."""
    space = Mnas()
    allowed = [int(space.valid(np.zeros(t, dtype=np.int8)).sum()) for t in range(BLOCKS * BLOCK_TOKENS)]
    per_block = np.array(allowed, dtype=object).reshape(BLOCKS, BLOCK_TOKENS).prod(axis=1)
    assert per_block.tolist() == [288, 432, 432, 432, 432, 432, 288]
    assert per_block.prod() == 432**5 * 288**2 == 1_247_968_747_541_495_808
    single = 4 * 2 * 2 * 3                                        # op, kernel, se, filters of a block
    ends, second = single * (1 + 3), single * (1 + 3 + 3)         # one layer has one skip, more have three
    assert space.size() == ends**2 * second * 432**4


def test_size_by_enumeration_where_a_first_layer_may_keep_its_shape() -> None:
    """Base repeats of 1 and no strides: 32 channels into block 2 may stay 32, and then its one layer has a skip."""
    space = Mnas(block_strides=[1] * 7, repeats=[1] * 7)
    networks = 0
    for filters in itertools.product(range(3), repeat=BLOCKS):
        channels = [32, *(space.block_channels[b, f] for b, f in enumerate(filters))]
        networks += prod(4 * 2 * 2 * ((3 if a == b else 1) + 3) for a, b in itertools.pairwise(channels))
    assert space.size() == networks
    rows = np.stack([row_of({}, {"filters": before}, {}, *[{}] * 4) for before in (0, 1, 2)])
    assert space.live_mask(rows)[:, 2 * BLOCK_TOKENS + SKIP].tolist() == [False, False, True]


# --- tokens --------------------------------------------------------------------------------------------------------


def test_positions_in_the_order_of_the_policy() -> None:
    choices = Mnas().choices
    assert [choice.name for choice in choices[:7]] == ["op0", "kernel0", "se0", "skip0", "filters0", "layers0", "op1"]
    assert len(choices) == 42 and choices[-1].name == "layers6"
    assert [choice.values for choice in choices[6:12]] == [
        ("conv", "sep", "mb3", "mb6"), (3, 5), (0, 0.25), ("none", "identity", "pool"), (0.75, 1.0, 1.25), (-1, 0, 1)]


def test_expand_embedding() -> None:
    """119 dimensions, 17 per block; 6 ones per block less the dead skips of blocks 0 and 6."""
    code = Mnas().onehot(MOBILENET_V2[None])[0]
    assert code.shape == (119,)
    assert code[17:34].tolist() == [0, 0, 0, 1, 1, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0]
    assert code.sum() == 42 - 2


def test_the_last_layer_of_a_block_cannot_be_taken_away() -> None:
    space = Mnas()
    for block in range(BLOCKS):
        position = block * BLOCK_TOKENS + LAYER
        assert space.valid(same()[:position]).tolist() == [block not in (0, 6), True, True]
    with pytest.raises(SpaceError, match="only layer of block 6"):
        space.graph(row_of(*[{}] * 6, {"layers": 0}))
    rows = space.sample_uniform(np.random.default_rng(0), 3000)
    shares = [np.bincount(rows[:, block * BLOCK_TOKENS + LAYER], minlength=3) / len(rows) for block in (0, 3)]
    assert shares[0][0] == 0 and np.allclose(shares[0][1:], 1 / 2, atol=0.05)
    assert np.allclose(shares[1], 1 / 3, atol=0.05)


@pytest.mark.parametrize("block, layers, live", [
    (0, 1, False), (0, 2, True), (1, 0, False), (1, 1, True), (2, 0, True), (4, 0, True), (6, 1, False), (6, 2, True)])
def test_skip_is_dead_where_no_layer_keeps_its_shape(block: int, layers: int, live: bool) -> None:
    space = Mnas()
    rows = np.stack([row_of(*[{"skip": skip, "layers": layers} if b == block else {} for b in range(BLOCKS)])
                     for skip in (NONE, IDENTITY, POOL)])
    assert space.live_mask(rows)[:, block * BLOCK_TOKENS + SKIP].tolist() == [live] * 3
    assert len(np.unique(space.canonical(rows), axis=0)) == (3 if live else 1)
    assert len({len(space.graph(row).nodes) for row in rows}) == (3 if live else 1)


def test_mutation_and_crossover_stay_valid() -> None:
    space = MnasS16()
    parents = space.sample_uniform(np.random.default_rng(0), 300)
    rng = np.random.default_rng(1)
    for rows in (space.mutate(rng, parents, 0.3), space.crossover(rng, parents, parents[::-1])):
        assert np.array_equal(space.check_tokens(rows), rows) and np.array_equal(space.canonical(rows), rows)
        assert (rows != parents).any(axis=1).mean() > 0.9


def test_text_says_channels_and_layers() -> None:
    assert Mnas().text(MOBILENET_V2) == ("sepk3c16x1:mb6k3c24x2i:mb6k3c32x3i:mb6k3c64x4i:mb6k3c96x3i:mb6k3c160x3i:"
                                         "mb6k3c320x1")
    assert MnasS16().text(same(kernel=1, se=1, skip=POOL, filters=2, layers=2)).endswith("convk5c100x2sp")


# --- networks ------------------------------------------------------------------------------------------------------


def test_keys_of_blocks() -> None:
    """Cosine of the concatenated one-hots = equal tokens / 6: here op and se differ, so 4 / 6 (fnas.md 11)."""
    space = Mnas()
    first = searched(space, same(skip=POOL))[3].key
    second = searched(space, same(skip=POOL, op=MB6, se=1))[3].key
    assert first == (CONV, 0, 0, POOL, 1, 1) and second == (MB6, 0, 1, POOL, 1, 1)
    sizes = [len(choice.values) for choice in space.choices[:BLOCK_TOKENS]]
    codes = [np.concatenate([np.eye(size)[token] for size, token in zip(sizes, key)]) for key in (first, second)]
    assert codes[0] @ codes[1] / (np.linalg.norm(codes[0]) * np.linalg.norm(codes[1])) == pytest.approx(0.6666667)
    blocks = space.graph(same(skip=POOL)).blocks
    assert [block.stage for block in blocks] == [-1, *range(7), -1, -1]
    assert all(block.key == () for block in blocks if block.stage < 0)
    assert blocks[1].key == (CONV, 0, 0, NONE, 1, 1), "a dead skip belongs to no key"


def test_roles_of_the_tensors() -> None:
    """What knowledge is copied by; two settings of a block share the names of equal roles."""
    space = MnasS16()
    conv, sep, mb6 = (nodes(space, same(op=op, se=1, skip=POOL), 1) for op in (CONV, SEP, MB6))
    squeeze = [f"layer1.se.{part}" for part in ("pool", "reduce", "relu", "expand", "gate", "mul")]
    depthwise = ["layer1.depthwise", "layer1.depthwise_bn", "layer1.depthwise_act"]
    tail = ["layer1.project", "layer1.project_bn", "layer1.skip_pool", "layer1.add"]
    second = [[name for name in names if name.startswith("layer1")] for names in (conv, sep, mb6)]
    assert second[0] == ["layer1.conv", "layer1.conv_bn", "layer1.conv_act", *squeeze, *tail[2:]]
    assert second[1] == [*depthwise, *squeeze, *tail]
    assert second[2] == ["layer1.expand", "layer1.expand_bn", "layer1.expand_act", *depthwise, *squeeze, *tail]
    narrow = nodes(space, row_of({"filters": 0}, *[{"skip": POOL}] * 6), 1)
    assert "layer0.add" in conv and "layer0.add" not in narrow, "only where the first layer keeps its shape"


def test_strides_channels_and_settings() -> None:
    space = MnasS32()
    blocks = searched(space, same(op=MB3, filters=2, layers=2, skip=IDENTITY))
    assert [block.out_shape for block in blocks] == [(20, 16, 16), (20, 16, 16), (20, 8, 8), (40, 8, 8), (60, 8, 8),
                                                     (100, 4, 4), (200, 4, 4)]
    assert dict(blocks[5].settings) == {"op": "mb3", "kernel": 3, "expand": 3, "se": False, "skip": "identity",
                                        "channels": 100, "layers": 4, "stride": 2}


ROWS = [same(), same(op=SEP, kernel=1, se=1, skip=POOL, layers=2), same(op=MB3, se=1, skip=IDENTITY, filters=0),
        row_of({}, *[{"op": MB6, "kernel": 1, "skip": POOL, "filters": 2, "layers": 0}] * 5, {})]


@pytest.mark.parametrize("space, row", [*((MnasS16(), row) for row in ROWS), (MnasS32(), ROWS[1]),
                                        (MnasS32(), ROWS[2])])
def test_onnx_runtime_computes_what_torch_computes(space: Mnas, row: Tokens) -> None:
    """The rows hold every value of every token."""
    torch.manual_seed(0)
    graph = space.graph(row)
    network = GraphNetwork(graph)
    images = torch.rand(3, *graph.input_shape)
    recalibrate_batch_norm(network, [torch.rand(16, *graph.input_shape)])
    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    content = to_onnx(graph, weights, batch=3).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        expected = network.eval()(images).numpy()
    assert np.abs(expected).max() > 1e-2 and np.std(expected, axis=0).max() > 1e-3
    assert np.allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


def test_the_rows_above_hold_every_token_value() -> None:
    blocks = MnasS16().by_block(np.stack(ROWS))
    sizes = MnasS16().vocabulary_sizes.reshape(BLOCKS, BLOCK_TOKENS)[0]
    assert all(set(np.unique(blocks[:, 2, kind])) == set(range(size)) for kind, size in enumerate(sizes))


def test_costs_and_features_by_parts_equal_those_of_whole_graphs() -> None:
    for space in (MnasS16(), Mnas(block_strides=[1] * 7, repeats=[1] * 7, resolution=9)):
        rows = space.sample_uniform(np.random.default_rng(0), 40)
        graphs = [space.graph(row) for row in rows]
        madds, params = space.cost(rows)
        assert madds.tolist() == [graph.madds for graph in graphs]
        assert params.tolist() == [graph.params for graph in graphs]
        assert np.allclose(space.latency_features(rows), [vector_features(graph) for graph in graphs], rtol=1e-6)


def test_latency_features_by_hand() -> None:
    """12 and 20 channels count as 16 and 32. Operators: three convolutions, pool and addition, head pool, linear."""
    builder = GraphBuilder(3, 8)
    builder.begin_block("all", 0, "all")
    x = builder.activation(builder.batch_norm(builder.conv(INPUT, "a", 20, 5, 2), "n"), "r", "relu")
    x = builder.conv(builder.conv(x, "d", 20, 3, groups=20), "p", 12, 1)
    x = builder.add((x, builder.pool(x, "q", "avg_pool", 3)), "s")
    builder.linear(builder.flatten(builder.global_pool(x, "g"), "f"), "l", 10)
    found = dict(zip(VECTOR_FEATURES, vector_features(builder.build()), strict=True))
    assert found == pytest.approx({"operators": 7, "depthwise": 32 * 9 * 16 / 1e6, "dense": 16 * 32 * 25 * 16 / 1e6,
                                   "pointwise": 32 * 16 * 16 / 1e6, "maps": 2 * 16 * 16 / 1e6})


def test_extremes() -> None:
    for space in (Mnas(), MnasS32(), MnasS16()):
        rows = np.concatenate([space.extremes(), space.sample_uniform(np.random.default_rng(0), 60)])
        madds, params = space.cost(rows)
        assert madds[0] == madds.min() and madds[1] == madds.max()
        assert params[0] == params.min() and params[1] == params.max()
        assert rows[0].reshape(BLOCKS, BLOCK_TOKENS)[:, OP].tolist() == [SEP] * 7


@pytest.mark.parametrize("options", [{"width": 0.1}, {"resolution": 2}, {"block_strides": [1, 2]}, {"stem_stride": 3},
                                     {"repeats": [0] * 7}, {"repeats": [1] * 6}])
def test_impossible_options(options: dict[str, float | Sequence[int]]) -> None:
    with pytest.raises(ConfigError, match="mnas"):
        Mnas(**options)  # type: ignore[arg-type]


def test_what_a_space_remembers_does_not_travel() -> None:
    """Thousands of remembered block costs in every worker's constructor would make Ray keep them in its store."""
    space = MnasS16(classes=10, channels=1)
    small = len(pickle.dumps(space))
    rows = space.sample_uniform(np.random.default_rng(0), 50)
    costs = space.cost(rows)
    assert len(pickle.dumps(space)) == small < 10_000
    assert np.array_equal(pickle.loads(pickle.dumps(space)).cost(rows)[0], costs[0])
