"""Labelled images that are decoded when they are read, because all of them do not fit in memory."""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from actors.data import LabelledImages
from actors.decoding import Decoder, check_like
from actors.encoded import EncodedImages
from actors.threads import in_threads
from searchspaces.errors import DataError

HEAD = 2**16    # bytes that hold the header of nearly every image file


@dataclass(frozen=True, eq=False)
class StreamedImages(LabelledImages):
    """Rows `rows` of `source`, with `labels`; `decoded` is the shape (H, W, C) of each. `heads` has for every image of
    the source a number that equal files have in common. What is read ahead may use `memory_mb`."""

    source: EncodedImages
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    decoded: tuple[int, int, int]
    decoder: Decoder
    heads: NDArray[np.uint64]
    memory_mb: float

    @staticmethod
    def of(source: EncodedImages, labels: NDArray[np.int64], decoder: Decoder, memory_mb: float) -> StreamedImages:
        """All images of the source. Looks at the header of each: DataError for one that is no image or unlike the
        first. Damage behind the header shows when the image is read."""
        heads = np.empty(len(source), dtype=np.uint64)
        shapes = np.empty((len(source), 3), dtype=np.int64)
        with source.opened() as get:
            def look(row: int) -> None:
                head, size = get(row, HEAD)
                try:
                    shapes[row] = decoder.shape(source.where(row), head)
                except DataError:   # a header longer than that
                    shapes[row] = decoder.shape(source.where(row), get(row, -1)[0])
                digest = hashlib.blake2b(head, digest_size=8, key=size.to_bytes(8, "little")).digest()
                heads[row] = int.from_bytes(digest, "little")

            _all(look, range(len(source)))
        first: tuple[int, ...] = tuple(shapes[0].tolist())
        for row in np.flatnonzero((shapes != shapes[0]).any(axis=1))[:1].tolist():
            check_like(source.where(row), tuple(shapes[row].tolist()), first)
        return StreamedImages(source, np.arange(len(source)), labels, (first[0], first[1], first[2]), decoder, heads,
                              memory_mb)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.decoded

    def prepare(self) -> None:
        with self.source.opened():
            pass

    def take(self, rows: NDArray[np.int64]) -> StreamedImages:
        return replace(self, rows=self.rows[rows], labels=self.labels[rows])

    def read(self, rows: NDArray[np.int64] | None = None, only: NDArray[np.int64] | None = None) -> NDArray[np.uint8]:
        wanted = self.rows if rows is None else self.rows[rows]
        out = np.zeros((len(wanted), *self.shape), dtype=np.uint8)
        with self.source.opened() as get:
            def decode(place: int) -> None:
                row = int(wanted[place])
                where = self.source.where(row)
                pixels = self.decoder.pixels(where, get(row, -1)[0])
                check_like(where, pixels.shape, self.shape)     # the file may have changed since
                out[place] = pixels

            _all(decode, range(len(wanted)) if only is None else only.tolist())
        return out

    def shared_with(self, others: Sequence[StreamedImages]) -> int:
        """How many of these images are also in the others, as equal files."""
        seen = [(other, place) for other in others
                for place in np.flatnonzero(np.isin(other._heads(), self._heads())).tolist()]
        mine = np.flatnonzero(np.isin(self._heads(), [other._heads()[place] for other, place in seen])).tolist()
        digests = {other._digest(place) for other, place in seen}
        return sum(self._digest(place) in digests for place in mine)

    def _heads(self) -> NDArray[np.uint64]:
        return self.heads[self.rows]

    def _digest(self, place: int) -> bytes:
        with self.source.opened() as get:
            return hashlib.sha256(get(int(self.rows[place]), -1)[0]).digest()


def _all(work: Callable[[int], None], places: Iterable[int]) -> None:
    """In as many threads as torch may use in this process: the CPUs it has been given."""
    for _ in in_threads(work, places, torch.get_num_threads()):
        pass
