"""The tensors of a trained network as interchangeable blocks: split by block, channels in order of importance.

    stored = split_blocks(graph, sort_channels(graph, weights))     # one entry per block of the graph

Sorting whole networks, once, before their blocks go separate ways has two uses: a leading slice of any channel axis
keeps the most important channels, and two neighbouring blocks of one network always agree on the channels between them,
whatever is sliced off. `adaptation.py` puts such blocks into other networks. Numpy only, no torch.

Shape legend: C channels of one axis.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from searchspaces.graph import Graph, Node

Arrays = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, eq=False)
class SourceBlock:
    """A stored block that suits a block of the target best: tensors by their names within the block, channels sorted.

    `similarity` is the cosine of the two block keys, `lineage` the training iterations along the chain of warm starts
    that made the weights. The arrays may be mapped read-only; they are copied from.
    """

    stage: int
    key: tuple[int, ...]
    similarity: float
    lineage: int
    weights: Arrays


def split_blocks(graph: Graph, weights: Arrays) -> list[dict[str, NDArray[np.generic]]]:
    """The tensors of each block of `graph`, in order, under their names within the block."""
    owner = {node: index for index, block in enumerate(graph.blocks) for node in block.nodes}
    blocks: list[dict[str, NDArray[np.generic]]] = [{} for _ in graph.blocks]
    for name, array in weights.items():
        index = owner[name.rpartition(".")[0]]
        blocks[index][name.removeprefix(f"{graph.blocks[index].name}.")] = array
    return blocks


def sort_channels(graph: Graph, weights: Arrays) -> dict[str, NDArray[np.generic]]:
    """The same function with every channel axis sorted by importance, descending: the L1 norm of what the consuming
    convolutions read from a channel (as Once-for-all does). All tensors coupled by a channel share its permutation.

    Image channels, classes, and channels that are concatenated or split into groups keep their order.
    """
    nodes = {node.name: node for node in graph.nodes}
    axis, fixed = channel_axes(graph), set()
    for node in graph.nodes:
        if node in (graph.nodes[0], graph.nodes[-1]) or node.op in ("concat", "zeros") or _grouped(node):
            fixed |= {axis[node.name], *(axis[name] for name in node.inputs if node is not graph.nodes[-1])}
    order = {name: np.argsort(-norms_C, kind="stable")
             for name, norms_C in _importance(nodes, axis, weights).items() if name not in fixed}
    result = {}
    for name, array in weights.items():
        node = nodes[name.rpartition(".")[0]]
        if axis[node.name] in order:
            array = array[order[axis[node.name]]]
        if name.endswith(".weight") and _reads_all(node) and axis[node.inputs[0]] in order:
            array = array[:, _flattened(order[axis[node.inputs[0]]], array.shape[1])]
        result[name] = np.ascontiguousarray(array)
    return result


def channel_axes(graph: Graph) -> dict[str, str]:
    """Per node, the first node of its channel axis: nodes with the same one share the order of their channels."""
    axis: dict[str, str] = {}
    for node in graph.nodes:
        axis[node.name] = node.name
        if node.op in ("input", "linear", "concat", "zeros") or (node.op == "conv" and not _depthwise(node)):
            continue  # these make channels of their own; all others pass on what they get
        first, *others = (axis[name] for name in node.inputs)
        for name, root in axis.items():
            if root in (node.name, *others):
                axis[name] = first
    return axis


def _depthwise(node: Node) -> bool:
    return node.op == "conv" and 1 < int(node.attributes["groups"]) == node.shape[0]


def _grouped(node: Node) -> bool:
    return node.op == "conv" and int(node.attributes["groups"]) > 1 and not _depthwise(node)


def _reads_all(node: Node) -> bool:
    """Does each output channel read every input channel?"""
    return node.op == "linear" or (node.op == "conv" and int(node.attributes["groups"]) == 1)


def _importance(nodes: Mapping[str, Node], axis: Mapping[str, str], weights: Arrays) -> dict[str, NDArray[np.float64]]:
    """float64[C] per axis that is read. What an SE reads from the pooled map counts only where nothing else reads."""
    pooled: dict[str, NDArray[np.float64]] = {}
    direct: dict[str, NDArray[np.float64]] = {}
    for node in nodes.values():
        if _reads_all(node):
            root = axis[node.inputs[0]]
            weight = np.moveaxis(np.abs(weights[f"{node.name}.weight"]).astype(np.float64), 1, 0)
            norms_C = weight.reshape(nodes[root].shape[0], -1).sum(axis=1)
            readers = pooled if nodes[node.inputs[0]].op == "global_pool" else direct
            readers[root] = readers.get(root, 0) + norms_C
    return pooled | direct


def _flattened(order_C: NDArray[np.int64], features: int) -> NDArray[np.int64]:
    """The order of the features of a flattened map, which come channel by channel."""
    per_channel = features // len(order_C)
    return (order_C[:, None] * per_channel + np.arange(per_channel)).ravel()
