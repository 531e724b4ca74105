"""UNAS: the shared weights and distributions over architectures, trained together (paper sections 3 and 4).

A step, for the budget whose turn it is (specification 4):
1. sample z and zeta_hat from p_phi, one architecture for each part of the batch;
2. L_d(z) of the sampled subnet without gradients, 3. L_d(zeta_hat) of the mixture with gradients to zeta_hat;
4. REBAR on the two; 5. RELAX on a measured latency, see latencyterm.py; 6. Adam on phi.
Then the weights learn from the training images at the relaxed sample (equation 7), by the usual optimiser.
Until warm-up ends only the weights learn, at samples of the uniform distribution.

Ours: several distributions, one per budget, share the weights, and take turns; the architectures of a step are parts of
the batch, so that a step means the same on any number of ranks; latencies count as shares of the budget.

Legend: B budgets (`aims`), E decisions (token positions), K_e values of a decision, A architectures of a step.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from searchspaces.errors import ConfigError, EvaluationError
from searchspaces.space import SearchSpace, Tokens
from searchspaces.supernet import Supernet
from searchspaces.training.distributions import Distributions, UpdateCounts
from searchspaces.training.estimators import Draw, draw, entropies, uniform
from searchspaces.training.latencyterm import Aim, LatencySettings, LatencyTerm
from searchspaces.training.objective import Gap, generalisation_loss
from searchspaces.training.training import Batch, Latencies, Schedule, Training, Wishes, share_right
from searchspaces.training.weights import WeightOptimizer, WeightSettings, fitting

Estimator = Literal["rebar", "gumbel_softmax", "reinforce"]
Objective = Literal["generalisation", "validation", "training"]
IMPOSSIBLE = -30.0      # logit of a value that the space excludes
LAST_RATE = 0.3         # the learning rate of phi falls to this share of itself (specification 7)


@dataclass(frozen=True)
class UnasSettings:
    """`aims`: one distribution each. `generalisation`: lambda of L_gen. `warm_up`: share of the epochs in which only
    weights learn. `architectures`: samples of a step, each with its part of the batch. `duplicates`: weight of what the
    space wants a mixture to avoid (`Supernet.mixture_penalty`)."""

    aims: tuple[Aim, ...]
    weights: WeightSettings = WeightSettings()
    latency: LatencySettings = field(default_factory=LatencySettings)
    temperature: float = 0.4
    learning_rate: float = 0.03
    weight_decay: float = 1e-6
    estimator: Estimator = "rebar"
    objective: Objective = "generalisation"
    generalisation: float = 0.5
    gap: Gap = "batch"
    softening: float = 0.0
    duplicates: float = 0.2
    weights_at: Literal["relaxed", "hard"] = "relaxed"
    warm_up: float = 0.3
    held_out_share: float = 0.2
    architectures: int = 1

    def __post_init__(self) -> None:
        for name, value, good in (
                ("temperature", self.temperature, self.temperature > 0),
                ("learning_rate", self.learning_rate, self.learning_rate > 0),
                ("generalisation", self.generalisation, self.generalisation >= 0),
                ("softening", self.softening, self.softening >= 0),
                ("warm_up", self.warm_up, 0 <= self.warm_up < 1),
                ("held_out_share", self.held_out_share, 0 < self.held_out_share < 1),
                ("architectures", self.architectures, self.architectures >= 1),
                ("number of budgets", len(self.aims), len(self.aims) >= 1)):
            if not good:
                raise ConfigError(f"{name} of unas is {value}; {ALLOWED[name]}")

    @property
    def least_parts(self) -> int:
        return self.architectures

    def check(self, space: SearchSpace) -> None:
        """Every space with a supernet will do."""

    def start(self, supernet: Supernet, schedule: Schedule) -> UnasTraining:
        return UnasTraining(supernet, self, schedule)


ALLOWED = {
    "temperature": "it must be above 0, usual are 0.2 to 2", "learning_rate": "it must be above 0",
    "generalisation": "the weight of the gap between validation and training loss must be at least 0",
    "softening": "it must be at least 0", "warm_up": "it is a share of the epochs, from 0 to less than 1",
    "held_out_share": "it is a share of the training images, between 0 and 1", "architectures": "it must be at least 1",
    "number of budgets": "give at least one",
}


class UnasTraining(Training):
    """See the module docstring. Logits are float64 on the CPU, whatever trains the weights."""

    scalars = ("loss", "accuracy", "validation_loss", "gap", "entropy", "latency_loss", "surrogate_error")

    def __init__(self, supernet: Supernet, settings: UnasSettings, schedule: Schedule) -> None:
        self.supernet = supernet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.settings = settings
        self.schedule = replace(schedule, parts=max(schedule.parts, settings.least_parts))
        self.steps_done = 0
        self._space = supernet.space
        self._warm_up = round(settings.warm_up * schedule.epochs) * schedule.steps_per_epoch
        self._distributions = Distributions("phi", [uniform_logits(self._space) for _ in settings.aims],
                                            settings.learning_rate, settings.weight_decay)
        self.phi = self._distributions.logits
        self._weights = WeightOptimizer(self.supernet, settings.weights, schedule.steps)
        self._learning = [p for p in self.supernet.parameters() if p.requires_grad]
        self._latency = LatencyTerm(self._space, settings.latency, settings.aims, settings.temperature,
                                    settings.softening)
        self._counts = UpdateCounts(self._space)

    # --- between epochs ----------------------------------------------------------------------------------------------

    def begin_epoch(self) -> Wishes:
        """Latencies of architectures drawn from today's distributions; none while warming up."""
        if self.steps_done < self._warm_up or self.steps_done >= self.schedule.steps:
            return {}
        slots = [(step, part) for step in range(self.steps_done, self.steps_done + self.schedule.steps_per_epoch)
                 for part in range(self.settings.architectures)]
        return self._latency.begin_epoch(self.steps_done, slots, self.phi, self.turn, self.schedule.seed)

    def give(self, latencies: Latencies) -> None:
        self._latency.give(latencies)

    def turn(self, step: int) -> int:
        """The budget whose distribution learns at a step."""
        return step % len(self.settings.aims)

    # --- one step ----------------------------------------------------------------------------------------------------

    def step(self, batch: Batch, held_out: Batch | None = None) -> dict[str, float]:
        assert held_out is not None, "UNAS needs validation images"
        turn, searching = self.turn(self.steps_done), self.steps_done >= self._warm_up
        self.supernet.train()
        lr = self._weights.begin(self.steps_done)
        self._distributions.clear(turn)
        sums = dict.fromkeys(self.scalars, 0.0)
        sampled: dict[int, Tokens] = {}
        validation_of_part = [of_part.batch for of_part in self.cut(held_out)]
        for part, validation in zip(self.parts(batch), validation_of_part, strict=True):
            number = part.number * self.settings.architectures // self.schedule.parts   # of the sample
            drawn = draw(self.phi[turn], self.settings.temperature, self._noise(number),
                         softening=self.settings.softening)
            numbers = (self._architecture_part(drawn, part.batch, validation, turn, number, part.share) if searching
                       else self._weights_part(drawn, part.batch, part.share))
            sums = {name: total + part.share * numbers.get(name, 0.0) for name, total in sums.items()}
            sampled[number] = self._tokens(drawn.z)
        self._counts.add(np.stack(list(sampled.values())))
        if searching:
            self._step_phi(turn)
        self._weights.finish(self.steps_done, [sums["loss"]], self.reduce_gradients)
        self.steps_done += 1
        return sums | {"entropy": float(np.mean([np.mean(entropies(phi)) for phi in self.phi])), "lr": lr}

    def _architecture_part(self, drawn: Draw, train: Batch, validation: Batch, turn: int, part: int,
                           share: float) -> dict[str, float]:
        """Gradients of one sample's share: to phi, steps 2 to 5, and to the weights, at the relaxed sample or at z."""
        settings = self.settings
        with torch.no_grad():
            hard = self._objective(*self._hard_losses(drawn, train, validation), drawn.z)
        points = [zeta.detach().to(self._device, torch.float32).requires_grad_() for zeta in drawn.zeta]
        logits = self.supernet.forward_mixture(train[0], points)
        train_B = self._losses(logits, train[1])
        validation_B = self._losses(self.supernet.forward_mixture(validation[0], points), validation[1])
        soft = self._objective(train_B, validation_B, points)
        if settings.weights_at == "relaxed" and self._one_gap:
            slopes: Sequence[Tensor | None] = self._shared_backward(train_B.mean(), validation_B.mean(), points, share)
            numbers = self._numbers(train_B, logits, train[1])
        else:
            slopes = torch.autograd.grad(soft, points, allow_unused=True)
            numbers = self._weights_part(drawn, train, share)
        # The value of soft at zeta_hat is that at zeta; its gradient goes on through zeta_hat's own Jacobian.
        through = drawn.zeta if settings.estimator == "gumbel_softmax" else drawn.zeta_hat
        reparametrised = torch.stack([(slope.detach().cpu().double() * point).sum()
                                      for slope, point in zip(slopes, through) if slope is not None]).sum()
        score = float(hard - soft.detach()) if settings.estimator == "rebar" else float(hard)
        surrogate = {"rebar": score * drawn.log_p + reparametrised, "gumbel_softmax": reparametrised,
                     "reinforce": score * drawn.log_p}[settings.estimator]
        progress = (self.steps_done - self._warm_up) / max(self.schedule.steps - self._warm_up, 1)
        term = self._latency.term(self.steps_done, part, turn, self.phi[turn], progress, self._noise(part, 1),
                                  self._noise(part, 2))
        (share * (surrogate + term.surrogate)).backward()
        gap = float(validation_B.mean().detach() - train_B.mean().detach())
        return numbers | {"validation_loss": float(validation_B.mean().detach()), "gap": gap,
                          "latency_loss": term.loss, "surrogate_error": term.error}

    def _shared_backward(self, train: Tensor, validation: Tensor, points: list[Tensor],
                         share: float) -> list[Tensor | None]:
        """d L_d / d zeta by the chain rule through both mean losses, so that one backward pass of the training loss
        serves the weights too: they learn at the same zeta, which does not depend on this step's phi."""
        ends = [loss.detach().requires_grad_() for loss in (train, validation)]
        penalty_at = [point.detach().requires_grad_() for point in points]
        objective = self._objective(ends[0][None], ends[1][None], penalty_at)
        by_train, by_validation, *by_point = torch.autograd.grad(objective, [*ends, *penalty_at], allow_unused=True)
        (share * train).backward(inputs=[*self._learning, *points])
        through_validation: Sequence[Tensor | None] = [None] * len(points)
        if by_validation is not None and bool(by_validation):
            through_validation = torch.autograd.grad(validation, points, allow_unused=True)
        weights = (0.0 if by_train is None else by_train / share, by_validation, 1.0)
        return [_weighted(weights, (point.grad, slope, direct))
                for point, slope, direct in zip(points, through_validation, by_point)]

    def _weights_part(self, drawn: Draw, train: Batch, share: float) -> dict[str, float]:
        """Gradient of the training loss to the weights alone, at the relaxed sample or at z (equation 7)."""
        images, labels = train
        if self.settings.weights_at == "hard":
            self.supernet.set_active(self._tokens(drawn.z))
            logits = self.supernet(images)
        else:
            logits = self.supernet.forward_mixture(images, [zeta.detach().to(self._device, torch.float32)
                                                            for zeta in drawn.zeta])
        losses_B = self._losses(logits, labels)
        (share * losses_B.mean()).backward()
        return self._numbers(losses_B, logits, labels)

    @staticmethod
    def _numbers(losses_B: Tensor, logits: Tensor, labels: Tensor) -> dict[str, float]:
        return {"loss": float(losses_B.mean().detach()),
                "accuracy": share_right(logits, labels)}

    def _step_phi(self, turn: int) -> None:
        done = (self.steps_done - self._warm_up) / max(self.schedule.steps - self._warm_up, 1)
        rate = self.settings.learning_rate * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done)))
        if not self._distributions.step(turn, self.reduce_gradients, rate):
            raise EvaluationError(f"the gradients of the architecture distribution are not finite at step "
                                  f"{self.steps_done}; lower controller.learning_rate, now "
                                  f"{self.settings.learning_rate}, or raise controller.temperature, now "
                                  f"{self.settings.temperature}")

    @property
    def _one_gap(self) -> bool:
        """Does L_d depend on the mean losses only?"""
        return self.settings.objective != "generalisation" or self.settings.gap == "batch"

    # --- losses ------------------------------------------------------------------------------------------------------

    def _objective(self, train_B: Tensor, validation_B: Tensor, point: Sequence[Tensor]) -> Tensor:
        settings = self.settings
        if settings.objective == "generalisation":
            loss = generalisation_loss(train_B, validation_B, settings.generalisation, settings.gap)
        else:
            loss = (train_B if settings.objective == "training" else validation_B).mean()
        if settings.duplicates:
            loss = loss + settings.duplicates * self.supernet.mixture_penalty(point).to(loss)
        return loss

    def _hard_losses(self, drawn: Draw, train: Batch, validation: Batch) -> tuple[Tensor, Tensor]:
        """Losses per image of the sampled subnet, with batch statistics as in the mixture."""
        self.supernet.set_active(self._tokens(drawn.z))
        train_B, validation_B = (self._losses(self.supernet(images), labels) for images, labels in (train, validation))
        return train_B, validation_B

    @staticmethod
    def _losses(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none")

    # --- samples -----------------------------------------------------------------------------------------------------

    def _noise(self, part: int, purpose: int = 0) -> list[Tensor]:
        """Uniform noise of one sample, the same wherever it is drawn."""
        seed = int(np.random.SeedSequence([self.schedule.seed, self.steps_done, part, purpose]).generate_state(1)[0])
        return uniform(self.phi[0], torch.Generator().manual_seed(seed))

    def _tokens(self, z: Sequence[Tensor]) -> Tokens:
        return np.array([int(one.argmax()) for one in z], dtype=np.int8)

    @property
    def _device(self) -> torch.device:
        return next(self.supernet.parameters()).device

    # --- state -------------------------------------------------------------------------------------------------------

    def update_counts(self) -> dict[str, tuple[int, int]]:
        """Samples drawn, of which the relaxed ones reach every value a little."""
        return self._counts.extremes()

    def distribution(self) -> dict[str, NDArray[np.float64]]:
        """Logits float64[K_e] by "BUDGET.DECISION", numbers in the order of `aims` and of the space's choices."""
        return self._distributions.arrays()

    def state_dict(self) -> dict[str, Tensor]:
        """model.*, momentum.*, counts.*, step; phi.B.E with adam.B.E.* and what latencies are known."""
        return (self._weights.state_dict() | self._latency.state_dict() | self._counts.state_dict()
                | self._distributions.state_dict() | {"step": torch.tensor(self.steps_done)})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._weights.load_state_dict(state)
        with fitting(self.supernet):
            self._counts.load_state_dict(state)
            self._distributions.load_state_dict(state)
            self._latency.load_state_dict(state)
            self.steps_done = int(state["step"])


def uniform_logits(space: SearchSpace) -> list[Tensor]:
    """float64[K_e] zeros per decision; what the space excludes has no chance. Validity must not depend on the tokens
    before."""
    prefix = np.zeros(len(space.choices), dtype=np.int8)
    return [torch.where(torch.from_numpy(space.valid(prefix[:position])), 0.0, IMPOSSIBLE).double()
            for position in range(len(space.choices))]


def _weighted(weights: Sequence[Tensor | float | None], slopes: Sequence[Tensor | None]) -> Tensor | None:
    parts = [weight * slope for weight, slope in zip(weights, slopes) if weight is not None and slope is not None]
    return torch.stack(parts).sum(dim=0) if parts else None
