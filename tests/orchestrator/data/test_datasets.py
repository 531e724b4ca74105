"""Datasets: what comes out of each source, and one clear sentence for each way in which a source can be wrong."""
from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError
from sklearn.datasets import load_digits

from actors.data import Images, Splits
from orchestrator.data.datasets import DataSettings, check_dataset, load_dataset
from searchspaces.errors import ConfigError, DataError


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def pictures(count: int, size: int = 8, colour: bool = True, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (size, size, 3) if colour else (size, size)
    return [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(count)]


def write_parquet(path: Path, images: list[Any], labels: Any, as_struct: bool = True) -> Path:
    column = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)] if as_struct else images
    pq.write_table(pa.table({"image": column, "label": labels}), path, row_group_size=7)
    return path


def load_parquet(path: Path, **options: Any) -> Splits:
    return load_dataset(DataSettings(name="parquet", train=path, **options))


def everything(splits: Splits) -> list[bytes]:
    return [image.tobytes() for part in (splits.train, splits.val, splits.test) for image in part.images]


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_digits_are_complete_disjoint_and_stratified() -> None:
    splits = load_dataset(DataSettings())
    assert (len(splits.train), len(splits.val), len(splits.test)) == (1150, 288, 359)
    assert splits.channels == 1 and splits.classes == tuple("0123456789") and splits.train.images.shape[1:] == (8, 8, 1)
    pixels = load_digits()
    expected = sorted(np.rint(image * (255 / 16)).astype(np.uint8).tobytes() for image in pixels.images)
    assert sorted(everything(splits)) == expected  # nothing lost, nothing twice
    shares = np.bincount(pixels.target) / len(pixels.target)
    for part in (splits.train, splits.val, splits.test):
        assert np.abs(np.bincount(part.labels) - shares * len(part)).max() <= 1
    assert check_dataset(splits) == []


def test_splits_depend_on_the_seed_only() -> None:
    one, same, other = (load_dataset(DataSettings(seed=seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.val.images, same.val.images)
    assert not np.array_equal(one.val.labels, other.val.labels)


def test_limit_takes_a_stratified_subset() -> None:
    splits = load_dataset(DataSettings(limit=200))
    assert len(splits.train) + len(splits.val) + len(splits.test) == 200
    assert np.bincount(splits.train.labels).min() >= 10


def test_short_form_names_the_dataset() -> None:
    assert DataSettings.model_validate("digits") == DataSettings()
    assert DataSettings(name="folder", train=Path("~/photos")).train == Path.home() / "photos"


@pytest.mark.parametrize("as_struct", [True, False])
def test_parquet_pixels_and_labels_survive(tmp_path: Path, as_struct: bool) -> None:
    images, labels = pictures(30), [i % 3 for i in range(30)]
    path = write_parquet(tmp_path / "train.parquet", [encoded(p) for p in images], labels, as_struct)
    splits = load_parquet(path)
    label_of = {p.tobytes(): label for p, label in zip(images, labels)}
    assert sorted(everything(splits)) == sorted(label_of)
    for part in (splits.train, splits.val, splits.test):
        assert all(label_of[image.tobytes()] == label for image, label in zip(part.images, part.labels))


def test_parquet_test_file_stays_the_test_split(tmp_path: Path) -> None:
    labels = [i % 2 for i in range(20)]
    train = write_parquet(tmp_path / "train.parquet", [encoded(p) for p in pictures(20)], labels)
    held_out = pictures(6, seed=9)
    test = write_parquet(tmp_path / "test.parquet", [encoded(p) for p in held_out], labels[:6])
    splits = load_parquet(train, test=test, val_fraction=0.25)
    assert (len(splits.train), len(splits.val)) == (15, 5)
    np.testing.assert_array_equal(splits.test.images, np.stack(held_out))


def test_hub_class_names_are_used(tmp_path: Path) -> None:
    table = pa.table({"image": [encoded(p) for p in pictures(9)], "label": [0, 1, 2] * 3})
    note = b'{"info": {"features": {"label": {"names": ["cat", "dog", "owl"], "_type": "ClassLabel"}}}}'
    pq.write_table(table.replace_schema_metadata({b"huggingface": note}), tmp_path / "t.parquet")
    assert load_parquet(tmp_path / "t.parquet").classes == ("cat", "dog", "owl")


def test_cifar10_jpegs(shared_data: Path) -> None:
    folder = shared_data / "cifar10"
    splits = load_dataset(DataSettings(name="parquet", train=folder / "train.parquet", test=folder / "test.parquet",
                                       limit=500))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (400, 100, 500)
    assert splits.train.images.shape[1:] == (32, 32, 3) and len(splits.classes) == 10
    table = pq.ParquetFile(folder / "test.parquet").read_row_group(0).slice(0, 50)
    first = np.asarray(Image.open(io.BytesIO(table["image"][0].as_py()["bytes"])).convert("RGB"))
    full = load_dataset(DataSettings(name="parquet", train=folder / "test.parquet", test_fraction=0.1))
    assert first.tobytes() in set(everything(full))


def make_folder(root: Path, classes: dict[str, int], seed: int = 0) -> Path:
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i, pixels in enumerate(pictures(count, seed=seed + len(name))):
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def test_folder_has_a_class_per_subfolder(tmp_path: Path) -> None:
    train = make_folder(tmp_path / "train", {"zebra": 6, "ant": 6})
    test = make_folder(tmp_path / "test", {"zebra": 3}, seed=50)
    (train / "ant" / "._1.jpg").write_bytes(b"no image, whatever its name ends with")
    splits = load_dataset(DataSettings(name="folder", train=train, test=test))
    assert splits.classes == ("ant", "zebra") and splits.test.labels.tolist() == [1, 1, 1]
    assert len(splits.train) + len(splits.val) == 12


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_channels_and_size_convert_while_reading(tmp_path: Path, channels: int, mode: str) -> None:
    mixed = pictures(6, size=8) + pictures(6, size=12, colour=False)
    path = write_parquet(tmp_path / "t.parquet", [encoded(p) for p in mixed], [0, 1] * 6)
    splits = load_parquet(path, channels=channels, size=10)
    assert splits.train.images.shape[1:] == (10, 10, channels)
    expected = Image.fromarray(mixed[0]).convert(mode).resize((10, 10), Image.Resampling.BILINEAR)
    assert np.asarray(expected).tobytes() in everything(splits)


# A user's own datasets, named as module:callable.


def own_arrays() -> tuple[np.ndarray, np.ndarray]:
    return np.stack(pictures(12, colour=False)), np.arange(12) % 2


def own_splits() -> Splits:
    return load_dataset(DataSettings(limit=100))


def own_leak() -> Splits:
    splits = own_splits()
    return Splits(splits.train, splits.val, splits.train, splits.classes, "leak")


def own_nonsense() -> str:
    return "no data"


def test_own_callable_returns_arrays_or_splits() -> None:
    here = "tests.orchestrator.data.test_datasets"
    assert load_dataset(DataSettings(name=f"{here}:own_arrays")).train.images.shape[1:] == (8, 8, 1)
    assert len(load_dataset(DataSettings(name=f"{here}:own_splits")).train) == 64
    with pytest.raises(DataError, match="test images are also in train"):
        load_dataset(DataSettings(name=f"{here}:own_leak"))
    with pytest.raises(DataError, match="returned str"):
        load_dataset(DataSettings(name=f"{here}:own_nonsense"))
    with pytest.raises(ConfigError, match="not callable"):
        load_dataset(DataSettings(name=f"{here}:io"))


# --- what can be wrong ------------------------------------------------------------------------------------------------

GOOD = [encoded(p) for p in pictures(12)]
LABELS = [i % 2 for i in range(12)]


def bad_columns(path: Path) -> None:
    pq.write_table(pa.table({"img": GOOD, "label": LABELS}), path)


def bad_image_type(path: Path) -> None:
    pq.write_table(pa.table({"image": [1] * 12, "label": LABELS}), path)


def corrupt(path: Path) -> None:
    write_parquet(path, [*GOOD[:9], GOOD[9][:60], *GOOD[10:]], LABELS)


def not_an_image(path: Path) -> None:
    write_parquet(path, [*GOOD[:4], b"hello", *GOOD[5:]], LABELS)


def no_bytes(path: Path) -> None:
    write_parquet(path, [*GOOD[:5], None, *GOOD[6:]], LABELS)


def negative(path: Path) -> None:
    write_parquet(path, GOOD, [*LABELS[:7], -1, *LABELS[8:]])


def fractional(path: Path) -> None:
    write_parquet(path, GOOD, [label + 0.5 for label in LABELS])


def unlabelled(path: Path) -> None:
    write_parquet(path, GOOD, [*LABELS[:3], None, *LABELS[4:]])


def empty(path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}), path)


def mixed_sizes(path: Path) -> None:
    write_parquet(path, [*GOOD[:8], *[encoded(p) for p in pictures(4, size=9)]], LABELS)


def mixed_colours(path: Path) -> None:
    write_parquet(path, [*GOOD[:8], *[encoded(p) for p in pictures(4, colour=False)]], LABELS)


def rare_class(path: Path) -> None:
    write_parquet(path, GOOD, [0] * 11 + [1])


def gap(path: Path) -> None:
    write_parquet(path, GOOD, [0, 2] * 6)


def one_class(path: Path) -> None:
    write_parquet(path, GOOD, [0] * 12)


def not_parquet(path: Path) -> None:
    path.write_text("label,image")


@pytest.mark.parametrize(("make", "message"), [
    (bad_columns, r"no column 'image'; its columns are img, label"),
    (bad_image_type, r"column 'image' of .* is int64; needed are encoded bytes"),
    (corrupt, r"row 9 of .* is not a readable image"),
    (not_an_image, r"row 4 of .* is not a readable image"),
    (no_bytes, r"row 5 of .* has no image bytes"),
    (negative, r"label -1 of row 7 .* is outside 0\.\.1"),
    (fractional, r"column 'label' of .* is double; needed are integers"),
    (unlabelled, r"row 3 of .* has no label"),
    (empty, r"holds no images"),
    (mixed_sizes, r"row 8 of .* has 9 x 9 pixels but the images before have 8 x 8; set data\.size"),
    (mixed_colours, r"row 8 of .* is grey but the images before are colour; set data\.channels"),
    (rare_class, r"class '1' \(label 1\) has 1 images"),
    (gap, r"class '1' \(label 1\) has 0 images"),
    (one_class, r"holds one class only"),
    (not_parquet, r"is not a readable Parquet file"),
])
def test_wrong_parquet_is_one_sentence(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "wrong.parquet"
    make(path)
    with pytest.raises(DataError, match=message) as caught:
        load_parquet(path)
    assert "\n" not in str(caught.value)


def test_label_outside_the_named_classes(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", GOOD, [0, 1, 2] * 4)
    with pytest.raises(DataError, match=r"label 2 of row 2 .* is outside 0\.\.1; correct it or set data\.classes"):
        load_parquet(path, classes=["cat", "dog"])
    test = write_parquet(tmp_path / "test.parquet", GOOD, [0, 1, 5] * 4)
    with pytest.raises(DataError, match=r"label 5 of row 2 in .*test.parquet is outside 0\.\.2"):
        load_parquet(path, test=test, classes=3)


def test_test_images_of_another_shape(tmp_path: Path) -> None:
    train = write_parquet(tmp_path / "a.parquet", GOOD, LABELS)
    test = write_parquet(tmp_path / "b.parquet", [encoded(p) for p in pictures(12, size=9)], LABELS)
    with pytest.raises(DataError, match=r"training images have shape \(8, 8, 3\) but test images have \(9, 9, 3\)"):
        load_parquet(train, test=test)


@pytest.mark.parametrize("name", ["parquet", "folder"])
def test_missing_source_is_named_in_full(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"{tmp_path}/absent does not exist"):
        load_dataset(DataSettings(name=name, train=tmp_path / "absent"))


def test_folder_without_images_and_unknown_test_class(tmp_path: Path) -> None:
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no images; put them into one sub-folder per class"):
        load_dataset(DataSettings(name="folder", train=tmp_path / "empty"))
    train = make_folder(tmp_path / "train", {"cat": 4, "horse": 4})
    test = make_folder(tmp_path / "test", {"bird": 2})
    with pytest.raises(DataError, match="class 'bird' that the training folder lacks; known classes: cat, horse"):
        load_dataset(DataSettings(name="folder", train=train, test=test))


@pytest.mark.parametrize(("options", "message"), [
    ({"name": "mnist"}, "dataset 'mnist' is unknown; choose digits, scattered_digits, parquet, folder, "
                         "module:function or module:Class"),
    ({"name": "parquet"}, "needs 'train'"),
    ({"name": "digits", "train": "x.parquet"}, "takes no 'train'"),
    ({"channels": 2}, r"allowed are 1 \(grey\) and 3"),
    ({"val_fraction": 1.5}, "less than 1"),
    ({"trian": "x"}, "Extra inputs are not permitted"),
])
def test_wrong_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataSettings(**options)


def test_conformance_names_every_problem() -> None:
    good = own_splits()
    wrong = Splits(Images(good.train.images.astype(np.float32), good.train.labels),  # type: ignore[arg-type]
                   Images(good.val.images, good.val.labels + 5), Images(good.test.images[:0], good.test.labels[:0]),
                   good.classes, "wrong")
    problems = check_dataset(wrong)
    assert any("train: images must be uint8" in p for p in problems)
    assert any("val: label" in p and "outside 0..9" in p for p in problems)
    assert any("test: is empty" in p for p in problems)
