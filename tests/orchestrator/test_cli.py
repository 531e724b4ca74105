"""The commands around a search, as a user types them."""
from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest

from orchestrator.data.datasets import DataSettings, load_dataset
from orchestrator.handover.paired import unpacked
from orchestrator.record.goals import target_state
from orchestrator.record.store import RunStore
from tests.orchestrator.run.test_search import (
    PATIENCE_S,
    ROOT,
    TINY,
    check_finished_run,
    command,
    finish,
    parts,
    stage,
    start,
    when,
)

PNAG = "controller: {name: pnag, evaluator: {least_steps: 20}, generator: {updates: 40, round_updates: 5}}"


def paretoray(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=cwd, capture_output=True, text=True, timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run of the real controller, killed in its search and resumed to the end. Its files preprocess."""
    folder = tmp_path_factory.mktemp("cli")
    run, options = folder / "runs" / "tiny", ("--runs", str(folder / "runs"))
    (folder / "tiny.yaml").write_text(TINY.replace("controller: random", PNAG).replace(
        "delivery: {", "delivery: {preprocess_in_model: true, "))
    process = start("search", str(folder / "tiny.yaml"), "--name", "tiny", *options)
    when(process, lambda: stage(run) == "search" and parts(run / "trials") >= 1)
    process.kill()
    process.wait()
    recorded = RunStore(run).read_trials()
    process = start("resume", "tiny", *options)
    output = finish(process)
    assert process.returncode == 0, output
    assert recorded and RunStore(run).read_trials()[:len(recorded)] == recorded
    return run


def test_finished_run(finished: Path) -> None:
    assert check_finished_run(finished) == 2
    events = [json.loads(line) for line in (finished / "events.jsonl").read_text().splitlines()]
    epoch = [event for event in events if event["kind"] == "epoch"][-1]
    assert epoch["updates_most"] == max(most for most, _ in epoch["updates"].values()) > 0
    assert epoch["updates_least"] == min(least for _, least in epoch["updates"].values())


def test_generate_answers_a_new_budget(finished: Path) -> None:
    known = [entry["budget_ms"] for entry in json.loads((finished / "generated.json").read_text())]
    budget = sum(known[:2]) / 2
    done = paretoray("generate", "tiny", "--budget", f"{1000 * budget}us", "--runs", str(finished.parent))
    assert done.returncode == 0, done.stdout + done.stderr
    entries = {entry["budget_ms"]: entry for entry in json.loads((finished / "generated.json").read_text())}
    assert set(known) < set(entries)
    new = next(entry for key, entry in entries.items() if key not in known)
    assert new["feasible"]
    assert 0 < new["probability_best"] <= 1 and new["considered"] >= new["considered_trained"] >= 1
    assert new["runner_up"] != new["arch_id"] and (new["expected_gain"] is None) == (new["considered"] == 1)
    assert "none of the other networks considered" in (finished / "report.html").read_text()
    assert new["latency_ms"] <= new["budget_ms"] == pytest.approx(budget)
    sidecar = json.loads((finished / new["onnx"]).with_suffix(".json").read_text())
    assert sidecar["parity_max_difference"] < 1e-3
    assert sidecar["input"]["layout"] == "NHWC uint8" and sidecar["input"]["timed_size"] == [8, 8]
    assert "uint8" in sidecar["targets"]["onnx_cpu"]["target"]["runtime"]
    images = load_dataset(DataSettings(limit=300)).test
    session = onnxruntime.InferenceSession(finished / new["onnx"])
    right = [session.run(None, {"images": image[None]})[0].argmax() == label
             for image, label in zip(images.images, images.labels)]
    assert np.mean(right) == pytest.approx(sidecar["accuracy"]["test"])
    validation = load_dataset(DataSettings(limit=300)).val
    hits = [session.run(None, {"images": image[None]})[0].argmax() == label
            for image, label in zip(validation.images, validation.labels)]
    assert (unpacked(sidecar["validation_hits"], len(validation)) == hits).all()
    assert sidecar["targets"]["onnx_cpu"] == {
        key: value for key, value in target_state(RunStore(finished), "onnx_cpu").items()
        if key in ("target_id", "target", "reference_ms")}


def test_generate_refuses_what_nobody_meets(finished: Path) -> None:
    before = (finished / "generated.json").read_text()
    done = paretoray("generate", "tiny", "--budget", "1us", "--runs", str(finished.parent))
    assert done.returncode == 2
    assert "reachable range" in done.stderr
    assert (finished / "generated.json").read_text() == before
    done = paretoray("generate", "tiny", "--budget", "fast", "--runs", str(finished.parent))
    assert done.returncode == 2
    assert "'fast' is not a latency budget" in done.stderr


def test_generate_needs_a_finished_run_and_whole_checkpoints(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "tiny")
    store = RunStore(tmp_path / "tiny")
    (tmp_path / "tiny" / "checkpoints" / "controller.safetensors").write_bytes(b"damaged")
    done = paretoray("generate", "tiny", "--budget", "1ms", "--runs", str(tmp_path))
    assert done.returncode == 2
    assert "damaged" in done.stderr
    store.update_state(stage="search")
    done = paretoray("generate", "tiny", "--budget", "1ms", "--runs", str(tmp_path))
    assert done.returncode == 2
    assert "paretoray resume tiny" in done.stderr


def test_resuming_a_finished_run_changes_nothing(finished: Path) -> None:
    before = RunStore(finished).read_trials()
    done = paretoray("resume", "tiny", "--runs", str(finished.parent))
    assert done.returncode == 0, done.stdout + done.stderr
    assert RunStore(finished).read_trials() == before


def test_runs_and_report(finished: Path) -> None:
    listing = paretoray("runs", "--runs", str(finished.parent))
    assert "tiny" in listing.stdout
    assert "done" in listing.stdout
    (finished / "report.html").unlink()
    assert paretoray("report", "tiny", "--runs", str(finished.parent)).returncode == 0
    assert (finished / "report.html").exists()
    missing = paretoray("report", "nobody", "--runs", str(finished.parent))
    assert missing.returncode == 2
    assert "known runs: tiny" in missing.stderr


@pytest.mark.soak
def test_measure_writes_and_continues_a_table(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    out = tmp_path / "table.parquet"
    for count in (3, 5):
        done = paretoray("measure", str(tmp_path / "tiny.yaml"), "--count", str(count), "--out", str(out))
        assert done.returncode == 0, done.stdout + done.stderr
    rows = pq.read_table(out).to_pylist()
    assert len({row["arch_id"] for row in rows}) == len(rows) >= 5
    assert all(row["latency_ms"] > 0 and row["candidate_rounds_ms"] for row in rows)


def test_targets() -> None:
    rows = json.loads(paretoray("targets", "--json").stdout)
    assert [(row["kind"], row["device"], row["state"], row["health"]) for row in rows
            if row["kind"] == "onnx_cpu"] == [("onnx_cpu", "latency_cpu", "idle", "ok")]


def test_check_certifies_and_refuses(tmp_path: Path) -> None:
    good = paretoray("check", "configs.own_space:PlainCnn")
    assert good.returncode == 0, good.stdout + good.stderr
    (tmp_path / "broken.py").write_text(
        "from configs.own_space import PlainCnn\n"
        "class Broken(PlainCnn):\n"
        "    def cost(self, tokens_NT):\n"
        "        madds, params = super().cost(tokens_NT)\n"
        "        return madds + 1, params\n")
    bad = subprocess.run(command("check", "broken:Broken"), cwd=tmp_path, capture_output=True, text=True,
                         timeout=PATIENCE_S, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)})
    assert bad.returncode == 2
    assert "cost" in bad.stdout
    assert "Traceback" not in bad.stderr
    missing = paretoray("check", "nowhere:Nothing")
    assert missing.returncode == 2
    assert "cannot import module 'nowhere'" in missing.stderr


def test_help_teaches() -> None:
    text = paretoray("--help").stdout
    for name in ("search", "resume", "generate", "measure", "merge", "targets", "worker", "dashboard", "report", "runs",
                 "check", "init", "keys"):
        assert name in text
