"""Searching the space first: a whole run with kills in both halves, what it leaves, and what is refused."""
from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from orchestrator.config import load_config, parse_config
from orchestrator.record.files import read_json
from orchestrator.record.store import RunStore
from orchestrator.run.search import Search
from orchestrator.services.context import data_and_space
from orchestrator.services.states import load_state
from searchspaces.elite.space import EliteSpace
from searchspaces.errors import ParetorayError
from tests.orchestrator.run.test_search import TINY, finish, stage, start, when

NARROW = {"epochs": 4, "evaluations": 8, "controller": {"name": "nss", "learning_rate": 0.3, "warm_up": 0.25}}
SPACE = {"name": "expanded-s16", "width": 16, "width_bin": 8}
TARGET = {"name": "tests.orchestrator.plugins:Weighing", "unit": 0.001}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("narrow") / "narrow.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(TINY) | {"space": SPACE, "target": TARGET, "narrow": NARROW,
                                                           "budgets": {"values_ms": [10.0]}}))
    return path


def newest(run: Path) -> int:
    """The last epoch of which there is a checkpoint, -1 before the first."""
    return max([int(path.stem.removeprefix("supernet-")) for path in (run / "checkpoints").glob("supernet-*.json")],
               default=-1)


@pytest.mark.soak
def test_a_run_killed_in_both_halves_ends_as_if_it_had_not_been(config: Path) -> None:
    runs = config.parent
    whole = start("search", str(config), "--runs", str(runs), "--name", "whole")
    said = finish(whole)
    assert whole.returncode == 0 and "space for 10 ms: mean" in said, said
    killed = start("search", str(config), "--runs", str(runs), "--name", "killed")
    when(killed, lambda: newest(runs / "killed" / "narrow") >= 2)
    killed.send_signal(signal.SIGKILL)
    killed.wait(60)
    assert stage(runs / "killed") == "narrow" and stage(runs / "killed" / "narrow") == "train"
    resumed = start("resume", "killed", "--runs", str(runs))
    when(resumed, lambda: newest(runs / "killed" / "narrow") >= 3)
    resumed.send_signal(signal.SIGTERM)
    said = finish(resumed)
    assert resumed.returncode != 0 and "run killed stopped in stage 'narrow'" in said, said
    assert said.count("paretoray resume") == 1 and f"paretoray resume killed --runs {runs}" in said
    again = start("resume", "killed", "--runs", str(runs))
    when(again, lambda: newest(runs / "killed") >= 1)
    again.send_signal(signal.SIGKILL)
    again.wait(60)
    last = start("resume", "killed", "--runs", str(runs))
    said = finish(last)
    assert last.returncode == 0, said
    one, two = (load_state(RunStore(runs / name / "narrow"), "distribution") for name in ("whole", "killed"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert read_json(runs / "whole" / "narrow" / "elite.json") == read_json(runs / "killed" / "narrow" / "elite.json")
    weights = [load_file(max((runs / name / "checkpoints").glob("supernet-*.safetensors"))) for name in
               ("whole", "killed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.soak
def test_what_it_leaves_behind(config: Path) -> None:
    """After the test above: the configuration says the ranges, the trials lie inside, training went on from the weights
    that the search for spaces left, and the page of the inner run is there."""
    run = config.parent / "whole"
    if not run.exists():
        pytest.skip("needs the run of the test before")
    resolved = load_config(run / "config.yaml")
    space = data_and_space(resolved)[1]
    assert isinstance(space, EliteSpace) and resolved.narrow is None
    found = read_json(run / "narrow" / "elite.json")["spaces"]
    assert len(found) == 1 and len(found[0]["draws"]) == 5
    trials = RunStore(run).read_trials()
    assert len(trials) >= 12 and all(trial.space_id == space.space_id for trial in trials)
    inherited = load_state(RunStore(run), "inherited")
    last = load_file(max((run / "narrow" / "checkpoints").glob("supernet-*.safetensors")))
    assert all(torch.equal(inherited[name], last[f"model.{name}"]) for name in inherited)
    first = read_json(min((run / "checkpoints").glob("supernet-*.json")))
    assert first["epoch"] == 1       # of the epochs that followed; epoch 0 held the inherited weights
    logits = [json.loads(line).get("logits") for line in (run / "narrow" / "events.jsonl").read_text().splitlines()
              if json.loads(line)["kind"] == "epoch"]
    assert [bool(row) for row in logits] == [False, True, True, True]
    assert max(np.ptp(row) for row in logits[-1].values()) > 0.3        # it did learn
    inner, outer = ((folder / "report.html").read_text() for folder in (run / "narrow", run))
    assert 'id="spaces"' in inner and "in stage:" not in inner and "paretoray resume" not in inner
    assert 'id="inside"' in outer and "narrow/report.html" in outer
    entries = read_json(run / "generated.json")
    assert len(entries) == 1 and entries[0]["latency_ms"] <= 10.0 and (run / entries[0]["onnx"]).exists()


@pytest.mark.parametrize(("changes", "words"), [
    ({"narrow": NARROW | {"epohcs": 3}}, "unknown key 'narrow.epohcs'; did you mean 'epochs'"),
    ({"narrow": NARROW | {"controller": {"name": "nss", "draws": 0}}}, "option 'draws' of controller nss is 0"),
    ({"narrow": NARROW | {"controller": {"name": "nss", "madds_m": [1e6]}}}, "madds_m 1e+06 is out of reach"),
    ({"narrow": NARROW | {"controller": {"name": "nss", "validation": 0.01}}}, "too few for a batch"),
    ({"narrow": NARROW | {"controller": "pnag"}}, "narrow.controller 'pnag' finds no spaces; choose nss"),
    ({"narrow": NARROW, "warm_start": ["other"]}, "warm_start needs runs of the same space"),
    ({"narrow": NARROW, "space": "mnas-s16"}, "has no supernet"),
    ({"narrow": None, "controller": "nss", "accuracy": {"source": "training"}}, "set accuracy: supernet")])
def test_what_cannot_work_is_refused_before_anything_starts(changes: dict[str, object], words: str,
                                                            tmp_path: Path) -> None:
    with pytest.raises(ParetorayError) as caught:
        Search(parse_config(yaml.safe_load(TINY) | {"space": SPACE} | changes, "test"), runs=tmp_path)
    assert words in str(caught.value)
    assert not list(tmp_path.iterdir())
