"""A whole search that is kept in an object store: killed, resumed from elsewhere, asked for models and reports."""
from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from actors.objectpath import ObjectPath, as_path, matching
from orchestrator.openedrun import open_run
from orchestrator.record.store import RunStore
from tests.objectstore import KEYS, Server
from tests.orchestrator.run.test_search import TINY, finish, start, when
from tests.orchestrator.test_mistakes import told

TINIER = TINY.replace("evaluations: 12", "evaluations: 8").replace("{epochs: 2", "{epochs: 1")


def stage(run: ObjectPath) -> str:
    state = run / "state.json"
    return str(json.loads(state.read_bytes()).get("stage")) if state.exists() else ""


@pytest.mark.slow
def test_killed_resumed_generated_and_reported(s3: Server, tmp_path: Path) -> None:
    runs = as_path(s3.address("search/runs"))
    assert isinstance(runs, ObjectPath)
    run, options = runs / "tiny", ("--runs", runs.address)
    (tmp_path / "tiny.yaml").write_text(TINIER)
    process = start("search", str(tmp_path / "tiny.yaml"), "--name", "tiny", *options)

    def searching() -> bool:
        time.sleep(0.5)     # each look is a request
        return stage(run) == "search" and len(matching(run / "trials", "*.parquet")) >= 2

    when(process, searching)
    process.send_signal(signal.SIGKILL)
    process.wait()
    recorded = [trial.arch_id for trial in RunStore(run).read_trials()]
    assert len(matching(run / "lease", "*")) == 1        # nobody took it away

    output = finish(start("resume", "tiny", *options))      # whose process was of this machine: no waiting
    assert "report: s3://lab-runs/search/runs/tiny/report.html" in output, output
    trials = RunStore(run).read_trials()
    assert [trial.sequence for trial in trials] == list(range(len(trials))) and len(trials) >= 8
    assert [trial.arch_id for trial in trials][:len(recorded)] == recorded
    entries = json.loads((run / "generated.json").read_bytes())
    made = [entry for entry in entries if entry["feasible"]]
    assert made and all((run / entry["onnx"]).stat().st_size > 10_000 for entry in made)
    assert matching(run / "tensorboard", "events*") and not matching(run / "lease", "*")

    budget_ms = 1.2 * max(entry["latency_ms"] for entry in made)
    generated = start("generate", "tiny", "--budget", f"{budget_ms:.3f}ms", *options)
    report = start("report", runs.address.replace("/runs?", "/runs/tiny?"))
    listed = start("runs", *options)
    assert "generated architectures for 1 budget(s)" in finish(generated)
    assert finish(report) == "report: s3://lab-runs/search/runs/tiny/report.html\n"
    assert "tiny" in finish(listed) and generated.returncode == report.returncode == listed.returncode == 0
    assert len(json.loads((run / "generated.json").read_bytes())) == 3

    opened = open_run("tiny", runs.address)
    assert opened.stage == "done" and len(opened.trials()) == len(trials)
    assert opened.models()["onnx"][0].startswith("s3://lab-runs/search/runs/tiny/models/")
    page = (run / "report.html").read_text()
    assert "paretoray generate tiny --runs" in page
    texts = [path.read_text() for path in run.iterdir() if path.suffix in (".json", ".jsonl", ".yaml", ".html")]
    assert not any(KEYS["AWS_SECRET_ACCESS_KEY"] in text for text in [output, *texts])


def test_mistakes_are_one_sentence_before_anything_starts(s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    missing = s3.address("runs", bucket="no-such-lab")
    for arguments, reason in [
            (("search", str(config), "--runs", missing), "there is no bucket 'no-such-lab' there; create it"),
            (("resume", "tiny", "--runs", missing), "there is no bucket 'no-such-lab' there"),
            (("runs", "--runs", missing), "there is no bucket 'no-such-lab' there"),
            (("report", "tiny", "--runs", s3.address("runs")), "there is no run 'tiny' in s3://lab-runs/runs"),
            (("search", str(config), "--runs", "ftp://lab/runs"), "'ftp://' is no kind of store that runs can be kept"),
            (("search", str(config), "--runs", "/dev/null/runs"), "cannot write while writing /dev/null/runs"),
    ]:
        assert reason in told(monkeypatch, capsys, *arguments)
    with s3.checks_keys():
        line = told(monkeypatch, capsys, "search", str(config), "--runs", s3.address("denied"))
    assert "access is denied" in line and "AWS_SECRET_ACCESS_KEY" in line and KEYS["AWS_SECRET_ACCESS_KEY"] not in line
    assert not as_path(s3.address("denied")).exists()
