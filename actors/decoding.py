"""From the bytes of an image file to pixels, or to one sentence about the file."""
from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from searchspaces.errors import DataError

GREY_MODES = ("1", "L", "LA", "I", "I;16", "F")
UNREADABLE = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Decoder:
    """Converts to `channels` (1 or 3; None: as the image is) and resizes to `size` x `size` pixels (None: as it is)."""

    channels: int | None = None
    size: int | None = None

    def pixels(self, where: str, data: bytes) -> NDArray[np.uint8]:
        """uint8[H, W, C]; DataError that says `where`. Pillow releases the interpreter meanwhile, so threads help."""
        try:
            image: Image.Image = Image.open(io.BytesIO(data))
            grey = self._grey(image)
            image = image.convert("L" if grey else "RGB")
        except UNREADABLE as error:
            raise _unreadable(where, error) from error
        if self.size is not None and image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        pixels = np.asarray(image)
        return pixels[..., None] if grey else pixels

    def shape(self, where: str, data: bytes) -> tuple[int, int, int]:
        """(H, W, C) that `pixels` will have, from the file's header: `data` may end behind it."""
        try:
            image = Image.open(io.BytesIO(data))
            channels = 1 if self._grey(image) else 3
        except UNREADABLE as error:
            raise _unreadable(where, error) from error
        width, height = image.size
        return self.size or height, self.size or width, channels

    def _grey(self, image: Image.Image) -> bool:
        return image.mode in GREY_MODES if self.channels is None else self.channels == 1


def check_like(where: str, shape: tuple[int, ...], first: tuple[int, ...]) -> None:
    """DataError where an image has another shape than those before it."""
    if shape == first:
        return
    if shape[2] != first[2]:
        kinds = {1: "grey", 3: "colour"}
        raise DataError(f"{where} is {kinds[shape[2]]} but the images before are {kinds[first[2]]}; set data.channels "
                        "to 1 or 3 to convert all of them")
    raise DataError(f"{where} has {shape[0]} x {shape[1]} pixels but the images before have {first[0]} x {first[1]}; "
                    "set data.size to resize all of them")


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _unreadable(where: str, error: Exception) -> DataError:
    return DataError(f"{where} is not a readable image ({first_line(error)}); repair or remove it")
