"""Weights that somebody else trained, which the supernet starts from (`supernet.start`), and what they expect to see.

Pixels are scaled as the weights were trained with, also in the files that are handed over; without `start` by the mean
and standard deviation of the training images.
"""
from __future__ import annotations

import torch

from actors.data import Images, Preprocessing, Splits
from orchestrator.config import Config
from searchspaces.efficientnet_lite.pretrained import MEAN, STD, load_pretrained, weights_file
from searchspaces.elite.supernet import EliteSupernet
from searchspaces.errors import ConfigError
from searchspaces.space import SearchSpace
from searchspaces.supernet import Supernet


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


def preprocessing_for(config: Config, train: Images, resolution: int) -> Preprocessing:
    """How images become the input of this run's networks."""
    if config.supernet.start is None:
        return Preprocessing.fit(train, resolution)
    channels = int(train.images.shape[3])
    return Preprocessing((MEAN,) * channels, (STD,) * channels, resolution, channels)


def timed_image_size(config: Config, splits: Splits) -> tuple[int, int] | None:
    """Height and width of the images from which networks are timed; None where they are timed without preprocessing."""
    height, width = splits.train.images.shape[1:3]
    return (int(height), int(width)) if config.delivery.preprocess_in_model else None
