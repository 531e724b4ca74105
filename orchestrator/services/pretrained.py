"""Weights that somebody else trained, which the supernet starts from (`supernet.start`), and what they expect to see.

Pixels are scaled as the weights were trained with, also in the files that are handed over; without `start` by the mean
and standard deviation of the training images.
"""
from __future__ import annotations

import torch

from actors.data import LabelledImages, Preprocessing
from orchestrator.config import Config
from orchestrator.record.store import RunStore
from searchspaces.efficientnet_lite.pretrained import MEAN, STD, load_pretrained, weights_file
from searchspaces.elite.supernet import EliteSupernet
from searchspaces.errors import ConfigError
from searchspaces.space import SearchSpace
from searchspaces.supernet import Supernet

PIXELS = "pixels"   # mean and standard deviation of the training images, in a run's state


def check_start(config: Config, space: SearchSpace) -> None:
    """ConfigError or StoreError where the supernet cannot start from what the configuration names."""
    if config.supernet.start is None:
        return
    if config.accuracy.source != "supernet":
        raise ConfigError(f"supernet.start is {config.supernet.start!r}, but accuracies come from "
                          f"{config.accuracy.source}, so no supernet is trained; leave it out, or set accuracy: "
                          "supernet")
    started(config.supernet.start, config.seed, space)


def started(start: str, seed: int, space: SearchSpace) -> Supernet:
    """A supernet with these weights; what they lack, as a head for other classes, is new and follows the seed."""
    file = weights_file(start)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        supernet = space.make_supernet()
    load_pretrained(supernet.base if isinstance(supernet, EliteSupernet) else supernet, file)
    return supernet


def preprocessing_for(config: Config, train: LabelledImages, resolution: int,
                      store: RunStore | None = None) -> Preprocessing:
    """How images become the input of this run's networks. Where all images must be read to tell, the run's `store`
    keeps what came out."""
    if config.supernet.start is None:
        known = store.state().get(PIXELS) if store is not None and train.memory_mb else None
        if known is not None:
            return Preprocessing(tuple(known["mean"]), tuple(known["std"]), resolution, train.shape[2])
        fitted = Preprocessing.fit(train, resolution)
        if store is not None and train.memory_mb:
            store.update_state(**{PIXELS: {"mean": list(fitted.mean), "std": list(fitted.std)}})
        return fitted
    channels = int(train.shape[2])
    return Preprocessing((MEAN,) * channels, (STD,) * channels, resolution, channels)
