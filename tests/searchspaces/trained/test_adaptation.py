"""Weights of stored blocks in other architectures: worked examples, and functions that must not change."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from searchspaces.graph import INPUT, Graph, GraphBuilder
from searchspaces.mnas.space import OPS, MnasS16
from searchspaces.mobilenetv3.space import MobileNetV3S16
from searchspaces.network import GraphNetwork
from searchspaces.trained.adaptation import adapted, inherit
from searchspaces.trained.blockweights import SourceBlock, channel_axes, sort_channels, split_blocks

Weights = dict[str, NDArray[np.generic]]


def trained(graph: Graph, seed: int = 0) -> GraphNetwork:
    """A network as after training: no tensor has the values of a fresh one."""
    torch.manual_seed(seed)
    network = GraphNetwork(graph)
    for name, tensor in network.state_dict().items():
        tensor.copy_(tensor + 0.3 * torch.rand_like(tensor) if "_bn." in name or name.endswith("bias") else tensor)
    return network.eval()


def weights_of(network: torch.nn.Module) -> Weights:
    return {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}


def sources_of(graph: Graph, weights: Weights, sort: bool = True) -> list[SourceBlock]:
    blocks = split_blocks(graph, sort_channels(graph, weights) if sort else weights)
    return [SourceBlock(block.stage, block.key, 1.0, 1, tensors) for block, tensors in zip(graph.blocks, blocks)]


def heir(graph: Graph, sources: Sequence[SourceBlock | None], seed: int = 9) -> GraphNetwork:
    torch.manual_seed(seed)
    network = GraphNetwork(graph)
    inherit(network, sources)
    return network.eval()


def logits(network: torch.nn.Module, images: torch.Tensor) -> NDArray[np.float32]:
    with torch.no_grad():
        return network(images).numpy()


# --- tensors ---------------------------------------------------------------------------------------------------------


def test_kernel_of_five_to_three_keeps_the_centre() -> None:
    stored = np.arange(25.0).reshape(1, 1, 5, 5)
    assert adapted(np.full((1, 1, 3, 3), -1.0), stored)[0, 0].tolist() == [[6, 7, 8], [11, 12, 13], [16, 17, 18]]


def test_kernel_of_three_to_five_has_a_ring_of_zeros() -> None:
    result = adapted(np.full((1, 1, 5, 5), -1.0), np.arange(1.0, 10).reshape(1, 1, 3, 3))[0, 0]
    assert result.tolist() == [[0, 0, 0, 0, 0], [0, 1, 2, 3, 0], [0, 4, 5, 6, 0], [0, 7, 8, 9, 0], [0, 0, 0, 0, 0]]


def test_four_channels_to_six_keep_the_last_two_fresh() -> None:
    fresh, stored = np.full((6, 6), -1.0), np.arange(16.0).reshape(4, 4)
    result = adapted(fresh, stored)
    np.testing.assert_array_equal(result[:4, :4], stored)
    assert (result[4:] == -1).all() and (result[:, 4:] == -1).all()
    assert (fresh == -1).all(), "the argument was written to"


def test_new_channels_with_a_larger_kernel_are_fresh_in_the_whole_kernel() -> None:
    result = adapted(np.full((2, 1, 5, 5), -1.0), np.ones((1, 1, 3, 3)))
    assert (result[1] == -1).all() and result[0].sum() == 9 and (result[0, 0, 0] == 0).all()


# --- channels in order -----------------------------------------------------------------------------------------------


def chain(mid: int = 4, kernel: int = 3) -> Graph:
    """One block: expand, depthwise, SE, project; then a classifier on a flattened 4x4 map."""
    builder = GraphBuilder(2, 4)
    builder.begin_block("body", 0, "layer", (mid, kernel))
    y = builder.batch_norm(builder.conv(INPUT, "body.expand", mid, 1), "body.expand_bn")
    y = builder.conv(builder.activation(y, "body.act", "relu"), "body.depthwise", mid, kernel, groups=mid)
    gate = builder.conv(builder.global_pool(y, "body.se.pool"), "body.se.reduce", 2, 1, bias=True)
    gate = builder.conv(builder.activation(gate, "body.se.relu", "relu"), "body.se.expand", mid, 1, bias=True)
    y = builder.mul(y, builder.activation(gate, "body.se.gate", "sigmoid"), "body.se.mul")
    x = builder.conv(y, "body.project", 3, 1)
    builder.begin_block("head", -1, "classifier")
    builder.linear(builder.flatten(x, "head.flatten"), "head.linear", 5)
    return builder.build()


def test_coupled_tensors_share_an_axis() -> None:
    axis = channel_axes(chain())
    middle = {name for name, root in axis.items() if root == "body.expand"}
    assert middle == {"body.expand", "body.expand_bn", "body.act", "body.depthwise", "body.se.pool", "body.se.mul",
                      "body.se.expand", "body.se.gate"}
    assert axis["head.flatten"] == "body.project" and axis["head.linear"] == "head.linear"


def test_channels_are_sorted_by_what_project_reads_and_coupled_tensors_follow() -> None:
    weights = weights_of(trained(chain()))
    weights["body.project.weight"] = np.array([1.0, 9, 4, 2], dtype=np.float32).reshape(1, 4, 1, 1).repeat(3, axis=0)
    weights["body.se.reduce.weight"] = np.array([99.0, 0, 0, 0], dtype=np.float32).reshape(1, 4, 1, 1).repeat(2, axis=0)
    result, order = sort_channels(chain(), weights), [1, 2, 3, 0]
    assert np.abs(result["body.project.weight"]).sum(axis=(0, 2, 3)).tolist() == [27, 12, 6, 3]
    for name in ("body.expand.weight", "body.depthwise.weight", "body.expand_bn.weight", "body.expand_bn.bias",
                 "body.expand_bn.running_mean", "body.expand_bn.running_var", "body.se.expand.bias"):
        np.testing.assert_array_equal(result[name], weights[name][order], err_msg=name)
    assert (result["body.se.reduce.weight"][:, 3] == 99).all()
    np.testing.assert_array_equal(result["head.linear.bias"], weights["head.linear.bias"])


def random_rows(space: MnasS16, count: int, seed: int = 0) -> NDArray[np.int8]:
    return space.sample_uniform(np.random.default_rng(seed), count)


@pytest.mark.parametrize("seed", range(4))
def test_sorting_keeps_the_function_of_whole_networks(seed: int) -> None:
    space = MnasS16()
    graph = space.graph(random_rows(space, 1, seed)[0])
    network = trained(graph, seed)
    before = weights_of(network)
    after = sort_channels(graph, before)
    assert sum(not np.array_equal(after[name], before[name]) for name in before) > len(before) / 2
    images = torch.randn(3, *graph.input_shape)
    result = GraphNetwork(graph, {name: torch.from_numpy(array) for name, array in after.items()}).eval()
    np.testing.assert_allclose(logits(result, images), logits(network, images), rtol=1e-3, atol=1e-4)


def test_a_shuffled_source_gives_the_same_heir() -> None:
    """Hidden channels have no names: a source with its channels in another order is the same source."""
    weights = weights_of(trained(chain(mid=6)))
    order = np.random.default_rng(1).permutation(6)
    shuffled = dict(weights)
    for name in ("body.expand.weight", "body.depthwise.weight", "body.expand_bn.weight", "body.expand_bn.bias",
                 "body.expand_bn.running_mean", "body.expand_bn.running_var", "body.se.expand.weight",
                 "body.se.expand.bias"):
        shuffled[name] = weights[name][order]
    for name in ("body.project.weight", "body.se.reduce.weight"):
        shuffled[name] = weights[name][:, order]
    heirs = [heir(chain(mid=4), sources_of(chain(mid=6), w)) for w in (weights, shuffled)]
    for name, tensor in heirs[0].state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), heirs[1].state_dict()[name].numpy(), err_msg=name)


def test_slices_are_those_of_the_once_for_all_supernet() -> None:
    """An independent implementation: sort the supernet, then extract a slimmer subnet from it."""
    space = MobileNetV3S16()
    torch.manual_seed(0)
    supernet = space.make_supernet().eval()
    slim = np.array(([0] + [0, 2] * 4) * 5, dtype=np.int8)      # depth 2, expand 3, kernel 7
    wide = np.array(([0] + [2, 2] * 4) * 5, dtype=np.int8)      # depth 2, expand 6, kernel 7
    source = weights_of(supernet.extract(wide).to(memory_format=torch.contiguous_format))
    supernet.sort_channels()  # type: ignore[operator]
    expected = weights_of(supernet.extract(slim).to(memory_format=torch.contiguous_format))
    result = weights_of(heir(space.graph(slim), sources_of(space.graph(wide), source)))
    compared = [name for name in expected if name.endswith(("depthwise.weight", "se.reduce.weight"))]
    assert len(compared) == 17      # the axes of these tensors are inside of one layer
    for name in compared[1:]:       # the first block is not elastic: the supernet leaves it as it is
        np.testing.assert_array_equal(result[name], expected[name], err_msg=name)


# --- whole networks --------------------------------------------------------------------------------------------------


def block_tokens(op: str = "mb3", kernel: int = 3, se: bool = False, layers: int = 0,
                 filters: float = 1.0) -> list[int]:
    return [OPS.index(op), (3, 5).index(kernel), int(se), 1, (0.75, 1.0, 1.25).index(filters), layers + 1]


def row(**changes: object) -> NDArray[np.int8]:
    """Blocks 0 and 6 fixed, blocks 1 to 5 as said."""
    middle = [block_tokens(**changes) for _ in range(5)]  # type: ignore[arg-type]
    return np.array([block_tokens(), *middle, block_tokens()], dtype=np.int8).ravel()


@pytest.mark.parametrize("seed", range(3))
def test_the_same_architecture_inherits_the_function(seed: int) -> None:
    space = MnasS16()
    graph = space.graph(random_rows(space, 1, seed)[0])
    source = trained(graph, seed)
    images = torch.randn(3, *graph.input_shape)
    result = heir(graph, sources_of(graph, weights_of(source)))
    np.testing.assert_allclose(logits(result, images), logits(source, images), rtol=1e-3, atol=1e-4)
    unsorted = heir(graph, sources_of(graph, weights_of(source), sort=False))
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, unsorted.state_dict()[name]), f"{name} is no plain copy"


def test_a_larger_kernel_inherits_the_function() -> None:
    """Zeros around a kernel change nothing."""
    space = MnasS16()
    small, large = space.graph(row(kernel=3)), space.graph(row(kernel=5))
    source = trained(small)
    images = torch.randn(3, *small.input_shape)
    result = heir(large, sources_of(small, weights_of(source)))
    np.testing.assert_allclose(logits(result, images), logits(source, images), rtol=1e-3, atol=1e-4)


def changed(result: GraphNetwork, keep: Callable[[str], bool], seed: int = 9) -> set[bool]:
    """Of the tensors that `keep` names: do they differ from a fresh network's?"""
    torch.manual_seed(seed)
    fresh = GraphNetwork(result.graph).state_dict()
    chosen = {name for name in fresh if keep(name)}
    assert chosen
    return {not torch.equal(fresh[name], tensor) for name, tensor in result.state_dict().items() if name in chosen}


def test_extra_layers_repeat_the_last_one_and_missing_ones_are_dropped() -> None:
    space = MnasS16()
    two, three = space.graph(row(layers=0)), space.graph(row(layers=1))
    sources = sources_of(two, weights_of(trained(two)))
    result = heir(three, sources)
    for layer, origin in ((0, 0), (1, 1), (2, 1)):
        for name in ("depthwise.weight", "project_bn.running_var"):
            np.testing.assert_array_equal(result.state_dict()[f"block2.layer{layer}.{name}"].numpy(),
                                          sources[3].weights[f"layer{origin}.{name}"])
    one = space.graph(row(layers=-1))
    np.testing.assert_array_equal(heir(one, sources).state_dict()["block2.layer0.project.weight"].numpy(),
                                  sources[3].weights["layer0.project.weight"])


def test_another_operator_inherits_equal_roles_only() -> None:
    space = MnasS16()
    separable, dense, inverted = (space.graph(row(op=op)) for op in ("sep", "conv", "mb3"))
    sources = sources_of(separable, weights_of(trained(separable)))
    result = heir(inverted, sources)
    assert changed(result, lambda n: n.startswith("block3") and ".expand" in n) == {False}
    assert changed(result, lambda n: n.startswith("block3") and (".project" in n or ".depthwise" in n)) == {True}
    assert changed(heir(dense, sources), lambda n: n.startswith("block3")) == {False}


def test_wider_middle_keeps_fresh_norms_beyond_the_stored_channels() -> None:
    space = MnasS16()
    three, six = space.graph(row(op="mb3")), space.graph(row(op="mb6"))
    sources = sources_of(three, weights_of(trained(three)))
    state = heir(six, sources).state_dict()
    stored = sources[3].weights["layer1.depthwise_bn.running_var"]
    for suffix, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
        tensor = state[f"block2.layer1.depthwise_bn.{suffix}"].numpy()
        assert (tensor[len(stored):] == value).all() and (tensor[:len(stored)] != value).any()


def test_se_that_one_side_lacks_stays_fresh() -> None:
    space = MnasS16()
    plain, gated = space.graph(row(se=False)), space.graph(row(se=True))
    result = heir(gated, sources_of(plain, weights_of(trained(plain))))
    assert changed(result, lambda n: n.startswith("block3") and ".se." in n) == {False}
    assert changed(result, lambda n: n.startswith("block3") and ".se." not in n) == {True}
    back = heir(plain, sources_of(gated, weights_of(trained(gated))))
    assert changed(back, lambda n: n.startswith("block3")) == {True}


def test_other_image_channels_are_channels_and_other_classes_stay_fresh() -> None:
    ten, hundred = MnasS16(classes=10, channels=1).graph(row()), MnasS16(classes=100, channels=3).graph(row())
    sources = sources_of(ten, weights_of(trained(ten)))
    result = heir(hundred, sources)
    assert changed(result, lambda n: n.startswith("head.")) == {False}
    torch.manual_seed(9)
    fresh = GraphNetwork(hundred).state_dict()["stem.conv.weight"]
    weight = result.state_dict()["stem.conv.weight"]
    np.testing.assert_array_equal(weight[:, :1].numpy(), sources[0].weights["conv.weight"])
    assert torch.equal(weight[:, 1:], fresh[:, 1:])


def test_blocks_without_a_source_stay_fresh() -> None:
    graph = MnasS16().graph(row())
    sources: list[SourceBlock | None] = list(sources_of(graph, weights_of(trained(graph))))
    sources[3] = None
    result = heir(graph, sources)
    assert changed(result, lambda n: n.startswith("block2.")) == {False}
    assert changed(result, lambda n: n.startswith("block3.")) == {True}


def test_any_architecture_inherits_from_any_other() -> None:
    """Every pair of rows fits together, and read-only arrays are not written to."""
    space = MnasS16()
    rows = random_rows(space, 6, seed=3)
    for source_row, target_row in zip(rows[:3], rows[3:]):
        source = sources_of(space.graph(source_row), weights_of(trained(space.graph(source_row))))
        for block in source:
            for array in block.weights.values():
                array.setflags(write=False)
        result = heir(space.graph(target_row), source)
        assert np.isfinite(logits(result, torch.randn(2, *result.graph.input_shape))).all()
        assert changed(result, lambda n: n.startswith(("stem.", "final."))) == {True}
