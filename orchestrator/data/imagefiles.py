"""Reads encoded images from Parquet (the common hub layout) or from a folder per class."""
from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from actors.data import stratified
from searchspaces.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
GREY_MODES = ("1", "L", "LA", "I", "I;16", "F")


@dataclass(frozen=True)
class Labelled:
    """Decoded images with raw labels, class names where the source has them, and its name for messages."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    names: tuple[str, ...] | None
    source: str


@dataclass(frozen=True)
class Reading:
    """How to read: at most `limit` images (a stratified choice by `seed`), converted to `channels` and `size`."""

    limit: int | None = None
    seed: int = 0
    channels: int | None = None
    size: int | None = None


def read_parquet(path: Path, how: Reading, names: tuple[str, ...] | None = None) -> Labelled:
    """`image`: struct {bytes, path} or binary, `label`: integer. Row numbers in messages count from 0."""
    if not path.is_file():
        raise DataError(f"dataset file {path.absolute()} does not exist; give the path of a Parquet file")
    try:
        file = pq.ParquetFile(path)
        _check_columns(file.schema_arrow, path)
        labels = _labels(file.read(columns=["label"])["label"], path)
        wanted = _limited(labels, how)
        chosen = np.zeros(len(labels), dtype=bool)
        chosen[wanted] = True
        images = _decode(_parquet_items(file, chosen, path), len(wanted), how, str(path))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file ({_first_line(error)})") from error
    return Labelled(images, labels[wanted], names or _hub_names(file.schema_arrow), str(path))


def read_folder(path: Path, how: Reading, names: tuple[str, ...] | None = None) -> Labelled:
    """One sub-folder per class, in the order of their names; a test folder has the training folder's classes."""
    if not path.is_dir():
        raise DataError(f"dataset folder {path.absolute()} does not exist; give a folder with one sub-folder per class")
    found = tuple(sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    if names is not None and set(found) - set(names):
        raise DataError(f"{path} has a class '{min(set(found) - set(names))}' that the training folder lacks; "
                        f"known classes: {', '.join(names)}")
    classes = names or found
    files = [(file, label) for label, name in enumerate(classes) if name in found
             for file in sorted((path / name).rglob("*")) if file.suffix.lower() in SUFFIXES]
    if not files:
        raise DataError(f"{path} holds no images; put them into one sub-folder per class ({', '.join(SUFFIXES)})")
    labels = np.array([label for _, label in files], dtype=np.int64)
    wanted = _limited(labels, how)
    items = ((str(files[row][0]), files[row][0].read_bytes()) for row in wanted)
    return Labelled(_decode(items, len(wanted), how, str(path)), labels[wanted], classes, str(path))


def labels_of(path: Path, folder: bool) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels and names of the classes, without decoding an image."""
    if folder:
        files, classes = _folder_files(path)
        return np.array([label for _, label in files], dtype=np.int64), classes
    try:
        file = pq.ParquetFile(path)
        _check_columns(file.schema_arrow, path)
        labels = _labels(file.read(columns=["label"])["label"], path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file ({_first_line(error)})") from error
    if not len(labels) or labels.min() < 0:
        raise DataError(f"{path} holds {'a label below 0' if len(labels) else 'no images'}; labels are 0, 1, ...")
    return labels, _hub_names(file.schema_arrow) or tuple(str(label) for label in range(int(labels.max()) + 1))


def _folder_files(path: Path) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    """Image files with their labels, and the names of the sub-folders."""
    found = tuple(sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    files = [(file, label) for label, name in enumerate(found)
             for file in sorted((path / name).rglob("*")) if file.suffix.lower() in SUFFIXES]
    if not files:
        raise DataError(f"{path} holds no images; put them into one sub-folder per class ({', '.join(SUFFIXES)})")
    return files, found


def _limited(labels: NDArray[np.int64], how: Reading) -> NDArray[np.int64]:
    """Rows to decode: all, or a stratified choice of `limit`, so that nothing is decoded in vain."""
    rows = np.arange(len(labels))
    if how.limit is None:
        return rows
    return stratified(np.random.default_rng(how.seed), labels, rows, how.limit)[0]


# --- Parquet ----------------------------------------------------------------------------------------------------------


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


def _parquet_items(file: pq.ParquetFile, chosen: NDArray[np.bool_], path: Path) -> Iterator[tuple[str, bytes]]:
    """(where, encoded bytes) of the chosen rows, one batch of rows in memory at a time."""
    start = 0
    for batch in file.iter_batches(batch_size=2048, columns=["image"]):
        column = batch.column(0)
        column = column.field("bytes") if pa.types.is_struct(column.type) else column
        for offset in np.flatnonzero(chosen[start:start + len(batch)]):
            data = column[int(offset)].as_py()
            where = f"row {start + offset} of {path}"
            if data is None:
                raise DataError(f"{where} has no image bytes; a path alone is not followed, embed the bytes")
            yield where, data
        start += len(batch)


def _hub_names(schema: pa.Schema) -> tuple[str, ...] | None:
    """Class names from the hub's own metadata (`ClassLabel`), where there is any."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return None
    label = json.loads(text).get("info", {}).get("features", {}).get("label", {})
    return tuple(label["names"]) if label.get("names") else None


# --- decoding ---------------------------------------------------------------------------------------------------------


def _decode(items: Iterable[tuple[str, bytes]], count: int, how: Reading, source: str) -> NDArray[np.uint8]:
    """uint8[N, H, W, C]. Pillow releases the interpreter while it decodes, so threads help."""
    if not count:
        raise DataError(f"{source} holds no images; give a file or folder with labelled images")
    images: NDArray[np.uint8] | None = None
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for row, (where, image) in enumerate(_in_order(pool, _decoder(how), items)):
            if images is None:
                images = np.empty((count, *image.shape), dtype=np.uint8)
            if image.shape != images.shape[1:]:
                raise _mixed(where, image.shape, images.shape[1:])
            images[row] = image
    assert images is not None
    return images


def _in_order(pool: ThreadPoolExecutor, decode: Callable[[tuple[str, bytes]], tuple[str, NDArray[np.uint8]]],
              items: Iterable[tuple[str, bytes]], chunk: int = 2048) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """`pool.map` in pieces: it would otherwise hold every encoded image at once."""
    pending: list[tuple[str, bytes]] = []
    for item in items:
        pending.append(item)
        if len(pending) == chunk:
            yield from pool.map(decode, pending, chunksize=64)
            pending = []
    yield from pool.map(decode, pending, chunksize=64)


def _decoder(how: Reading) -> Callable[[tuple[str, bytes]], tuple[str, NDArray[np.uint8]]]:
    def decode(item: tuple[str, bytes]) -> tuple[str, NDArray[np.uint8]]:
        where, data = item
        try:
            image: Image.Image = Image.open(io.BytesIO(data))
            grey = image.mode in GREY_MODES if how.channels is None else how.channels == 1
            image = image.convert("L" if grey else "RGB")
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{where} is not a readable image ({_first_line(error)}); repair or remove it") from error
        if how.size is not None and image.size != (how.size, how.size):
            image = image.resize((how.size, how.size), Image.Resampling.BILINEAR)
        pixels = np.asarray(image)
        return where, pixels[..., None] if grey else pixels

    return decode


def _mixed(where: str, shape: tuple[int, ...], first: tuple[int, ...]) -> DataError:
    if shape[2] != first[2]:
        kinds = {1: "grey", 3: "colour"}
        return DataError(f"{where} is {kinds[shape[2]]} but the images before are {kinds[first[2]]}; set data.channels "
                         "to 1 or 3 to convert all of them")
    return DataError(f"{where} has {shape[0]} x {shape[1]} pixels but the images before have {first[0]} x {first[1]}; "
                     "set data.size to resize all of them")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
