"""Training of a supernet in plain torch: one object, one call per optimiser step (specification 2.5 and 8).

    training = SupernetTraining(space.make_supernet(), TrainingSettings(), total_steps=1000, seed=0)
    for images, labels in batches:                     # float[B, C, H, W], int64[B]
        training.step(images, labels)

The supernet trains on the device it is on, and so do the images. Which subnets a step trains depends on (seed, step)
only. So data-parallel workers with equal seeds train the same subnets and only need `reduce_gradients`, and a training
resumed from `state_dict` continues bit-identically if it is fed the same batches. Not thread-safe.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from searchspaces.errors import ConfigError, EvaluationError, StoreError
from searchspaces.network import input_of
from searchspaces.space import Tokens
from searchspaces.supernet import Supernet
from searchspaces.training.sampling import sandwich, strict_fair


@dataclass(frozen=True)
class TrainingSettings:
    """Defaults are for small images and some thousand steps. `subnets` counts the random ones of a sandwich;
    `distill_weight` weighs the cross-entropy against the largest subnet's probabilities; `warmup_fraction` of the steps
    the learning rate rises linearly, then it falls as a cosine to zero; `grad_clip` bounds the global norm."""

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

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.grad_clip <= 0:
            raise ConfigError(f"lr and grad_clip of supernet training are {self.lr} and {self.grad_clip}; both must be "
                              "above 0")
        if not (0 <= self.momentum < 1 and 0 <= self.warmup_fraction < 1 and 0 <= self.dropout < 1
                and 0 <= self.label_smoothing < 1):
            raise ConfigError("momentum, warmup_fraction, dropout and label_smoothing of supernet training must lie in "
                              f"[0, 1), got {self.momentum}, {self.warmup_fraction}, {self.dropout} and "
                              f"{self.label_smoothing}")
        if self.sampler not in ("sandwich", "fair") or self.subnets < 0:
            raise ConfigError(f"supernet training has sampler '{self.sampler}' and {self.subnets} random subnets; the "
                              "sampler is sandwich or fair, the number at least 0")


class SupernetTraining:
    """See the module docstring. `reduce_gradients`, if set, is called once before each optimiser step with the
    parameters that have a gradient, in the same order on every worker: replace `p.grad` by the mean over workers."""

    def __init__(self, supernet: Supernet, settings: TrainingSettings, total_steps: int, seed: int) -> None:
        # About twice as fast for depthwise layers on CPUs.
        self.supernet: Supernet = supernet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.settings = settings
        self.total_steps = total_steps
        self.seed = seed
        self.steps_done = 0
        self.reduce_gradients: Callable[[Iterable[nn.Parameter]], None] | None = None
        space = supernet.space
        self._smallest, self._largest = space.extremes()
        self._counts = [np.zeros(size, dtype=np.int64) for size in space.vocabulary_sizes]
        for module in supernet.modules():
            if isinstance(module, nn.Dropout):
                module.p = settings.dropout
        self._parameters = dict(supernet.named_parameters())
        decayed = [p for p in self._parameters.values() if p.ndim > 1]  # neither batch norm nor biases
        plain = [p for p in self._parameters.values() if p.ndim <= 1]
        self._optimizer = torch.optim.SGD(
            [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then cosine to zero at `total_steps`."""
        warmup = self.settings.warmup_fraction * self.total_steps
        if step < warmup:
            return self.settings.lr * (step + 1) / (warmup + 1)
        progress = min((step - warmup) / max(self.total_steps - warmup, 1), 1.0)
        return self.settings.lr * 0.5 * (1 + math.cos(math.pi * progress))

    def subnets_of_step(self, step: int) -> Tokens:
        """The rows that a step trains, the same in every process."""
        rng = np.random.default_rng([self.seed, step])
        space = self.supernet.space
        if self.settings.sampler == "fair":
            return strict_fair(space, rng)
        return sandwich(space, rng, self.settings.subnets)

    def step(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """One optimiser step on the summed gradients of the sampled subnets; scalars of the step."""
        rows = self.subnets_of_step(self.steps_done)
        lr = self.learning_rate(self.steps_done)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        images = images.contiguous(memory_format=torch.channels_last)
        self.supernet.train()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.random.fork_rng(devices=[], enabled=self.settings.dropout > 0):
            if self.settings.dropout > 0:
                torch.manual_seed(hash((self.seed, self.steps_done)))
            losses, accuracy = self._accumulate(rows, images, labels)
        active = [p for p in self._parameters.values() if p.grad is not None]
        if self.reduce_gradients is not None:
            self.reduce_gradients(active)
        norm = float(nn.utils.clip_grad_norm_(active, self.settings.grad_clip))
        if not (math.isfinite(norm) and all(math.isfinite(loss) for loss in losses)):
            raise EvaluationError(f"supernet training diverged at step {self.steps_done} (loss {losses[0]}); lower its "
                                  f"learning rate, now {self.settings.lr}")
        self._optimizer.step()
        self._count(rows)
        self.steps_done += 1
        return {"loss": losses[0], "loss_mean": sum(losses) / len(losses), "accuracy": accuracy, "lr": lr,
                "grad_norm": norm}

    def _accumulate(self, rows: Tokens, images: Tensor, labels: Tensor) -> tuple[list[float], float]:
        """Backward passes of all rows; losses, and the largest subnet's (or the first one's) batch accuracy."""
        settings, distill = self.settings, self.settings.distill_weight
        losses: list[Tensor] = []
        teacher: Tensor | None = None
        accuracy = torch.tensor(0.0)
        if settings.sampler == "fair" and distill > 0:
            teacher = self._teacher(images)
        for row in rows:
            self.supernet.set_active(row)
            logits = self.supernet(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
            if teacher is not None:
                loss = loss + distill * F.cross_entropy(logits, teacher)
            loss.backward()
            if not losses:
                accuracy = (logits.detach().argmax(1) == labels).float().mean()
                if settings.sampler == "sandwich" and distill > 0:
                    teacher = logits.detach().softmax(1)  # the largest comes first
            losses.append(loss.detach())
        return [float(loss) for loss in losses], float(accuracy)

    @torch.no_grad()
    def _teacher(self, images: Tensor) -> Tensor:
        self.supernet.set_active(self._largest)
        return self.supernet(images).softmax(1)

    def _count(self, rows: Tokens) -> None:
        live = self.supernet.space.live_mask(rows)
        for position, counts in enumerate(self._counts):
            np.add.at(counts, rows[live[:, position], position], 1)

    def update_counts(self) -> dict[str, tuple[int, int]]:
        """Per position (most, least) often trained value; dead tokens train nothing and are not counted."""
        return {choice.name: (int(counts.max()), int(counts.min()))
                for choice, counts in zip(self.supernet.space.choices, self._counts)}

    def state_dict(self) -> dict[str, Tensor]:
        """A snapshot on the CPU, flat so that safetensors can write it: model.*, momentum.*, counts.*, step."""
        state = {f"model.{name}": tensor.detach().to("cpu", copy=True).contiguous()
                 for name, tensor in self.supernet.state_dict().items()}
        for name, parameter in self._parameters.items():
            buffer = self._optimizer.state.get(parameter, {}).get("momentum_buffer")
            if buffer is not None:
                state[f"momentum.{name}"] = buffer.detach().to("cpu", copy=True).contiguous()
        for position, counts in enumerate(self._counts):
            state[f"counts.{position}"] = torch.from_numpy(counts.copy())
        return state | {"step": torch.tensor(self.steps_done)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores a snapshot of a training with the same space. StoreError if it belongs to another one."""
        try:
            self.supernet.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()
                                           if name.startswith("model.")})
            self.steps_done = int(state["step"])
            self._counts = [state[f"counts.{position}"].numpy().copy() for position in range(len(self._counts))]
        except (RuntimeError, KeyError) as error:
            first = str(error).splitlines()[0]
            raise StoreError(f"this supernet checkpoint does not fit {self.supernet.space.space_id} ({first}); use the "
                             "options it was trained with") from error
        for name, parameter in self._parameters.items():
            self._optimizer.state.pop(parameter, None)
            if f"momentum.{name}" in state:
                momentum = state[f"momentum.{name}"].to(parameter.device, copy=True)
                self._optimizer.state[parameter]["momentum_buffer"] = momentum


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
