"""What a stranger's folder gets wrong, and what is said of one that will do."""
from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.config import parse_config
from orchestrator.data.filecheck import check_files
from orchestrator.data.imagefiles import SUFFIXES
from orchestrator.run.search import Search
from searchspaces.errors import DataError
from tests.orchestrator.data.test_datasets import encoded, make_folder, pictures, write_parquet


def direct(path: Path) -> None:
    make_folder(path.parent / "other", {"cat": 12})
    shutil.copytree(path.parent / "other" / "cat", path)


def splits(path: Path) -> None:
    for part in ("Train", "test", "val"):
        make_folder(path / part, {"cat": 12, "dog": 12})


def only_train(path: Path) -> None:
    make_folder(path / "train", {"cat": 12, "dog": 12})


def one_class(path: Path) -> None:
    make_folder(path, {"cat": 12})


def zipped(path: Path) -> None:
    make_folder(path / "photos", {"cat": 12, "dog": 12})


def few(path: Path) -> None:
    make_folder(path, {"cat": 12, "dog": 9, "owl": 3})


def no_images(path: Path) -> None:
    make_folder(path, {"cat": 0, "dog": 0})
    (path / "cat" / "1.heic").write_bytes(b"pixels")


def broken(path: Path) -> None:
    make_folder(path, {"cat": 12, "dog": 12})
    (path / "cat" / "3.png").write_bytes(b"<html>not found</html>")
    for number in range(4):
        (path / "dog" / f"{number}.png").write_bytes(b"")


@pytest.mark.parametrize(("make", "message"), [
    (direct, r"mine holds images \(12\) and no sub-folder of them.*as .*mine/cat/1\.jpg"),
    (splits, r"mine holds Train and test and val, which are no classes.*set data\.train=.*mine/Train and "
             r"data\.test=.*mine/test, each"),
    (only_train, r"mine holds train, which are no classes.*set data\.train=.*mine/train, each"),
    (one_class, r"mine holds one class only \('cat'\); a classifier needs at least two: add a sub-folder"),
    (zipped, r"one class only \('photos'\).*the 2 folders in it, set data\.train=.*mine/photos"),
    (few, r"class 'owl' has 3 images in .*mine; at least 10 of every class .* \(2 classes have too few\)"),
    (no_images, r"holds no images; put them into one sub-folder per class.*it holds 1 \.heic"),
    (broken, r"5 of 24 image files cannot be read: .*cat/3\.png, .*dog/0\.png, .*dog/1\.png and 2 more; repair"),
])
def test_a_folder_that_cannot_work_is_refused_before_a_run_exists(tmp_path: Path, make: Callable[[Path], None],
                                                                  message: str) -> None:
    make(tmp_path / "mine")
    config = parse_config({"data": {"name": "folder", "train": str(tmp_path / "mine"), "size": 8}}, "test")
    with pytest.raises(DataError, match=message) as caught:
        Search(config, runs=tmp_path / "runs", name="run")
    assert "\n" not in str(caught.value) and not (tmp_path / "runs").exists()


def test_what_is_doubtful_is_said(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "mine", {"cat": 60, "dog": 12, "zebra": 20})
    assert check_files("folder", folder, None) == [
        f"2 of 3 classes have fewer than 50 images, 'dog' has 12 in {folder}: with fewer than 50 of a class accuracies "
        "are rough; add some if you can"]
    for number in range(7):
        (folder / "cat" / f"{number}.heic").write_bytes(b"pixels")
    (folder / "cat" / ".DS_Store").write_bytes(b"desktop")
    shutil.copy(folder / "cat" / "1.png", folder / "stray.png")
    assert check_files("folder", folder, None)[1:] == [
        f"images in {folder} itself, in no class, are left out (1)",
        f"files in {folder} that are no images are left out (7 .heic); images end with {', '.join(SUFFIXES)}"]
    make_folder(tmp_path / "test", {"cat": 2})
    (tmp_path / "test" / "cat" / "0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="1 of 94 image files cannot be read: .*test/cat/0.png"):
        check_files("folder", folder, tmp_path / "test")


def test_classes_called_train_are_classes_beside_others(tmp_path: Path) -> None:
    assert check_files("folder", make_folder(tmp_path / "vehicles", {"bus": 50, "train": 50}), None) == []


def test_classes_of_a_parquet_file_are_counted_too(tmp_path: Path) -> None:
    images = [encoded(pixels) for pixels in pictures(60)]
    path = write_parquet(tmp_path / "mine.parquet", images, [0] * 51 + [1] * 9)
    with pytest.raises(DataError, match="class 'owl' has 9 images"):
        check_files("parquet", path, None, ["cat", "owl"])
    path = write_parquet(tmp_path / "more.parquet", images, [0] * 50 + [1] * 10)
    assert check_files("parquet", path, None)[0].startswith("class '1' has 10 images")
