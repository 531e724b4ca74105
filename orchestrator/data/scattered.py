"""Scattered digits: the embedded digits made hard enough that a larger network is worth its latency.

Each handwritten digit of 8 x 8 pixels is turned, scaled and moved on a larger canvas, between pieces of other digits
and under noise, several times for training. Nothing is downloaded. All of it depends on the images and the seed alone,
and is plain arithmetic of numpy, so the pixels are the same everywhere.

Legend: N images, S source pixels a side, R canvas pixels a side.
"""
from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from actors.data import Images, LabelledImages, Splits

CANVAS = 24
COPIES = 2              # renderings of each training image
TURN_DEGREES = 25.0
SCALES = (1.0, 1.6)
SHIFT = 3.5             # pixels, in any direction
CONTRAST = (0.55, 1.0)
PIECES, PIECE = 2, 3    # pieces of other digits, each of so many pixels a side
NOISE = 15.0            # standard deviation, in grey levels of 255


def scattered(splits: Splits, seed: int) -> Splits:
    """The splits with every image scattered; no source image is in two of them, so neither is a rendering."""
    train, val, test = (_rendered(part, np.random.default_rng([seed, number]), copies) for number, (part, copies)
                        in enumerate(((splits.train, COPIES), (splits.val, 1), (splits.test, 1))))
    return Splits(train, val, test, splits.classes, "scattered_digits")


def _rendered(source: LabelledImages, rng: np.random.Generator, copies: int) -> Images:
    images = np.concatenate([source.read()[..., 0]] * copies).astype(np.float64)
    canvas = _placed(images, rng)
    canvas = np.maximum(canvas, _pieces(images, rng))
    canvas = canvas * rng.uniform(*CONTRAST, size=(len(canvas), 1, 1)) + rng.normal(0.0, NOISE, canvas.shape)
    grey = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    return Images(grey[..., None], np.concatenate([source.labels] * copies))


def _placed(images_NSS: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """float64[N, R, R]: turned, scaled and moved. Each canvas pixel looks up where it comes from."""
    count, side = len(images_NSS), images_NSS.shape[1]
    angle = np.deg2rad(rng.uniform(-TURN_DEGREES, TURN_DEGREES, count))
    scale = rng.uniform(*SCALES, count)
    shift_2N = rng.uniform(-SHIFT, SHIFT, (2, count))
    at = np.arange(CANVAS) - (CANVAS - 1) / 2
    y, x = at[None, :, None] - shift_2N[0][:, None, None], at[None, None, :] - shift_2N[1][:, None, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    rows = (cos * y + sin * x) / scale[:, None, None] + (side - 1) / 2
    columns = (cos * x - sin * y) / scale[:, None, None] + (side - 1) / 2
    return _bilinear(images_NSS, rows, columns)


def _bilinear(images_NSS: NDArray[np.float64], rows_NRR: NDArray[np.float64],
              columns_NRR: NDArray[np.float64]) -> NDArray[np.float64]:
    """The images between their pixels; 0 outside."""
    padded = np.pad(images_NSS, ((0, 0), (1, 1), (1, 1)))
    last = padded.shape[1] - 1
    r, c = np.clip(rows_NRR + 1, 0, last), np.clip(columns_NRR + 1, 0, last)
    top, left = np.minimum(r.astype(int), last - 1), np.minimum(c.astype(int), last - 1)
    down, right = r - top, c - left
    n = np.arange(len(images_NSS))[:, None, None]
    return ((1 - down) * ((1 - right) * padded[n, top, left] + right * padded[n, top, left + 1])
            + down * ((1 - right) * padded[n, top + 1, left] + right * padded[n, top + 1, left + 1]))


def _pieces(images_NSS: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """float64[N, R, R]: pieces of other images at random places, which are not what is asked for."""
    count, side = len(images_NSS), images_NSS.shape[1]
    canvas = np.zeros((count, CANVAS, CANVAS))
    for _ in range(PIECES):
        other = rng.permutation(count)
        top, left = rng.integers(0, side - PIECE + 1, (2, count))
        down, right = rng.integers(0, CANVAS - PIECE + 1, (2, count))
        for n in range(count):
            piece = images_NSS[other[n], top[n]:top[n] + PIECE, left[n]:left[n] + PIECE]
            place = canvas[n, down[n]:down[n] + PIECE, right[n]:right[n] + PIECE]
            np.maximum(place, 0.8 * piece, out=place)
    return canvas
