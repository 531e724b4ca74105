"""Spaces that one run found, in the configuration of another: ranges in full, weights copied, clear refusals."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from actors.supernet.checkpoints import write_checkpoint
from orchestrator.config import Config, parse_config
from orchestrator.record.files import write_json
from orchestrator.record.store import RunStore
from orchestrator.services.elite import FORMAT, advice, check_inheritance, freeze_weights, with_ranges
from orchestrator.services.states import load_state
from searchspaces.catalogue import make_space
from searchspaces.elite.found import DrawnSpace, FoundSpace
from searchspaces.elite.space import EliteSpace
from searchspaces.errors import ConfigError, SpaceError, StoreError

SPACE = {"name": "expanded-s16", "width": 16, "width_bin": 8}
DATA = {"name": "digits", "limit": 300}
FOUND = [FoundSpace(3e6, 3e6, "madds", (DrawnSpace((0, 1, 1, 0, 1, 1), 3e6, 0.0, -1.0),), 0),
         FoundSpace(5e6, 5e6, "madds", (DrawnSpace((1, 1, 1, 1, 0, 1), 5e6, 0.0, -1.0),), 0)]


def base(channels: int = 1) -> Any:
    return make_space("expanded-s16", classes=10, channels=channels, options={"width": 16, "width_bin": 8})


@pytest.fixture()
def runs(tmp_path: Path) -> Path:
    """With a run `spaces` that found two, and its supernet."""
    config = parse_config({"data": DATA, "space": SPACE, "controller": "nss"}, "test")
    store = RunStore.create(tmp_path, "spaces", yaml.safe_dump(config.model_dump(mode="json")), {})
    space = base()
    write_json(store.path / "elite.json", {
        "format": FORMAT, "space": SPACE, "space_id": space.space_id, "classes": 10, "channels": 1,
        "groups": [], "spaces": [{"goal": "onnx_cpu", **found.as_json()} for found in FOUND]})
    torch.manual_seed(4)
    weights = {f"model.{name}": tensor for name, tensor in space.make_supernet().state_dict().items()}
    write_checkpoint(store.path / "checkpoints", "supernet", 2, weights,
                     {"space_id": space.space_id, "epoch": 2, "version": 2, "step": 8, "progress": {}})
    return tmp_path


def test_a_space_far_from_its_aim_says_what_to_change() -> None:
    near, far = (FoundSpace(3e6, 3e6, "madds", (DrawnSpace((0,), mean, mean / 3e6 - 1, -1.0),), 0)
                 for mean in (3.2e6, 3.4e6))
    assert advice(near) == "" and "more than 10% off its aim" in advice(far) and "now 1" in advice(far)
    unreachable = FoundSpace(1e6, 3e6, "madds", (DrawnSpace((0,), 3.1e6, 2.1, -1.0),), 0)
    assert advice(unreachable) == ""        # of its target, but near what can be aimed at


def inside(**options: Any) -> Config:
    return parse_config({"data": DATA, "space": {"name": "elite", "run": "spaces", **options}}, "test")


def made(config: Config) -> EliteSpace:
    space = make_space("elite", classes=10, channels=1, options=config.space.options)
    assert isinstance(space, EliteSpace)
    return space


def test_one_space_or_all_of_them_become_ranges_that_stand_for_themselves(runs: Path) -> None:
    second = with_ranges(inside(aim=1), runs)
    assert second.space.options["ranges"] == {
        "depth0": [3, 4], "range0": ["9-16"], "depth1": [3, 4], "range1": ["9-16"], "depth2": [1, 2],
        "range2": ["9-16"]}
    together = with_ranges(inside(), runs)
    assert together.space.options["ranges"] == {"range0": ["9-16"], "depth1": [3, 4], "range2": ["9-16"]}
    assert made(together).size() == (4 * 8) * (2 * 16) * (4 * 8)
    assert with_ranges(together, runs / "elsewhere") is together       # the run is needed no more
    again = parse_config(yaml.safe_load(yaml.safe_dump(second.model_dump(mode="json"))), "test")
    assert made(again).space_id == made(second).space_id != made(together).space_id


def test_ranges_by_hand_need_no_run() -> None:
    space = made(parse_config({"space": {"name": "elite", "base": SPACE, "ranges": {"depth0": [2], "depth2": [1, 4]}}},
                              "test"))
    rows = space.widened(space.sample_uniform(np.random.default_rng(0), 50))
    assert set(rows[:, 0]) == {1} and set(rows[:, 6]) == {0, 3}


def test_weights_are_copied_once_and_are_those_of_the_run(runs: Path) -> None:
    config = with_ranges(inside(), runs)
    store = RunStore.create(runs, "mine", "{}", {})
    freeze_weights(store, config)
    copied = load_state(store, "inherited")
    torch.manual_seed(4)
    expected = base().make_supernet().state_dict()
    assert copied.keys() == expected.keys() and all(torch.equal(copied[name], expected[name]) for name in expected)
    supernet = made(config).make_supernet()
    supernet.base.load_state_dict(copied)  # type: ignore[attr-defined, operator]


def altered(runs: Path, **changes: Any) -> None:
    file = runs / "spaces" / "elite.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(("changes", "options", "words"), [
    ({"format": 0}, {}, "is of format 0, this version reads 1; search the spaces again"),
    ({"space_id": "expanded(other)"}, {}, r"searched expanded\(other\), which this version builds as"),
    ({}, {"aim": 2}, r"space.aim is 2; run 'spaces' found 2 spaces, so it must lie in 0..1"),
    ({}, {"run": "spcaes"}, "spcaes")])
def test_what_cannot_be_taken_over(runs: Path, changes: dict[str, Any], options: dict[str, Any], words: str) -> None:
    altered(runs, **changes)
    with pytest.raises((StoreError, ConfigError), match=words):
        with_ranges(inside(**options), runs)


def test_a_run_that_has_not_finished_its_training_is_refused(runs: Path) -> None:
    (runs / "spaces" / "elite.json").unlink()
    with pytest.raises(StoreError, match="has found no spaces yet.*resume spaces"):
        with_ranges(inside(), runs)


def test_weights_of_another_datasets_shape_are_refused(runs: Path) -> None:
    config = with_ranges(inside(), runs)
    check_inheritance(config, 10, 1)
    with pytest.raises(ConfigError, match="trained for 10 classes and 1 channels, the dataset has 100 and 3"):
        check_inheritance(config, 100, 3)


def test_both_runs_start_from_the_same_weights(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier versions kept a relative path as it was given."""
    file = runs / "spaces" / "config.yaml"
    file.write_text(file.read_text().replace("start: null", "start: ofa"))
    monkeypatch.chdir(runs)
    config = with_ranges(inside(), runs)
    alike = config.supernet.model_copy(update={"start": str(runs / "ofa")})
    check_inheritance(config.model_copy(update={"supernet": alike}), 10, 1)
    with pytest.raises(ConfigError, match="has supernet.start 'ofa', this one None"):
        check_inheritance(config, 10, 1)


@pytest.mark.parametrize(("options", "words"), [
    ({}, "needs `run`, a run with controller nss, or `base` and `ranges`"),
    ({"base": "expanded-s17"}, "did you mean 'expanded-s16'"), ({"base": {"width": 16}}, "give a name"),
    ({"base": SPACE, "ranges": {"depth9": [1]}}, "did you mean 'depth"),
    ({"base": SPACE, "ranges": {"depth0": [9]}}, r"range of depth0 is \[9\]; give a list of some of \[1, 2, 3, 4\]"),
    ({"base": SPACE, "ranges": {"depth0": []}}, "give a list"), ({"bsae": "darts"}, "did you mean 'base'"),
    ({"base": SPACE, "ranges": {f"{kind}{i}": [value] for i in range(3) for kind, value in
                                (("depth", 1), ("range", "1-8"), ("place", 1))}}, "nothing to search")])
def test_ranges_that_make_no_space(options: dict[str, Any], words: str) -> None:
    with pytest.raises((ConfigError, SpaceError), match=words) as caught:
        make_space("elite", classes=10, channels=1, options=options)
    assert "\n" not in str(caught.value)
