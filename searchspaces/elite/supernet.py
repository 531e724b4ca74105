"""The weight-shared network of a space inside another: the other's."""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from searchspaces.network import GraphNetwork
from searchspaces.space import Tokens
from searchspaces.supernet import Supernet

if TYPE_CHECKING:
    from searchspaces.elite.space import EliteSpace


class EliteSupernet(Supernet):
    """The base's weights, of which only what lies inside is ever used."""

    def __init__(self, space: EliteSpace) -> None:
        super().__init__()
        self.space: EliteSpace = space
        self.base = space.base.make_supernet()
        self.set_active(space.extremes()[1])

    def set_active(self, tokens_T: Tokens) -> None:
        rows = self.space.check_tokens(np.asarray(tokens_T)[None])
        self.base.set_active(self.space.widened(rows)[0])

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.base(images)
        return logits

    def forward_mixture(self, images: Tensor, mixture: Sequence[Tensor]) -> Tensor:
        return self.base.forward_mixture(images, self._widened(mixture))

    def mixture_penalty(self, mixture: Sequence[Tensor]) -> Tensor:
        return self.base.mixture_penalty(self._widened(mixture))

    def _widened(self, mixture: Sequence[Tensor]) -> list[Tensor]:
        """The base's mixture: nothing of the values outside."""
        like, own = mixture[0], iter(mixture)
        found = []
        for of_one, size in zip(self.space.tokens, self.space.base.vocabulary_sizes):
            weights = next(own) if len(of_one) > 1 else torch.ones(1, dtype=like.dtype, device=like.device)
            index = torch.tensor(of_one, device=like.device)
            found.append(torch.zeros(int(size), dtype=like.dtype, device=like.device).index_add(0, index, weights))
        return found

    def extract(self, tokens_T: Tokens) -> GraphNetwork:
        network = self.base.extract(self.space.widened(np.asarray(tokens_T)[None])[0])
        assert isinstance(network, GraphNetwork)
        return network
