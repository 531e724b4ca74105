"""Files damaged after the stage that wrote them: `generate` says so, `resume` makes them again."""
from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import psutil
import pytest

from actors.data import Preprocessing
from actors.latency.worker import input_shape
from orchestrator.config import load_config
from orchestrator.record.store import RunStore
from orchestrator.services.context import data_and_space
from orchestrator.services.retraining import Retrained
from tests.orchestrator.data.test_accuracy import PROXY, cells_table
from tests.orchestrator.run.test_search import TINY, check_finished_run, finish, parts, start, when
from tests.orchestrator.test_cli import paretoray


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repair")
    (folder / "tiny.yaml").write_text(TINY)
    process = start("search", str(folder / "tiny.yaml"), "--name", "tiny", "--runs", str(folder / "runs"))
    output = finish(process)
    assert process.returncode == 0, output
    return folder / "runs" / "tiny"


def damage(path: Path) -> bytes:
    """Turns one byte in the middle over, as a bad disk does; what was there."""
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1:])
    return content


def new_budget(run: Path) -> str:
    budgets = [entry["budget_ms"] for entry in json.loads((run / "generated.json").read_text())]
    return f"{sum(budgets) / len(budgets):.6f}ms"


@pytest.mark.soak
def test_damaged_supernet_is_trained_again_before_the_delivery(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "tiny"))
    newest = max((run / "checkpoints").glob("supernet-*.safetensors"))
    whole = damage(newest)
    refused = paretoray("generate", "tiny", "--budget", new_budget(run), "--runs", str(tmp_path))
    assert refused.returncode == 2
    assert "checkpoint of epoch 2" in refused.stderr and "resume" in refused.stderr
    assert "Traceback" not in refused.stderr
    damage(run / "checkpoints" / "controller.safetensors")
    RunStore(run).update_state(stage="deliver")
    shutil.rmtree(run / "models")  # so that delivering needs the weights
    resumed = paretoray("resume", "tiny", "--runs", str(tmp_path))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "epochs between are trained again" in resumed.stdout
    assert newest.read_bytes() == whole, "an epoch that is trained again is the same epoch"
    check_finished_run(run)
    assert {json.loads(path.read_text())["weights_version"] for path in (run / "models").glob("*.json")} == {2}
    done = paretoray("generate", "tiny", "--budget", new_budget(run), "--runs", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.soak
def test_damaged_predictor_and_controller_are_made_again(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "tiny"))
    states = [run / "checkpoints" / f"{name}.safetensors" for name in ("predictor", "controller")]
    for file in states:
        damage(file)
    refused = paretoray("generate", "tiny", "--budget", new_budget(run), "--runs", str(tmp_path))
    assert refused.returncode == 2
    assert "is missing or damaged" in refused.stderr and "resume the run" in refused.stderr
    trials = RunStore(run).read_trials()
    resumed = paretoray("resume", "tiny", "--runs", str(tmp_path))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "fitted again to all measurements" in resumed.stdout and "learns again from all trials" in resumed.stdout
    assert [file.with_name(file.name + ".damaged").exists() for file in states] == [True, True]
    assert RunStore(run).read_trials() == trials
    done = paretoray("generate", "tiny", "--budget", new_budget(run), "--runs", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    again = paretoray("resume", "tiny", "--runs", str(tmp_path))
    assert again.returncode == 0 and "again" not in again.stdout


def test_damaged_weights_of_a_finalist_are_trained_again(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(PROXY)
    config = load_config(tmp_path / "mine.yaml")
    splits, space = data_and_space(config)
    store = RunStore.create(tmp_path, "run", "", {})
    retrained = Retrained(config, space, splits, Preprocessing.fit(splits.train, input_shape(space)[1]), store)
    tokens_T = space.extremes()[0]
    before = retrained.weights(tokens_T)
    damage(store.path / "checkpoints" / f"retrained-{space.arch_id(tokens_T)}.safetensors")
    assert retrained.accuracy(tokens_T) is None
    after = retrained.weights(tokens_T)
    assert retrained.accuracy(tokens_T) is not None
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name])


@pytest.mark.soak
def test_full_disk_ends_a_search_in_one_sentence_and_resume_finishes_it(tmp_path: Path) -> None:
    """As on a full disk the driver may write no more: a limit on the size of its files, set from outside."""
    run = tmp_path / "tiny"
    (tmp_path / "tiny.yaml").write_text(cells_table(tmp_path / "cells.parquet", unit=0.005))
    process = start("search", str(tmp_path / "tiny.yaml"), "--name", "tiny", "--runs", str(tmp_path))
    when(process, lambda: parts(run / "latency") >= 1)
    psutil.Process(process.pid).rlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
    output = finish(process)
    assert process.returncode == 2, output
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and str(run) in errors[0] and "free some space" in errors[0]
    assert "Traceback" not in output, output
    assert RunStore(run).latency.rows >= 1, "what was recorded is kept"
    resumed = paretoray("resume", "tiny", "--runs", str(tmp_path))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    check_finished_run(run)
