"""Latency features of a network whose channel counts are anything, not only multiples of 8.

Runtimes compute on vectors of channels and pad the last one, so that 20 channels take the time of 32: on an AVX-512 CPU
with ONNX Runtime a 3x3 convolution of 20, 24 or 32 channels takes equally long. Exact multiply-adds miss that.
"""
from __future__ import annotations

from collections.abc import Collection
from math import prod

from searchspaces.graph import Graph

VECTOR = 16
VECTOR_FEATURES = ("operators", "depthwise", "dense", "pointwise", "maps")


def vector_features(graph: Graph, nodes: Collection[str] | None = None) -> tuple[float, ...]:
    """VECTOR_FEATURES of a graph as a runtime with vector layouts sees it: channels in whole vectors of 16.
    Of `nodes` alone where they are given; the features of disjoint sets add up.

    Operators left after fusion; mega multiply-adds of depthwise, of dense k x k and of 1x1 convolutions; mega elements
    of maps that are pooled, gated or added, which also change layout on the way.
    """
    shapes = {node.name: node.shape for node in graph.nodes}
    sums = dict.fromkeys(VECTOR_FEATURES, 0.0)
    for node in graph.nodes[1:]:
        if nodes is not None and node.name not in nodes:
            continue
        if node.op in ("batch_norm", "relu", "relu6", "flatten"):
            continue
        vectors_out, vectors_in = (VECTOR * -(-shape[0] // VECTOR) for shape in (node.shape, shapes[node.inputs[0]]))
        elements = vectors_out * prod(node.shape[1:]) / 1e6
        sums["operators"] += 1
        if node.op == "conv":
            taps = int(node.attributes["kernel"]) ** 2
            if node.attributes["groups"] != 1:
                sums["depthwise"] += elements * taps
            else:
                sums["dense" if taps > 1 else "pointwise"] += elements * taps * vectors_in
        elif node.op in ("mul", "avg_pool", "add"):
            sums["maps"] += elements
    return tuple(sums.values())
