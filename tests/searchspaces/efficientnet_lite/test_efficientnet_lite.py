"""Tokens, costs and padding of the EfficientNet-Lite space, against published numbers and the reference network."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from searchspaces.efficientnet_lite.space import EXPANDS, EfficientNetLite, EfficientNetLiteS
from searchspaces.errors import ConfigError, SpaceError
from searchspaces.graph import GraphBuilder, conv_pads
from searchspaces.network import GraphNetwork
from searchspaces.onnxgraph import to_onnx

LITE0 = EfficientNetLite(classes=1000, resolution=224)
SMALL = EfficientNetLiteS(resolution=[11, 16])


def test_the_largest_is_lite0() -> None:
    """Lite0 is published with 4.7M parameters and 407M multiply-adds, which count batch norm and more; by our
    convention of counting it has these."""
    madds, params = LITE0.cost(LITE0.extremes())
    assert (int(madds[1]), int(params[1])) == (385_187_552, 4_652_008)
    assert (int(madds[0]), int(params[0])) == (105_711_152, 2_178_680)


@pytest.mark.parametrize("name, width, depth", [
    ("efficientnet-lite0", 1.0, 1.0), ("efficientnet-lite1", 1.0, 1.1), ("efficientnet-lite2", 1.1, 1.2)])
def test_parameters_are_those_of_the_reference(name: str, width: float, depth: float) -> None:
    reference = pytest.importorskip("efficientnet_lite_pytorch", reason="efficientnet-lite-pytorch is not installed")
    network = reference.EfficientNet.from_name(name)
    space = EfficientNetLite(classes=1000, width=width, depth=depth, resolution=224)
    assert space.cost(space.extremes())[1][1] == sum(p.numel() for p in network.parameters())


def test_size() -> None:
    one = 12 * 42 * 39 * 258 * 1554 * 3     # sums of 3^d or 6^d over the depths of each stage
    assert LITE0.size() == one == 23_642_158_176
    assert EfficientNetLite().size() == 7 * one
    tiny = EfficientNetLite(depth=0.25, resolution=32)      # one layer in each stage
    assert tiny.size() == 3 * 6 * 3 * 6 * 6 * 3 and len(tiny.choices) == 9


def test_positions_in_the_order_of_the_policy() -> None:
    names = [choice.name for choice in EfficientNetLite().choices]
    assert len(names) == 30
    assert names[:8] == ["depth0", "expand0.0", "expand0.1", "depth1", "expand1.0", "kernel1.0", "expand1.1",
                         "kernel1.1"]
    assert names[-2:] == ["expand5.0", "resolution"]


def test_dead_tokens() -> None:
    space = EfficientNetLite()
    assert space.live_mask(space.extremes()).sum(axis=1).tolist() == [5 + 6 + 3 + 1, 30]
    rows = space.sample_uniform(np.random.default_rng(0), 200)
    assert not rows[~space.live_mask(rows)].any()


def test_cost_by_tables_equals_the_graphs() -> None:
    rows = SMALL.sample_uniform(np.random.default_rng(1), 30)
    graphs = [SMALL.graph(row) for row in rows]
    madds, params = SMALL.cost(rows)
    assert madds.tolist() == [graph.madds for graph in graphs]
    assert params.tolist() == [graph.params for graph in graphs]


def test_text_and_back() -> None:
    rows = SMALL.sample_uniform(np.random.default_rng(2), 30)
    assert all((SMALL.parse(SMALL.text(row)) == row).all() for row in rows)
    assert SMALL.text(SMALL.extremes()[0]) == "3x3e3 / 3x3e3 / 3x3e3 / 3x3e3 / 3x3e3 / 3x3e3 / r11"
    fixed = LITE0.parse("3x3e6 3x3e4 / 5x5e6 / 3x3e6 / 3x3e3 5x5e4 / 5x5e6 / 3x3e6")
    assert LITE0.graph(fixed).blocks[3].settings["expand"] == EXPANDS[1]


@pytest.mark.parametrize("text", [
    "", "3x3e3 / 3x3e3 / 3x3e3 / 3x3e3 / 3x3e3 / 3x3e3", "5x5e3 / 3x3e3 / 3x3e3 / 3x3e3 / 3x3e3 / 3x3e3 / r11",
    "3x3e5 / 3x3e3 / 3x3e3 / 3x3e3 / 3x3e3 / 3x3e3 / r11", "3x3e3 / 3x3e3 / 3x3e3 / 3x3e3 / 3x3e3 / 3x3e3 / r12",
    "/ 3x3e3 / 3x3e3 / 3x3e3 / 3x3e3 / 3x3e3 / r11", "3x3e3 / 3x3e3 / 3x3e3 / 3x3e3 / 3x3e3 / 3x3e3 3x3e3 / r11",
    "3x3e3 / 3x3e3 / 3x3e3 / 3x3e3 / 3x3e3 / 3x3e3 /", "3x3e3 / 3x3e3 / 3x3e3",
])
def test_text_that_is_no_architecture(text: str) -> None:
    with pytest.raises(SpaceError, match="is not an architecture"):
        SMALL.parse(text)


@pytest.mark.parametrize("options", [
    {"width": 0.0}, {"depth": 5}, {"resolution": []}, {"resolution": [32, 16]}, {"resolution": 2}, {"stem_stride": 3}])
def test_impossible_options(options: dict) -> None:
    with pytest.raises(ConfigError, match="of efficientnet_lite is"):
        EfficientNetLite(**options)


def test_bins_are_by_stage() -> None:
    groups = {group.name: group.labels for group in EfficientNetLite().bin_groups()}
    assert list(groups)[:5] == ["depth0", "expand0", "depth1", "expand1", "kernel1"] and "depth5" not in groups
    assert groups["kernel4"] == ("3", "5") and "kernel2" not in groups and groups["depth4"][0] == "1-2"


def test_latency_features_grow_with_resolution_and_depth() -> None:
    space = EfficientNetLite(resolution=[32, 64])
    row = space.extremes()[0]
    larger = space.latency_features(np.stack([row, [*row[:-1], 1]]).astype(np.int8))
    assert 3 < larger[1, 1] / larger[0, 1] < 5 and (larger[1] >= larger[0]).all()
    assert space.latency_features(space.extremes())[:, 5:].tolist() == [[1] * 5, [2, 2, 3, 3, 4]]


# --- padding -------------------------------------------------------------------------------------------------------


def test_pads_depend_on_the_size() -> None:
    """An even side and stride 2: nothing before and one after a 3x3 kernel, one and two about a 5x5 one."""
    def pads(side: int, kernel: int, stride: int) -> tuple[int, ...]:
        builder = GraphBuilder(1, side)
        builder.begin_block("one", 0, "one")
        builder.conv("input", "conv", 1, kernel, stride, same=True)
        graph = builder.build()
        assert graph.nodes[-1].shape == (1, -(-side // stride), -(-side // stride))
        return conv_pads(graph.nodes[-1], graph.input_shape)

    assert pads(32, 3, 2) == (0, 0, 1, 1) and pads(33, 3, 2) == (1, 1, 1, 1)
    assert pads(32, 5, 2) == (1, 1, 2, 2) and pads(33, 5, 2) == (2, 2, 2, 2)
    assert pads(32, 3, 1) == (1, 1, 1, 1) and pads(1, 3, 2) == (1, 1, 1, 1) and pads(7, 1, 2) == (0, 0, 0, 0)


@pytest.mark.parametrize("resolution", [32, 33])
def test_file_computes_what_torch_computes(resolution: int) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    space = EfficientNetLiteS(resolution=resolution, stem_stride=2, channels=3)
    graph = space.graph(space.extremes()[1])
    torch.manual_seed(0)
    network = GraphNetwork(graph).eval()
    images = torch.rand(2, *graph.input_shape)
    expected = network(images).detach().numpy()
    model = to_onnx(graph, {name: tensor.numpy() for name, tensor in network.state_dict().items()}, 2)
    uneven = [a for node in model.graph.node for a in node.attribute if a.name == "pads" and len(set(a.ints)) > 1]
    assert bool(uneven) == (resolution == 32)   # from 33 on every strided layer sees an odd side: 33, 17, 9, 5, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    logits = session.run(["logits"], {"images": images.numpy()})[0]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
