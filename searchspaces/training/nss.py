"""NSS: a distribution over spaces, trained beside the shared weights ([S3 3 and 6.3]; specification nss 8).

Warm-up: the weights alone learn, at members of uniformly drawn spaces; with a probability that falls to 0 a group is
trained at its largest value instead, or the last channels and layers would starve. Then every step does both halves:

    (a) on held-out images: draw g, and a member of every bin; loss = CE + lambda |F(g) / F_t - 1|; Adam on theta
    (b) on training images: a fresh draw, CE alone; SGD on the weights

Ours: several aims (budgets), one distribution each, share the weights and take turns; the cost of a space is its mean
latency as a predictor sees it, or the paper's multiply-adds.

Legend: K groups of token positions, B_k bins of one; theta[a][k] are the logits of aim a, float64[B_k] on the CPU.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from searchspaces.errors import ConfigError, EvaluationError
from searchspaces.space import SearchSpace, Tokens
from searchspaces.supernet import Supernet
from searchspaces.training.distributions import Distributions, UpdateCounts
from searchspaces.training.estimators import entropies
from searchspaces.training.spaces import (
    Cost,
    SpaceCosts,
    SpaceOfSpaces,
    deviation,
    exact_madds,
    full_probability,
    madds_of,
    relaxed,
    sampled_mean,
    straight_through,
    temperature,
)
from searchspaces.training.training import Batch, Schedule, Training, share_right
from searchspaces.training.weights import WeightOptimizer, WeightSettings, fitting

# Logits start equal, and Adam moves one by about the learning rate per step: with less way to go a distribution ends
# undecided, with much more it ends where the noise of the last steps took it (docs/nss.md, "Measured").
REACH, LARGEST_RATE = 25.0, 0.5
DRAWS = {"architecture": 1, "weights": 2, "cost": 3}    # what random numbers of one step are for


@dataclass(frozen=True)
class SpaceAim:
    """What a space's mean cost should be: `target` ms of the latency model `label`, or multiply-adds where there is
    none."""

    target: float
    label: str = ""


@dataclass(frozen=True)
class NssSettings:
    """`latency`: by label of an aim, the model that predicts ms. `cost_weight`: lambda. `task_weight`: of the
    cross-entropy; 0 leaves the cost alone, a control. `warm_up`: share of the epochs. `full`: does warm-up train the
    largest values more often? `hard`: straight-through draws. `samples`: networks for a mean that has no closed form.
    `members`: drawn per step to judge a space by; its loss is that of one at the lower quartile.
    `learning_rate`: of the logits; None: so large that an aim's steps together can carry one by REACH.
    """

    aims: tuple[SpaceAim, ...]
    latency: Mapping[str, Cost] = field(default_factory=dict)
    weights: WeightSettings = WeightSettings()
    cost_weight: float = 1.0
    task_weight: float = 1.0
    hinge: bool = False
    learning_rate: float | None = None
    weight_decay: float = 1e-3
    first_temperature: float = 5.0
    last_temperature: float = 0.001
    warm_up: float = 0.3
    full: bool = True
    hard: bool = False
    samples: int = 16
    members: int = 1
    held_out_share: float = 0.5

    def __post_init__(self) -> None:
        for name, value, good, allowed in (
                ("number of aims", len(self.aims), len(self.aims) >= 1, "give at least one"),
                ("lowest target", min((aim.target for aim in self.aims), default=1.0),
                 all(aim.target > 0 for aim in self.aims), "a space is to cost something, so it must be above 0"),
                ("cost_weight", self.cost_weight, self.cost_weight >= 0, "it must be at least 0"),
                ("task_weight", self.task_weight, self.task_weight >= 0, "it must be at least 0"),
                ("learning_rate", self.learning_rate, self.learning_rate is None or self.learning_rate > 0,
                 "it must be above 0"),
                ("last_temperature", self.last_temperature,
                 0 < self.last_temperature <= self.first_temperature,
                 f"it must be above 0 and at most first_temperature, {self.first_temperature:g}"),
                ("warm_up", self.warm_up, 0 <= self.warm_up < 1, "it is a share of the epochs, from 0 to less than 1"),
                ("samples", self.samples, self.samples >= 1, "it must be at least 1"),
                ("members", self.members, self.members >= 1, "it must be at least 1"),
                ("held_out_share", self.held_out_share, 0 < self.held_out_share < 1,
                 "it is a share of the training images, between 0 and 1")):
            if not good:
                raise ConfigError(f"{name} of nss is {value}; {allowed}")

    @property
    def least_parts(self) -> int:
        return 1

    def check(self, space: SearchSpace) -> None:
        spaces = SpaceOfSpaces(space)
        madds = [aim.target for aim in self.aims if not aim.label]
        low, high = SpaceCosts(spaces, None, 0).reachable() if madds else (0.0, 0.0)
        for target in madds:
            if not low <= target <= high:
                raise ConfigError(f"controller.madds_m {target / 1e6:g} is out of reach: the mean multiply-adds of a "
                                  f"space inside {space.space_id} lie between {low / 1e6:.4g} and {high / 1e6:.4g} "
                                  "million; choose a target between them, or another space")

    def start(self, supernet: Supernet, schedule: Schedule) -> NssTraining:
        return NssTraining(supernet, self, schedule)


class NssTraining(Training):
    """See the module docstring. Every rank makes the same draws, for all parts of a batch, so its share of the batch is
    all that differs."""

    scalars = ("loss", "accuracy", "validation_loss", "gap", "entropy", "cost_loss")

    def __init__(self, supernet: Supernet, settings: NssSettings, schedule: Schedule) -> None:
        self.supernet = supernet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.settings, self.schedule = settings, schedule
        self.steps_done = 0
        self.spaces = SpaceOfSpaces(supernet.space)
        costs = {label: SpaceCosts(self.spaces, settings.latency[label] if label else None, schedule.seed)
                 for label in {aim.label for aim in settings.aims}}
        # The aim's, or the nearest mean cost that a space can have: a budget may be fine for some network, and yet be
        # below the mean of every space.
        self.targets = [costs[aim.label].nearest(aim.target) for aim in settings.aims]
        self._full_T = supernet.space.extremes()[1]
        self._warm_up = warm_up_epochs(settings.warm_up, schedule.epochs) * schedule.steps_per_epoch
        self.learning_rate = settings.learning_rate or min(
            REACH * len(settings.aims) / (schedule.steps - self._warm_up), LARGEST_RATE)
        self._distributions = Distributions(
            "theta", [[torch.zeros(len(group), dtype=torch.float64) for group in self.spaces.groups]
                      for _ in settings.aims], self.learning_rate, settings.weight_decay, betas=(0.5, 0.999))
        self.theta = self._distributions.logits
        self._weights = WeightOptimizer(self.supernet, settings.weights, schedule.steps)
        self._counts = UpdateCounts(supernet.space)

    def step(self, batch: Batch, held_out: Batch | None = None) -> dict[str, float]:
        assert held_out is not None, "NSS needs held-out images"
        self.supernet.train()
        lr = self._weights.begin(self.steps_done)
        if self.steps_done < self._warm_up:
            numbers = self._warm_up_step(batch)
        else:
            turn = self.steps_done % len(self.settings.aims)
            numbers = self._space_step(turn, held_out)
            numbers |= self._weights_step(turn, batch)
            numbers["gap"] = numbers["validation_loss"] - numbers["loss"]
        self._weights.finish(self.steps_done, [numbers["loss"]], self.reduce_gradients)
        self.steps_done += 1
        entropy = float(np.mean([np.mean(entropies(theta)) for theta in self.theta]))
        return dict.fromkeys(self.scalars, 0.0) | numbers | {"entropy": entropy, "lr": lr}

    # --- warm-up (specification 5) ---------------------------------------------------------------------------------

    def _warm_up_step(self, batch: Batch) -> dict[str, float]:
        row = self.warm_up_row(self.steps_done)
        self.supernet.set_active(row)
        self._counts.add(row[None])
        return self._backward(batch, self.supernet)

    def warm_up_row(self, step: int) -> Tokens:
        """int8[T]: the member that a step of warm-up trains, the same in every process."""
        rng = self._rng("weights", step)
        bins = [int(rng.integers(len(group))) for group in self.spaces.groups]
        row = self.spaces.row(bins, self.spaces.members(rng), self.spaces.free_tokens(rng))
        p = full_probability(step, self._warm_up) if self.settings.full else 0.0
        for group in self.spaces.groups:
            if rng.random() < p:
                row[list(group.positions)] = self._full_T[list(group.positions)]
        return row

    # --- after it --------------------------------------------------------------------------------------------------

    def _space_step(self, turn: int, held_out: Batch) -> dict[str, float]:
        """(a): the distribution of aim `turn` learns, the weights do not."""
        settings, theta = self.settings, self.theta[turn]
        self._distributions.clear(turn)
        weights = self._draw(turn, "architecture")
        cost = deviation(self._mean_cost(settings.aims[turn], weights), self.targets[turn], settings.hinge)
        total, validation = settings.cost_weight * cost, 0.0
        for part in self.parts(held_out) if settings.task_weight else ():
            task = part.share * self._task_loss(weights, part.batch)
            validation += float(task.detach())
            self._add_gradients(theta, total + settings.task_weight * task.cpu().double())
            total = torch.zeros(())     # once is enough
        if not settings.task_weight:
            self._add_gradients(theta, total)
        if not self._distributions.step(turn, self.reduce_gradients, self.learning_rate):
            raise EvaluationError(f"the gradients of the space distribution are not finite at step {self.steps_done}; "
                                  f"lower controller.learning_rate, now {self.learning_rate:.4g}, or supernet."
                                  f"learning_rate, now {settings.weights.lr}")
        return {"validation_loss": validation, "cost_loss": float(cost.detach())}

    @staticmethod
    def _add_gradients(theta: Sequence[Tensor], loss: Tensor) -> None:
        gradients = torch.autograd.grad(loss, theta, retain_graph=True, materialize_grads=True)  # 0: costs nothing
        for logits, gradient in zip(theta, gradients):
            logits.grad = gradient if logits.grad is None else logits.grad + gradient

    def _task_loss(self, weights: Sequence[Tensor], batch: Batch) -> Tensor:
        """Of a member; of several, the loss that a quarter of them do not exceed (specification 3, ours): a space is
        then judged by its better members, about which its mean says little."""
        images, labels = batch
        mixtures = [self._mixture(weights, "architecture", part) for part in range(self.settings.members)]
        with torch.no_grad():
            order = sorted(range(len(mixtures)), key=lambda j: float(
                F.cross_entropy(self.supernet.forward_mixture(images, mixtures[j]), labels))) if mixtures[1:] else [0]
        chosen = mixtures[order[math.ceil(len(mixtures) / 4) - 1]]
        return F.cross_entropy(self.supernet.forward_mixture(images, chosen), labels)

    def _weights_step(self, turn: int, batch: Batch) -> dict[str, float]:
        """(b): gradients of the weights at a fresh draw."""
        with torch.no_grad():
            weights = self._draw(turn, "weights")
        mixture = self._mixture(weights, "weights")
        self._counts.add(np.array([[int(weight.argmax()) for weight in mixture]], dtype=np.int8))
        return self._backward(batch, lambda images: self.supernet.forward_mixture(images, mixture))

    def _backward(self, batch: Batch, forward: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Gradients of the weights, part by part; loss and accuracy of this rank's images."""
        sums = {"loss": 0.0, "accuracy": 0.0}
        for part in self.parts(batch):
            images, labels = part.batch
            logits = forward(images)
            loss = F.cross_entropy(logits, labels)
            (part.share * loss).backward()
            sums["loss"] += part.share * float(loss.detach())
            sums["accuracy"] += part.share * share_right(logits, labels)
        return sums

    def _draw(self, turn: int, purpose: str) -> list[Tensor]:
        settings, epoch = self.settings, self.steps_done // self.schedule.steps_per_epoch
        tau = temperature(epoch, self.schedule.epochs, settings.first_temperature, settings.last_temperature)
        seed = int(self._rng(purpose, self.steps_done, 1).integers(2**62))
        drawn = relaxed(self.theta[turn], tau, torch.Generator().manual_seed(seed))
        return straight_through(drawn) if settings.hard else drawn

    def _mixture(self, weights: Sequence[Tensor], purpose: str, part: int = 0) -> list[Tensor]:
        """Of members of the drawn bins; `part` numbers several such draws of a step."""
        rng = self._rng(purpose, self.steps_done, part and part + 1)     # 1 is the draw of the bins
        device = next(self.supernet.parameters()).device
        mixture = self.spaces.mixture(weights, self.spaces.members(rng), self.spaces.free_tokens(rng))
        return [weight.to(device, torch.float32) for weight in mixture]

    def _mean_cost(self, aim: SpaceAim, weights: Sequence[Tensor]) -> Tensor:
        rng = self._rng("cost", self.steps_done)
        if aim.label:
            return sampled_mean(self.spaces, weights, self.settings.latency[aim.label], self.settings.samples, rng)
        mean = exact_madds(self.spaces, weights)
        return sampled_mean(self.spaces, weights, madds_of(self.supernet.space), self.settings.samples,
                            rng) if mean is None else mean

    def _rng(self, purpose: str, step: int, part: int = 0) -> np.random.Generator:
        return np.random.default_rng([self.schedule.seed, step, DRAWS[purpose], part])

    # --- state -----------------------------------------------------------------------------------------------------

    def update_counts(self) -> dict[str, tuple[int, int]]:
        """How often a value was the heaviest of its position."""
        return self._counts.extremes()

    def distribution(self) -> dict[str, NDArray[np.float64]]:
        """Logits float64[B_k] by "AIM.GROUP", numbers in the order of `aims` and of the space's bin groups."""
        return self._distributions.arrays()

    def state_dict(self) -> dict[str, Tensor]:
        """model.*, momentum.*, theta.AIM.GROUP, adam.AIM.GROUP.*, counts.*, step."""
        return (self._weights.state_dict() | self._counts.state_dict() | self._distributions.state_dict()
                | {"step": torch.tensor(self.steps_done)})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._weights.load_state_dict(state)
        with fitting(self.supernet):
            self._counts.load_state_dict(state)
            self._distributions.load_state_dict(state)
            self.steps_done = int(state["step"])


def warm_up_epochs(share: float, epochs: int) -> int:
    """Whole epochs of warm-up; one at least is left for the distribution."""
    return min(round(share * epochs), epochs - 1)
