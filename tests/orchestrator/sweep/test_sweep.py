"""Whole sweeps of table look-ups: on a cluster that is too small, killed, resumed, one search stopped early."""
from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from rich.console import Console

from orchestrator.cli import main
from orchestrator.frontier import hypervolume
from orchestrator.record.store import RunStore
from orchestrator.sweep.folder import SweepFolder, resume_command
from orchestrator.sweep.recorded import State
from orchestrator.sweep.results import sweep_rows
from orchestrator.sweep.settings import parse_sweep
from orchestrator.sweep.sweep import Sweep
from searchspaces.errors import ClusterError, ParetorayError, StoreError
from tests.orchestrator.cluster.test_jobs import free_port
from tests.orchestrator.cluster.test_nodes import end, start_ray
from tests.orchestrator.run.test_architectures import LATENCY_MS, TEST, table_config
from tests.orchestrator.run.test_search import finish, parts, start, when

RUNG, EVALUATIONS = 8, 90
HEAVY = "tests.orchestrator.plugins:Heavy"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two CPUs."""
    port, folder = free_port(), tempfile.mkdtemp(prefix="sweep-")  # short: socket paths are limited to 107 characters
    head = start_ray(f"ray start --head --port={port} --num-cpus=2 --include-dashboard=false --temp-dir={folder}")
    yield f"127.0.0.1:{port}"
    end(head)
    shutil.rmtree(folder, ignore_errors=True)


def sweep_of_tables(folder: Path, **changes: Any) -> dict[str, Any]:
    """Of two searches: the second finds far less, at a second per evaluation. Each holds a CPU, for its target, when
    it asks for a second one: two at a time would wait for each other for ever on a cluster of two."""
    base = table_config(folder / "t.parquet").model_dump(mode="json")
    base["targets"][0] |= {"name": "tests.orchestrator.plugins:BusyTable"}
    base |= {"search": {"evaluations": EVALUATIONS}, "controller": HEAVY}
    return {"base": base, "over": {"controller.heavy": [False, True]}, "parallel": 2,
            "stop_early": {"after": RUNG, "factor": 4}} | changes


def written(folder: Path, **changes: Any) -> str:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep_of_tables(folder, **changes)))
    return str(path)


@pytest.mark.soak
def test_a_killed_sweep_goes_on_where_it_was(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    sweep, options = tmp_path / "runs" / "two", ("--runs", str(tmp_path / "runs"), "--address", address)
    process = start("sweep", written(tmp_path), "--name", "two", *options)
    when(process, lambda: any(parts(path / "trials") for path in sweep.glob("002-*")))
    process.send_signal(signal.SIGKILL)
    output = finish(process)
    assert "1 at a time instead of 2 (each needs 2 CPUs, of 2)" in output
    before = {path.parent.parent.name: RunStore(path.parent.parent).trials.rows
              for path in sweep.glob("*/trials/part-000000000.parquet")}

    process = start("sweep", "--resume", "two", *options)
    output = finish(process)
    assert process.returncode == 0, output
    members = SweepFolder(sweep).members
    assert [member.state for member in members] == [State.DONE, State.STOPPED], output
    assert members[0].evaluations >= EVALUATIONS and members[1].evaluations == RUNG
    for member in members:
        trials = RunStore(sweep / member.name).read_trials()
        assert [trial.sequence for trial in trials] == list(range(len(trials)))
        assert len(trials) >= before[member.name]
        assert (len(trials) >= EVALUATIONS) == (member.state is State.DONE)
    check_comparison(sweep)
    for name in ("two", "001-False"):     # the pages of the sweep and of a member, as a user asks for them
        root = sweep.parent if name == "two" else sweep
        monkeypatch.setattr("sys.argv", ["paretoray", "report", name, "--runs", str(root)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
    assert str(sweep / "001-False" / "report.html") in re.sub(r"\s", "", capsys.readouterr().out)


def check_comparison(sweep: Path) -> None:
    """sweep.json against the tables, by other means."""
    results = json.loads((sweep / "sweep.json").read_text())["results"]
    reference_ms = results["reference_ms"]
    first = json.loads((sweep / "001-False" / "state.json").read_text())
    assert reference_ms == first["targets"]["table"]["slowest_ms"]
    for row in results["searches"]:
        trials = RunStore(sweep / row["name"]).read_trials()
        latency = np.array([trial.latency_ms for trial in trials], dtype=float)
        accuracy = np.array([trial.accuracy for trial in trials], dtype=float)
        assert row["hypervolume"] == pytest.approx(hypervolume(latency, accuracy, reference_ms) / reference_ms)
        assert row["best"] == pytest.approx([max(accuracy[latency <= ms]) if (latency <= ms).any() else None
                                             for ms in results["budgets_ms"]])
    entries = json.loads((sweep / "001-False" / "generated.json").read_text())
    lost = [0.009 * TEST[entry["budget_ms"] >= LATENCY_MS].max() - entry["test_accuracy"] for entry in entries]
    assert results["searches"][0]["regret"] == pytest.approx(np.mean(lost)) and min(lost) >= 0
    assert results["searches"][1]["regret"] is None
    page = (sweep / "report.html").read_text()
    assert page.count("/report.html\">") == 2 and "Regret (points)" in page and "finished" in page


@pytest.mark.soak
def test_ctrl_c_and_the_death_of_a_search(tmp_path: Path) -> None:
    """In the Ray that a sweep starts for itself, two at a time; the searches are Optuna's."""
    pytest.importorskip("optuna")
    sweep = tmp_path / "runs" / "three"
    path = written(tmp_path, over={"controller.heavy": [True, False], "seed": {"integers": [0, 9]}}, search="optuna",
                   samples=3, parallel=2, stop_early=None,
                   base=sweep_of_tables(tmp_path)["base"] | {"search": {"evaluations": 12}})
    options = ("--runs", str(sweep.parent))
    process = start("sweep", path, "--name", "three", *options)
    when(process, lambda: any(parts(run / "trials") for run in sweep.glob("0*")))
    process.send_signal(signal.SIGINT)
    output = finish(process)
    assert process.returncode == 130 and resume_command(sweep) in output.splitlines()[-1], output
    begun = SweepFolder(sweep).members
    assert 1 <= len(begun) <= 3
    process = start("sweep", "--resume", *options)      # the newest that is not done
    when(process, lambda: bool(searches(process.pid)))
    searches(process.pid)[0].kill()
    output = finish(process)
    assert process.returncode == 0, output
    assert "its process died; it is started again" in output
    members = SweepFolder(sweep).members
    assert [(m.name, m.values) for m in members[:len(begun)]] == [(m.name, m.values) for m in begun]
    assert [m.state for m in members] == [State.DONE] * 3 and all(m.evaluations >= 12 for m in members)


@pytest.mark.soak
def test_a_search_that_fails_does_not_stop_the_others(ray_local: None, tmp_path: Path) -> None:
    """In the Ray of the caller. No cell answers in half a millisecond."""
    raw = sweep_of_tables(tmp_path, over={"budgets": [[0.5], [1.5]]}, stop_early=None)
    raw["base"]["search"]["evaluations"] = 12
    with (tmp_path / "log").open("w") as log:
        sweep = Sweep(parse_sweep(raw, "test"), runs=tmp_path, name="s", console=Console(file=log, width=120))
        with pytest.raises(ParetorayError, match=r"1 of 2 searches of sweep s failed \(001-0.5\)"):
            sweep.run()
    failed, done = SweepFolder(tmp_path / "s").members
    assert (failed.state, done.state) == (State.FAILED, State.DONE)
    assert "budget" in failed.note and f"001-0.5: failed: {failed.note}" in (tmp_path / "log").read_text()
    page = (tmp_path / "s" / "report.html").read_text()
    assert escape(failed.note) in page and "1 of 2 not done" in page
    assert [row["run"] for row in sweep_rows(tmp_path)] == ["s/ (sweep)"]


def searches(driver: int) -> list[psutil.Process]:
    """Processes in which a search of the sweep runs."""
    found = []
    for child in psutil.Process(driver).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.cmdline()[:1] == ["ray::SearchActor.run"]:
                found.append(child)
    return found


def test_what_never_finds_room_and_names_that_are_taken(ray_local: None, tmp_path: Path) -> None:
    """`ray_local` has four CPUs."""
    raw = sweep_of_tables(tmp_path)
    raw["base"]["search"]["rollouts"] = 20
    quiet = Console(quiet=True)
    with pytest.raises(ClusterError, match="needs 21 CPUs and the cluster has 4"):
        Sweep(parse_sweep(raw, "test"), runs=tmp_path, name="big", console=quiet).run()
    assert not (tmp_path / "big").exists()
    raw["base"]["search"]["rollouts"] = 1
    Sweep(parse_sweep(raw, "test"), runs=tmp_path, name="same", console=quiet)
    with pytest.raises(StoreError, match="'same' exists already in .*choose another --name"):
        Sweep(parse_sweep(raw, "test"), runs=tmp_path, name="same", console=quiet)
