"""The ONNX writer against torch: equal outputs, equal optimised operators, every operator, both kinds of batch."""
from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from searchspaces.catalogue import make_space
from searchspaces.darts.space import DartsS16
from searchspaces.errors import SpaceError
from searchspaces.graph import INPUT, Graph, GraphBuilder
from searchspaces.network import GraphNetwork, recalibrate_batch_norm
from searchspaces.onnxgraph import to_onnx
from searchspaces.space import SearchSpace

MOBILE = make_space("mobilenetv3-s32", classes=10, channels=3, options={})
CELLS = make_space("nasbench201", classes=10, channels=3, options={})
PAIRS = DartsS16(cells=3, width=4)
PAIRS_TEXT = ("normal sep3~0+sep5~1 avg3~0+max3~1 dil3~2+dil3~2 skip~3+skip~3 / "
              "reduction skip~0+sep7~1 avg3~0+max3~1 dil3~0+sep3~2 skip~1+skip~4")
CELL_TOKENS = np.array([3, 2, 1, 0, 3, 4], dtype=np.int8)


def every_operator() -> Graph:
    builder = GraphBuilder(3, 9)
    builder.begin_block("all", -1, "all")
    x = builder.conv(INPUT, "a.conv", 8, 3, 2)
    x = builder.activation(builder.batch_norm(x, "a.bn"), "a.act", "h_swish")
    y = builder.conv(x, "b.conv", 8, 3, groups=8, dilation=2, bias=True)
    y = builder.activation(builder.batch_norm(y, "b.bn", eps=1e-3, affine=False), "b.act", "relu6")
    gate = builder.conv(builder.global_pool(y, "gate.pool"), "gate.conv", 8, 1, bias=True)
    y = builder.mul(y, builder.activation(gate, "gate.act", "h_sigmoid"), "gate.mul")
    z = builder.batch_norm(builder.pool(x, "z.max", "max_pool", 3), "z.bn")     # not behind a convolution: stays a node
    z = builder.activation(builder.pool(z, "z.avg", "avg_pool", 3), "z.act", "sigmoid")
    nothing = builder.zeros(x, "nothing", builder.shape(x))
    total = builder.add((x, nothing, y, z), "total")
    both = builder.concat((total, builder.add((nothing, nothing), "none")), "both")
    both = builder.activation(builder.shift(both, "shift"), "both.act", "relu")
    builder.linear(builder.flatten(builder.pool(both, "down", "avg_pool", 2, 2, 0), "flat"), "head", 5, bias=False)
    return builder.build()


def trained(graph: Graph) -> GraphNetwork:
    """A network whose batch-norms are not neutral and whose images matter to the last layer."""
    torch.manual_seed(0)
    network = GraphNetwork(graph)
    for name, tensor in network.state_dict().items():
        if tensor.ndim == 1 and not name.endswith(("running_mean", "running_var")):
            tensor.normal_(1.0, 0.3)
    recalibrate_batch_norm(network, [torch.rand(8, *graph.input_shape)])
    return network.eval()


def weights_of(network: GraphNetwork) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in network.state_dict().items()}


def run(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["images"]
    return session.run(["logits"], {"images": images})[0]


def optimised_operators(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    """What the runtime executes, without the nodes that only change layout or shape.

    torch writes a global pool as the mean over height and width: the same operation under another name.
    """
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    histogram = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    histogram["GlobalAveragePool"] += histogram.pop("ReduceMean", 0)
    for kind in ("ReorderInput", "ReorderOutput", "Flatten", "Reshape"):
        histogram.pop(kind, None)
    return histogram


GRAPHS = {"every operator": every_operator(), "mobilenetv3": MOBILE.graph(MOBILE.extremes()[1]),
          "nasbench201": CELLS.graph(CELL_TOKENS), "darts": PAIRS.graph(PAIRS.parse(PAIRS_TEXT))}


@pytest.mark.parametrize("batch", [3, None])
@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_file_computes_what_torch_computes(graph: Graph, batch: int | None) -> None:
    network = trained(graph)
    images = np.random.default_rng(0).random((3, *graph.input_shape), dtype=np.float32)
    expected = network(torch.from_numpy(images)).detach().numpy()
    logits = run(to_onnx(graph, weights_of(network), batch), images)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert np.ptp(logits, axis=0).max() > 0     # the images do matter


@pytest.mark.parametrize("graph", [MOBILE.graph(MOBILE.extremes()[0]), GRAPHS["nasbench201"]],
                         ids=["mobilenetv3", "nasbench201"])
def test_same_optimised_operators_as_the_torch_exporter(graph: Graph, tmp_path: Path) -> None:
    network = trained(graph)
    path = tmp_path / "exported.onnx"
    torch.onnx.export(network, (torch.zeros(1, *graph.input_shape),), str(path), dynamo=True, verbose=False)
    exported = optimised_operators(onnx.load(path), tmp_path)
    for weights in (None, weights_of(network)):
        ours = optimised_operators(to_onnx(graph, weights), tmp_path)
        assert "BatchNormalization" not in ours
        assert ours == exported
    operators = {node.name: node.op for node in graph.nodes}
    lone_norms = sum(node.op == "batch_norm" and operators[node.inputs[0]] != "conv" for node in graph.nodes)
    assert ours["Conv"] == Counter(operators.values())["conv"] + lone_norms     # the runtime makes them convolutions


def test_metadata_and_reproducible_random_weights() -> None:
    graph = GRAPHS["mobilenetv3"]
    model = to_onnx(graph, metadata={"arch_id": "abc", "run": "r"})
    assert {entry.key: entry.value for entry in model.metadata_props} == {"arch_id": "abc", "run": "r"}
    assert to_onnx(graph).SerializeToString() == to_onnx(graph).SerializeToString()
    logits = run(to_onnx(graph), np.ones((1, *graph.input_shape), np.float32))
    assert np.isfinite(logits).all() and np.abs(logits).max() > 0


def test_random_and_given_weights_have_the_same_shapes() -> None:
    graph = GRAPHS["mobilenetv3"]
    shapes = [{t.name: tuple(t.dims) for t in to_onnx(graph, weights).graph.initializer}
              for weights in (None, weights_of(trained(graph)))]
    assert shapes[0] == shapes[1]
    # folding leaves a bias per channel in the place of four batch-norm tensors
    numbers = sum(prod(shape) for shape in shapes[0].values())
    normed = sum(node.shape[0] for node in graph.nodes if node.op == "batch_norm")
    assert numbers == graph.params - normed


def test_missing_and_misshapen_weights_are_named() -> None:
    graph = GRAPHS["mobilenetv3"]
    weights = weights_of(trained(graph))
    name = next(iter(weights))
    with pytest.raises(SpaceError, match=f"{name} has shape"):
        to_onnx(graph, weights | {name: np.zeros(3, np.float32)})
    del weights[name]
    with pytest.raises(SpaceError, match=f"lack the tensor {name}"):
        to_onnx(graph, weights)


@pytest.mark.parametrize("space", [MOBILE, CELLS, PAIRS], ids=["mobilenetv3", "nasbench201", "darts"])
def test_every_sampled_architecture_is_a_valid_file(space: SearchSpace) -> None:
    for tokens_T in np.concatenate([space.extremes(), space.sample_uniform(np.random.default_rng(1), 4)]):
        graph = space.graph(tokens_T)
        logits = run(to_onnx(graph, batch=2), np.ones((2, *graph.input_shape), np.float32))
        assert logits.shape == (2, 10) and np.isfinite(logits).all()
