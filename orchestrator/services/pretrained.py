"""Weights that somebody else trained, which the supernet starts from (`supernet.start`), and what they expect to see.

Pixels are scaled as the weights were trained with, also in the files that are handed over; without `start` by the mean
and standard deviation of the training images.
"""
from __future__ import annotations

from pathlib import Path

import torch

from actors.data import LabelledImages, Preprocessing, Splits
from orchestrator.config import Config
from orchestrator.record.store import RunStore
from searchspaces.efficientnet_lite import pretrained as efficientnet_lite
from searchspaces.efficientnet_lite.space import EfficientNetLite
from searchspaces.elite.space import EliteSpace
from searchspaces.elite.supernet import EliteSupernet
from searchspaces.errors import ConfigError
from searchspaces.mobilenetv3 import pretrained as mobilenetv3
from searchspaces.mobilenetv3.space import MobileNetV3
from searchspaces.space import SearchSpace
from searchspaces.supernet import Supernet
from searchspaces.trained.given import Published, fill, weights_file

PIXELS = "pixels"   # mean and standard deviation of the training images, in a run's state
PUBLISHED: dict[type[SearchSpace], Published] = {
    EfficientNetLite: efficientnet_lite.PUBLISHED, MobileNetV3: mobilenetv3.PUBLISHED}


def published_for(space: SearchSpace) -> Published:
    """The weights that exist for a space, or for the one that it is a part of. ConfigError where there are none."""
    whole = space.base if isinstance(space, EliteSpace) else space
    for kind, published in PUBLISHED.items():
        if isinstance(whole, kind):
            return published
    raise ConfigError(f"search space {space.space_id} cannot start from trained weights; use space efficientnet_lite "
                      "or mobilenetv3, or leave out supernet.start")


def absolute_start(start: str | None) -> str | None:
    """A path that means the same file from any folder; names of packages stay."""
    if start is None or any(start in published.packages for published in PUBLISHED.values()):
        return start
    return str(Path(start).expanduser().absolute())


def with_absolute_start(config: Config) -> Config:
    """The configuration with a `supernet.start` that a resumed run finds from any folder."""
    start = absolute_start(config.supernet.start)
    if start == config.supernet.start:
        return config
    return config.model_copy(update={"supernet": config.supernet.model_copy(update={"start": start})})


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
    published = published_for(space)
    file = weights_file(published, start)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        supernet = space.make_supernet()
    fill(supernet.base if isinstance(supernet, EliteSupernet) else supernet, published, file)
    return supernet


def preprocessing_for(config: Config, space: SearchSpace, train: LabelledImages, resolution: int,
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
    return Preprocessing(*published_for(space).pixels(train.shape[2]), resolution, train.shape[2])


def timed_image_size(config: Config, splits: Splits) -> tuple[int, int] | None:
    """Height and width of the images from which networks are timed; None where they are timed without preprocessing."""
    height, width = splits.train.shape[:2]
    return (int(height), int(width)) if config.delivery.preprocess_in_model else None
