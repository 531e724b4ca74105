"""The training loop of single networks: its arithmetic, and that a state is all a training needs to go on."""
from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from actors.data import Augmentation, Batches, Images, Preprocessing
from actors.supernet.checkpoints import read_newest, remove_checkpoints, write_checkpoint
from actors.supernet.finetune import NetworkTraining, Recipe, arrays, fine_tuned_weights
from searchspaces.errors import EvaluationError
from searchspaces.network import GraphNetwork
from tests.actors.tinyspace import TinySpace

TOKENS = np.array([1, 1], dtype=np.int8)
RECIPE = Recipe(epochs=3, learning_rate=0.1, momentum=0.9, weight_decay=0.01, label_smoothing=0.1)


def noise(images: int = 50, seed: int = 0) -> Images:
    rng = np.random.default_rng(seed)
    return Images(rng.integers(0, 256, (images, 8, 8, 1), dtype=np.uint8), rng.integers(0, 10, images))


def batches(size: int = 16) -> Batches:
    return Batches(noise(), Preprocessing((0.5,), (0.3,), 8, 1), Augmentation(1), size, seed=5)


def network(norm: bool = True) -> GraphNetwork:
    torch.manual_seed(0)
    return GraphNetwork(TinySpace(norm=norm).graph(TOKENS))


def by_hand(recipe: Recipe, given: Batches) -> dict[str, torch.Tensor]:
    """Nesterov momentum, weight decay on matrices only, gradients clipped to the norm, cosine: from the formulas."""
    model = network()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in weights.items()}
    total = recipe.epochs * given.steps
    for t in range(total):
        images, labels = given.get(*divmod(t, given.steps))
        logits = torch.func.functional_call(model, {n: w.requires_grad_() for n, w in weights.items()}, (images,))
        log_p = functional.log_softmax(logits, dim=1)
        nll = -log_p[torch.arange(len(labels)), labels].mean()
        loss = (1 - recipe.label_smoothing) * nll - recipe.label_smoothing * log_p.mean()
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values()))))
        norm = math.sqrt(sum(float((g ** 2).sum()) for g in gradients.values()))
        rate = recipe.learning_rate / 2 * (1 + math.cos(math.pi * t / total))
        for name, w in weights.items():
            g = gradients[name] * min(1.0, recipe.max_gradient_norm / norm)
            g = g + (recipe.weight_decay if w.ndim > 1 else 0.0) * w.detach()
            velocity[name] = recipe.momentum * velocity[name] + g
            weights[name] = (w - rate * (g + recipe.momentum * velocity[name])).detach()
    return weights


@pytest.mark.parametrize("max_norm", [5.0, 0.1])
def test_steps_are_those_of_the_formulas(max_norm: float) -> None:
    recipe = Recipe(2, 0.1, 0.9, 0.01, 0.1, max_norm)
    model = network()
    training = NetworkTraining(model, batches(), recipe)
    while training.epoch < recipe.epochs:
        training.train_epoch()
    expected = by_hand(recipe, batches())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], atol=1e-5, rtol=1e-4)


def test_cosine() -> None:
    assert [round(RECIPE.rate(x), 6) for x in (0, 1 / 3, 0.5, 1)] == [0.1, 0.075, 0.05, 0.0]


def test_a_loaded_state_goes_on_bit_by_bit(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    undisturbed = NetworkTraining(network(), batches(), RECIPE)
    losses = [undisturbed.train_epoch() for _ in range(3)]
    first = NetworkTraining(network(), batches(), RECIPE)
    first.train_epoch()
    write_checkpoint(folder, "epoch", 1, first.state_dict(), {})
    torch.manual_seed(99)
    second = NetworkTraining(GraphNetwork(TinySpace().graph(TOKENS)), batches(), RECIPE)
    checkpoint = read_newest(folder, "epoch")
    assert checkpoint is not None
    second.load_state_dict(checkpoint.tensors, epoch=1)
    assert [second.train_epoch() for _ in range(2)] == losses[1:]
    a, b = undisturbed.state_dict(), second.state_dict()
    assert a.keys() == b.keys() and any(name.startswith("momentum.") for name in a)
    assert all(torch.equal(a[name], b[name]) for name in a)
    remove_checkpoints(folder, "epoch")
    assert not list(folder.iterdir())


def test_without_its_momentum_a_training_would_go_another_way() -> None:
    """The optimiser's part of the state matters: what the test above would miss otherwise."""
    first = NetworkTraining(network(), batches(), RECIPE)
    first.train_epoch()
    state = first.state_dict()
    second = NetworkTraining(network(), batches(), RECIPE)
    second.load_state_dict({n: t for n, t in state.items() if n.startswith("network.")}, epoch=1)
    assert first.train_epoch() != second.train_epoch()


def test_divergence_is_an_error_with_a_way_out() -> None:
    training = NetworkTraining(network(norm=False), batches(), Recipe(3, 1e30))
    with pytest.raises(EvaluationError, match=r"diverged in epoch 1 .*lower its learning rate, now 1e\+30"):
        while training.epoch < 3:
            training.train_epoch()


def test_a_killed_fine_tuning_goes_on_and_a_finished_one_costs_nothing(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fine_tuned_weights(network(), batches(), 3, 0.1)
    epochs, train_epoch = [], NetworkTraining.train_epoch

    def counted(training: NetworkTraining) -> float:
        if len(epochs) == 2:
            raise KeyboardInterrupt
        epochs.append(training.epoch)
        return train_epoch(training)

    monkeypatch.setattr(NetworkTraining, "train_epoch", counted)
    with pytest.raises(KeyboardInterrupt):
        fine_tuned_weights(network(), batches(), 3, 0.1, folder=tmp_path)
    epochs[:] = [9]
    for _ in range(2):
        again = fine_tuned_weights(network(), batches(), 3, 0.1, folder=tmp_path)
        assert epochs == [9, 2] and all(np.array_equal(again[name], whole[name]) for name in whole)
    epochs.clear()
    with pytest.raises(KeyboardInterrupt):      # another rate is another training
        fine_tuned_weights(network(), batches(), 3, 0.2, folder=tmp_path)
    assert epochs == [0, 1]


def test_no_epochs_of_fine_tuning_change_statistics_only() -> None:
    before = arrays(network())
    after = fine_tuned_weights(network(), batches(), 0, 0.1)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"norm.running_mean", "norm.running_var"}
