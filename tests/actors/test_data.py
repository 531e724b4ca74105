"""Preprocessing and batches against independent arithmetic: numpy, Pillow, and one worker against several."""
from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from actors.data import Augmentation, Batches, Images, Preprocessing, calibration_images, jittered, stratified
from searchspaces.errors import DataError


def noise(count: int, size: int = 8, channels: int = 3, seed: int = 0) -> Images:
    rng = np.random.default_rng(seed)
    return Images(rng.integers(0, 256, (count, size, size, channels), dtype=np.uint8), np.arange(count) % 10)


def test_fit_and_apply_are_the_textbook_formula() -> None:
    data = noise(50)
    preprocessing = Preprocessing.fit(data, resolution=8)
    scaled = data.images.astype(np.float64) / 255
    np.testing.assert_allclose(preprocessing.mean, scaled.mean(axis=(0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(preprocessing.std, scaled.std(axis=(0, 1, 2)), rtol=1e-9)
    expected = ((scaled - scaled.mean(axis=(0, 1, 2))) / scaled.std(axis=(0, 1, 2))).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(preprocessing.numpy(data.images), expected, atol=1e-5)
    assert preprocessing.numpy(data.images).flags.c_contiguous


@pytest.mark.parametrize("resolution", [5, 8, 16])
def test_resize_is_what_pillow_calls_bilinear(resolution: int) -> None:
    data = noise(3, size=8, channels=1)
    preprocessing = Preprocessing((0.0,), (1.0,), resolution, 1)
    for image, ours in zip(data.images, preprocessing.numpy(data.images)):
        exact = Image.fromarray(image[..., 0].astype(np.float32), mode="F")
        resized = np.asarray(exact.resize((resolution, resolution), Image.Resampling.BILINEAR)) / 255
        np.testing.assert_allclose(ours[0], resized, atol=1e-4)


def test_sidecar_round_trip_and_equal_numbers_for_both_runtimes() -> None:
    preprocessing = Preprocessing.fit(noise(20), resolution=12)
    again = Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict())))
    assert again == preprocessing
    images = noise(5, seed=1).images
    np.testing.assert_array_equal(preprocessing.tensor(images).numpy(), again.numpy(images))


def test_inputs_are_never_written_and_wrong_ones_are_refused() -> None:
    data = noise(5)
    data.images.flags.writeable = False
    Preprocessing.fit(data, 8).tensor(data.images)
    Augmentation(2, flip=True)(data.images, np.random.default_rng(0))
    with pytest.raises(DataError, match=r"\(N, H, W, 1\), got uint8 of shape \(5, 8, 8, 3\)"):
        Preprocessing((0.0,), (1.0,), 8, 1).tensor(data.images)


def test_prepare_in_chunks_equals_the_whole() -> None:
    data = noise(25)
    preprocessing = Preprocessing.fit(data, 8)
    np.testing.assert_array_equal(preprocessing.prepare(data, chunk=7).images, preprocessing.numpy(data.images))


def test_augmented_image_is_a_shifted_window_and_flips_only_when_asked() -> None:
    data = noise(40, size=6, channels=1)
    padded = np.pad(data.images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    windows = {(y, x): padded[:, y:y + 6, x:x + 6] for y in range(5) for x in range(5)}
    shifts, mirrored = set(), 0
    for flip in (False, True):
        out = Augmentation(2, flip)(data.images, np.random.default_rng(3))
        for i, image in enumerate(out):
            plain = {shift for shift, window in windows.items() if np.array_equal(window[i], image)}
            back = {shift for shift, window in windows.items() if np.array_equal(window[i], image[:, ::-1])}
            assert plain or (flip and back)
            mirrored += not plain
            shifts |= plain
    assert len(shifts) > 10 and 8 < mirrored < 32


def test_batches_depend_on_seed_epoch_and_step_only() -> None:
    batches = Batches(noise(50), Preprocessing.fit(noise(50), 8), Augmentation(1, True), batch=8, seed=3)
    assert batches.steps == 6
    first, again = batches.get(2, 4), batches.get(2, 4, batches.order(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], batches.get(3, 4)[0])
    rows = np.concatenate([batches.order(0)[s * 8:(s + 1) * 8] for s in range(6)])
    assert len(set(rows.tolist())) == 48  # an epoch visits every image at most once
    assert not np.array_equal(batches.order(0), batches.order(1))


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_see_exactly_the_single_workers_batch(ranks: int) -> None:
    data, preprocessing = noise(40), Preprocessing.fit(noise(40), 8)
    augmentation = Augmentation(1, True, colour=0.2, mixup=0.2, cutmix=0.5)
    whole = Batches(data, preprocessing, augmentation, 10, 0).get(1, 2)
    parts = [Batches(data, preprocessing, augmentation, 10, 0, rank, ranks).get(1, 2) for rank in range(ranks)]
    assert torch.equal(torch.cat([images for images, _ in parts]), whole[0])
    assert torch.equal(torch.cat([labels for _, labels in parts]), whole[1])


@pytest.mark.parametrize("augmentation", [Augmentation(mixup=0.4), Augmentation(cutmix=1.0),
                                          Augmentation(mixup=1.0, cutmix=1.0)])
def test_mixed_images_and_their_targets_keep_the_same_share(augmentation: Augmentation) -> None:
    """Image k is k everywhere, of class k: the mean of a mixed image is the mean class under its target."""
    levels = np.arange(0, 240, 10, dtype=np.uint8)
    images = np.broadcast_to(levels[:, None, None, None], (24, 16, 16, 3)).copy()
    for seed in range(20):
        mixed, targets = augmentation.mixed(images, np.eye(24, dtype=np.float32), np.random.default_rng(seed))
        np.testing.assert_allclose(mixed.mean(axis=(1, 2, 3)), targets @ levels, atol=0.51)   # rounded to whole levels
        np.testing.assert_allclose(targets.sum(axis=1), 1, atol=1e-6)
    assert (images[:, 0, 0, 0] == levels).all()


def test_cutmix_takes_one_rectangle_of_the_share_that_beta_drew() -> None:
    """Beta(a, a) with a large a is near a half: half of the area, less where the rectangle reaches over the edge."""
    images = np.zeros((2, 40, 40, 1), dtype=np.uint8)
    images[1] = 255
    shares = []
    for seed in range(200):
        mixed, targets = Augmentation(cutmix=1e4).mixed(images, np.eye(2, dtype=np.float32),
                                                        np.random.default_rng(seed))
        foreign = mixed[0, ..., 0] == 255
        if not foreign.any():       # its partner was itself
            continue
        rows, columns = foreign.any(axis=1), foreign.any(axis=0)
        assert foreign.sum() == rows.sum() * columns.sum()
        assert targets[0, 1] == pytest.approx(foreign.mean())
        shares.append(foreign.mean())
    assert max(shares) == pytest.approx(0.5, abs=0.03) and 0.25 < np.mean(shares) < 0.45


def test_colour_jitter_is_brightness_then_contrast_then_saturation() -> None:
    image = np.array([[[[100, 40, 10]], [[60, 60, 60]]]], dtype=np.uint8)      # mean 55
    factors = np.array([1.2, 0.5, 2.0]).reshape(3, 1, 1, 1, 1)
    # brightness: 120 48 12 | 72 72 72, mean 66; contrast: 93 57 39 | 69 69 69; saturation about 63: 123 51 15 | 69
    assert jittered(image, factors).tolist() == [[[[123, 51, 15]], [[69, 69, 69]]]]
    assert (jittered(image, np.ones((3, 1, 1, 1, 1))) == image).all()
    assert jittered(image, np.full((3, 1, 1, 1, 1), 9.0)).max() == 255


def test_calibration_images_are_distinct_training_images() -> None:
    chosen = calibration_images(noise(50), 20, seed=1)
    assert len({image.tobytes() for image in chosen.images}) == 20
    assert len(calibration_images(noise(50), 2000, seed=1)) == 50


def test_stratified_choice_keeps_the_shares_of_the_classes() -> None:
    labels = np.array([0] * 60 + [1] * 30 + [2] * 10)
    chosen, rest = stratified(np.random.default_rng(0), labels, np.arange(100), 20)
    assert np.bincount(labels[chosen]).tolist() == [12, 6, 2]
    assert sorted([*chosen, *rest]) == list(range(100))
