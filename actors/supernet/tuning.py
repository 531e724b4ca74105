"""Single networks fine-tuned away from the supernet: as Ray tasks, so that several train at once."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from actors.data import Augmentation, Batches, LabelledImages, Preprocessing
from actors.devices import Device, training_device
from actors.objectpath import AnyPath, as_path
from actors.supernet.finetune import fine_tuned_weights
from searchspaces.graph import Graph
from searchspaces.network import GraphNetwork

RETRIES = 20


@dataclass(frozen=True)
class TuningSettings:
    """`device` auto: the GPU where the worker has been given one."""

    epochs: int
    learning_rate: float
    batch_size: int
    seed: int
    augmentation: Augmentation
    calibration_images: int
    device: Device = "auto"


def tuned_weights(graph: Graph, start: Mapping[str, NDArray[Any]], train: LabelledImages, preprocessing: Preprocessing,
                  settings: TuningSettings, folder: str | AnyPath | None = None,
                  threads: int = 1) -> dict[str, NDArray[np.generic]]:
    """State dict of the graph's network, fine-tuned from `start` on images as `preprocessing` makes them.

    With a `folder` it goes on from what that holds and leaves the last checkpoint there, so that calling it again costs
    nothing.
    """
    torch.set_num_threads(threads)
    network = GraphNetwork(graph)
    network.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in start.items()})
    batches = Batches(train, preprocessing, settings.augmentation, min(settings.batch_size, len(train)), settings.seed)
    return fine_tuned_weights(network.to(training_device(settings.device)), batches, settings.epochs,
                              settings.learning_rate, settings.calibration_images,
                              None if folder is None else as_path(folder))


def submit_tuning(name: str, graph: Graph, start: ray.ObjectRef, train: ray.ObjectRef, preprocessing: Preprocessing,
                  settings: TuningSettings, folder: str | AnyPath | None = None, num_cpus: float = 1,
                  num_gpus: float = 0) -> ray.ObjectRef:
    """`tuned_weights` as a Ray task. Killed, it is started again by Ray; with a `folder` it loses at most one epoch."""
    task: Any = ray.remote(tuned_weights).options(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=RETRIES,
                                                  name=name)
    return task.remote(graph, start, train, preprocessing, settings, folder, max(1, int(num_cpus)))
