"""Encoded images by reference: files of a folder, rows of a Parquet file. What travels is small.

A row of Parquet cannot be read alone: its row group is decompressed as a whole, and a batch of random rows would read
the file again and again. So the images of a Parquet file are copied once, as they are, one behind the other into a file
of the user's cache (`~/.cache/paretoray/images`), on every machine that reads them. A changed Parquet file is copied
again, in place of the old copy.
"""
from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import shutil
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from actors.decoding import first_line
from actors.wholefile import write_whole
from searchspaces.errors import DataError

COPY_TIME_OUT_S = 3600.0    # for another process of this machine that makes the same copy
POLL_S = 0.1
Get = Callable[[int, int], tuple[bytes, int]]


class EncodedImages(ABC):
    """Images 0..N-1 as they lie on a disk. Pickles; each process opens them for itself, in as many threads as it likes.

    DataError, which names the node and the path, where they cannot be read.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def where(self, row: int) -> str:
        """What a message calls this image."""

    @abstractmethod
    def items(self) -> Iterator[tuple[str, bytes]]:
        """(where, bytes) of all images in order, a few of them in memory at a time."""

    @abstractmethod
    def opened(self) -> contextlib.AbstractContextManager[Get]:
        """For any order: `get(row, most)` is (the image's first bytes, at most `most` of them; its size in bytes)."""


@dataclass(frozen=True, eq=False)
class FolderFiles(EncodedImages):
    """`names` are paths below `root`, one array of Arrow: as a list they would be an object each in every process."""

    root: str
    names: pa.StringArray

    def __len__(self) -> int:
        return len(self.names)

    def where(self, row: int) -> str:
        return os.path.join(self.root, self.names[row].as_py())

    def items(self) -> Iterator[tuple[str, bytes]]:
        with self.opened() as get:
            for row in range(len(self)):
                yield self.where(row), get(row, -1)[0]

    @contextlib.contextmanager
    def opened(self) -> Iterator[Get]:
        yield self._get

    def _get(self, row: int, most: int) -> tuple[bytes, int]:
        path = self.where(row)
        with readable(path), open(path, "rb") as file:
            return file.read(most), os.fstat(file.fileno()).st_size


@dataclass(frozen=True, eq=False)
class ParquetRows(EncodedImages):
    """Rows of a Parquet file with a column `image`: bytes, or a struct with `bytes`."""

    path: str
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, row: int) -> str:
        return f"row {self.rows[row]} of {self.path}"

    def items(self) -> Iterator[tuple[str, bytes]]:
        with pq.ParquetFile(self.path, buffer_size=2**22) as file:     # or it holds whole row groups, still compressed
            chosen = np.zeros(file.metadata.num_rows, dtype=bool)
            chosen[self.rows] = True
            start = 0
            for batch in file.iter_batches(batch_size=256, columns=["image"]):
                column = batch.column(0)
                column = column.field("bytes") if pa.types.is_struct(column.type) else column
                for offset in np.flatnonzero(chosen[start:start + len(batch)]):
                    data, where = column[int(offset)].as_py(), f"row {start + offset} of {self.path}"
                    if data is None:
                        raise DataError(f"{where} has no image bytes; a path alone is not followed, embed the bytes")
                    yield where, data
                start += len(batch)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Get]:
        with readable(self.path):
            folder = self._copied()
            ends = np.load(folder / ENDS, mmap_mode="r")
            descriptor = os.open(folder / IMAGES, os.O_RDONLY | os.O_CLOEXEC)

        def get(row: int, most: int) -> tuple[bytes, int]:
            start, end = int(ends[row]), int(ends[row + 1])
            with readable(str(folder / IMAGES)):
                return os.pread(descriptor, end - start if most < 0 else min(most, end - start), start), end - start

        try:
            yield get
        finally:
            os.close(descriptor)

    def _copied(self) -> Path:
        """The folder of the copy, which is made where it is missing. Whole once `ENDS` is there, which comes last."""
        state = os.stat(self.path)
        texts = (self.path.encode(), f"{state.st_size} {state.st_mtime_ns}".encode(), self.rows.tobytes())
        source, version, rows = (hashlib.sha256(text).hexdigest()[:12] for text in texts)
        folder = cache_folder() / f"{source}-{version}-{rows}"
        if not (folder / ENDS).exists():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with _locked(folder.parent / f"{source}.lock"):
                    for old in folder.parent.glob(f"{source}-*"):
                        if old.name.split("-")[1] != version:
                            shutil.rmtree(old, ignore_errors=True)
                    if not (folder / ENDS).exists():
                        self._copy(folder)
            except OSError as error:
                raise DataError(f"the images of {self.path} cannot be copied to {folder} on node "
                                f"{socket.gethostname()} ({error.strerror}); make room there, or set XDG_CACHE_HOME to "
                                "a folder that has it") from error
        return folder

    def _copy(self, folder: Path) -> None:
        ends = [0]
        temporary = folder / f".{IMAGES}"
        try:
            with open(temporary, "wb") as file:
                for _, data in self.items():
                    file.write(data)
                    ends.append(ends[-1] + len(data))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, folder / IMAGES)
        except pa.ArrowException as error:
            raise DataError(f"{self.path} is not a readable Parquet file ({first_line(error)})") from error
        finally:
            temporary.unlink(missing_ok=True)
        content = io.BytesIO()
        np.save(content, np.array(ends, dtype=np.int64))
        write_whole(folder / ENDS, content.getvalue())


IMAGES, ENDS = "images.bin", "ends.npy"     # the bytes; where each image ends, behind a 0


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "paretoray" / "images"


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
    """Says which node cannot read what: on a cluster, not every node need have the disk."""
    try:
        yield
    except OSError as error:
        raise DataError(f"node {socket.gethostname()} cannot read {path} ({error.strerror or first_line(error)}); the "
                        "images must be at this path, readable, on every node that trains") from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process of this machine at a time; the lock ends with its holder."""
    deadline = time.monotonic() + COPY_TIME_OUT_S
    with open(path, "wb") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise DataError(f"another process has held {path} for {COPY_TIME_OUT_S:g} s; end it, or remove "
                                    "the file") from error
            time.sleep(POLL_S)
        yield
