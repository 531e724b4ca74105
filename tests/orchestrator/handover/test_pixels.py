"""Files that hold their own preprocessing, as handed over: what they say of themselves, and README's lines on one."""
from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from actors.data import Images, Preprocessing, Splits
from configs.own_space import PlainCnn
from orchestrator.config import DeliverySettings
from orchestrator.handover.delivered import Candidate
from orchestrator.handover.exported import as_pixels, check_parity, file_accuracy
from orchestrator.handover.models import HandOver
from orchestrator.record.goals import Goal
from searchspaces.errors import EvaluationError
from searchspaces.network import GraphNetwork
from searchspaces.onnxgraph import to_onnx
from searchspaces.space import Tokens
from tests.orchestrator.handover.test_handover import Bench

README = Path(__file__).parents[3] / "README.md"
SPACE = PlainCnn(classes=3, channels=3, resolution=8)
RNG = np.random.default_rng(0)
IMAGES = Images(RNG.integers(0, 256, (24, 12, 10, 3)).astype(np.uint8), np.arange(24) % 3)
SPLITS = Splits(IMAGES, IMAGES, IMAGES, ("cat", "dog", "zebra crossing"), "noise")
ROW = SPACE.sample_uniform(np.random.default_rng(1), 1)[0]
HOW = Preprocessing.fit(IMAGES, 8)


def network() -> GraphNetwork:
    torch.manual_seed(0)
    return GraphNetwork(SPACE.graph(ROW)).eval()


class Colours(Bench):
    def trained_weights(self, tokens_T: Tokens) -> dict[str, NDArray[np.float32]]:
        return {name: tensor.numpy() for name, tensor in network().state_dict().items()}


@pytest.fixture(scope="module", params=[True, False], ids=["inside", "outside"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[bool, Path]:
    """(with its preprocessing inside?, the file)"""
    folder = tmp_path_factory.mktemp("models")
    lineage = {"run": "r", "weights_version": 2, "targets": {"cpu": {"target": {"batch": 1}}}}
    settings = DeliverySettings(preprocess_in_model=request.param)
    arch_id = SPACE.arch_id(ROW)
    maker = HandOver(SPACE, SPLITS, HOW, Colours({}, {arch_id: 1.0}), settings, folder, lineage,
                     Goal("cpu", ("cpu",), (2.0,)))
    entry, = maker.deliver([2.0], [Candidate(ROW, arch_id, 0.3, 1.0, 1.0)])
    assert entry.feasible and entry.test_accuracy == file_accuracy((folder / entry.onnx).read_bytes(), IMAGES, HOW)
    with torch.inference_mode():
        right = network()(HOW.tensor(IMAGES.images)).argmax(dim=1).numpy() == IMAGES.labels
    assert entry.test_accuracy == right.mean()
    return request.param, folder / entry.onnx


def test_a_file_and_its_sidecar_tell_the_truth(made: tuple[bool, Path]) -> None:
    inside, path = made
    sidecar = json.loads(path.with_suffix(".json").read_text())
    session = onnxruntime.InferenceSession(path)
    given, = session.get_inputs()
    assert sidecar["input"]["name"] == given.name == "images"
    assert sidecar["output"] == {"name": session.get_outputs()[0].name, "classes": list(SPLITS.classes)}
    assert (given.type, given.shape, sidecar["input"]["layout"], sidecar["output"]["name"]) == (
        ("tensor(uint8)", [1, "height", "width", 3], "NHWC uint8", "probabilities") if inside else
        ("tensor(float)", [1, 3, 8, 8], "NCHW float32", "logits"))
    assert sidecar["input"]["preprocessing_in_model" if inside else "preprocessing"] == json.loads(
        json.dumps(HOW.to_dict()))
    assert sidecar["input"].get("timed_size") == ([12, 10] if inside else None)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == list(SPLITS.classes)
    assert json.loads(metadata["made_for_budgets_ms"]) == {"cpu": 2.0}
    assert Preprocessing.from_dict(json.loads(metadata["preprocessing"])) == HOW


def test_readme_classifies_a_photograph(made: tuple[bool, Path], tmp_path: Path) -> None:
    """Its very lines, in a process of its own, on a photograph of another size than the data's."""
    inside, path = made
    if not inside:
        pytest.skip("README's lines are for files with their preprocessing")
    lines, = (block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
              if "InferenceSession" in block)
    assert len(lines.splitlines()) <= 10
    imported = set(re.findall(r"^(?:from|import) (\w+)", lines, re.MULTILINE))
    assert imported == {"json", "sys", "numpy", "onnxruntime", "PIL"}
    (tmp_path / "classify.py").write_text(lines)
    photograph = RNG.integers(0, 256, (57, 41, 3)).astype(np.uint8)
    Image.fromarray(photograph).save(tmp_path / "photograph.png")
    done = subprocess.run([sys.executable, "-P", "classify.py", str(path), "photograph.png"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120.0, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        expected = network()(HOW.tensor(photograph[None])).softmax(dim=1)[0]
    assert done.stdout == f"{ {name: f'{float(p):.1%}' for name, p in zip(SPLITS.classes, expected)} }\n"


@pytest.mark.parametrize("change", [{"mean": (0.5, 0.49, 0.5)}, {"std": (0.4, 0.3, 0.2)}])
def test_parity_covers_the_preprocessing(change: dict[str, object]) -> None:
    """A mean that is two per cent off, or blue for red, is no rounding error."""
    how = Preprocessing(**{**HOW.to_dict(), "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.3, 0.4)})
    models = {name: to_onnx(SPACE.graph(ROW), {name: tensor.numpy() for name, tensor in network().state_dict().items()},
                            pixels=as_pixels(fields, IMAGES.shape)).SerializeToString()
              for name, fields in (("right", how), ("wrong", Preprocessing(**{**how.to_dict(), **change})))}
    assert check_parity(network(), models["right"], IMAGES.images, how) < 1e-5
    with pytest.raises(EvaluationError, match="differs from torch by"):
        check_parity(network(), models["wrong"], IMAGES.images, how)
