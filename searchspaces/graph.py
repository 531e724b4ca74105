"""One description of a network, read by everybody: cost, ONNX, torch, drawings, latency features.

A search space turns a token row into a `Graph`; nothing else in the project knows how a space is laid out.
`network.py` runs a graph in torch, `onnxgraph.py` writes it as ONNX, `Graph.madds` and `Graph.params` count it
(conventions of multiply-adds: convolutions and linear layers only; parameters: every trainable tensor).

Shapes are per image: (C, H, W) for maps, (C,) after `flatten`. Tensor names of a node `n` are `n.weight`, `n.bias`,
`n.running_mean`, `n.running_var`: the same in the torch state dict and in the ONNX initialisers.
"""
from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from numbers import Integral
from typing import Literal

from searchspaces.errors import SpaceError

Op = Literal[
    "input", "conv", "batch_norm", "linear", "relu", "relu6", "h_swish", "sigmoid", "h_sigmoid",
    "add", "mul", "concat", "shift", "avg_pool", "max_pool", "global_pool", "flatten", "zeros",
]
ACTIVATIONS: tuple[Op, ...] = ("relu", "relu6", "h_swish", "sigmoid", "h_sigmoid")
INPUT = "input"


def conv_out(size: int, kernel: int, stride: int, dilation: int = 1) -> int:
    """Output size of a convolution or pooling with "same" padding `dilation * (kernel // 2)`."""
    padding = dilation * (kernel // 2)
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def same_pads(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after a side in TensorFlow's "SAME" padding, whose output is ceil(size / stride) wide. An odd
    number puts one more after, so a stride of 2 on an even side looks half a stride further than `kernel // 2` would.
    """
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def make_divisible(value: float, divisor: int = 8) -> int:
    """Nearest multiple of `divisor`, never below 90 % of `value` (specification 1.2, after OFA)."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


@dataclass(frozen=True)
class Node:
    """One operator. `attributes` by op: conv {kernel, stride, groups, dilation, bias} and {same} where it pads as
    TensorFlow does (`conv_pads`), linear {bias}, batch_norm {eps, affine}, avg_pool/max_pool {kernel, stride, padding},
    zeros {} (a map of zeros of `shape`)."""

    name: str
    op: Op
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    attributes: Mapping[str, int | float | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """A named group of consecutive nodes, for drawings, latency features and the knowledge pool.

    `stage` counts from 0 over the searched stages, -1 for stem and head. `settings` are the choices that made the
    block, with the names a reader knows (kernel, expand, op ...). `key` is the block's key in a knowledge pool: the
    canonical token indices that made it, one per token type in a fixed order, so that the cosine of two keys as
    concatenated one-hots is their share of equal tokens (FNAS 4.3). Fixed blocks such as stem and head have ().
    """

    name: str
    stage: int
    label: str
    settings: Mapping[str, int | float | str | bool]
    nodes: tuple[str, ...]
    madds: int
    params: int
    out_shape: tuple[int, ...]
    key: tuple[int, ...] = ()


@dataclass(frozen=True)
class Graph:
    """A whole network: `nodes` in execution order, the first of them the input, the last of them the logits."""

    nodes: tuple[Node, ...]
    blocks: tuple[Block, ...]

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.nodes[0].shape

    @property
    def madds(self) -> int:
        return sum(block.madds for block in self.blocks)

    @property
    def params(self) -> int:
        return sum(block.params for block in self.blocks)


def tensor_shapes(node: Node, input_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a node's tensors, running statistics included, keyed by suffix ("weight", ...)."""
    a = node.attributes
    if node.op == "conv":
        shapes = {"weight": (node.shape[0], input_shape[0] // int(a["groups"]), int(a["kernel"]), int(a["kernel"]))}
        return shapes | ({"bias": (node.shape[0],)} if a["bias"] else {})
    if node.op == "linear":
        return {"weight": (node.shape[0], input_shape[0])} | ({"bias": (node.shape[0],)} if a["bias"] else {})
    if node.op == "batch_norm":
        names = (("weight", "bias") if a["affine"] else ()) + ("running_mean", "running_var")
        return dict.fromkeys(names, (node.shape[0],))
    return {}


def conv_pads(node: Node, input_shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Zeros that a convolution adds above, left, below and right of its input."""
    kernel, stride, dilation = (int(node.attributes[key]) for key in ("kernel", "stride", "dilation"))
    if not node.attributes.get("same", False):
        padding = dilation * (kernel // 2)
        return padding, padding, padding, padding
    reach = dilation * (kernel - 1) + 1
    (top, bottom), (left, right) = (same_pads(side, reach, stride) for side in input_shape[1:])
    return top, left, bottom, right


def node_madds(node: Node, input_shape: tuple[int, ...]) -> int:
    """Multiply-adds of one node: C_in C_out k^2 H_out W_out / groups, or in * out; 0 for everything else."""
    if node.op in ("conv", "linear"):
        return prod(tensor_shapes(node, input_shape)["weight"]) * prod(node.shape[1:])
    return 0


def node_params(node: Node, input_shape: tuple[int, ...]) -> int:
    """Trainable numbers of one node; running statistics do not count."""
    shapes = tensor_shapes(node, input_shape)
    return sum(prod(shape) for name, shape in shapes.items() if not name.startswith("running"))


class GraphBuilder:
    """Writes a graph node by node; every method takes node names and returns the new node's name.

    Names are `prefix.role`, so that a supernet can copy its slices into the graph's tensors by name.
    Open a block with `begin_block` before its first node; the stem and the head are blocks too. SpaceError where a node
    cannot be: its inputs are not there, shapes do not fit, a number is no int.
    """

    def __init__(self, channels: int, resolution: int) -> None:
        whole("GraphBuilder", channels=channels, resolution=resolution)
        self._nodes: dict[str, Node] = {INPUT: Node(INPUT, "input", (), (channels, resolution, resolution))}
        self._blocks: list[tuple[str, int, str, Mapping[str, int | float | str | bool], tuple[int, ...], int]] = []

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._nodes:
            close = difflib.get_close_matches(str(name), self._nodes, n=1)
            raise SpaceError(f"there is no node {name!r}; " + (f"did you mean '{close[0]}'?" if close else
                             "give the name that a method of the builder returned, or INPUT"))
        return self._nodes[name].shape

    def begin_block(self, name: str, stage: int, label: str, key: tuple[int, ...] = (),
                    **settings: int | float | str | bool) -> None:
        whole(f"block '{name}'", least=-1, stage=stage)
        self._blocks.append((name, stage, label, settings, key, len(self._nodes)))

    def conv(self, x: str, name: str, out: int, kernel: int, stride: int = 1, *, groups: int = 1, dilation: int = 1,
             bias: bool = False, same: bool = False) -> str:
        """`same`: padding as TensorFlow's "SAME" instead of `dilation * (kernel // 2)` on every side."""
        whole(f"conv '{name}'", out=out, kernel=kernel, stride=stride, groups=groups, dilation=dilation)
        channels, *size = self._map(x, f"conv '{name}'")
        if channels % groups or out % groups:
            raise SpaceError(f"conv '{name}' has {groups} groups, which must divide its {channels} input and {out} "
                             "output channels")
        height, width = (-(-side // stride) if same else conv_out(side, kernel, stride, dilation) for side in size)
        attributes = {"kernel": kernel, "stride": stride, "groups": groups, "dilation": dilation, "bias": bias}
        attributes |= {"same": True} if same else {}
        return self._add(Node(name, "conv", (x,), (out, height, width), attributes))

    def batch_norm(self, x: str, name: str, *, eps: float = 1e-5, affine: bool = True) -> str:
        self._map(x, f"batch_norm '{name}'")
        return self._add(Node(name, "batch_norm", (x,), self.shape(x), {"eps": eps, "affine": affine}))

    def activation(self, x: str, name: str, kind: Op) -> str:
        one_of(f"activation '{name}'", kind, ACTIVATIONS)
        return self._add(Node(name, kind, (x,), self.shape(x)))

    def linear(self, x: str, name: str, out: int, *, bias: bool = True) -> str:
        whole(f"linear '{name}'", out=out)
        if len(self.shape(x)) != 1:
            raise SpaceError(f"linear '{name}' needs a vector, but '{x}' has shape {self.shape(x)}; flatten it first")
        return self._add(Node(name, "linear", (x,), (out,), {"bias": bias}))

    def add(self, xs: tuple[str, ...], name: str) -> str:
        self._alike(xs, f"add '{name}'", first=0)
        return self._add(Node(name, "add", xs, self.shape(xs[0])))

    def mul(self, x: str, gate: str, name: str) -> str:
        shape = self.shape(x)
        if self.shape(gate) not in (shape, (shape[0], *(1 for _ in shape[1:]))):
            raise SpaceError(f"mul '{name}': gate '{gate}' has shape {self.shape(gate)}, but '{x}' has {shape}; a gate "
                             "has the same shape, or one value per channel")
        return self._add(Node(name, "mul", (x, gate), shape))

    def concat(self, xs: tuple[str, ...], name: str) -> str:
        self._alike(xs, f"concat '{name}'", first=1)
        return self._add(Node(name, "concat", xs, (sum(self.shape(x)[0] for x in xs), *self.shape(xs[0])[1:])))

    def shift(self, x: str, name: str) -> str:
        """The map without its first row and column: a stride of 2 then sees the pixels it would have left out."""
        channels, height, width = self.shape(x)
        return self._add(Node(name, "shift", (x,), (channels, height - 1, width - 1)))

    def pool(self, x: str, name: str, kind: Literal["avg_pool", "max_pool"], kernel: int, stride: int = 1,
             padding: int | None = None) -> str:
        one_of(f"pool '{name}'", kind, ("avg_pool", "max_pool"))
        whole(f"pool '{name}'", kernel=kernel, stride=stride)
        padding = kernel // 2 if padding is None else padding
        whole(f"pool '{name}'", least=0, padding=padding)
        channels, *size = self._map(x, f"pool '{name}'")
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in size)
        attributes = {"kernel": kernel, "stride": stride, "padding": padding}
        return self._add(Node(name, kind, (x,), (channels, height, width), attributes))

    def global_pool(self, x: str, name: str) -> str:
        return self._add(Node(name, "global_pool", (x,), (self._map(x, f"global_pool '{name}'")[0], 1, 1)))

    def flatten(self, x: str, name: str) -> str:
        return self._add(Node(name, "flatten", (x,), (prod(self.shape(x)),)))

    def zeros(self, x: str, name: str, shape: tuple[int, ...]) -> str:
        self.shape(x)
        return self._add(Node(name, "zeros", (x,), shape))

    def build(self) -> Graph:
        nodes = tuple(self._nodes.values())
        if len(nodes) == 1:
            raise SpaceError("the graph has no node but its input; add layers before build()")
        bounds = [block[-1] for block in self._blocks] + [len(nodes)]
        blocks = []
        for (name, stage, label, settings, key, start), end in zip(self._blocks, bounds[1:], strict=True):
            members = nodes[start:end]
            madds = sum(node_madds(node, self.shape(node.inputs[0])) for node in members)
            params = sum(node_params(node, self.shape(node.inputs[0])) for node in members)
            blocks.append(Block(name, stage, label, settings, tuple(n.name for n in members), madds, params,
                                members[-1].shape if members else self.shape(INPUT), key))
        return Graph(nodes, tuple(blocks))

    def _map(self, x: str, subject: str) -> tuple[int, ...]:
        shape = self.shape(x)
        if len(shape) != 3:
            raise SpaceError(f"{subject} needs a map (channels, height, width), but '{x}' has shape {shape}")
        return shape

    def _alike(self, xs: tuple[str, ...], subject: str, first: int) -> None:
        """Are the inputs of equal shape from axis `first` on?"""
        if not isinstance(xs, tuple) or not xs:
            raise SpaceError(f"{subject} has the inputs {xs!r}; it needs a tuple of node names")
        shapes = [self.shape(x) for x in xs]
        if any(shape[first:] != shapes[0][first:] or len(shape) != len(shapes[0]) for shape in shapes):
            told = ", ".join(f"'{x}' {shape}" for x, shape in zip(xs, shapes))
            raise SpaceError(f"{subject} has inputs of different shapes: {told}; "
                             + ("only their channels may differ" if first else "they must be equal"))

    def _add(self, node: Node) -> str:
        if not self._blocks:
            raise SpaceError(f"node {node.name!r} belongs to no block; call begin_block before the first node")
        if not isinstance(node.name, str) or not node.name:
            raise SpaceError(f"a {node.op} node is named {node.name!r}; a name is a text such as 'stage0.conv'")
        if node.name in self._nodes:
            raise SpaceError(f"two nodes are named '{node.name}'; every name may be used once")
        for x in node.inputs:
            self.shape(x)
        if any(side < 1 for side in node.shape):
            raise SpaceError(f"{node.op} '{node.name}' would have shape {node.shape}, from {self.shape(node.inputs[0])}"
                             "; use fewer strides, a smaller kernel or a larger resolution")
        self._nodes[node.name] = node
        return node.name


def whole(subject: str, least: int = 1, **numbers: object) -> None:
    """SpaceError where one of the numbers is no int of at least `least`; numpy's ints are fine."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise SpaceError(f"{subject}: {name} is {value!r} ({type(value).__name__}); it must be an int of at least "
                             f"{least}")


def one_of(subject: str, value: object, allowed: Sequence[str]) -> None:
    """SpaceError with the closest name where the value is not among them."""
    if value not in allowed:
        close = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.4)
        raise SpaceError(f"{subject} is of the unknown kind {value!r}; "
                         + (f"did you mean '{close[0]}'? " if close else "") + f"allowed are {', '.join(allowed)}")
