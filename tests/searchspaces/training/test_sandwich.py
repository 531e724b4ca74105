"""Supernet training: sampling by step, resumption, data parallelism, distillation, and that it learns."""
from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor

from searchspaces.errors import ConfigError, EvaluationError, StoreError
from searchspaces.mobilenetv3.space import MobileNetV3S16
from searchspaces.network import recalibrate_batch_norm
from searchspaces.training.sandwich import SandwichSettings, SandwichTraining, evaluate
from searchspaces.training.training import Schedule

SPACE = MobileNetV3S16(width=0.25, resolution=8, unit_strides=(1, 1, 2, 1, 1))


def data(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A bright quadrant or half on noise: ten classes that need no long training."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (n,), generator=generator)
    images = 0.3 * torch.randn(n, 1, 8, 8, generator=generator)
    for image, label in zip(images, labels):
        a, b = divmod(int(label), 5)
        image[0, 4 * a:4 * a + 4, b:b + 4] += 2.0
    return images, labels


def training(settings: SandwichSettings | None = None, total_steps: int = 6, seed: int = 0) -> SandwichTraining:
    torch.manual_seed(0)
    return (settings or SandwichSettings()).start(SPACE.make_supernet(), Schedule(1, total_steps, seed))


def equal(a: SandwichTraining, b: SandwichTraining) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_every_subnet_learns() -> None:
    trainer = training(SandwichSettings(lr=0.1), total_steps=40)
    accuracies = [trainer.step(data(32, seed=step))["accuracy"] for step in range(40)]
    assert np.mean(accuracies[-8:]) > 0.7       # of 0.1 by chance; other seeds reach 0.77 to 0.89
    images, labels = data(300, seed=1000)
    for row in [*SPACE.extremes(), *SPACE.sample_uniform(np.random.default_rng(0), 2)]:
        network = trainer.supernet.extract(row)
        recalibrate_batch_norm(network, data(600, seed=2000)[0].split(100))
        assert evaluate(network, images, labels) > 0.8


@pytest.mark.parametrize("settings", [
    SandwichSettings(), SandwichSettings(sampler="fair"), SandwichSettings(dropout=0.2, distill_weight=0.0),
])
def test_resumed_training_is_bit_identical(settings: SandwichSettings) -> None:
    whole = training(settings)
    for step in range(6):
        whole.step(data(8, step))
    first = training(settings)
    for step in range(3):
        first.step(data(8, step))
    stored = load(save(first.state_dict()))
    torch.manual_seed(99)  # a new process has another random state and other initial weights
    resumed = settings.start(SPACE.make_supernet(), Schedule(1, 6, 0))
    resumed.load_state_dict(stored)
    assert resumed.steps_done == 3
    for step in range(3, 6):
        resumed.step(data(8, step))
    assert equal(whole, resumed)


def test_snapshot_does_not_move_with_the_training() -> None:
    trainer = training()
    before = trainer.state_dict()
    kept = {name: tensor.clone() for name, tensor in before.items()}
    trainer.step(data(8))
    assert all(torch.equal(before[name], kept[name]) for name in before)


def test_subnets_depend_on_seed_and_step_only() -> None:
    one, two, other = training(seed=5), training(seed=5), training(seed=6)
    two.step(data(8))
    assert (one.subnets_of_step(4) == two.subnets_of_step(4)).all()
    assert (one.subnets_of_step(4) != one.subnets_of_step(5)).any()
    assert (one.subnets_of_step(4) != other.subnets_of_step(4)).any()


def test_gradients_are_reduced_once_per_step_and_in_the_same_order() -> None:
    """Two workers that exchange mean gradients keep equal weights on different data."""
    workers = [training(), training()]
    seen: list[list[Tensor]] = []

    def record(parameters: object) -> None:
        seen.append([p.grad for p in parameters])  # type: ignore[attr-defined]

    for step in range(2):
        copies = []
        for rank, worker in enumerate(workers):  # first pass: what would each worker contribute?
            probe = copy.deepcopy(worker)
            probe.reduce_gradients = record
            probe.step(data(8, 10 * step + rank))
            copies.append([gradient.clone() for gradient in seen.pop()])
            assert not seen
        means = [(a + b) / 2 for a, b in zip(*copies, strict=True)]

        def exchange(parameters: object, means: list[Tensor] = means) -> None:
            for parameter, mean in zip(parameters, means, strict=True):  # type: ignore[call-overload]
                parameter.grad.copy_(mean)

        for rank, worker in enumerate(workers):
            worker.reduce_gradients = exchange
            worker.step(data(8, 10 * step + rank))
    for a, b in zip(workers[0].supernet.parameters(), workers[1].supernet.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("body_rate, mixed", [(1.0, False), (0.2, True)])
def test_one_step_against_autograd_by_hand(body_rate: float, mixed: bool) -> None:
    """Gradients of all subnets summed, distillation from the largest, decay not on batch norm and biases; the body at
    its own rate; labels that are probabilities."""
    settings = SandwichSettings(lr=0.1, momentum=0.0, weight_decay=0.01, warmup_fraction=0.0, grad_clip=1e9,
                                body_rate=body_rate)
    trainer = training(settings)
    images, labels = data(16)
    if mixed:
        labels = 0.7 * F.one_hot(labels, 10).float() + 0.3 * F.one_hot(labels.roll(1), 10)
    reference = copy.deepcopy(trainer.supernet).train()
    total, teacher = torch.zeros(()), torch.zeros(())
    for index, row in enumerate(trainer.subnets_of_step(0)):
        reference.set_active(row)
        logits = reference(images)
        total = total + F.cross_entropy(logits, labels, label_smoothing=0.1)
        if index == 0:
            teacher = logits.detach().softmax(1)
        else:
            total = total - (teacher * logits.log_softmax(1)).sum(1).mean()
    total.backward()
    expected = {}
    for name, p in reference.named_parameters():
        decay = 0.01 * p if p.ndim > 1 else 0.0
        rate = 0.1 if name.startswith("head.linear") else 0.1 * body_rate
        expected[name] = p if p.grad is None else p - rate * (p.grad + decay)
    trainer.step((images, labels))
    for name, p in trainer.supernet.named_parameters():
        assert torch.allclose(p, expected[name], atol=2e-5), name


def test_the_teacher_trains_alone_first_and_a_resumed_training_knows_when_it_ends() -> None:
    settings = SandwichSettings(teacher=0.5)
    trainer, largest = training(settings, total_steps=6), SPACE.extremes()[1]
    for step in range(4):
        trainer.step(data(4, step))
    assert [len(trainer.subnets_of_step(step)) for step in range(6)] == [1, 1, 1, 4, 4, 4]
    assert all((trainer.subnets_of_step(step)[0] == largest).all() for step in range(6))
    assert trainer.update_counts()["depth0"][0] >= 4      # the largest once a step
    again = training(settings, total_steps=6)
    again.load_state_dict(trainer.state_dict())
    for step in range(4, 6):
        trainer.step(data(4, step))
        again.step(data(4, step))
    assert equal(trainer, again)


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    trainer = training(SandwichSettings(lr=0.2, warmup_fraction=0.1), total_steps=100)
    rates = [trainer.learning_rate(step) for step in range(101)]
    assert rates[:10] == sorted(rates[:10]) and rates[0] > 0
    assert max(rates) == rates[10] == 0.2
    assert rates[55] == pytest.approx(0.1) and rates[100] == pytest.approx(0.0)


def test_update_counts_are_equal_under_strict_fairness() -> None:
    trainer = training(SandwichSettings(sampler="fair"))
    for step in range(3):
        trainer.step(data(4, step))
    counts = trainer.update_counts()
    assert len(counts) == 45
    assert counts["depth0"] == counts["kernel3.1"] == (3, 3)
    assert sum(most for most, _ in counts.values()) < 45 * 3 + 1
    deep = [least for name, (_, least) in counts.items() if name.endswith(".3")]
    assert min(deep) < 3  # the last layer of a unit is dead in shallow subnets


def test_divergence_is_one_sentence() -> None:
    trainer = training()
    images, labels = data(8)
    with pytest.raises(EvaluationError, match="learning rate"):
        trainer.step((images * float("nan"), labels))


def test_foreign_checkpoint_is_refused() -> None:
    torch.manual_seed(0)
    other = SandwichSettings().start(MobileNetV3S16(width=0.5, resolution=8).make_supernet(), Schedule(1, 6, 0))
    with pytest.raises(StoreError, match="does not fit"):
        training().load_state_dict(other.state_dict())
    with pytest.raises(StoreError):
        training().load_state_dict({})


@pytest.mark.parametrize("options", [
    {"lr": 0.0}, {"momentum": 1.0}, {"warmup_fraction": -0.1}, {"sampler": "sandwitch"}, {"subnets": -1},
    {"body_rate": 1.5}, {"teacher": 1.0},
])
def test_impossible_settings(options: dict) -> None:
    with pytest.raises(ConfigError):
        SandwichSettings(**options)
