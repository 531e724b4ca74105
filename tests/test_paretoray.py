"""`import paretoray`: what a program and a notebook find there."""
from __future__ import annotations

import os
import pydoc
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import paretoray
from orchestrator.handover.delivered import Delivered
from orchestrator.record.files import write_json
from orchestrator.record.store import RunStore
from searchspaces.errors import StoreError
from tests.orchestrator.example_run import add_trials, example_space

ROOT = Path(__file__).parents[1]


def test_every_name_is_there_and_told() -> None:
    assert {name for names in paretoray.HOMES.values() for name in names} == set(paretoray.__all__)
    for name in paretoray.__all__:
        assert getattr(paretoray, name) is not None
    text = pydoc.plain(pydoc.render_doc(paretoray))
    assert "open_run" in text and "class SearchSpace" in text
    with pytest.raises(AttributeError, match="no attribute 'Serach'"):
        paretoray.Serach  # noqa: B018


def test_it_is_packed_and_its_version_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["py-modules"] == ["paretoray"]
    assert paretoray.__version__ == project["project"]["version"]


def test_from_another_folder_without_ray_until_it_is_needed(tmp_path: Path) -> None:
    code = ("import sys, paretoray; early = 'torch' in sys.modules; import orchestrator.cli; "
            "early |= 'ray' in sys.modules; "
            "from paretoray import Search, load_config; print(early, Search.__name__, load_config.__name__)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout.split() == ["False", "Search", "load_config"], done.stderr


def test_a_run_is_opened_as_tables_and_a_figure(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path, "mine", (ROOT / "configs" / "quickstart.yaml").read_text(), {})
    run = paretoray.open_run("mine", tmp_path)
    assert (run.stage, len(run.trials()), len(run.models())) == ("measure", 0, 0)
    with pytest.raises(StoreError, match="no trials to draw yet"):
        run.figure()
    trials = add_trials(store, example_space(), 120)
    write_json(tmp_path / "mine" / "generated.json", [
        {"budget_ms": 1.0, "feasible": False, "reason": "nothing fits"},
        {"budget_ms": 2.0, "feasible": True, "latency_ms": 1.9, "accuracy": 0.9, "onnx": "models/a.onnx"}])
    before = sorted(path for path in run.path.rglob("*"))
    table, models = run.trials(), run.models()
    assert table["arch_id"].tolist() == [trial.arch_id for trial in trials]
    assert table["accuracy"].isna().sum() == sum(trial.accuracy is None for trial in trials) > 0
    assert list(models.columns) == list(Delivered.__dataclass_fields__)
    assert models["onnx"].tolist() == ["", str(run.path / "models/a.onnx")]
    assert {trace.name for trace in run.figure().data} >= {"Pareto front", "handed-over model"}
    assert sorted(path for path in run.path.rglob("*")) == before
    assert paretoray.open_run(tmp_path / "mine") == run
    with pytest.raises(StoreError, match="known runs: mine"):
        paretoray.open_run("other", tmp_path)
    with pytest.raises(StoreError, match="holds no config.yaml"):
        paretoray.open_run(tmp_path / "other")
