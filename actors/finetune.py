"""The last training of one chosen subnet before it is handed over."""
from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from actors.data import Batches, Images, calibration_images
from actors.evaluator import even_chunks
from searchspaces.errors import EvaluationError
from searchspaces.network import input_of, recalibrate_batch_norm

LABEL_SMOOTHING = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 3e-5  # not on batch norms and biases; specification searchspaces 2.5
MAX_GRADIENT_NORM = 5.0


def fine_tuned_weights(network: nn.Module, batches: Batches, epochs: int, learning_rate: float,
                       calibration: int = 2000) -> dict[str, NDArray[np.generic]]:
    """State dict of the extracted subnet after `epochs` (0: none) with the supernet's optimiser, cosine to zero, and
    batch-norm statistics re-estimated on `calibration` training images. Changes `network`; same input, same result."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # twice as fast for depthwise layers
    decayed = [p for p in network.parameters() if p.ndim > 1]
    plain = [p for p in network.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain}]
    optimizer = torch.optim.SGD(groups, lr=learning_rate, momentum=MOMENTUM, nesterov=True)
    total = epochs * batches.steps
    network.train()
    for epoch in range(epochs):
        order = batches.order(epoch)
        for step in range(batches.steps):
            progress = (epoch * batches.steps + step) / total
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
            images, labels = batches.get(epoch, step, order)
            images = input_of(network, images).contiguous(memory_format=torch.channels_last)
            loss = functional.cross_entropy(network(images), labels, label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = float(nn.utils.clip_grad_norm_(network.parameters(), MAX_GRADIENT_NORM))
            if not math.isfinite(norm):
                raise EvaluationError(f"fine-tuning diverged in epoch {epoch + 1}; lower "
                                      f"delivery.fine_tune_learning_rate, now {learning_rate:g}")
            optimizer.step()
    recalibrate(network, batches.data, batches, calibration)
    network.eval()
    return arrays(network)


def recalibrate(network: nn.Module, train: Images, batches: Batches, count: int) -> None:
    images = calibration_images(train, count, batches.seed)
    recalibrate_batch_norm(network, even_chunks(batches.preprocessing.tensor(images.images), 100))


def arrays(module: nn.Module) -> dict[str, NDArray[np.generic]]:
    """The module's tensors as numpy copies in the plain memory layout."""
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format).numpy()
            for name, tensor in module.state_dict().items()}
