"""A search space of your own in one file: a plain convolutional network with searched width and depth per stage.

    paretoray check configs.own_space:PlainCnn          # does it keep the contract?
    paretoray search configs/own_space.yaml             # search it like the shipped ones

`graph` is all that describes the network: cost, ONNX files, stand-alone networks, drawings and latency features follow
from it. The supernet shares weights by leading channels and leading layers.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from searchspaces.graph import INPUT, Graph, GraphBuilder
from searchspaces.network import BatchNorm, GraphNetwork, initialise
from searchspaces.space import Choice, SearchSpace, Tokens
from searchspaces.supernet import Supernet

STAGES = 3
DEPTHS = (1, 2, 3)
WIDTHS = (8, 16, 32)


class PlainCnn(SearchSpace):
    """Three stages of conv3x3-BN-ReLU; the first layer of each halves the map. Tokens: depth, width per stage."""

    def __init__(self, classes: int = 10, channels: int = 3, resolution: int = 16) -> None:
        super().__init__(classes, channels)
        self.resolution = resolution

    @property
    def space_id(self) -> str:
        return f"plaincnn(resolution={self.resolution},channels={self.channels},classes={self.classes})"

    @property
    def choices(self) -> tuple[Choice, ...]:
        return tuple(choice for s in range(STAGES)
                     for choice in (Choice(f"depth{s}", "depth", DEPTHS), Choice(f"width{s}", "width", WIDTHS)))

    def graph(self, tokens_T: Tokens) -> Graph:
        builder = GraphBuilder(self.channels, self.resolution)
        x = INPUT
        for s in range(STAGES):
            depth, width = DEPTHS[tokens_T[2 * s]], WIDTHS[tokens_T[2 * s + 1]]
            for layer in range(depth):
                name = f"stage{s}.layer{layer}"
                builder.begin_block(name, stage=s, label=f"conv3x3 {width}", kernel=3, width=width)
                x = builder.conv(x, f"{name}.conv", width, 3, stride=2 if layer == 0 else 1)
                x = builder.activation(builder.batch_norm(x, f"{name}.norm"), f"{name}.relu", "relu")
        builder.begin_block("head", stage=-1, label="pool, linear")
        builder.linear(builder.flatten(builder.global_pool(x, "head.pool"), "head.flatten"), "head.linear",
                       self.classes)
        return builder.build()

    def make_supernet(self) -> Supernet:
        return PlainSupernet(self)


class PlainSupernet(Supernet):
    """The widest and deepest network; a subnet takes the first channels and the first layers."""

    def __init__(self, space: PlainCnn) -> None:
        super().__init__()
        self.space: PlainCnn = space
        widest = WIDTHS[-1]
        for s in range(STAGES):
            self.add_module(f"stage{s}", nn.ModuleDict({f"layer{i}": nn.ModuleDict({
                "conv": nn.Conv2d(space.channels if s == i == 0 else widest, widest, 3, 2 if i == 0 else 1, 1,
                                  bias=False),
                "norm": BatchNorm(widest)}) for i in range(DEPTHS[-1])}))
        self.head = nn.ModuleDict({"linear": nn.Linear(widest, space.classes)})
        initialise(self)
        self.set_active(space.extremes()[1])

    def set_active(self, tokens_T: Tokens) -> None:
        # A single architecture is the mixture that puts all weight on its tokens.
        self._active = [torch.eye(len(choice.values))[token]
                        for choice, token in zip(self.space.choices, map(int, tokens_T))]

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_mixture(images, self._active)

    def forward_mixture(self, images: Tensor, mixture: Sequence[Tensor]) -> Tensor:
        x = images
        for s in range(STAGES):
            depth_D, width_W = mixture[2 * s], mixture[2 * s + 1]
            mask_C = sum(weight * (torch.arange(WIDTHS[-1]) < width) for weight, width in zip(width_W, WIDTHS))
            prefixes = []
            for i in range(DEPTHS[-1]):
                layer = self.get_submodule(f"stage{s}.layer{i}")
                x = layer["norm"](layer["conv"](x)).relu() * mask_C[:, None, None]  # type: ignore[index]
                prefixes.append(x)
            x = torch.stack([weight * prefixes[depth - 1] for weight, depth in zip(depth_D, DEPTHS)]).sum(dim=0)
        return self.head["linear"](x.mean(dim=(2, 3)))

    def extract(self, tokens_T: Tokens) -> nn.Module:
        network = GraphNetwork(self.space.graph(tokens_T))
        mine = self.state_dict()
        network.load_state_dict({name: mine[name][tuple(slice(size) for size in tensor.shape)].clone()
                                 for name, tensor in network.state_dict().items()})
        return network.train(self.training)
