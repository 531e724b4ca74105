"""Whole searches with UNAS: latencies in the training loop, a kill in the middle of it, and resuming."""
from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml

from orchestrator.config import parse_config
from orchestrator.record.files import read_json
from orchestrator.record.store import RunStore
from orchestrator.run.search import Search
from orchestrator.run.stages.collapse import collapsed
from orchestrator.services.states import load_state
from searchspaces.errors import ConfigError
from tests.orchestrator.run.test_search import TINY, finish, stage, start, when

TARGET = {"name": "tests.orchestrator.plugins:Weighing", "unit": 1.0}
UNAS = {"name": "unas", "warm_up": 0.25, "learning_rate": 0.1, "latency": {"samples": 6, "networks": 12}}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unas") / "unas.yaml"
    settings = yaml.safe_load(TINY) | {"target": TARGET, "controller": UNAS}
    settings["supernet"] |= {"epochs": 4, "batch_size": 32}
    settings["space"] = {"name": "mobilenetv3-s16", "width": 0.25}
    path.write_text(yaml.safe_dump(settings))
    return path


def learned(run: Path) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in load_state(RunStore(run), "distribution").items()}


@pytest.mark.soak
def test_a_run_killed_while_training_ends_as_if_it_had_not_been(config: Path) -> None:
    runs = config.parent
    whole = start("search", str(config), "--runs", str(runs), "--name", "whole")
    said = finish(whole)
    assert whole.returncode == 0, said
    killed = start("search", str(config), "--runs", str(runs), "--name", "killed")
    when(killed, lambda: len(list((runs / "killed" / "checkpoints").glob("supernet-*.safetensors"))) >= 2)
    killed.send_signal(signal.SIGKILL)
    killed.wait(60)
    assert stage(runs / "killed") == "train"
    resumed = start("resume", "killed", "--runs", str(runs))
    said = finish(resumed)
    assert resumed.returncode == 0, said
    one, two = learned(runs / "whole"), learned(runs / "killed")
    assert one.keys() == two.keys() and len(one) == 2 * 45
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert max(abs(logits).max() for logits in one.values()) > 0.05         # it did learn
    trials = [{trial.tokens for trial in RunStore(runs / name).read_trials() if trial.budget_ms}
              for name in ("whole", "killed")]      # workers finish in any order
    assert trials[0] == trials[1] and len(trials[0]) == 12


@pytest.mark.soak
def test_what_the_run_leaves_behind(config: Path) -> None:
    """After the test above: latencies of drawn networks are recorded, the history tells losses, gap and logits."""
    run = config.parent / "whole"
    if not run.exists():
        pytest.skip("needs the run of the test before")
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    epochs = [event for event in events if event["kind"] == "epoch"]
    assert len(epochs) == 4 and all({"validation_loss", "gap", "entropy"} <= set(epoch) for epoch in epochs)
    assert "logits" not in epochs[0] and set(epochs[-1]["logits"]) == {f"{b}.{e}" for b in range(2) for e in range(45)}
    assert RunStore(run).latency.read().num_rows >= 12 + 12     # measured first, then for the surrogate
    budgets = read_json(run / "state.json")["goals"][0]["budgets_ms"]
    proposed = [trial.budget_ms for trial in RunStore(run).read_trials() if trial.budget_ms]   # others: fallbacks
    assert proposed[:2] == budgets and set(proposed) == set(budgets)


def test_a_distribution_that_settles_early_is_said() -> None:
    sure, open_ = np.array([20.0, 0.0, 0.0]), np.zeros(3)
    assert "budget 2 is settled after 30%" in collapsed({"0.0": open_, "1.0": sure, "1.1": sure}, 0.3)
    assert collapsed({"0.0": sure, "0.1": open_}, 0.3) == "" and collapsed({"0.0": sure}, 0.6) == ""


@pytest.mark.parametrize(("changes", "words"), [
    ({"supernet": {"batch_size": 512}}, "too few for a batch of 512"),
    ({"controller": UNAS | {"validation": 0.02}}, "change controller.validation"),
    ({"controller": UNAS | {"temperature": 0}}, "option 'temperature' of controller unas is 0"),
    ({"controller": UNAS | {"generalisation": -1}}, "option 'generalisation' of controller unas is -1"),
    ({"controller": UNAS | {"latency": {"mode": "hing"}}}, "'hinge' or 'linear'"),
    ({"controller": UNAS | {"temprature": 1}}, "did you mean 'temperature'"),
    ({"space": "mnas-s16"}, "has no supernet")])
def test_what_cannot_work_is_refused_before_anything_starts(changes: dict[str, object], words: str,
                                                            tmp_path: Path) -> None:
    config = parse_config(yaml.safe_load(TINY) | {"controller": UNAS} | changes, "test")
    with pytest.raises(ConfigError, match=words):
        Search(config, runs=tmp_path)
    assert not list(tmp_path.iterdir())
