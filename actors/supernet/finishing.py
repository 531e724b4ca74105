"""Single subnets finished away from the supernet: as Ray tasks, so that several train at once, on a core each."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from actors.data import Images, Preprocessing
from actors.supernet.finetune import fine_tuned_weights
from actors.supernet.training import SupernetSettings, whole_batches
from searchspaces.network import GraphNetwork
from searchspaces.space import SearchSpace, Tokens

RETRIES = 20


def finished_weights(space: SearchSpace, tokens_T: Tokens, start: Mapping[str, NDArray[Any]], train: Images,
                     preprocessing: Preprocessing, settings: SupernetSettings, epochs: int, learning_rate: float,
                     threads: int = 1) -> dict[str, NDArray[np.generic]]:
    """What `SupernetActor.fine_tune` gives with so many threads, from the subnet's own weights."""
    torch.set_num_threads(threads)
    network = GraphNetwork(space.graph(tokens_T))
    network.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in start.items()})
    return fine_tuned_weights(network, whole_batches(train, preprocessing, settings), epochs, learning_rate,
                              settings.calibration_images)


def submit_finishing(space: SearchSpace, tokens_T: Tokens, start: ray.ObjectRef, train: ray.ObjectRef,
                     preprocessing: Preprocessing, settings: SupernetSettings, epochs: int, learning_rate: float,
                     threads: int = 1) -> ray.ObjectRef:
    """`finished_weights` as a Ray task. Killed, it is started again by Ray."""
    task: Any = ray.remote(finished_weights).options(num_cpus=threads, max_retries=RETRIES,
                                                     name=f"fine-tune-{space.arch_id(tokens_T)}")
    return task.remote(space, tokens_T, start, train, preprocessing, settings, epochs, learning_rate, threads)
