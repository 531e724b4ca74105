"""The fixed network that every visit times beside the candidate (latency.md section 3).

It never changes within a version of the project: its hash is part of the target's identity. It is made of what the
searched networks are made of (inverted residuals, squeeze-excite, both activations), so that whatever slows the machine
down slows both alike, and it lies near the middle of the mobilenetv3 spaces in cost at every input size.
"""
from __future__ import annotations

import hashlib
import json

from searchspaces.graph import INPUT, Graph, GraphBuilder, Op

LARGE_INPUT = 64    # from here on the stem halves the resolution, as the searched networks do
CLASSES = 10
EXPAND, KERNELS = 4, (5, 3, 5)    # of the layers of every unit
# (out channels, stride of the first layer, squeeze-excite, activation)
UNITS: tuple[tuple[int, int, bool, Op], ...] = (
    (16, 1, False, "relu"), (24, 2, True, "relu"), (40, 2, False, "h_swish"), (56, 1, True, "h_swish"),
    (80, 2, True, "h_swish"),
)


def reference_graph(channels: int, resolution: int) -> Graph:
    """The reference network for inputs of that size."""
    builder = GraphBuilder(channels, resolution)
    builder.begin_block("stem", -1, "stem")
    x = builder.conv(INPUT, "stem.conv", 16, 3, 2 if resolution > LARGE_INPUT else 1)
    x = builder.activation(builder.batch_norm(x, "stem.norm"), "stem.act", "h_swish")
    for stage, (out, stride, gate, act) in enumerate(UNITS):
        for layer, kernel in enumerate(KERNELS):
            name = f"unit{stage}.layer{layer}"
            builder.begin_block(name, stage, f"{kernel}x{kernel} e{EXPAND}", kernel=kernel, expand=EXPAND)
            x = _inverted_residual(builder, x, name, out, kernel, stride if layer == 0 else 1, gate, act)
    builder.begin_block("head", -1, "head")
    x = builder.activation(builder.batch_norm(builder.conv(x, "head.conv", 480, 1), "head.norm"), "head.act", "h_swish")
    x = builder.flatten(builder.global_pool(x, "head.pool"), "head.flat")
    builder.linear(x, "head.linear", CLASSES)
    return builder.build()


def graph_hash(graph: Graph) -> str:
    """12 hex digits over every node and attribute."""
    text = json.dumps([[node.name, node.op, node.inputs, node.shape, sorted(node.attributes.items())]
                       for node in graph.nodes])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _inverted_residual(builder: GraphBuilder, x: str, name: str, out: int, kernel: int, stride: int, gate: bool,
                       act: Op) -> str:
    channels = builder.shape(x)[0]
    middle = channels * EXPAND
    y = builder.batch_norm(builder.conv(x, f"{name}.expand", middle, 1), f"{name}.norm0")
    y = builder.activation(y, f"{name}.act0", act)
    y = builder.conv(y, f"{name}.depthwise", middle, kernel, stride, groups=middle)
    y = builder.activation(builder.batch_norm(y, f"{name}.norm1"), f"{name}.act1", act)
    if gate:
        z = builder.conv(builder.global_pool(y, f"{name}.pool"), f"{name}.reduce", middle // 4, 1, bias=True)
        z = builder.conv(builder.activation(z, f"{name}.act2", "relu"), f"{name}.restore", middle, 1, bias=True)
        y = builder.mul(y, builder.activation(z, f"{name}.gate", "h_sigmoid"), f"{name}.scale")
    y = builder.batch_norm(builder.conv(y, f"{name}.project", out, 1), f"{name}.norm2")
    return builder.add((x, y), f"{name}.sum") if stride == 1 and channels == out else y
