"""Training of one stand-alone network, an epoch at a time: proxy trainings, from scratch, and a last fine-tuning.

    training = NetworkTraining(network, batches, recipe)
    while training.epoch < recipe.epochs: training.train_epoch()

The state after an epoch is everything: a training that loads it goes on exactly as the one that wrote it, because
batches depend on the seed and the step only, and on one kind of device every step is deterministic.
"""
from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from actors.data import Batches, LabelledImages, calibration_images, even_rows
from actors.devices import device_of
from actors.objectpath import AnyPath
from actors.supernet.checkpoints import read_newest, remove_checkpoints, write_checkpoint
from searchspaces.errors import EvaluationError, StoreError
from searchspaces.network import input_of, recalibrate_batch_norm
from searchspaces.training.weights import parameter_groups

log = logging.getLogger(__name__)
NETWORK, MOMENTUM = "network.", "momentum."  # prefixes in the state
EPOCH = "epoch"     # name of the checkpoints of a fine-tuning


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum, cosine to zero over `epochs`; no weight decay on batch norms and biases."""

    epochs: int
    learning_rate: float
    momentum: float = 0.9
    weight_decay: float = 3e-5  # specification searchspaces 2.5
    label_smoothing: float = 0.1
    max_gradient_norm: float = 5.0

    def rate(self, progress: float) -> float:
        """Learning rate at a share 0..1 of all steps."""
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


class NetworkTraining:
    """Trains `network` in place, on the device that holds it. Raises EvaluationError where training diverges."""

    def __init__(self, network: nn.Module, batches: Batches, recipe: Recipe) -> None:
        self.network, self.batches, self.recipe = network, batches, recipe
        self.epoch = 0
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # depthwise layers: twice as fast
        self._device = device_of(network)
        self._parameters = dict(network.named_parameters())
        groups = parameter_groups(self._parameters, recipe.weight_decay)
        self._optimizer = torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum, nesterov=True)

    def train_epoch(self) -> float:
        """The next epoch; mean loss over its steps."""
        self.network.train()
        steps = self.batches.steps
        losses = []
        for step, batch in enumerate(self.batches.epoch(self.epoch)):
            progress = (self.epoch * steps + step) / (self.recipe.epochs * steps)
            for group in self._optimizer.param_groups:
                group["lr"] = self.recipe.rate(progress)
            losses.append(self._step(*batch))
        self.epoch += 1
        return float(torch.stack(losses).mean())

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        images = input_of(self.network, images.to(self._device, non_blocking=True))
        labels = labels.to(self._device, non_blocking=True)
        logits = self.network(images.contiguous(memory_format=torch.channels_last))
        loss = functional.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters.values(), self.recipe.max_gradient_norm)
        if not math.isfinite(float(norm)):  # a loss that is not finite has no finite gradient either
            raise EvaluationError(f"training diverged in epoch {self.epoch + 1} (loss {float(loss.detach()):g}); lower "
                                  f"its learning rate, now {self.recipe.learning_rate:g}")
        self._optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Tensor]:
        """Network and optimiser after the epochs done. The number of epochs is the caller's to keep."""
        momentum = {MOMENTUM + name: self._optimizer.state[p]["momentum_buffer"]
                    for name, p in self._parameters.items() if p in self._optimizer.state}
        return {NETWORK + name: tensor for name, tensor in self.network.state_dict().items()} | momentum

    def load_state_dict(self, state: Mapping[str, Tensor], epoch: int) -> None:
        self.network.load_state_dict({name.removeprefix(NETWORK): tensor for name, tensor in state.items()
                                      if name.startswith(NETWORK)})
        for name, parameter in self._parameters.items():
            if MOMENTUM + name in state:
                buffer = torch.empty_like(parameter).copy_(state[MOMENTUM + name]).detach()
                self._optimizer.state[parameter]["momentum_buffer"] = buffer
        self.epoch = epoch


def fine_tuned_weights(network: nn.Module, batches: Batches, epochs: int, learning_rate: float,
                       calibration: int = 2000, folder: AnyPath | None = None) -> dict[str, NDArray[np.generic]]:
    """State dict of the extracted subnet after `epochs` (0: none) with the supernet's optimiser, cosine to zero, and
    batch-norm statistics re-estimated on `calibration` training images. Changes `network`; same input, same result.
    With a `folder` it goes on from the newest epoch there and leaves its own, the last one too."""
    training = NetworkTraining(network, batches, Recipe(epochs, learning_rate))
    if folder is not None:
        _resume(training, folder)
    while training.epoch < epochs:
        training.train_epoch()
        if folder is not None:
            _save(training, folder)
    recalibrate(network, batches.data, batches, calibration)
    network.eval()
    return arrays(network)


def _facts(training: NetworkTraining) -> dict[str, Any]:
    """What must be equal for a training to be the same training."""
    batches = training.batches
    return {"recipe": asdict(training.recipe), "images": len(batches.data), "batch": batches.batch,
            "seed": batches.seed, "augmentation": asdict(batches.augmentation),
            "resolution": batches.preprocessing.resolution}


def _resume(training: NetworkTraining, folder: AnyPath) -> None:
    checkpoint = read_newest(folder, EPOCH)
    if checkpoint is not None and checkpoint.about["facts"] == _facts(training):
        training.load_state_dict(checkpoint.tensors, checkpoint.about["epoch"])
    elif checkpoint is not None:
        remove_checkpoints(folder, EPOCH)


def _save(training: NetworkTraining, folder: AnyPath) -> None:
    """A disk that refuses costs the way back, not the training."""
    about = {"facts": _facts(training), "epoch": training.epoch}
    try:
        write_checkpoint(folder, EPOCH, training.epoch, training.state_dict(), about)
    except StoreError as error:
        log.warning("%s; a killed training would start again", error)


def recalibrate(network: nn.Module, train: LabelledImages, batches: Batches, count: int) -> None:
    """Batch-norm statistics of `count` training images without augmentation."""
    images = calibration_images(train, count, batches.seed)
    chunks = (batches.preprocessing.tensor(images.read(rows)) for rows in even_rows(len(images), 100))
    recalibrate_batch_norm(network, (chunk.contiguous(memory_format=torch.channels_last).to(device_of(network))
                                     for chunk in chunks))


def arrays(module: nn.Module) -> dict[str, NDArray[np.generic]]:
    """The module's tensors as numpy copies in the plain memory layout."""
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format).numpy()
            for name, tensor in module.state_dict().items()}
