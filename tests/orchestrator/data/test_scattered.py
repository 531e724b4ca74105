"""Scattered digits: the same pixels everywhere, no digit in two splits, and harder than plain ones."""
from __future__ import annotations

from hashlib import sha256

import numpy as np
import pytest

from actors.data import Images, Splits
from orchestrator.data import scattered as module
from orchestrator.data.datasets import DataSettings, check_dataset, load_dataset
from orchestrator.data.scattered import CANVAS, COPIES, scattered

PLAIN = load_dataset(DataSettings(name="digits"))
SCATTERED = load_dataset(DataSettings(name="scattered_digits"))


def test_shapes_and_labels() -> None:
    assert check_dataset(SCATTERED) == []
    assert SCATTERED.train.images.shape == (COPIES * len(PLAIN.train), CANVAS, CANVAS, 1)
    assert np.array_equal(SCATTERED.train.labels, np.concatenate([PLAIN.train.labels] * COPIES))
    assert np.array_equal(SCATTERED.test.labels, PLAIN.test.labels)
    assert (SCATTERED.name, SCATTERED.classes) == ("scattered_digits", PLAIN.classes)


def test_pixels_depend_on_the_seed_alone_and_are_the_same_everywhere() -> None:
    again = load_dataset(DataSettings(name="scattered_digits"))
    assert np.array_equal(SCATTERED.train.images, again.train.images)
    other = scattered(PLAIN, seed=1)
    assert not np.array_equal(SCATTERED.test.images, other.test.images)
    assert sha256(SCATTERED.test.images[:20].tobytes()).hexdigest()[:16] == "ce6d7105c4e699c1"


def test_splits_come_from_different_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without turning, moving and clutter a rendering is its source in the middle of the canvas."""
    for name, value in {"TURN_DEGREES": 0.0, "SCALES": (1.0, 1.0), "SHIFT": 0.0, "PIECES": 0, "NOISE": 0.0,
                        "CONTRAST": (1.0, 1.0), "COPIES": 1}.items():
        monkeypatch.setattr(module, name, value)
    still = scattered(PLAIN, seed=0)
    side, start = PLAIN.train.images.shape[1], (CANVAS - PLAIN.train.images.shape[1]) // 2
    for part in ("train", "val", "test"):
        middle = getattr(still, part).images[:, start:start + side, start:start + side]
        assert np.array_equal(middle, getattr(PLAIN, part).images)


def nearest(splits: Splits) -> float:
    """Accuracy of the nearest training image, pixel by pixel."""
    def flat(images: Images) -> np.ndarray:
        return images.images.reshape(len(images), -1).astype(np.float32)

    train, test = flat(splits.train), flat(splits.test)
    distances = (test ** 2).sum(1)[:, None] - 2 * test @ train.T + (train ** 2).sum(1)
    return float((splits.train.labels[distances.argmin(1)] == splits.test.labels).mean())


def test_it_is_harder_than_the_digits_it_comes_from() -> None:
    assert nearest(PLAIN) > 0.95
    assert nearest(SCATTERED) < 0.7
