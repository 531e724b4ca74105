"""Graphs in torch, and batch-norm statistics against closed forms."""
from __future__ import annotations

import copy
import pickle

import numpy as np
import torch
from torch import nn

from searchspaces.graph import GraphBuilder, tensor_shapes
from searchspaces.mobilenetv3.space import MobileNetV3S16
from searchspaces.network import GraphNetwork, input_of, recalibrate_batch_norm


def all_operators() -> GraphBuilder:
    """Every operator once; node names that collide with attributes of nn.Module or with other nodes' prefixes."""
    builder = GraphBuilder(3, 9)
    builder.begin_block("all", -1, "all operators")
    a = builder.batch_norm(builder.conv("input", "half", 6, 3, 2, bias=True), "half.bn")
    b = builder.batch_norm(builder.conv("input", "type.b", 6, 5, 2, groups=3, dilation=2), "training", affine=False)
    c = builder.concat((builder.activation(a, "relu", "relu"), builder.activation(b, "relu6", "relu6")), "concat")
    c = builder.add((c, builder.pool(c, "avg", "avg_pool", 3), builder.pool(c, "max", "max_pool", 3)), "add")
    c = builder.add((c, builder.zeros(c, "zeros", builder.shape(c))), "same")
    gate = builder.activation(builder.global_pool(c, "pool"), "gate", "sigmoid")
    c = builder.mul(builder.activation(c, "swish", "h_swish"), builder.activation(gate, "hard", "h_sigmoid"), "mul")
    c = builder.conv(builder.shift(c, "shift"), "shifted", 12, 1, 2)
    builder.linear(builder.flatten(builder.pool(c, "strided", "max_pool", 2, 2, 0), "flat"), "logits", 4)
    return builder


def test_every_operator_has_the_shape_the_graph_says() -> None:
    graph = all_operators().build()
    network = GraphNetwork(graph)
    logits = network(torch.randn(2, 3, 9, 9))
    assert logits.shape == (2, 4)
    shapes = {node.name: node.shape for node in graph.nodes}
    expected = {f"{node.name}.{suffix}": shape for node in graph.nodes[1:]
                for suffix, shape in tensor_shapes(node, shapes[node.inputs[0]]).items()}
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == expected
    assert sum(p.numel() for p in network.parameters()) == graph.params


def test_average_pool_leaves_padding_out() -> None:
    builder = GraphBuilder(1, 4)
    builder.begin_block("pool", -1, "pool")
    builder.flatten(builder.pool("input", "pool", "avg_pool", 3), "flat")
    assert torch.allclose(GraphNetwork(builder.build())(torch.ones(1, 1, 4, 4)), torch.ones(1, 16))


def test_shift_drops_the_first_row_and_column() -> None:
    builder = GraphBuilder(1, 3)
    builder.begin_block("shift", -1, "shift")
    builder.flatten(builder.shift("input", "shift"), "flat")
    images = torch.arange(9.0).reshape(1, 1, 3, 3)
    assert GraphNetwork(builder.build())(images).tolist() == [[4, 5, 7, 8]]


def test_weights_go_in_and_out_by_name() -> None:
    space = MobileNetV3S16()
    graph = space.graph(space.extremes()[0])
    torch.manual_seed(0)
    first, second = GraphNetwork(graph).eval(), GraphNetwork(graph).eval()
    images = torch.randn(2, 1, 16, 16)
    assert not torch.allclose(first(images), second(images))
    plain = {name: torch.from_numpy(tensor.numpy().copy()) for name, tensor in first.state_dict().items()}
    second.load_state_dict(plain)
    third = GraphNetwork(graph, plain).eval()
    for network in (second, third, copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert torch.equal(network(images), first(images))


def test_recalibration_is_exact_over_all_batches() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5))
    network.train()
    batches = [torch.randn(n, 2, 6, 6) * n for n in (3, 5, 16)]  # unequal sizes, means and variances
    recalibrate_batch_norm(network, batches)
    values = network[0](torch.cat(batches)).detach().double()
    norm = network[1]
    assert torch.allclose(norm.running_mean.double(), values.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(norm.running_var.double(), values.var((0, 2, 3), unbiased=False), rtol=1e-5)
    assert norm.momentum == 0.1 and all(module.training for module in network.modules())


def test_recalibration_makes_evaluation_equal_to_batch_statistics() -> None:
    """With one batch, evaluation mode on that batch must give what training mode gives, layer after layer."""
    torch.manual_seed(0)
    space = MobileNetV3S16()
    network = GraphNetwork(space.graph(space.sample_uniform(np.random.default_rng(0), 1)[0]))
    images = torch.randn(32, 1, 16, 16)
    expected = network.train()(images).detach()
    assert not torch.allclose(network.eval()(images), expected, atol=1e-2)
    recalibrate_batch_norm(network, [images])
    assert torch.allclose(network(images), expected, atol=1e-4)
    assert not network.training


def test_images_are_resized_to_the_network() -> None:
    space = MobileNetV3S16(resolution=[12, 16])
    network = GraphNetwork(space.graph(space.extremes()[0]))
    assert input_of(network, torch.ones(2, 1, 16, 16)).shape == (2, 1, 12, 12)
    assert torch.allclose(input_of(network, torch.ones(2, 1, 16, 16)), torch.ones(2, 1, 12, 12))
    assert input_of(nn.Identity(), torch.ones(2, 1, 16, 16)).shape == (2, 1, 16, 16)
