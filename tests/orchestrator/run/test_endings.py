"""How a run ends that does not finish: what is left of it, and what its user reads last."""
from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import ray
from rich.console import Console

from orchestrator.config import dump_config, load_config
from orchestrator.record.store import RunStore
from orchestrator.run.search import Search
from searchspaces.errors import ClusterError
from tests.orchestrator.run.test_search import TINY, check_finished_run, finish, parts, stage, start, when

GONE_S = 30.0     # Ray's own agents would stay for more than that
TOY = "tests.orchestrator.cluster.nodetargets:ToyTarget"    # no node offers one


def test_only_a_new_run_that_recorded_nothing_leaves_no_folder(tmp_path: Path, ray_local: None) -> None:
    (tmp_path / "toy.yaml").write_text(TINY.replace("onnx_cpu", f'"{TOY}"'))
    config, console = load_config(tmp_path / "toy.yaml"), Console(quiet=True)
    with pytest.raises(ClusterError, match="no node of the cluster announces a device") as failed:
        Search(config, runs=tmp_path, name="new", console=console).run()
    assert failed.value.__notes__ == ["run new ended with an error before anything was recorded; its folder is removed"]
    assert not (tmp_path / "new").exists()
    RunStore.create(tmp_path, "known", dump_config(config), {})
    with pytest.raises(ClusterError) as failed:
        Search.resume("known", runs=tmp_path, console=console).run()
    assert failed.value.__notes__[0].endswith("in stage 'measure'; everything recorded is kept, go on with: "
                                              f"paretoray resume known --runs {tmp_path}")
    assert (tmp_path / "known" / "config.yaml").exists()


@pytest.mark.parametrize("table", ["latency", "trials", "checkpoints"])
def test_what_counts_as_recorded(tmp_path: Path, table: str) -> None:
    store = RunStore.create(tmp_path, "run", "", {})
    store.event("stage", stage="measure")
    store.update_state(stage="measure")
    assert not store.recorded
    if table == "checkpoints":
        (store.path / table).mkdir()
        (store.path / table / "supernet-0.safetensors").touch()
    else:
        getattr(store, table).append([{"arch_id": "a", "tokens": [0], "error": "worker lost"}])
    assert store.recorded


def part_of(driver: int, name: str) -> psutil.Process:
    return next(child for child in psutil.Process(driver).children() if child.name() == name)


@pytest.mark.soak
def test_whatever_dies_the_last_line_says_how_to_resume_and_nothing_stays(tmp_path: Path, ray_local: None) -> None:
    """The raylet, the GCS and then the driver itself are killed; another Ray (ours) and a stranger in the session's
    folder are left alone."""
    run, options = tmp_path / "tiny", ("--runs", str(tmp_path))
    (tmp_path / "tiny.yaml").write_text(TINY)
    arguments = ("search", str(tmp_path / "tiny.yaml"), "--name", "tiny", *options)
    moments: list[tuple[str, Callable[[], bool]]] = [
        ("raylet", lambda: parts(run / "latency") >= 1),
        ("gcs_server", lambda: stage(run) == "train"),
        ("driver", lambda: parts(run / "trials") >= 1),
    ]
    for victim, moment in moments:
        process = start(*arguments)
        when(process, moment)
        driver = psutil.Process(process.pid)
        family = driver.children(recursive=True)
        folder = next(argument.partition("=")[2] for argument in part_of(process.pid, "gcs_server").cmdline()
                      if argument.startswith("--log_dir="))
        stranger = subprocess.Popen(["tail", "-f", f"{folder}/gcs_server.out"], stdout=subprocess.DEVNULL)
        (driver if victim == "driver" else part_of(process.pid, victim)).kill()
        output = finish(process)
        assert process.returncode == (-signal.SIGKILL if victim == "driver" else 2), output
        last = output.splitlines()[-1]
        assert last.startswith("run tiny "), output
        assert last.endswith(f"go on with: paretoray resume tiny --runs {tmp_path}"), output
        assert ("was killed in stage 'search'" if victim == "driver" else "ended with an error in stage") in last
        assert victim == "driver" or f"error: Ray's {victim} on this machine was killed by signal 9" in output
        assert "Traceback" not in output
        assert not psutil.wait_procs(family, timeout=GONE_S)[1]
        assert stranger.poll() is None and ray.get(ray.put(victim)) == victim
        stranger.kill()
        stranger.wait()
        arguments = ("resume", "tiny", *options)
    process = start(*arguments)
    output = finish(process)
    assert process.returncode == 0, output
    check_finished_run(run)
