"""Finds encoded images in Parquet (the common hub layout) or in a folder per class; decodes them all, or streams them.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from actors.data import Images, LabelledImages, stratified
from actors.decoding import Decoder, check_like, first_line
from actors.encoded import EncodedImages, FolderFiles, ParquetRows
from actors.streamed import StreamedImages
from actors.threads import in_threads
from searchspaces.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class Labelled:
    """Images with raw labels, class names where the source has them, and its name for messages."""

    images: LabelledImages
    names: tuple[str, ...] | None
    source: str

    @property
    def labels(self) -> NDArray[np.int64]:
        return self.images.labels


@dataclass(frozen=True)
class Reading:
    """How to read: at most `limit` images (a stratified choice by `seed`), converted to `channels` and `size`."""

    limit: int | None = None
    seed: int = 0
    channels: int | None = None
    size: int | None = None

    @property
    def decoder(self) -> Decoder:
        return Decoder(self.channels, self.size)


@dataclass(frozen=True, eq=False)
class Found:
    """The images of a source, of which nothing is read yet but the labels."""

    images: EncodedImages
    labels: NDArray[np.int64]
    names: tuple[str, ...] | None
    source: str
    how: Reading

    def decoded_mb(self) -> float:
        """What all of them take once decoded, judged by the first."""
        where, data = next(self._items())
        return len(self.labels) * float(np.prod(self.how.decoder.shape(where, data))) / 1e6

    def decoded(self) -> Labelled:
        return Labelled(Images(_decode(self._items(), len(self.labels), self.how.decoder), self.labels), self.names,
                        self.source)

    def streamed(self, memory_mb: float) -> Labelled:
        images = StreamedImages.of(self.images, self.labels, self.how.decoder, memory_mb)
        return Labelled(images, self.names, self.source)

    def _items(self) -> Iterator[tuple[str, bytes]]:
        try:
            yield from self.images.items()
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{self.source} is not a readable Parquet file ({first_line(error)})") from error


def read(find: Callable[..., Found], train: Path, test: Path | None, how: Reading,
         memory_mb: float) -> tuple[Labelled, Labelled | None]:
    """Training and test images (None without): in memory where all of them take no more than `memory_mb`."""
    found = find(train, how)
    parts = [found] if test is None else [found, find(test, how, found.names)]
    streams = sum(part.decoded_mb() for part in parts) > memory_mb
    first, *others = [part.streamed(memory_mb) if streams else part.decoded() for part in parts]
    return first, others[0] if others else None


def find_parquet(path: Path, how: Reading, names: tuple[str, ...] | None = None) -> Found:
    """`image`: struct {bytes, path} or binary, `label`: integer. Row numbers in messages count from 0."""
    if not path.is_file():
        raise DataError(f"dataset file {path.absolute()} does not exist; give the path of a Parquet file")
    labels, own_names = _parquet_labels(path)
    rows = _limited(labels, how, path)
    return Found(ParquetRows(str(path.absolute()), rows), labels[rows], names or own_names, str(path), how)


def find_folder(path: Path, how: Reading, names: tuple[str, ...] | None = None) -> Found:
    """One sub-folder per class, in the order of their names; a test folder has the training folder's classes."""
    if not path.is_dir():
        raise DataError(f"dataset folder {path.absolute()} does not exist; give a folder with one sub-folder per class")
    files, classes = _folder_files(path, names)
    labels = np.array([label for _, label in files], dtype=np.int64)
    rows = _limited(labels, how, path)
    below = pa.array([str(files[row][0].relative_to(path)) for row in rows], pa.string())
    return Found(FolderFiles(str(path.absolute()), below), labels[rows], classes, str(path), how)


def labels_of(path: Path, folder: bool) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels and names of the classes, without decoding an image."""
    if folder:
        files, classes = _folder_files(path)
        return np.array([label for _, label in files], dtype=np.int64), classes
    labels, names = _parquet_labels(path)
    if not len(labels) or labels.min() < 0:
        raise DataError(f"{path} holds {'a label below 0' if len(labels) else 'no images'}; labels are 0, 1, ...")
    return labels, names or tuple(str(label) for label in range(int(labels.max()) + 1))


def _folder_files(path: Path, names: tuple[str, ...] | None = None) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    """Image files with their labels, and the names of the classes: those given, or of the sub-folders."""
    found = files_by_class(path)
    if names is not None and set(found) - set(names):
        raise DataError(f"{path} has a class '{min(set(found) - set(names))}' that the training folder lacks; "
                        f"known classes: {', '.join(names)}")
    classes = names or tuple(found)
    files = [(file, label) for label, name in enumerate(classes) for file in found.get(name, []) if is_image(file)]
    if not files:
        raise DataError(f"{path} holds no images; put them into one sub-folder per class ({', '.join(SUFFIXES)})")
    return files, classes


def files_by_class(path: Path) -> dict[str, list[Path]]:
    """The files of every sub-folder, sorted; what is hidden is left out (some systems put `._1.jpg` beside `1.jpg`)."""
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return {folder.name: [file for file in sorted(folder.rglob("*")) if file.is_file()
                          and not file.name.startswith(".")] for folder in folders}


def is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES


def _limited(labels: NDArray[np.int64], how: Reading, path: Path) -> NDArray[np.int64]:
    """Rows to decode: all, or a stratified choice of `limit`, so that nothing is decoded in vain."""
    if not len(labels):
        raise DataError(f"{path} holds no images; give a file or folder with labelled images")
    rows = np.arange(len(labels))
    if how.limit is None:
        return rows
    return stratified(np.random.default_rng(how.seed), labels, rows, how.limit)[0]


# --- Parquet ----------------------------------------------------------------------------------------------------------


def _parquet_labels(path: Path) -> tuple[NDArray[np.int64], tuple[str, ...] | None]:
    """Labels, and the names of the classes where the file has them."""
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(file.schema_arrow, path)
            return _labels(file.read(columns=["label"])["label"], path), _hub_names(file.schema_arrow)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file ({first_line(error)})") from error


def _check_columns(schema: pa.Schema, path: Path) -> None:
    missing = [name for name in ("image", "label") if name not in schema.names]
    if missing:
        raise DataError(f"{path} has no column '{missing[0]}'; its columns are {', '.join(schema.names)}, needed are "
                        "'image' (encoded bytes, or a struct with 'bytes') and 'label' (integers from 0)")
    kind = schema.field("image").type
    encoded = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(encoded) or pa.types.is_large_binary(encoded)):
        raise DataError(f"column 'image' of {path} is {kind}; needed are encoded bytes (PNG, JPEG ...) or a struct "
                        "with a field 'bytes'")


def _labels(column: pa.ChunkedArray, path: Path) -> NDArray[np.int64]:
    if not pa.types.is_integer(column.type):
        raise DataError(f"column 'label' of {path} is {column.type}; needed are integers 0, 1, ... without gaps")
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise DataError(f"row {row} of {path} has no label; every image needs an integer from 0")
    return column.to_numpy().astype(np.int64)


def _hub_names(schema: pa.Schema) -> tuple[str, ...] | None:
    """Class names from the hub's own metadata (`ClassLabel`), where there is any."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return None
    label = json.loads(text).get("info", {}).get("features", {}).get("label", {})
    return tuple(label["names"]) if label.get("names") else None


# --- decoding ---------------------------------------------------------------------------------------------------------


def _decode(items: Iterable[tuple[str, bytes]], count: int, decoder: Decoder) -> NDArray[np.uint8]:
    """uint8[N, H, W, C]"""
    images: NDArray[np.uint8] | None = None

    def decode(item: tuple[str, bytes]) -> tuple[str, NDArray[np.uint8]]:
        return item[0], decoder.pixels(*item)

    for row, (where, image) in enumerate(in_threads(decode, items)):
        if images is None:
            images = np.empty((count, *image.shape), dtype=np.uint8)
        check_like(where, image.shape, images.shape[1:])
        images[row] = image
    assert images is not None
    return images
