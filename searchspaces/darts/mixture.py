"""Mixtures of the factorised cell (specification unas.md section 8), as pure functions of the tensors of a mixture.

A mixture holds one weight vector per token position, in token order: `mixture[t]` is float[V_t], or float[B, V_t] with
a mixture of its own for each image. A node of n inputs has the selectors i, i' over inputs and o, o' over operations.

Legend: I inputs of a node, O = 7 operations, B images.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from searchspaces.darts.skeleton import CELL_TYPES, NODES

TOKENS = 4  # of a node: in_a, op_a, in_b, op_b


def pair_weights(mixture: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Per node, the normal cell's first, the outer products i (x) o and i' (x) o', each float[..., I, O].

    Kept apart and flattened they are the edge form that a latency surrogate takes (specification 5.3): 196 per cell.
    """
    nodes = [mixture[start:start + TOKENS] for start in range(0, len(CELL_TYPES) * NODES * TOKENS, TOKENS)]
    return [(in_a[..., :, None] * op_a[..., None, :], in_b[..., :, None] * op_b[..., None, :])
            for in_a, op_a, in_b, op_b in nodes]


def edge_weights(mixture: Sequence[Tensor]) -> list[Tensor]:
    """Per node Z[m, k] = i[m] o[k] + i'[m] o'[k], float[..., I, O]: the node is the sum of Z[m, k] Op_mk(x_m)."""
    return [a + b for a, b in pair_weights(mixture)]


def duplicate_penalty(mixture: Sequence[Tensor]) -> Tensor:
    """The sum over nodes of <i (x) o, i' (x) o'>: for independent selectors the expected number of nodes whose two
    pairs coincide. A scalar, or float[B]."""
    return torch.stack([(a * b).sum(dim=(-2, -1)) for a, b in pair_weights(mixture)]).sum(dim=0)
