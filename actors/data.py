"""Images on their way into a network: splits, preprocessing, augmented batches.

Images are in memory (`Images`), or read from a disk when they are needed (`actors.streamed.StreamedImages`); what
becomes of them is the same, bit for bit.

Legend: N images, B images of a batch, H, W, C height, width, channels. Raw images are uint8[N, H, W, C]; what a network
sees is float32[N, C, R, R] at the space's resolution R. Arrays may be mapped read-only from Ray's object store, where
every reader of a node shares one copy: nothing here writes into its arguments.
"""
from __future__ import annotations

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from actors.loading import ahead
from searchspaces.errors import DataError
from searchspaces.training.training import parts_of_rank

PREPARED_MB = 1536.0    # of float images that are held to evaluate on; more are prepared again every time
READ_AT_ONCE = 256      # images, where there is no batch size to follow


class LabelledImages(ABC):
    """Raw labelled images: labels int64[N] in memory, pixels uint8[N, H, W, C] with C = 1 or 3 wherever they are.

    Immutable and pickled; may be read by several threads and processes. `memory_mb` bounds what is read ahead: 0 where
    everything is in memory.
    """

    labels: NDArray[np.int64]
    memory_mb: float

    def __len__(self) -> int:
        return len(self.labels)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """(H, W, C)"""

    @abstractmethod
    def take(self, rows: NDArray[np.int64]) -> Self: ...

    @abstractmethod
    def read(self, rows: NDArray[np.int64] | None = None, only: NDArray[np.int64] | None = None) -> NDArray[np.uint8]:
        """uint8[len(rows), H, W, C], of all images without `rows`. Where `only` is given, the caller uses these places
        of the result and no others, whose pixels may be anything. DataError for an image that cannot be read."""

    def prepare(self) -> None:  # noqa: B027 - most have nothing to do
        """What is done once on a node, and may take minutes, before images can be read there."""

    @property
    def raw_mb(self) -> float:
        """Of all pixels."""
        return len(self) * float(np.prod(self.shape)) / 1e6


@dataclass(frozen=True)
class Images(LabelledImages):
    """In memory."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    memory_mb = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.images.shape[1:]

    def take(self, rows: NDArray[np.int64]) -> Images:
        return Images(self.images[rows], self.labels[rows])

    def read(self, rows: NDArray[np.int64] | None = None, only: NDArray[np.int64] | None = None) -> NDArray[np.uint8]:
        return self.images if rows is None else self.images[rows]


@dataclass(frozen=True)
class Splits:
    """`train` trains weights, `val` (taken from the training data) is what the search chooses by, `test` is what it
    reports and never sees. `classes` are the names of labels 0..K-1."""

    train: LabelledImages
    val: LabelledImages
    test: LabelledImages
    classes: tuple[str, ...]
    name: str

    @property
    def channels(self) -> int:
        return int(self.train.shape[2])


@dataclass(frozen=True)
class Prepared:
    """Preprocessed images, ready for a network: float32[N, C, R, R], labels int64[N]."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Preprocessing:
    """From raw image to network input: scale, resize (bilinear), subtract mean, divide by std, channels first.

    Stored with every model. Torch and ONNX Runtime are fed by the same function, so that parity is by construction;
    without this package: `(resize(image * scale, R) - mean) / std`, where resize is bilinear with half-pixel centres
    and, when shrinking, a filter as wide as the shrinkage (what Pillow calls BILINEAR).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resolution: int
    channels: int
    scale: float = 1 / 255

    @staticmethod
    def fit(train: LabelledImages, resolution: int) -> Preprocessing:
        """Mean and standard deviation per channel over the training images, in units of the scaled image."""
        channels = train.shape[2]
        # A histogram of the 256 levels is exact and needs no float copy of the data set.
        levels = np.arange(256) / 255
        rows = chunks_of(len(train), READ_AT_ONCE)
        counts = sum(ahead(functools.partial(_histogram, train), rows, _mb(READ_AT_ONCE, *train.shape),
                           train.memory_mb), start=np.zeros((channels, 256), dtype=np.int64))
        mean, std = [], []
        for channel in range(channels):
            share = counts[channel] / counts[channel].sum()
            mean.append(float(share @ levels))
            std.append(float(np.sqrt(share @ (levels - mean[-1]) ** 2)) or 1.0)  # a constant channel stays finite
        return Preprocessing(tuple(mean), tuple(std), resolution, int(channels))

    def tensor(self, images: NDArray[np.uint8]) -> Tensor:
        """float32[N, C, R, R] for uint8[N, H, W, C]."""
        if images.ndim != 4 or images.shape[3] != self.channels or images.dtype != np.uint8:
            raise DataError(f"images must be uint8 of shape (N, H, W, {self.channels}), got {images.dtype} of shape "
                            f"{images.shape}; convert them as the model's preprocessing says")
        x = mapped(images).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        x.mul_(self.scale)  # in place on the float copy made above, never on the caller's array
        if tuple(x.shape[2:]) != (self.resolution, self.resolution):
            x = functional.interpolate(x, size=(self.resolution, self.resolution), mode="bilinear",
                                       align_corners=False, antialias=max(x.shape[2:]) > self.resolution)
        mean, std = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (self.mean, self.std))
        return x.sub_(mean).div_(std)

    def numpy(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The same numbers for ONNX Runtime."""
        return self.tensor(images).numpy()

    def prepare(self, images: LabelledImages, chunk: int = 1000) -> Prepared:
        """A whole split, `chunk` images at a time."""
        out = np.empty((len(images), self.channels, self.resolution, self.resolution), dtype=np.float32)
        for rows in chunks_of(len(images), chunk):
            out[rows] = self.numpy(images.read(rows))
        return Prepared(out, np.asarray(images.labels))

    def inputs(self, images: LabelledImages, at_most_mb: float = PREPARED_MB) -> Inputs:
        """A whole split to evaluate on, prepared if that takes no more than so much memory."""
        if self.input_mb(len(images)) <= at_most_mb:
            return self.prepare(images)
        held = Images(images.read(), images.labels) if images.raw_mb <= images.memory_mb else images
        return PreparedInChunks(held, self)

    def input_mb(self, count: int) -> float:
        """Of so many images as a network sees them."""
        return 4 * _mb(count, self.resolution, self.resolution, self.channels)

    def to_dict(self) -> dict[str, Any]:
        """For the JSON sidecar of a model."""
        return asdict(self)

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> Preprocessing:
        return Preprocessing(tuple(fields["mean"]), tuple(fields["std"]), int(fields["resolution"]),
                             int(fields["channels"]), float(fields["scale"]))


@dataclass(frozen=True)
class PreparedInChunks:
    """Images that are prepared a few at a time, whenever they are asked for: the numbers of `Preprocessing.prepare`."""

    raw: LabelledImages
    preprocessing: Preprocessing

    @property
    def labels(self) -> NDArray[np.int64]:
        return self.raw.labels

    def chunks(self, size: int) -> Iterator[Tensor]:
        """float32[size, C, R, R], the last one smaller."""
        item_mb = self.preprocessing.input_mb(size) + _mb(size, *self.raw.shape)
        return ahead(self._chunk, chunks_of(len(self.raw), size), item_mb, self.raw.memory_mb)

    def _chunk(self, rows: NDArray[np.int64]) -> Tensor:
        return self.preprocessing.tensor(self.raw.read(rows))


Inputs = Prepared | PreparedInChunks


@dataclass(frozen=True)
class Augmentation:
    """Random crop after zero padding by `padding` pixels, mirroring where left and right mean the same, `colour`
    jitter, and images mixed with others of the batch.

    Digits, letters and signs change their meaning in a mirror: `flip` is off unless asked for. Brightness, contrast and
    saturation are each scaled by a factor in [1 - colour, 1 + colour]. `mixup` and `cutmix` are the a of Beta(a, a),
    from which a batch's share is drawn (Zhang et al. 2018; Yun et al. 2019); with both, each batch is mixed in one way
    or the other.
    """

    padding: int = 0
    flip: bool = False
    colour: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def unmixed(self) -> Augmentation:
        return replace(self, mixup=0.0, cutmix=0.0)

    def __call__(self, images: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        """Augmented copy, not mixed. The same generator state draws the same for every image of the batch."""
        count, height, width, _ = images.shape
        top, left = rng.integers(0, 2 * self.padding + 1, size=(2, count))
        mirrored = np.asarray(rng.random(count) < 0.5)
        if self.padding:
            pad = (self.padding, self.padding)
            padded = np.pad(images, ((0, 0), pad, pad, (0, 0)))
            rows = top[:, None] + np.arange(height)
            columns = left[:, None] + np.arange(width)
            images = padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
        if self.flip:
            images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
        if self.colour:
            images = jittered(images, rng.uniform(1 - self.colour, 1 + self.colour, size=(3, count, 1, 1, 1)))
        return images

    def mixed(self, images: NDArray[np.uint8], targets: NDArray[np.float32],
              rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Every image mixed with the one at its place in a permutation of the batch, and the probabilities
        float32[B, K] of its classes in the same share."""
        partner = rng.permutation(len(images))
        by_area = self.cutmix > 0 and (not self.mixup > 0 or rng.random() < 0.5)
        strength = self.cutmix if by_area else self.mixup
        share = float(rng.beta(strength, strength))     # that the images keep of themselves
        if by_area:
            images, share = cut(images, images[partner], share, rng)
        else:
            blend = share * images.astype(np.float32) + (1 - share) * images[partner].astype(np.float32)
            images = np.rint(blend).astype(np.uint8)
        return images, (share * targets + (1 - share) * targets[partner]).astype(np.float32)


def jittered(images: NDArray[np.uint8], factors: NDArray[np.float64]) -> NDArray[np.uint8]:
    """`factors` [3, B, 1, 1, 1] of brightness, of contrast about the image's mean, of saturation about each pixel's."""
    brightness, contrast, saturation = factors.astype(np.float32)
    x = images.astype(np.float32) * brightness
    mean = x.mean(axis=(1, 2, 3), keepdims=True)
    x = mean + contrast * (x - mean)
    grey = x.mean(axis=3, keepdims=True)
    return np.asarray(np.rint(np.clip(grey + saturation * (x - grey), 0, 255)), dtype=np.uint8)


def cut(images: NDArray[np.uint8], others: NDArray[np.uint8], share: float,
        rng: np.random.Generator) -> tuple[NDArray[np.uint8], float]:
    """A rectangle of 1 - share of the area from the others, at one place for the batch, and the share that was kept:
    the rectangle may reach over the edge."""
    height, width = images.shape[1:3]
    middle, half = rng.random(2) * (height, width), np.sqrt(1 - share) * np.array([height, width]) / 2
    (top, left), (bottom, right) = (np.clip(np.rint(at), 0, (height, width)).astype(int)
                                    for at in (middle - half, middle + half))
    out = images.copy()
    out[:, top:bottom, left:right] = others[:, top:bottom, left:right]
    return out, 1 - (bottom - top) * (right - left) / (height * width)


@dataclass(frozen=True)
class Batches:
    """Training batches as a pure function of (seed, epoch, step): a resumed epoch sees what the lost one saw.

    `batch` is the size over all ranks together. Every rank draws the whole permutation and the whole batch's
    augmentation and keeps its parts of `parts` of equal size, so that W ranks together see exactly what one worker
    would. The last, smaller
    batch of an epoch is left out (batch norm), except where it is the only one.
    """

    data: LabelledImages
    preprocessing: Preprocessing
    augmentation: Augmentation
    batch: int
    seed: int
    rank: int = 0
    ranks: int = 1
    parts: int = 1

    @property
    def steps(self) -> int:
        """Steps per epoch."""
        return max(1, len(self.data) // self.batch)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The permutation of the training images in this epoch."""
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.data))

    def get(self, epoch: int, step: int, order: NDArray[np.int64] | None = None) -> tuple[Tensor, Tensor]:
        """This rank's images float32[B / ranks, C, R, R] and labels int64[B / ranks] of one step; where images are
        mixed, the labels are probabilities float32[B / ranks, K].

        `order` saves drawing the epoch's permutation again.
        """
        order = self.order(epoch) if order is None else order
        rows = order[step * self.batch:(step + 1) * self.batch]
        mine = self.rows_here(len(rows))
        rng = np.random.default_rng([self.seed, epoch, step])
        needed = None if self.augmentation.mixes else mine    # what is mixed may come from another rank's part
        images = self.augmentation(self.data.read(rows, only=needed), rng)
        labels: NDArray[Any] = self.data.labels[rows]
        if self.augmentation.mixes:
            images, labels = self.augmentation.mixed(images, np.eye(self._classes, dtype=np.float32)[labels], rng)
        return self.preprocessing.tensor(images[mine]), torch.from_numpy(labels[mine])

    @cached_property
    def _classes(self) -> int:
        """All of them have training images."""
        return int(self.data.labels.max()) + 1

    def rows_here(self, count: int) -> NDArray[np.int64]:
        """Which of a batch's `count` images are this rank's."""
        parts = np.array_split(np.arange(count), max(self.parts, self.ranks))
        return np.concatenate([parts[number] for number in parts_of_rank(len(parts), self.rank, self.ranks)])

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All steps of an epoch, read ahead where the images are not in memory."""
        return self.of([(epoch, step) for step in range(self.steps)])

    def of(self, steps: Sequence[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """`get(epoch, step)` of each, read ahead where the images are not in memory."""
        item_mb = self.preprocessing.input_mb(self.batch) / self.ranks + _mb(self.batch, *self.data.shape)
        return ahead(_Step(self), steps, item_mb, self.data.memory_mb)


class _Step:
    """`Batches.get` that draws the permutation of an epoch once."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def __call__(self, at: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, step = at
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._batches.order(epoch)
        return self._batches.get(epoch, step, self._order[1])


def chunks_of(count: int, size: int) -> list[NDArray[np.int64]]:
    """0..count-1 in chunks of `size`, the last one smaller."""
    return [np.arange(start, min(start + size, count)) for start in range(0, count, size)]


def even_rows(count: int, size: int) -> list[NDArray[np.int64]]:
    """0..count-1 in chunks of about `size`, none of them tiny."""
    return np.array_split(np.arange(count), max(1, round(count / size)))


def _histogram(images: LabelledImages, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64[C, 256]: how often each level occurs."""
    pixels = images.read(rows)
    return np.stack([np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(pixels.shape[3])])


def _mb(*factors: int) -> float:
    return float(np.prod(factors, dtype=np.float64)) / 1e6


def calibration_images(train: LabelledImages, count: int, seed: int) -> LabelledImages:
    """The training images on which batch-norm statistics are re-estimated (specification searchspaces 2.4)."""
    rows = np.random.default_rng([seed, len(train)]).permutation(len(train))[:count]
    return train.take(np.sort(rows))


def stratified(rng: np.random.Generator, labels: NDArray[np.int64], rows: NDArray[np.int64],
               count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(chosen, rest): `count` of the rows with every class at its share (largest remainders), both sorted."""
    if count >= len(rows):
        return np.sort(rows), rows[:0]
    shuffled = rng.permutation(rows)
    # A row's position within its class, as a share of the class: cutting there takes the same share of each.
    order = np.argsort(labels[shuffled], kind="stable")
    share = np.empty(len(rows))
    _, sizes = np.unique(labels[shuffled], return_counts=True)
    share[order] = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    by_share = shuffled[np.argsort(share, kind="stable")]
    return np.sort(by_share[:count]), np.sort(by_share[count:])


def mapped(array: NDArray[Any]) -> Tensor:
    """A tensor on the array's own memory. Numpy protects arrays of the object store, torch does not: read only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
