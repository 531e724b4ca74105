"""A whole search on Parquet files in the hub layout, to models that are judged from the files alone."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from tests.orchestrator.data.test_datasets import encoded, write_parquet
from tests.orchestrator.run.test_search import finish, start

CONFIG = """
seed: 1
data: {{name: parquet, train: {folder}/train.parquet, test: {folder}/test.parquet, classes: [dark, grey, light]}}
space: {{name: nasbench201, width: 4, cells: 1, resolution: 8}}
target: onnx_cpu
budgets: [1s]
latency: {{initial: 10, maximum: 10, visits: 1}}
supernet: {{epochs: 6, batch_size: 16}}
controller: random
search: {{evaluations: 6, calibration_images: 32, rollouts: 1}}
delivery: {{alternatives: 2, fine_tune_epochs: 20}}
"""


def shades(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Colour noise around three shades; the shade is the label."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    noise = rng.integers(-30, 31, (count, 8, 8, 3))
    return (np.array([50, 125, 200])[labels][:, None, None, None] + noise).astype(np.uint8), labels


@pytest.mark.soak
def test_search_on_parquet_hands_over_models_that_know_its_classes(tmp_path: Path) -> None:
    for name, count, seed in (("train", 60, 0), ("test", 30, 1)):
        images, labels = shades(count, seed)
        write_parquet(tmp_path / f"{name}.parquet", [encoded(image) for image in images], labels)
    (tmp_path / "mine.yaml").write_text(CONFIG.format(folder=tmp_path))
    process = start("search", str(tmp_path / "mine.yaml"), "--name", "mine", "--runs", str(tmp_path))
    output = finish(process)
    assert process.returncode == 0, output
    entry, = json.loads((tmp_path / "mine" / "generated.json").read_text())
    assert entry["feasible"], entry["reason"]
    model = tmp_path / "mine" / entry["onnx"]
    sidecar = json.loads(model.with_suffix(".json").read_text())
    assert sidecar["output"]["classes"] == ["dark", "grey", "light"]
    how = sidecar["input"]["preprocessing"]
    images, labels = shades(30, 1)  # in their own size: no resizing
    inputs = (images * how["scale"] - np.array(how["mean"])) / np.array(how["std"])
    session = onnxruntime.InferenceSession(model)
    fed = inputs.transpose(0, 3, 1, 2).astype(np.float32)
    logits = np.concatenate([session.run(None, {"images": row[None]})[0] for row in fed])
    accuracy = float((logits.argmax(axis=1) == labels).mean())
    assert accuracy == pytest.approx(sidecar["accuracy"]["test"]) and accuracy > 0.6
