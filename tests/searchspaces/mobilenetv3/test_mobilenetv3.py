"""Tokens, costs and encodings of the MobileNetV3 space against specification sections 2 and pnag.md 5, 7, 14."""
from __future__ import annotations

import numpy as np
import pytest

from searchspaces.errors import ConfigError, SpaceError
from searchspaces.mobilenetv3.space import EXPANDS, KERNELS, MobileNetV3, MobileNetV3S16, MobileNetV3S32

# The networks that the authors of PNAG released for mobile, with the multiply-adds (classifier left out) and parameters
# of the paper's table 1, in millions.
RELEASED = {
    "2,3,3,3,3:3,3,0,0,3,5,3,0,3,3,5,0,3,3,5,0,5,5,7,0:3,3,0,0,4,3,3,0,4,4,4,0,4,6,6,0,6,6,3,0": (349, 7.3),
    "2,3,3,4,4:5,3,0,0,5,3,3,0,3,5,5,0,5,5,5,3,7,5,7,5:3,4,0,0,3,4,4,0,3,3,6,0,4,6,6,6,6,6,6,6": (451, 9.9),
    "2,4,4,4,4:5,3,0,0,5,5,5,3,5,5,5,5,3,5,5,5,7,5,5,5:4,3,0,0,4,4,4,6,6,3,6,3,6,6,4,6,6,6,6,3": (492, 9.2),
    "3,4,4,4,4:5,3,7,0,5,5,5,5,5,5,5,5,3,5,5,3,7,5,5,5:4,4,6,0,4,4,6,6,6,4,6,6,6,6,4,6,6,6,6,6": (606, 10.0),
    "4,4,4,4,4:5,5,5,5,5,7,3,5,7,5,5,3,3,5,5,3,5,3,3,5:6,6,6,6,4,6,6,6,6,6,6,6,6,6,6,6,6,6,6,6": (724, 10.4),
}
CLASSIFIER = 1536 * 1000


@pytest.mark.parametrize("width, madds, params", [
    (1.0, (121.3, 566.2), (3.41, 7.66)),
    (1.2, (193.1, 843.1), (4.60, 10.70)),
])
def test_cost_range_at_224_pixels(width: float, madds: tuple[float, float], params: tuple[float, float]) -> None:
    space = MobileNetV3(classes=1000, width=width)
    found_madds, found_params = space.cost(space.extremes())
    assert np.round(found_madds / 1e6, 1).tolist() == list(madds)
    assert np.round(found_params / 1e6, 2).tolist() == list(params)


def test_cost_range_of_the_cifar_variant() -> None:
    space = MobileNetV3S32()
    madds, params = space.cost(space.extremes())
    assert np.round(madds / 1e6, 2).tolist() == [11.38, 70.49]
    assert np.round(params / 1e6, 3).tolist() == [0.553, 1.777]


def test_the_80_ms_network_of_pnag() -> None:
    space = MobileNetV3(classes=1000, width=1.2)
    tokens = space.parse(next(iter(RELEASED)))
    madds, params = space.cost(tokens[None])
    assert (round(madds[0] / 1e6, 2), round(params[0] / 1e6, 2)) == (350.10, 7.34)
    assert int(space.live_mask(tokens[None]).sum()) == 33


@pytest.mark.parametrize("text", RELEASED)
def test_released_networks_have_their_published_cost(text: str) -> None:
    space = MobileNetV3(classes=1000, width=1.2)
    tokens = space.parse(text)
    assert space.text(tokens) == text
    madds, params = (int(value[0]) for value in space.cost(tokens[None]))
    published_madds, published_params = RELEASED[text]
    assert madds - CLASSIFIER == pytest.approx(published_madds * 1e6, abs=0.7e6)
    assert params == pytest.approx(published_params * 1e6, abs=0.06e6)


def test_size() -> None:
    assert MobileNetV3().size() == 7371 ** 5 == 21_758_655_492_572_485_851
    assert MobileNetV3(resolution=list(range(128, 225, 4))).size() == 25 * 7371 ** 5


def test_positions_in_the_order_of_the_policy() -> None:
    names = [choice.name for choice in MobileNetV3().choices]
    assert len(names) == 45
    assert names[:5] == ["depth0", "expand0.0", "kernel0.0", "expand0.1", "kernel0.1"]
    assert names[9] == "depth1" and names[-1] == "kernel4.3"
    assert MobileNetV3(resolution=[128, 224]).choices[-1].values == (128, 224)


def test_live_tokens_are_between_25_and_45() -> None:
    space = MobileNetV3()
    assert space.live_mask(space.extremes()).sum(axis=1).tolist() == [25, 45]
    rows = space.sample_uniform(np.random.default_rng(0), 200)
    depths = rows[:, ::9].astype(int) + 2
    assert (space.live_mask(rows).sum(axis=1) == 5 + 2 * depths.sum(axis=1)).all()
    assert not rows[~space.live_mask(rows)].any()


def test_samples_are_uniform_over_token_values() -> None:
    rows = MobileNetV3().sample_uniform(np.random.default_rng(0), 6000)
    for position in (0, 1, 2, 9, 40):  # depths, and expand and kernel of layers that are always live
        shares = np.bincount(rows[:, position], minlength=3) / len(rows)
        assert np.abs(shares - 1 / 3).max() < 0.03  # five standard errors


def test_mutation_always_gives_another_architecture() -> None:
    space = MobileNetV3()
    parents = space.sample_uniform(np.random.default_rng(0), 500)
    children = space.mutate(np.random.default_rng(1), parents, 0.0)
    assert (children != parents).any(axis=1).all()
    same_depth = (children[:, :45:9] == parents[:, :45:9]).all(axis=1)
    assert (children != parents)[same_depth].sum(axis=1).max() == 1


def test_layers_that_come_to_life_are_random() -> None:
    space = MobileNetV3()
    parents = np.repeat(space.extremes()[:1], 3000, axis=0)
    deeper = space.mutate(np.random.default_rng(0), parents, 0.5)
    grown = deeper[deeper[:, 0] > 0][:, 5]  # expand of layer 2 of unit 0, dead in every parent
    assert len(grown) > 1000 and np.bincount(grown, minlength=3).min() > 0.25 * len(grown)
    crossed = space.crossover(np.random.default_rng(0), parents, np.repeat(space.extremes()[1:], 3000, axis=0))
    assert (crossed[:, 0] == 2).any() and (crossed[crossed[:, 0] == 2][:, 7] < 2).any()


def test_expand_embedding() -> None:
    """pnag.md 14: layer 0 of unit 0 with kernel 5, expand 4."""
    space = MobileNetV3()
    row = np.zeros((1, 45), dtype=np.int8)
    row[0, 1], row[0, 2] = EXPANDS.index(4), KERNELS.index(5)
    code = space.onehot(row)[0]
    assert code.shape == (120,)
    assert code[:3].tolist() == [0, 1, 0] and code[60:63].tolist() == [0, 1, 0]
    assert code[6:12].tolist() == [0] * 6  # layers 2 and 3 of unit 0 are dead
    assert code.sum() == 2 * 10


def test_resolution_comes_last_and_scales_the_cost() -> None:
    space = MobileNetV3S32(resolution=[16, 32])
    small, large = np.zeros((2, 46), dtype=np.int8)
    large[-1] = 1
    codes = space.onehot(np.stack([small, large]))
    assert codes.shape == (2, 122) and codes[:, 120:].tolist() == [[1, 0], [0, 1]]
    madds, params = space.cost(np.stack([small, large]))
    assert params[0] == params[1] and 3 < madds[1] / madds[0] < 4
    assert space.text(large).endswith(":r32") and (space.parse(space.text(large)) == large).all()
    assert space.graph(small).input_shape == (3, 16, 16)


def test_cost_by_tables_equals_the_graphs() -> None:
    space = MobileNetV3S32(resolution=[24, 32], classes=7)
    rows = space.sample_uniform(np.random.default_rng(1), 40)
    graphs = [space.graph(row) for row in rows]
    madds, params = space.cost(rows)
    assert madds.tolist() == [graph.madds for graph in graphs]
    assert params.tolist() == [graph.params for graph in graphs]


def test_latency_features_by_hand() -> None:
    space = MobileNetV3S16()
    row = space.parse("2,3,2,2,2:7,3,0,0,5,3,3,0,3,3,0,0,3,3,0,0,3,3,0,0:6,4,0,0,3,4,6,0,3,3,0,0,3,3,0,0,3,3,0,0")
    features = space.latency_features(row[None])[0]
    assert features.shape == (26,)
    first_expand, first_taps, rest_expand, rest_taps, rest_count = features[:25].reshape(5, 5)
    assert first_expand[:2].tolist() == [6, 3] and first_taps[:2].tolist() == [6 * 49, 3 * 25]
    assert rest_expand[:2].tolist() == [4, 10] and rest_taps[:2].tolist() == [4 * 9, 10 * 9]
    assert rest_count.tolist() == [1, 2, 1, 1, 1] and features[25] == 1


def test_blocks_say_what_a_drawing_needs() -> None:
    space = MobileNetV3S16()
    graph = space.graph(space.extremes()[0])
    searched = [block for block in graph.blocks if block.stage >= 0]
    assert [block.stage for block in searched] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert dict(searched[2].settings) == {"kernel": 3, "expand": 3, "depth": 2, "channels": 24, "stride": 1, "se": True}
    assert sum(block.stage < 0 for block in graph.blocks) == 4


@pytest.mark.parametrize("text", [
    "2,2,2,2,2", "5,2,2,2,2:" + ",".join("3" * 20) + ":" + ",".join("3" * 20), "a:b:c",
    "2,2,2,2,2:" + ",".join("0" * 20) + ":" + ",".join("3" * 20), "",
])
def test_text_that_is_no_architecture(text: str) -> None:
    with pytest.raises(SpaceError):
        MobileNetV3S32().parse(text)


@pytest.mark.parametrize("options", [
    {"width": 0.0}, {"resolution": []}, {"resolution": [32, 16]}, {"resolution": 2}, {"unit_strides": [1, 2]},
    {"stem_stride": 3},
])
def test_impossible_options(options: dict) -> None:
    with pytest.raises(ConfigError):
        MobileNetV3(**options)
