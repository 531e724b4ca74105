"""The same search on an existing cluster: by --address, and as a Ray job with the working directory uploaded."""
from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.orchestrator.run.test_search import PATIENCE_S, TINY, check_finished_run, finish, start

ROOT = Path(__file__).parents[3]
SCRIPTS = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[tuple[str, str]]:
    """(address, dashboard) of a cluster that somebody else started, with its default token authentication."""
    port, dashboard = free_port(), free_port()
    folder = tempfile.mkdtemp(prefix="head-")  # short: socket paths are limited to 107 characters
    environment = os.environ | {"PATH": f"{SCRIPTS}:{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(
        [str(SCRIPTS / "ray"), "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}",
         f"--dashboard-agent-listen-port={free_port()}", "--num-cpus=5", "--resources={\"latency_cpu\": 1}",
         f"--temp-dir={folder}", "--node-ip-address=127.0.0.1"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "will now block" in line:
            break
    assert process.poll() is None, "".join(lines)
    yield f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    process.wait(30)
    for child in children:
        if child.is_running():
            child.kill()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.soak
def test_search_by_address(head: tuple[str, str], tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    process = start("search", str(config), "--name", "there", "--runs", str(tmp_path / "runs"), "--address", head[0])
    output = finish(process)
    assert process.returncode == 0, output
    run = tmp_path / "runs" / "there"
    check_finished_run(run)
    known = [entry["budget_ms"] for entry in json.loads((run / "generated.json").read_text())]
    more = start("generate", "there", "--budget", f"{sum(known) / 2}ms", "--runs", str(run.parent), "--address",
                 head[0])
    output = finish(more)
    assert more.returncode == 0, output
    new = [entry for entry in json.loads((run / "generated.json").read_text()) if entry["budget_ms"] not in known]
    assert [entry["feasible"] for entry in new] == [True]


@pytest.mark.slow
def test_search_as_a_job(head: tuple[str, str], tmp_path: Path) -> None:
    """A copy of the checkout with a .git, a .venv and runs/: none of the three travels."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("searchspaces", "actors", "orchestrator", "configs"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".rayignore", ".gitignore", "pyproject.toml"):
        shutil.copy(ROOT / name, checkout / name)
    for name in (".git", ".venv", "runs"):
        (checkout / name).mkdir()
        (checkout / name / "big").write_bytes(os.urandom(1000))
    (checkout / "configs" / "tiny.yaml").write_text(TINY)
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    inner = f"ls -a; python -m orchestrator search configs/tiny.yaml --name job --runs {tmp_path / 'runs'}"
    job = subprocess.run([str(SCRIPTS / "ray"), "job", "submit", "--address", head[1], "--working-dir", str(checkout),
                          "--", "bash", "-c", inner], env=environment, capture_output=True, text=True,
                         timeout=PATIENCE_S)
    assert job.returncode == 0, job.stdout + job.stderr
    listing = job.stdout.split()
    assert "orchestrator" in listing
    assert not {".git", ".venv", "runs"} & set(listing)
    check_finished_run(tmp_path / "runs" / "job")
