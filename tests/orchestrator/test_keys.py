"""`paretoray keys`: every key is told, from the classes that check it."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.config import Config
from orchestrator.controllers.catalogue import CONTROLLERS
from orchestrator.keys import Key, keys_of, keys_table
from searchspaces.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_every_key_has_a_meaning() -> None:
    keys = keys_of()
    assert {key.name.partition(".")[0] for key in keys} == set(Config.model_fields)
    for name in CONTROLLERS:
        keys += keys_of(f"controller.{name}")
    assert [key.name for key in keys if not key.meaning or not key.kind] == []


@pytest.mark.parametrize(("section", "expected"), [
    ("delivery.margin", Key("delivery.margin", "float", "0.02", ">= 0, < 0.5",
                            "share of the budget kept free for measurement noise")),
    ("search.rollouts", Key("search.rollouts", "int or auto", "auto", ">= 1, <= 4096", "rollout workers (trainers: "
                            "accuracy.workers); auto: one per spare CPU, at most 4 per GPU")),
    ("accuracy.table.unit", Key("accuracy.table.unit", "float", "0.01", "> 0",
                                "value of 1 in these columns: 0.01 for per cent")),
    ("controller.pnag.posterior.trees", Key("controller.posterior.trees", "int", "50", ">= 2, <= 1000000",
                                            "of the random forest")),
])
def test_one_key(section: str, expected: Key) -> None:
    assert keys_of(section) == [expected]


def test_options_of_plug_ins_come_from_their_signature() -> None:
    resolution = {key.name: key for key in keys_of("space.mobilenetv3-s16")}["space.resolution"]
    assert (resolution.kind, resolution.default) == ("int or a list of int", "16")
    assert resolution.meaning.count("becomes a searched token") == 1
    assert "space.NAME, where NAME is darts" in keys_of("space")[0].meaning
    assert [key.name for key in keys_of("space.configs.own_space:PlainCnn")] == ["space.resolution"]
    assert {"target.path", "target.column"} <= {key.name for key in keys_of("target.table")}
    assert keys_of("controller.random") == []


@pytest.mark.parametrize(("section", "closest"), [
    ("supernt", "supernet"), ("search.evalations", "search.evaluations"), ("controller.pnga", "controller.pnag"),
    ("space.mobilenet", "space.mobilenetv3"), ("target.onnx", "target.onnx_cpu"),
    ("controller.pnag.generater", "controller.pnag.generator"),
])
def test_an_unknown_section_names_the_closest(section: str, closest: str) -> None:
    with pytest.raises(ConfigError, match=f"no section or key '{section}'; did you mean '{closest}"):
        keys_of(section)


def test_the_table_and_the_version_as_typed(tmp_path: Path) -> None:
    assert keys_table(keys_of()).row_count == len(keys_of())
    for arguments, text in ((["keys", "budgets"], "[0.2ms, 300us]"), (["--version"], "paretoray 0.1.0")):
        done = subprocess.run([sys.executable, "-m", "orchestrator", *arguments], cwd=ROOT, capture_output=True,
                              text=True, timeout=240)
        assert done.returncode == 0 and text in done.stdout, done.stderr
