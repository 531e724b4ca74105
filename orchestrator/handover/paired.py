"""Which validation images a model has right, and what that says about two models' difference.

Models that are scored on the same images share their luck: where both are right or both are wrong, nothing is learned
about which is better. With b images that only the first has right and c that only the second has, of n, the variance of
the difference of their accuracies is (b + c - (b - c)^2 / n) / n^2 (McNemar 1947; Fleiss, Statistical Methods for Rates
and Proportions, 2.6).

Shape legend: N models, I images.
"""
from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FEW = 0.5   # images: that many of each model's answers might have gone the other way, however well all went


def packed(hits_I: NDArray[np.bool_]) -> str:
    """A bit per image, as text for a sidecar."""
    return base64.b64encode(np.packbits(hits_I).tobytes()).decode("ascii")


def unpacked(text: str, images: int) -> NDArray[np.bool_]:
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8), count=images)
    return bits.astype(bool)


def error_covariance(accuracy_N: NDArray[np.float64], hits: Sequence[NDArray[np.bool_] | None],
                     images: int) -> NDArray[np.float64]:
    """float64[N, N]: of the errors of accuracies measured on these images. Of models with known hits the variance of a
    difference is McNemar's with half an image of each added to b + c, so that agreement on a few images is no proof
    of being equal. A model without stands for itself, which makes its differences too wide rather than too narrow."""
    covariance_NN = np.diag(accuracy_N * (1 - accuracy_N) / images)
    known = [n for n, hits_I in enumerate(hits) if hits_I is not None]
    if known:
        centred = np.stack([np.asarray(hits[n], dtype=np.float64) for n in known])
        centred -= centred.mean(axis=1, keepdims=True)
        covariance_NN[np.ix_(known, known)] = centred @ centred.T / images**2
    return np.asarray(covariance_NN + FEW / images**2 * np.eye(len(accuracy_N)))
