"""The shared weights' optimiser: SGD with momentum, linear warm-up and cosine (specification searchspaces 2.5)."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from searchspaces.errors import ConfigError, EvaluationError, StoreError
from searchspaces.supernet import Supernet

CLASSIFIER = "head.linear"
Reduce = Callable[[Iterable[nn.Parameter]], None]


@dataclass(frozen=True)
class WeightSettings:
    """`warmup_fraction` of the steps the learning rate rises linearly, then it falls as a cosine to zero; `grad_clip`
    bounds the global norm. Weights before the classifier learn at `body_rate` times the rate: below 1 where they are
    trained already and the classifier is new."""

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 3e-5
    warmup_fraction: float = 0.1
    grad_clip: float = 5.0
    body_rate: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.body_rate <= 1:
            raise ConfigError(f"body_rate of supernet training is {self.body_rate}; it is a share of the learning rate "
                              "in 0..1")
        if not (self.lr > 0 and self.grad_clip > 0):
            raise ConfigError(f"lr and grad_clip of supernet training are {self.lr} and {self.grad_clip}; both must be "
                              "above 0")
        if not (0 <= self.momentum < 1 and 0 <= self.warmup_fraction < 1):
            raise ConfigError(f"momentum and warmup_fraction of supernet training must lie in [0, 1), got "
                              f"{self.momentum} and {self.warmup_fraction}")


class WeightOptimizer:
    """Of one supernet. `begin(step)`, backward passes, `finish(...)`; its state is momentum.* beside model.*."""

    def __init__(self, supernet: Supernet, settings: WeightSettings, total_steps: int) -> None:
        self.settings, self.total_steps = settings, total_steps
        self._supernet = supernet
        self._parameters = dict(supernet.named_parameters())
        self._optimizer = torch.optim.SGD(
            parameter_groups(self._parameters, settings.weight_decay, settings.body_rate),
            lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then cosine to zero at `total_steps`."""
        warmup = self.settings.warmup_fraction * self.total_steps
        if step < warmup:
            return self.settings.lr * (step + 1) / (warmup + 1)
        progress = min((step - warmup) / max(self.total_steps - warmup, 1), 1.0)
        return self.settings.lr * 0.5 * (1 + math.cos(math.pi * progress))

    def begin(self, step: int) -> float:
        """Clears gradients and sets the step's learning rate, which it returns."""
        lr = self.learning_rate(step)
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["share"]
        self._optimizer.zero_grad(set_to_none=True)
        return lr

    def finish(self, step: int, losses: list[float], reduce_gradients: Reduce | None) -> float:
        """Reduces, clips and applies the gradients; their norm. EvaluationError if they or a loss are not finite."""
        active = [p for p in self._parameters.values() if p.grad is not None]
        if reduce_gradients is not None:
            reduce_gradients(active)
        norm = float(nn.utils.clip_grad_norm_(active, self.settings.grad_clip))
        if not (math.isfinite(norm) and all(math.isfinite(loss) for loss in losses)):
            raise EvaluationError(f"supernet training diverged at step {step} (loss {losses[0]}); lower its learning "
                                  f"rate, now {self.settings.lr}")
        self._optimizer.step()
        return norm

    def state_dict(self) -> dict[str, Tensor]:
        """model.* and momentum.*, on the CPU."""
        state = {f"model.{name}": tensor.detach().to("cpu", copy=True).contiguous()
                 for name, tensor in self._supernet.state_dict().items()}
        for name, parameter in self._parameters.items():
            buffer = self._optimizer.state.get(parameter, {}).get("momentum_buffer")
            if buffer is not None:
                state[f"momentum.{name}"] = buffer.detach().to("cpu", copy=True).contiguous()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        with fitting(self._supernet):
            self._supernet.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()
                                            if name.startswith("model.")})
        for name, parameter in self._parameters.items():
            self._optimizer.state.pop(parameter, None)
            if f"momentum.{name}" in state:
                momentum = state[f"momentum.{name}"].to(parameter.device, copy=True)
                self._optimizer.state[parameter]["momentum_buffer"] = momentum


def parameter_groups(parameters: Mapping[str, nn.Parameter], weight_decay: float,
                     body_rate: float = 1.0) -> list[dict[str, Any]]:
    """For an optimiser: neither batch norm nor biases decay, and a group learns at its `share` of the rate: 1 for the
    classifier, which is what is called head.linear."""
    head = [p for name, p in parameters.items() if name.startswith(CLASSIFIER)]
    body = [p for name, p in parameters.items() if not name.startswith(CLASSIFIER)]
    return [{"params": [p for p in part if (p.ndim > 1) == decays], "weight_decay": weight_decay if decays else 0.0,
             "share": share} for part, share in ((head, 1.0), (body, body_rate)) for decays in (True, False)]


@contextmanager
def fitting(supernet: Supernet) -> Iterator[None]:
    """Turns the error of a state that does not fit into a StoreError."""
    try:
        yield
    except (RuntimeError, KeyError) as error:
        first = str(error).splitlines()[0]
        raise StoreError(f"this supernet checkpoint does not fit {supernet.space.space_id} ({first}); use the options "
                         "it was trained with") from error
