"""Weights of trained blocks into a network of another architecture (FNAS 4.3; specification fnas.md section 5).

    stored = split_blocks(graph, sort_channels(graph, weights))     # of a trained network (blockweights.py)
    inherit(network, sources)                                       # into a fresh network, one source per block

Which part of a tensor survives where shapes differ:

    fewer channels      the leading ones; stored channels are in order of importance, so these are the most important
    more channels       the stored ones come first; the others keep their fresh initialisation (batch norm 1, 0, 0, 1)
    smaller kernel      the centre; larger kernel: zeros around the stored one
    more layers         layer i from stored layer i, those beyond from the last stored one; fewer: the first ones
    another operator    tensors of equal role (depthwise, project, ...) as above, all others stay fresh, and so does an
                        SE that only one side has
    image channels      as channels
    classes             the classifier stays fresh where their number differs

A role is a tensor's name within its block with the layer counted apart: `block3.layer1.project.weight` is the role
`project.weight` of layer 1 in block3. Tensors without counterpart stay fresh.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from searchspaces.graph import Block
from searchspaces.network import GraphNetwork
from searchspaces.trained.blockweights import Arrays, SourceBlock

LAYER = re.compile(r"(^|.*\.)layer(\d+)(\..*)")


@torch.no_grad()
def inherit(network: GraphNetwork, sources: Sequence[SourceBlock | None]) -> None:
    """Overwrites, in place, what `network` can take from the sources, one per block of its graph (None: stays fresh).

    `network` must be freshly initialised: what no source covers keeps its values. Running statistics are copied too but
    belong to the source's network: re-estimate them before they are used. Optimiser state is never inherited.
    """
    state = network.state_dict()  # shares the parameters' memory
    logits = network.graph.nodes[-1].name
    for block, source in zip(network.graph.blocks, sources, strict=True):
        for name, stored in (_counterparts(block, state, source.weights) if source else {}).items():
            if name.rpartition(".")[0] != logits or stored.shape[0] == state[name].shape[0]:
                state[name].copy_(torch.from_numpy(adapted(state[name].cpu().numpy(), stored)))


def adapted(fresh: NDArray[np.generic], stored: NDArray[np.generic]) -> NDArray[np.generic]:
    """`stored` in the shape of `fresh`: [channels], [out, in] or [out, in, k, k] with odd k, both of the same kind."""
    result = np.array(fresh)
    channels = tuple(slice(min(sizes)) for sizes in zip(fresh.shape[:2], stored.shape[:2]))
    kernels = [(_centre(k, stored_k), _centre(stored_k, k)) for k, stored_k in zip(fresh.shape[2:], stored.shape[2:])]
    result[channels] = 0  # the ring around a smaller stored kernel
    result[(*channels, *(here for here, _ in kernels))] = stored[(*channels, *(there for _, there in kernels))]
    return result


def _centre(size: int, other: int) -> slice:
    """The part of a kernel axis that lies on an axis of another size when their centres do."""
    margin = max(0, (size - other) // 2)
    return slice(margin, size - margin)


def _counterparts(block: Block, state: Mapping[str, Tensor], stored: Arrays) -> dict[str, NDArray[np.generic]]:
    """Per tensor of the target block, by its full name: the stored tensor of the same role and layer, if any."""
    members, prefix = set(block.nodes), f"{block.name}."
    local = {name: name.removeprefix(prefix) for name in state if name.rpartition(".")[0] in members}
    targets, sources = _layers(local.values()), _layers(stored)
    found = {}
    for name, role in local.items():
        layered = LAYER.fullmatch(role)
        if layered and sources:
            position = min(targets.index(int(layered[2])), len(sources) - 1)
            role = f"{layered[1]}layer{sources[position]}{layered[3]}"
        if role in stored and stored[role].ndim == state[name].ndim:
            found[name] = stored[role]
    return found


def _layers(roles: Iterable[str]) -> list[int]:
    return sorted({int(layered[2]) for layered in map(LAYER.fullmatch, roles) if layered})
