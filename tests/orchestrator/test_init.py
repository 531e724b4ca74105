"""`paretoray init`: what it sees becomes a configuration that loads and runs."""
from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from orchestrator.config import load_config
from orchestrator.init import look_at_data, write_config
from searchspaces.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]


def picture(seed: int, label: int, size: tuple[int, int] = (16, 16), mode: str = "L") -> Image.Image:
    """Noise around a brightness that tells the class."""
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    pixels = np.random.default_rng(seed).normal(60 + 120 * label, 30, shape).clip(0, 255)
    return Image.fromarray(pixels.astype(np.uint8), mode)


def folder_of(path: Path, count: int, size: tuple[int, int] = (16, 16), mode: str = "L", classes: int = 2) -> Path:
    for label in range(classes):
        (path / f"class {label}").mkdir(parents=True)
        for i in range(count):
            picture(i, label, size, mode).save(path / f"class {label}" / f"{i}.png")
    return path


def parquet_of(path: Path, labels: list[int], seed: int = 0) -> Path:
    images = []
    for row, label in enumerate(labels):
        buffer = io.BytesIO()
        picture(seed + row, label % 2, (32, 32), "RGB").save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    pq.write_table(pa.table({"image": images, "label": labels}), path)
    return path


def test_small_grey_images_in_a_folder(tmp_path: Path) -> None:
    said = write_config(folder_of(tmp_path / "letters: #1", 20), tmp_path / "a" / "mine.yaml")
    config = load_config(tmp_path / "a" / "mine.yaml")
    assert (config.data.name, config.space.name, config.space.options) == ("folder", "mobilenetv3-s16",
                                                                          {"resolution": 16})
    assert not config.supernet.flip and config.data.size is None and config.data.channels is None
    assert "40 images of 2 classes, 1 channel(s), 16 x 16 pixels" in said[0]
    with pytest.raises(ConfigError, match="exists already"):
        write_config(tmp_path / "letters: #1", tmp_path / "a" / "mine.yaml")
    write_config(tmp_path / "letters: #1", tmp_path / "a" / "mine.yaml", force=True)


def test_colour_images_in_parquet_with_a_test_file(tmp_path: Path) -> None:
    parquet_of(tmp_path / "train.parquet", [0, 1] * 15)
    parquet_of(tmp_path / "test.parquet", [0, 1] * 5, seed=100)
    write_config(tmp_path, tmp_path / "mine.yaml")
    config = load_config(tmp_path / "mine.yaml")
    assert (config.space.name, config.supernet.flip, config.data.test) == ("mobilenetv3-s32", True,
                                                                          tmp_path / "test.parquet")


def test_images_of_different_sizes_and_colours_are_brought_together(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "photos", 12, (120, 90), "RGB")
    picture(0, 0, (64, 64)).save(folder / "class 0" / "0.png")
    seen = look_at_data(folder)
    assert (seen.settings.size, seen.settings.channels, seen.side, seen.sample.channels) == (224, 3, 224, 3)
    write_config(folder, tmp_path / "mine.yaml")
    assert load_config(tmp_path / "mine.yaml").space.name == "mobilenetv3"


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    for path, reason in ((tmp_path / "nowhere", "there is nothing at"), (tmp_path / "empty", "holds no images"),
                         (folder_of(tmp_path / "one", 12, classes=1), "needs at least two"),
                         (folder_of(tmp_path / "few", 4), "class 'class 0' has 4 images"),
                         (tmp_path / "broken.parquet", "not a readable Parquet file"),
                         (parquet_of(tmp_path / "gap.parquet", [0, 2] * 12), "class '1' has 0 images")):
        with pytest.raises(DataError, match=reason):
            write_config(path, tmp_path / "mine.yaml")
    assert not (tmp_path / "mine.yaml").exists()


@pytest.mark.soak
def test_a_search_with_what_was_written(tmp_path: Path) -> None:
    folder_of(tmp_path / "images", 60)
    quick = ("supernet.epochs=1", "supernet.workers=1", "latency.initial=12", "latency.maximum=12", "latency.visits=1",
             "search.evaluations=12", "search.rollouts=1", "delivery.alternatives=1", "delivery.fine_tune_epochs=0",
             "budgets.count=1", "controller=random")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    for arguments in (["init", "images"],
                      ["search", "images.yaml", "--name", "mine", *(part for key in quick for part in ("--set", key))]):
        done = subprocess.run([sys.executable, "-m", "orchestrator", *arguments], cwd=tmp_path, env=environment,
                              capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "runs" / "mine" / "models").glob("*.onnx"))
