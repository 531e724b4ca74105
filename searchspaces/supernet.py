"""The Supernet contract: one weight-shared network over a space."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from searchspaces.space import SearchSpace, Tokens


class Supernet(nn.Module, ABC):
    """Shared weights of every architecture of `space`.

    Call `set_active(tokens_T)` and then the module: images float[B, C, H, W] to logits float[B, classes] of that
    architecture. Batch-norm statistics of a subnet are wrong until recalibrated (`recalibrate_batch_norm` on the
    extracted network). Not thread-safe: one process, one active architecture at a time.
    """

    space: SearchSpace

    @abstractmethod
    def set_active(self, tokens_T: Tokens) -> None:
        """Chooses the architecture of the following forward passes."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Logits of the active architecture."""

    @abstractmethod
    def forward_mixture(self, images: Tensor, mixture: Sequence[Tensor]) -> Tensor:
        """Logits of a mixture: `mixture[t]` float[V_t] are weights of position t's values, differentiable.

        One-hot weights give the same logits as `set_active` with those tokens (batch statistics included).
        """

    def mixture_penalty(self, mixture: Sequence[Tensor]) -> Tensor:
        """A scalar, differentiable, above 0 where a mixture holds what the space's networks should avoid."""
        return torch.zeros(())

    @abstractmethod
    def extract(self, tokens_T: Tokens) -> nn.Module:
        """A stand-alone `GraphNetwork` of the architecture with copies of its weights, equal in output."""


