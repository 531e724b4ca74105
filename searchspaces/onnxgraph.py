"""Architecture -> runnable ONNX file, written node by node without torch (latency.md section 2).

One writer serves both uses, so what is measured during the search is what is handed over:
- without weights: cheap random numbers, because latency does not depend on values; milliseconds per architecture;
- with weights (a `GraphNetwork` state dict as numpy arrays): the trained network.

A batch-norm that follows a convolution is folded into it while writing, in float64:
    s = gamma / sqrt(var + eps),  W' = s W,  b' = s (b - mean) + beta.
The runtime would do the same (its optimised operators are equal, a test holds that), but a folded file is smaller,
loads faster and is fast in runtimes that do not fold. Sums leave out `zeros` inputs for the same reason.

With `Pixels` the file begins with its preprocessing and ends with probabilities (onnxpixels.py).
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from math import log2, prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from searchspaces.errors import SpaceError
from searchspaces.graph import INPUT, Graph, Node, conv_pads, tensor_shapes
from searchspaces.onnxpixels import HEIGHT, RESIZE_OPSET, WIDTH, Pixels, from_pixels

IMAGES, LOGITS, PROBABILITIES = "images", "logits", "probabilities"
OPSET = 17            # the runtime's layout optimiser knows every operator used here at this version
IR_VERSION = 8        # the oldest that holds opsets 17 and 18, so that old runtimes open the file
PREPROCESSED = "pixels.preprocessed"
POOL_SIZE = 1 << 16   # random numbers made once per scale and repeated
Weights = Mapping[str, NDArray[np.float32]]

# Operators that are one ONNX node without tensors or computed attributes. HardSwish as one operator is what the
# runtime fuses into the convolution before it; x * relu6(x + 3) / 6 written out is not fused.
PLAIN: dict[str, tuple[str, dict[str, float | int]]] = {
    "relu": ("Relu", {}),
    "h_swish": ("HardSwish", {}),
    "sigmoid": ("Sigmoid", {}),
    "h_sigmoid": ("HardSigmoid", {"alpha": 1.0 / 6.0, "beta": 0.5}),
    "mul": ("Mul", {}),
    "concat": ("Concat", {"axis": 1}),
    "global_pool": ("GlobalAveragePool", {}),
    "flatten": ("Flatten", {"axis": 1}),
}


def to_onnx(graph: Graph, weights: Weights | None = None, batch: int | None = 1,
            metadata: Mapping[str, str] | None = None, pixels: Pixels | None = None) -> onnx.ModelProto:
    """Input "images" float[batch, C, H, W], output "logits" float[batch, classes]; batch None is a free dimension.

    With `pixels`: input "images" uint8[batch, H, W, C] of any height and width, output "probabilities"
    float[batch, classes]. `metadata` becomes the file's `metadata_props`. Raises SpaceError where `weights` lacks a
    tensor or one has another shape than the graph says.
    """
    writer = _Writer(graph, weights, batch, IMAGES if pixels is None else PREPROCESSED)
    for node in graph.nodes[1:]:
        writer.write(node)
    size: int | str = "batch" if batch is None else batch
    shape: list[int | str] = [size, *graph.input_shape]
    kind, output, opset = TensorProto.FLOAT, LOGITS, OPSET
    if pixels is not None:
        nodes, constants = from_pixels(pixels, int(graph.input_shape[1]), IMAGES, PREPROCESSED)
        writer.nodes = [*nodes, *writer.nodes,
                        helper.make_node("Softmax", [LOGITS], [PROBABILITIES], name=PROBABILITIES, axis=1)]
        writer.tensors += constants
        shape = [size, HEIGHT, WIDTH, graph.input_shape[0]]
        kind, output, opset = TensorProto.UINT8, PROBABILITIES, RESIZE_OPSET
        metadata = {**(metadata or {}), **pixels.metadata}
    proto = helper.make_graph(
        writer.nodes, "paretoray", [helper.make_tensor_value_info(IMAGES, kind, shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [size, *graph.nodes[-1].shape])], writer.tensors)
    model = helper.make_model(proto, producer_name="paretoray", opset_imports=[helper.make_opsetid("", opset)],
                              ir_version=IR_VERSION)
    if metadata:
        helper.set_model_props(model, dict(metadata))
    return model


class _Writer:
    """Collects ONNX nodes and initialisers; `value` maps a graph node to the name of the tensor that holds it, the
    graph's input to `first`."""

    def __init__(self, graph: Graph, weights: Weights | None, batch: int | None, first: str) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self._weights, self._batch = weights, batch
        self._node = {node.name: node for node in graph.nodes}
        self._value = {INPUT: first}
        self._last = graph.nodes[-1].name
        uses = Counter(name for node in graph.nodes for name in node.inputs)
        self._folded = {node.inputs[0]: node for node in graph.nodes
                        if node.op == "batch_norm" and self._node[node.inputs[0]].op == "conv"
                        and uses[node.inputs[0]] == 1}
        self._zeros: set[str] = set()
        self._constants: set[str] = set()

    def write(self, node: Node) -> None:
        if node.op == "conv":
            self._conv(node)
        elif node.op == "batch_norm":
            self._batch_norm(node)
        elif node.op == "linear":
            self._linear(node)
        elif node.op in ("avg_pool", "max_pool"):
            self._pool(node)
        elif node.op == "relu6":
            bounds = [self._constant(f"relu6.{value}", np.array(value, np.float32)) for value in (0.0, 6.0)]
            self._emit(node, "Clip", [self._value[node.inputs[0]], *bounds])
        elif node.op == "add":
            self._add(node)
        elif node.op == "shift":
            self._shift(node)
        elif node.op == "zeros":
            self._write_zeros(node)
        else:
            kind, attributes = PLAIN[node.op]
            self._emit(node, kind, [self._value[name] for name in node.inputs], **attributes)

    def _emit(self, node: Node, kind: str, inputs: list[str], **attributes: Any) -> None:
        output = LOGITS if node.name == self._last else node.name
        self.nodes.append(helper.make_node(kind, inputs, [output], name=node.name, **attributes))
        self._value[node.name] = output

    def _conv(self, node: Node) -> None:
        a = node.attributes
        shape = self._node[node.inputs[0]].shape
        shapes = tensor_shapes(node, shape)
        norm = self._folded.get(node.name)
        names = [self._value[node.inputs[0]], f"{node.name}.weight"]
        if norm is None and not a["bias"]:
            self._tensor(names[1], shapes["weight"])
        else:
            names.append(f"{node.name}.bias")
            if norm is not None and self._weights is not None:
                for name, array in zip(names[1:], self._fold(node, norm, shapes)):
                    self._constant(name, array)
            else:
                self._tensor(names[1], shapes["weight"])
                self._tensor(names[2], (node.shape[0],))
        self._emit(node, "Conv", names, kernel_shape=[int(a["kernel"])] * 2, strides=[int(a["stride"])] * 2,
                   dilations=[int(a["dilation"])] * 2, group=int(a["groups"]), pads=conv_pads(node, shape))

    def _fold(self, conv: Node, norm: Node, shapes: Mapping[str, tuple[int, ...]]) -> tuple[NDArray[np.float32], ...]:
        """Weight and bias of `conv` with `norm` folded in (equation in the module docstring)."""
        channels = (conv.shape[0],)
        weight = self._given(f"{conv.name}.weight", shapes["weight"]).astype(np.float64)
        bias = self._given(f"{conv.name}.bias", channels) if "bias" in shapes else np.zeros(channels)
        gamma, beta, mean, variance = self._statistics(norm)
        scale = gamma.astype(np.float64) / np.sqrt(variance.astype(np.float64) + norm.attributes["eps"])
        return ((weight * scale[:, None, None, None]).astype(np.float32),
                (scale * (bias - mean) + beta).astype(np.float32))

    def _statistics(self, norm: Node) -> list[NDArray[np.float32]]:
        """gamma, beta, running mean and variance; neutral ones without weights or affine parameters."""
        neutral = {"weight": np.ones, "bias": np.zeros, "running_mean": np.zeros, "running_var": np.ones}
        present = tensor_shapes(norm, norm.shape) if self._weights is not None else {}
        return [self._given(f"{norm.name}.{key}", present[key]) if key in present
                else make(norm.shape[0], dtype=np.float32) for key, make in neutral.items()]

    def _batch_norm(self, node: Node) -> None:
        if node.inputs[0] in self._folded:
            self._alias(node, node.inputs[0])
            return
        keys = ("weight", "bias", "running_mean", "running_var")
        names = [self._constant(f"{node.name}.{key}", array) for key, array in zip(keys, self._statistics(node))]
        self._emit(node, "BatchNormalization", [self._value[node.inputs[0]], *names],
                   epsilon=float(node.attributes["eps"]))

    def _linear(self, node: Node) -> None:
        shapes = tensor_shapes(node, self._node[node.inputs[0]].shape)
        names = [self._tensor(f"{node.name}.{key}", shape) for key, shape in shapes.items()]
        self._emit(node, "Gemm", [self._value[node.inputs[0]], *names], transB=1)

    def _pool(self, node: Node) -> None:
        kernel, stride, padding = (int(node.attributes[key]) for key in ("kernel", "stride", "padding"))
        kind = "AveragePool" if node.op == "avg_pool" else "MaxPool"
        extra = {"count_include_pad": 0} if node.op == "avg_pool" else {}
        self._emit(node, kind, [self._value[node.inputs[0]]], kernel_shape=[kernel] * 2, strides=[stride] * 2,
                   pads=[padding] * 4, **extra)

    def _add(self, node: Node) -> None:
        """A chain of two-input sums, which the runtime fuses into convolutions; `Sum` of many inputs is not fused."""
        terms = [name for name in node.inputs if name not in self._zeros]
        if not terms:
            self._zeros.add(node.name)
        if len(terms) < 2:
            self._alias(node, (terms or list(node.inputs))[0])
            return
        total = self._value[terms[0]]
        for index, name in enumerate(terms[1:-1]):
            partial = f"{node.name}.partial{index}"
            self.nodes.append(helper.make_node("Add", [total, self._value[name]], [partial], name=partial))
            total = partial
        self._emit(node, "Add", [total, self._value[terms[-1]]])

    def _shift(self, node: Node) -> None:
        bounds = {"starts": (1, 1), "ends": tuple(size + 1 for size in node.shape[1:]), "axes": (2, 3)}
        names = [self._constant(f"{node.name}.{key}", np.array(value, np.int64)) for key, value in bounds.items()]
        self._emit(node, "Slice", [self._value[node.inputs[0]], *names])

    def _write_zeros(self, node: Node) -> None:
        self._zeros.add(node.name)
        if self._batch is not None:
            self._value[node.name] = self._constant(node.name, np.zeros((self._batch, *node.shape), np.float32))
            return
        size = f"{node.name}.batch"
        self.nodes.append(helper.make_node("Shape", [IMAGES], [size], name=size, start=0, end=1))
        sides = self._constant(f"{node.name}.sides", np.array(node.shape, np.int64))
        shape = f"{node.name}.shape"
        self.nodes.append(helper.make_node("Concat", [size, sides], [shape], name=shape, axis=0))
        self._emit(node, "ConstantOfShape", [shape])

    def _alias(self, node: Node, source: str) -> None:
        """The node is its source; as the last node it still has to be called "logits"."""
        if node.name == self._last:
            self._emit(node, "Identity", [self._value[source]])
        else:
            self._value[node.name] = self._value[source]

    def _constant(self, name: str, array: NDArray[np.generic]) -> str:
        if name not in self._constants:
            self._constants.add(name)
            self.tensors.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def _tensor(self, name: str, shape: tuple[int, ...]) -> str:
        """The given weight of that name, or random numbers: biases small, the rest of He's scale sqrt(2 / fan_in)."""
        if self._weights is not None:
            return self._constant(name, self._given(name, shape))
        exponent = round(0.5 * log2(2.0 / prod(shape[1:]))) if len(shape) > 1 else -6
        data = _random_bytes(exponent, 4 * prod(shape))
        self.tensors.append(helper.make_tensor(name, TensorProto.FLOAT, shape, data, raw=True))
        return name

    def _given(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        assert self._weights is not None
        if name not in self._weights:
            raise SpaceError(f"weights for the ONNX file lack the tensor {name}; pass the state dict of the same graph")
        array = np.asarray(self._weights[name], dtype=np.float32)
        if array.shape != shape:
            raise SpaceError(f"weight {name} has shape {array.shape}, the graph needs {shape}; pass the state dict of "
                             "the same graph")
        return array


def _random_bytes(exponent: int, size: int) -> bytes:
    """`size` bytes of float32 numbers of standard deviation 2^exponent, always the same ones."""
    pool = _random_pool(exponent)
    return (pool * -(-size // len(pool)))[:size]


@lru_cache(maxsize=32)
def _random_pool(exponent: int) -> bytes:
    numbers = np.random.default_rng(0).standard_normal(POOL_SIZE, dtype=np.float32)
    return (numbers * np.float32(2.0**exponent)).astype("<f4").tobytes()
