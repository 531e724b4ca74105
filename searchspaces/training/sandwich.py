"""Supernet training on sampled subnets: the sandwich, or strict fairness (specification searchspaces 2.5 and 8).

    training = SandwichSettings().start(space.make_supernet(), Schedule(epochs=20, steps_per_epoch=50, seed=0))
    for images, labels in batches:                     # float[B, C, H, W], int64[B]
        training.step((images, labels))

The supernet trains on the device it is on, and so do the images. Which subnets a step trains depends on (seed, step)
only. So data-parallel ranks with equal seeds train the same subnets and only need `reduce_gradients`, and a training
resumed from `state_dict` continues bit-identically if it is fed the same batches.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from searchspaces.errors import ConfigError
from searchspaces.network import input_of
from searchspaces.space import SearchSpace, Tokens
from searchspaces.supernet import Supernet
from searchspaces.training.distributions import UpdateCounts
from searchspaces.training.sampling import sandwich, strict_fair
from searchspaces.training.training import Batch, Schedule, Training, share_right
from searchspaces.training.weights import WeightOptimizer, WeightSettings, fitting


@dataclass(frozen=True)
class SandwichSettings:
    """Defaults are for small images and some thousand steps. `subnets` counts the random ones of a sandwich;
    `distill_weight` weighs the cross-entropy against the largest subnet's probabilities; `warmup_fraction` of the steps
    the learning rate rises linearly, then it falls as a cosine to zero; `grad_clip` bounds the global norm; the body
    learns at `body_rate` times the classifier's rate. In the first `teacher` of the steps the largest network trains
    alone: where the weights are trained already it soon teaches well, and at a fraction of a sandwich's cost."""

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 3e-5
    label_smoothing: float = 0.1
    warmup_fraction: float = 0.1
    sampler: Literal["sandwich", "fair"] = "sandwich"
    subnets: int = 2
    distill_weight: float = 1.0
    grad_clip: float = 5.0
    dropout: float = 0.0
    body_rate: float = 1.0
    teacher: float = 0.0

    def __post_init__(self) -> None:
        self.weights  # noqa: B018 (checks its share)
        if not 0 <= self.teacher < 1:
            raise ConfigError(f"teacher of supernet training is {self.teacher}, a share of the steps; it must lie in "
                              "[0, 1)")
        if not (0 <= self.dropout < 1 and 0 <= self.label_smoothing < 1):
            raise ConfigError("dropout and label_smoothing of supernet training must lie in [0, 1), got "
                              f"{self.dropout} and {self.label_smoothing}")
        if self.sampler not in ("sandwich", "fair") or self.subnets < 0:
            raise ConfigError(f"supernet training has sampler '{self.sampler}' and {self.subnets} random subnets; the "
                              "sampler is sandwich or fair, the number at least 0")

    @property
    def weights(self) -> WeightSettings:
        return WeightSettings(self.lr, self.momentum, self.weight_decay, self.warmup_fraction, self.grad_clip,
                              self.body_rate)

    @property
    def held_out_share(self) -> float:
        return 0.0

    @property
    def least_parts(self) -> int:
        return 1

    def check(self, space: SearchSpace) -> None:
        """Every space with a supernet will do."""

    def start(self, supernet: Supernet, schedule: Schedule) -> SandwichTraining:
        return SandwichTraining(supernet, self, schedule)


class SandwichTraining(Training):
    """See the module docstring."""

    def __init__(self, supernet: Supernet, settings: SandwichSettings, schedule: Schedule) -> None:
        # About twice as fast for depthwise layers on CPUs.
        self.supernet = supernet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.settings, self.schedule = settings, schedule
        self.steps_done = 0
        space = supernet.space
        self._smallest, self._largest = space.extremes()
        self._counts = UpdateCounts(space)
        for module in supernet.modules():
            if isinstance(module, nn.Dropout):
                module.p = settings.dropout
        self._weights = WeightOptimizer(self.supernet, settings.weights, schedule.steps)

    def learning_rate(self, step: int) -> float:
        return self._weights.learning_rate(step)

    def subnets_of_step(self, step: int) -> Tokens:
        """The rows that a step trains, the same in every process."""
        rng = np.random.default_rng([self.schedule.seed, step])
        space = self.supernet.space
        if step < self.settings.teacher * self.schedule.steps:
            return self._largest[None]
        if self.settings.sampler == "fair":
            return strict_fair(space, rng)
        return sandwich(space, rng, self.settings.subnets)

    def step(self, batch: Batch, held_out: Batch | None = None) -> dict[str, float]:
        """One optimiser step on the summed gradients of the sampled subnets; numbers of the step."""
        rows = self.subnets_of_step(self.steps_done)
        lr = self._weights.begin(self.steps_done)
        self.supernet.train()
        losses, accuracy = [0.0] * len(rows), 0.0
        for part in self.parts(batch):
            with torch.random.fork_rng(devices=[], enabled=self.settings.dropout > 0):
                if self.settings.dropout > 0:
                    torch.manual_seed(hash((self.schedule.seed, self.steps_done, *([part.number] * (part.number > 0)))))
                losses_of_part, accuracy_of_part = self._accumulate(rows, part.share, *part.batch)
            losses = [loss + part.share * more for loss, more in zip(losses, losses_of_part)]
            accuracy += part.share * accuracy_of_part
        norm = self._weights.finish(self.steps_done, losses, self.reduce_gradients)
        self._counts.add(rows)
        self.steps_done += 1
        return {"loss": losses[0], "loss_mean": sum(losses) / len(losses), "accuracy": accuracy, "lr": lr,
                "grad_norm": norm}

    def _accumulate(self, rows: Tokens, share: float, images: Tensor, labels: Tensor) -> tuple[list[float], float]:
        """Backward passes of all rows, `share` of each; losses, and the largest subnet's (or the first one's) accuracy.
        """
        settings, distill = self.settings, self.settings.distill_weight
        losses: list[Tensor] = []
        teacher: Tensor | None = None
        accuracy = 0.0
        if settings.sampler == "fair" and distill > 0:
            teacher = self._teacher(images)
        for row in rows:
            self.supernet.set_active(row)
            logits = self.supernet(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
            if teacher is not None:
                loss = loss + distill * F.cross_entropy(logits, teacher)
            (share * loss).backward()
            if not losses:
                accuracy = share_right(logits, labels)
                if settings.sampler == "sandwich" and distill > 0:
                    teacher = logits.detach().softmax(1)  # the largest comes first
            losses.append(loss.detach())
        return [float(loss) for loss in losses], accuracy

    @torch.no_grad()
    def _teacher(self, images: Tensor) -> Tensor:
        self.supernet.set_active(self._largest)
        return self.supernet(images).softmax(1)

    def update_counts(self) -> dict[str, tuple[int, int]]:
        return self._counts.extremes()

    def state_dict(self) -> dict[str, Tensor]:
        """model.*, momentum.*, counts.*, step."""
        return self._weights.state_dict() | self._counts.state_dict() | {"step": torch.tensor(self.steps_done)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        with fitting(self.supernet):
            steps_done = int(state["step"])
            self._counts.load_state_dict(state)
        self._weights.load_state_dict(state)
        self.steps_done = steps_done


def evaluate(network: nn.Module, images: Tensor, labels: Tensor, batch: int = 256) -> float:
    """Accuracy in 0..1 in evaluation mode. A `GraphNetwork` gets the images at its own resolution."""
    training = network.training
    network.eval()
    correct = 0
    with torch.inference_mode():
        for start in range(0, len(images), batch):
            logits = network(input_of(network, images[start:start + batch]))
            correct += int((logits.argmax(1) == labels[start:start + batch]).sum())
    network.train(training)
    return correct / len(images)
