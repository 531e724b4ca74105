"""The Training contract: one way to train a supernet's shared weights, and whatever else a method learns beside them.

    training = settings.start(space.make_supernet(), Schedule(epochs=30, steps_per_epoch=50, seed=0))
    for epoch in ...:
        wishes = training.begin_epoch()                 # {}: nothing is needed from outside
        training.give(latencies of what it wished for)
        for batch, held_out in ...:
            training.step(batch, held_out)

Lifecycle: made on the device of the supernet, stepped until the schedule ends, saved between epochs. What a step does
depends on (seed, step), the state and the batches alone: a training restored from `state_dict` goes on bit-identically
if it is fed the same. Not thread-safe.

A batch is cut into `Schedule.parts`, each with a forward and backward pass and batch statistics of its own; gradients
and running statistics are means over the parts. Data-parallel ranks hold equal copies, do one or several parts each,
and differ in `Schedule.rank` only: `reduce_gradients` makes their gradients one. As the parts do not depend on the
ranks, any number of ranks learns the same, up to rounding.

What a method needs from outside (latencies of architectures that it drew) it asks for between epochs, as `Wishes`, and
is given by the driver, which measures. It never waits, and what it does with the answer must not depend on when the
measurement was made.

`searchspaces/training/conformance.py` certifies an implementation.
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from searchspaces.space import SearchSpace, Tokens
from searchspaces.supernet import Supernet

Batch = tuple[Tensor, Tensor]       # images float[B, C, H, W], labels int64[B] or probabilities float[B, classes]
Wishes = Mapping[str, Tokens]       # by label of a goal: architectures whose latency for it is wanted, int8[N, T]
Latencies = Mapping[str, NDArray[np.float64]]   # ms[N] for the rows of the wishes


@dataclass(frozen=True)
class Schedule:
    """How long a training lasts, into how many `parts` its batches are cut, and which of them this process does."""

    epochs: int
    steps_per_epoch: int
    seed: int
    rank: int = 0
    ranks: int = 1
    parts: int = 1

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def mine(self) -> range:
        return parts_of_rank(self.parts, self.rank, self.ranks)


def parts_of_rank(parts: int, rank: int, ranks: int) -> range:
    """Numbers of the parts of a batch that a rank does, one at least: neighbours, so that a rank's images are too."""
    first = rank * parts // ranks
    return range(first, max((rank + 1) * parts // ranks, first + 1))


@dataclass(frozen=True, eq=False)
class Part:
    """Of a batch. `share`: of the images of this rank, so that gradients of share times the part's mean loss add up to
    those of the rank's mean loss."""

    number: int
    share: float
    batch: Batch


class Training(ABC):
    """See the module docstring. `reduce_gradients`, if set, is called with parameters that have a gradient before each
    optimiser step, in the same order on every rank: replace `p.grad` by the mean over ranks.

    `scalars` names those of a step's numbers that an epoch reports as means.
    """

    supernet: Supernet
    schedule: Schedule
    steps_done: int
    scalars: Sequence[str] = ("loss", "accuracy")
    reduce_gradients: Callable[[Iterable[nn.Parameter]], None] | None = None

    def begin_epoch(self) -> Wishes:
        """What this epoch's steps need; safe to call again before the first step, with the same answer."""
        return {}

    def give(self, latencies: Latencies) -> None:
        """The answer to this epoch's wishes, row by row, before its first step."""
        assert not latencies, f"{type(self).__name__} wished for nothing"

    def cut(self, batch: Batch) -> list[Part]:
        """This rank's images in its parts, in channels_last."""
        images, labels = batch
        mine = self.schedule.mine
        pairs = zip(images.contiguous(memory_format=torch.channels_last).tensor_split(len(mine)),
                    labels.tensor_split(len(mine)), strict=True)
        return [Part(number, len(pair[1]) / len(labels), pair) for number, pair in zip(mine, pairs, strict=True)]

    def parts(self, batch: Batch) -> Iterator[Part]:
        """The same, for forward passes in training mode. Go through all of them: between two the running statistics of
        batch norm are put back, after the last one they are the mean over these parts."""
        parts = self.cut(batch)
        statistics = running_statistics(self.supernet) if len(parts) > 1 else []
        before = [tensor.clone() for tensor in statistics]
        moved = [torch.zeros_like(tensor) for tensor in statistics]
        for part in parts:
            yield part
            for tensor, start, total in zip(statistics, before, moved):
                total.add_(tensor - start)
                tensor.copy_(start)
        for tensor, total in zip(statistics, moved):
            tensor.add_(total, alpha=1 / len(parts))

    @abstractmethod
    def step(self, batch: Batch, held_out: Batch | None = None) -> dict[str, float]:
        """One optimiser step; numbers of the step. `held_out`: images that no weight learns from, for methods whose
        settings ask for a `held_out_share` of the training images. EvaluationError if it diverged."""

    @abstractmethod
    def update_counts(self) -> dict[str, tuple[int, int]]:
        """Per position (most, least) often trained value; dead tokens train nothing and are not counted."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """A snapshot on the CPU, flat so that safetensors can write it; the weights as model.*, step."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores a snapshot of a training with the same space and settings. StoreError if it belongs to another."""

    def distribution(self) -> dict[str, NDArray[np.float64]]:
        """Logits that a method holds beside the weights, for its controller; {} where it has none."""
        return {}


class TrainingMethod(Protocol):
    """The settings of a method, which travel to the supernet's actor and make the training there."""

    @property
    def held_out_share(self) -> float:
        """Share of the training images that `step` gets as `held_out`; 0: none."""

    @property
    def least_parts(self) -> int:
        """Into how many parts a batch must be cut at least; 1 for methods to which a part is like another."""

    def check(self, space: SearchSpace) -> None:
        """ConfigError or SpaceError where the method cannot train a supernet of this space."""

    def start(self, supernet: Supernet, schedule: Schedule) -> Training: ...


def share_right(logits: Tensor, labels: Tensor) -> float:
    """Accuracy in 0..1 on a batch. A mixed image counts for the class with the largest share."""
    classes = labels if labels.ndim == 1 else labels.argmax(1)
    return float((logits.detach().argmax(1) == classes).float().mean())


def running_statistics(module: nn.Module) -> list[Tensor]:
    """Means and variances that batch norm keeps, all layers'."""
    return [tensor for name, tensor in module.named_buffers() if name.endswith(("running_mean", "running_var"))]
