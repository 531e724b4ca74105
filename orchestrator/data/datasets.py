"""Datasets: handwritten digits, Parquet of encoded images, an image folder, or the user's own function or class.

Every source gives labelled images; this file turns them into `Splits`. The validation images come out of the training
data (the search chooses by them); the test images are the source's own test data where there is any, otherwise they
are set aside first. Splits are stratified by class, disjoint, and depend on the data and `seed` only.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, field_validator, model_validator

from actors.data import Images, LabelledImages, Splits, stratified
from actors.streamed import StreamedImages
from orchestrator.data.imagefiles import Found, Labelled, Reading, find_folder, find_parquet, read
from orchestrator.data.scattered import scattered
from orchestrator.settings import MANY, SEEDS, Section
from searchspaces.errors import ConfigError, DataError
from searchspaces.plugins import load_object, user_code

BUILT_IN = ("digits", "scattered_digits", "parquet", "folder")
MIN_PER_CLASS = 3  # one image for each of train, val and test


class DataSettings(Section):
    """Where the images come from. `data: digits` is short for `data: {name: digits}`."""

    name: str = Field("digits", description="digits, scattered_digits, parquet, folder, module:function or "
                                                      "module:Class")
    train: Path | None = Field(None, description="Parquet file or image folder to train and validate on")
    test: Path | None = Field(None, description="the same for the final report; none: set aside from train")
    val_fraction: float = Field(0.2, gt=0, lt=1, description="share of the training data that the search chooses by")
    test_fraction: float = Field(0.2, gt=0, lt=1, description="share set aside as test where there is no test data")
    limit: int | None = Field(None, ge=10, le=MANY, description="at most so many images of train and of test, for "
                                                                "quick work")
    classes: Annotated[int, Field(ge=2, le=1_000_000)] | list[str] | None = Field(None, description=(
        "number or names of classes; none: from the data"))
    channels: int | None = Field(None, description="1 (grey) or 3 (colour): converts; none: as the images are")
    size: int | None = Field(None, ge=4, le=1024, description="images are resized to size x size while reading")
    memory_mb: float = Field(2048, gt=0, le=1e9, description=(
        "decoded images of parquet or folder that take more are not held in memory but decoded while they are needed; "
        "what is decoded ahead may then take so much in each training process"))
    seed: int = Field(0, ge=0, le=SEEDS, description="seed of the splits; kept apart from the run's seed")

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("train", "test")
    @classmethod
    def _of_the_user(cls, path: Path | None) -> Path | None:
        """A shell leaves the ~ of --set data.train=~/photos as it is."""
        return path if path is None else path.expanduser()

    @model_validator(mode="after")
    def _consistent(self) -> DataSettings:
        if self.name not in BUILT_IN and ":" not in self.name:
            raise ValueError(f"dataset '{self.name}' is unknown; choose {', '.join(BUILT_IN)}, "
                             "module:function or module:Class")
        if self.name in ("parquet", "folder") and self.train is None:
            raise ValueError(f"dataset '{self.name}' needs 'train', the path of its training data")
        if self.name not in ("parquet", "folder") and (self.train or self.test):
            raise ValueError(f"dataset '{self.name}' takes no 'train' or 'test' path; choose parquet or folder")
        if self.channels not in (None, 1, 3):
            raise ValueError(f"'channels' is {self.channels}; allowed are 1 (grey) and 3 (colour)")
        return self


def load_dataset(settings: DataSettings) -> Splits:
    """The configured dataset, or DataError in one sentence. Relative paths start at the working directory."""
    if settings.name == "digits":
        source, test, name = _digits(), None, "digits"
    elif settings.name == "scattered_digits":
        return scattered(_split(settings, _digits(), None, settings.name), settings.seed)
    elif settings.name == "parquet":
        source, test, name = _files(settings, find_parquet)
    elif settings.name == "folder":
        source, test, name = _files(settings, find_folder)
    else:
        made = _call(settings.name)
        if isinstance(made, Splits):
            return _checked(made)
        source, test, name = made, None, settings.name
    return _split(settings, source, test, name)


def check_dataset(splits: Splits) -> list[str]:
    """Problems of a dataset, one sentence each; empty where everything is in order. The conformance suite."""
    problems = []
    if not splits.classes:
        problems.append("the dataset names no classes; give the names of labels 0, 1, ... in `classes`")
    shapes = set()
    for part in ("train", "val", "test"):
        images: LabelledImages = getattr(splits, part)
        problems += [f"{part}: {problem}" for problem in _array_problems(images, len(splits.classes))]
        shapes.add(images.shape)
    if len(shapes) > 1:
        problems.append(f"train, val and test have different image shapes {sorted(map(str, shapes))}; resize them")
    if not problems:
        missing = sorted(set(range(len(splits.classes))) - set(splits.train.labels.tolist()))
        if missing:
            problems.append(f"train: no image of class {splits.classes[missing[0]]} (label {missing[0]})")
        shared = _shared_rows(splits)
        if shared:
            problems.append(f"{shared} test images are also in train or val; the reported accuracy would be too high")
    return problems


def _array_problems(data: LabelledImages, classes: int) -> list[str]:
    labels = data.labels
    images = data.images if isinstance(data, Images) else data.read(np.arange(min(1, len(data))))
    problems = []
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        problems.append(f"images must be uint8 of shape (N, H, W, 1 or 3), got {images.dtype} of shape {images.shape}")
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        problems.append(f"labels must be integers of shape (N,), got {labels.dtype} of shape {labels.shape}")
    if isinstance(data, Images) and len(images) != len(labels):
        problems.append(f"{len(images)} images but {len(labels)} labels")
    if not len(labels):
        problems.append("is empty")
    if not problems:
        bad = np.flatnonzero((labels < 0) | (labels >= classes))
        if len(bad):
            problems.append(f"label {labels[bad[0]]} of row {bad[0]} is outside 0..{classes - 1}")
    return problems


def _shared_rows(splits: Splits) -> int:
    """How many whole pictures of the test split are seen by the search. Some repeats are natural in public data (flat
    or tiny images), so only a share above one in a hundred counts as a mistake. Streamed images are compared as files.
    """
    if isinstance(splits.test, StreamedImages):
        shared = splits.test.shared_with([part for part in (splits.train, splits.val)
                                          if isinstance(part, StreamedImages)])
    else:
        seen = {image.tobytes() for part in (splits.train, splits.val) for image in part.read()}
        shared = sum(image.tobytes() in seen for image in splits.test.read())
    return shared if shared > len(splits.test) / 100 else 0


# --- sources ----------------------------------------------------------------------------------------------------------


def _digits() -> Labelled:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels with 17 grey levels."""
    from sklearn.datasets import load_digits  # half a second that only this dataset needs

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    return Labelled(Images(images, digits.target.astype(np.int64)), tuple(str(name) for name in digits.target_names),
                    "digits")


def _files(settings: DataSettings, find: Callable[..., Found]) -> tuple[Labelled, Labelled | None, str]:
    assert settings.train is not None
    how = Reading(settings.limit, settings.seed, settings.channels, settings.size)
    return *read(find, settings.train, settings.test, how, settings.memory_mb), str(settings.train)


def is_dataset(loaded: Any) -> bool:
    """A function, or a class whose objects can be called, made without arguments."""
    return any("__call__" in c.__dict__ for c in loaded.__mro__) if isinstance(loaded, type) else callable(loaded)


def _call(reference: str) -> Splits | Labelled:
    """The user's function, or object of the user's class: returns Splits, or (images, labels)."""
    loaded: Any = load_object(reference)
    if not is_dataset(loaded):
        raise ConfigError(f"'{reference}' is a {type(loaded).__name__}, not callable; name a function, or a class "
                          "with __call__, that returns Splits or (images, labels)")
    needed = [p.name for p in inspect.signature(loaded).parameters.values()
              if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if needed:
        raise ConfigError(f"'{reference}' needs the argument '{needed[0]}', but a dataset is made without any; give it "
                          "a default value")
    with user_code(f"dataset {reference}", loaded, DataError):
        made = loaded()() if isinstance(loaded, type) else loaded()
    if isinstance(made, Splits):
        return made
    if not (isinstance(made, tuple) and len(made) == 2):
        raise DataError(f"'{reference}' returned {type(made).__name__}; return actors.data.Splits or (images, labels)")
    images, labels = np.asarray(made[0]), np.asarray(made[1])
    images = images[..., None] if images.ndim == 3 else images
    problems = _array_problems(Images(images, labels), np.iinfo(np.int64).max)
    if problems:
        raise DataError(f"'{reference}': {problems[0]}")
    return Labelled(Images(images, labels.astype(np.int64)), None, reference)


# --- splitting --------------------------------------------------------------------------------------------------------


def _split(settings: DataSettings, source: Labelled, test: Labelled | None, name: str) -> Splits:
    names = _class_names(settings, source, test)
    for part in (source, test):
        if part is not None:
            _check_labels(part, len(names))
    _check_counts(source, names)
    if test is not None and test.images.shape != source.images.shape:
        raise DataError(f"training images have shape {source.images.shape} but test images have "
                        f"{test.images.shape}; set data.size and data.channels so that both are read alike")
    rng = np.random.default_rng(settings.seed)
    everything = source.images
    rows = np.arange(len(everything))
    if settings.limit is not None:
        rows = stratified(rng, everything.labels, rows, settings.limit)[0]
    if test is None:
        count = max(len(names), round(settings.test_fraction * len(rows)))
        test_rows, rows = stratified(rng, everything.labels, rows, count)
        test_images = everything.take(test_rows)
    else:
        test_images = test.images
    count = max(len(names), round(settings.val_fraction * len(rows)))
    val_rows, train_rows = stratified(rng, everything.labels, rows, count)
    return _checked(Splits(everything.take(train_rows), everything.take(val_rows), test_images, names, name))


def _class_names(settings: DataSettings, source: Labelled, test: Labelled | None) -> tuple[str, ...]:
    if isinstance(settings.classes, list):
        return tuple(settings.classes)
    if source.names is not None and settings.classes in (None, len(source.names)):
        return source.names
    highest = max(int(part.labels.max(initial=0)) for part in (source, test) if part is not None)
    return tuple(str(label) for label in range(settings.classes or highest + 1))


def _check_labels(part: Labelled, classes: int) -> None:
    bad = np.flatnonzero((part.labels < 0) | (part.labels >= classes))
    if len(bad):
        raise DataError(f"label {part.labels[bad[0]]} of row {bad[0]} in {part.source} is outside 0..{classes - 1}; "
                        "correct it or set data.classes")


def _check_counts(source: Labelled, names: Sequence[str]) -> None:
    if not len(source.labels):
        raise DataError(f"{source.source} holds no images; give a file or folder with labelled images")
    counts = np.bincount(source.labels, minlength=len(names))
    few = int(counts.argmin())
    if counts[few] < MIN_PER_CLASS:
        raise DataError(f"class '{names[few]}' (label {few}) has {counts[few]} images in {source.source}; at least "
                        f"{MIN_PER_CLASS} per class are needed to train, validate and test")
    if len(names) < 2:
        raise DataError(f"{source.source} holds one class only ('{names[0]}'); a classifier needs at least two")


def _checked(splits: Splits) -> Splits:
    problems = check_dataset(splits)
    if problems:
        raise DataError(f"dataset {splits.name}: {problems[0]}")
    return splits
