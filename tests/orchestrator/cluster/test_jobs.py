"""The same search on an existing cluster: by --address, and as a Ray job with the working directory uploaded."""
from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray import __version__ as ray_version

from orchestrator.cluster.admission import TOKEN_FILE, has_token, make_token
from orchestrator.cluster.jobs import JOB_CONFIG, runs_may_be_lost, shown_path, submission_id
from orchestrator.record.dashboard import ALERTS, DISCOVERY_FILE, PANELS, SCRAPE, write_dashboard
from orchestrator.record.raymetrics import FAILED
from orchestrator.record.store import RunStore
from tests.orchestrator.run.test_search import PATIENCE_S, TINY, check_finished_run, finish, parts, start

ROOT = Path(__file__).parents[3]
SCRIPTS = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Head:
    """A cluster that somebody else started: `address` of its GCS, `dashboard` of its jobs, Ray's `folder`."""

    address: str
    dashboard: str
    folder: Path


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """With its default token authentication."""
    if not has_token():
        make_token()
    port, dashboard = free_port(), free_port()
    folder = tempfile.mkdtemp(prefix="head-")  # short: socket paths are limited to 107 characters
    environment = os.environ | {"PATH": f"{SCRIPTS}:{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0",
                                "RAY_metrics_report_interval_ms": "3000"}
    process = subprocess.Popen(
        [str(SCRIPTS / "ray"), "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}",
         f"--dashboard-agent-listen-port={free_port()}", "--num-cpus=5", "--resources={\"latency_cpu\": 1}",
         f"--temp-dir={folder}"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "will now block" in line:
            break
    assert process.poll() is None, "".join(lines)
    yield Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", Path(folder))
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    process.wait(30)
    for child in children:
        if child.is_running():
            child.kill()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.soak
def test_search_by_address(head: Head, tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    process = start("search", str(config), "--name", "there", "--runs", str(tmp_path / "runs"), "--address",
                    head.address)
    output = finish(process)
    assert process.returncode == 0, output
    run = tmp_path / "runs" / "there"
    check_finished_run(run)
    known = [entry["budget_ms"] for entry in json.loads((run / "generated.json").read_text())]
    more = start("generate", "there", "--budget", f"{sum(known) / 2}ms", "--runs", str(run.parent), "--address",
                 head.address)
    output = finish(more)
    assert more.returncode == 0, output
    new = [entry for entry in json.loads((run / "generated.json").read_text()) if entry["budget_ms"] not in known]
    assert [entry["feasible"] for entry in new] == [True]


@pytest.mark.soak
def test_two_searches_share_the_only_device(head: Head, tmp_path: Path) -> None:
    """Neither gives it up, and both measure again when they hand over."""
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY.replace("rollouts: 2", "rollouts: 1").replace("supernet: {", "supernet: {workers: 1, "))
    names = ("first", "second")
    both = [start("search", str(config), "--name", name, "--runs", str(tmp_path / "runs"), "--address", head.address)
            for name in names]
    outputs = [process.communicate(timeout=4 * PATIENCE_S)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    waited = [f"target onnx_cpu waits for its turn: {other} measures on latency_cpu" in output
              for output, other in zip(outputs, reversed(names))]
    assert any(waited), outputs
    for name in names:
        check_finished_run(tmp_path / "runs" / name)


def checkout(folder: Path) -> Path:
    """A copy of this one with a .git, a .venv and runs/: none of the three travels."""
    for name in ("searchspaces", "actors", "orchestrator", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".rayignore", ".gitignore", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    for name in (".git", ".venv", "runs"):
        (folder / name).mkdir()
        (folder / name / "big").write_bytes(os.urandom(1000))
    (folder / "configs" / "tiny.yaml").write_text(TINY)
    return folder


def job(head: Head, *arguments: str) -> subprocess.Popen[str]:
    command, *rest = arguments
    return subprocess.Popen([str(SCRIPTS / "ray"), "job", command, "--address", head.dashboard, *rest], text=True,
                            env=os.environ | {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def status(head: Head, submission_id: str) -> dict[str, Any]:
    """What `ray job status` and the dashboard show."""
    token = os.environ.get("RAY_AUTH_TOKEN") or TOKEN_FILE.read_text()
    request = urllib.request.Request(f"{head.dashboard}/api/jobs/{submission_id}",
                                     headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return dict(json.load(answer))


def scraped(head: Head) -> set[str]:
    """Names of all series that Ray shows now, as Prometheus finds them."""
    (ports,) = json.loads((head.folder / DISCOVERY_FILE).read_text())
    names: set[str] = set()
    for target in ports["targets"]:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
            names |= {line.decode().split("{")[0] for line in answer if not line.startswith(b"#")}
    return names


@pytest.mark.slow
def test_search_as_a_job_is_watched_stopped_and_resumed(head: Head, tmp_path: Path) -> None:
    """Its status tells the progress, its metrics are those of the dashboard, and a second job goes on."""
    (tmp_path / "checkout").mkdir()
    run, names = tmp_path / "runs" / "job", set[str]()
    patience = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})
    submit = ("submit", "--working-dir", str(checkout(tmp_path / "checkout")), "--runtime-env-json", patience)
    with prometheus(head, tmp_path) as asked:
        inner = f"ls -a; exec python -m orchestrator search configs/tiny.yaml --name job --runs {run.parent}"
        output = finish(job(head, *submit, "--no-wait", "--submission-id", "first", "--", "bash", "-c", inner))
        assert "first" in output
        deadline = time.monotonic() + PATIENCE_S
        while parts(run / "trials") < 2:
            assert status(head, "first")["status"] in ("PENDING", "RUNNING") and time.monotonic() < deadline
            names |= scraped(head)
            time.sleep(0.5)
        assert status(head, "first")["message"].startswith("search: ")
        finish(job(head, "stop", "first"))
        assert status(head, "first")["status"] == "STOPPED"
        output = finish(job(head, "logs", "first"))
        listing = output.split()
        assert "orchestrator" in listing and not {".git", ".venv", "runs"} & set(listing)
        assert f"go on with: paretoray resume job --runs {run.parent}" in output, output
        recorded = RunStore(run).read_trials()
        inner = f"exec python -m orchestrator resume job --runs {run.parent}"
        second = job(head, *submit, "--", "bash", "-c", inner)
        while second.poll() is None:
            names |= scraped(head)
            time.sleep(1.0)
        output = finish(second)
        assert second.returncode == 0, output
        assert f"report: {run / 'report.html'} (on {socket.gethostname()})" in output
        for expression in [panel.expression for panel in PANELS]:
            assert asked(expression.replace("$run", "job")), f"no data for {expression}"
        for alert in ALERTS:
            asked(alert.expression)
    check_finished_run(run)
    assert recorded and RunStore(run).read_trials()[:len(recorded)] == recorded
    wanted = {name for shown in (*PANELS, *ALERTS) for name in re.findall(r"\bray_\w+", shown.expression)}
    assert wanted - names <= {FAILED.series}, "not shown by Ray, but in the dashboard (no trial failed)"


def test_what_a_driver_knows_of_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(JOB_CONFIG, raising=False)
    assert submission_id() == runs_may_be_lost(Path("runs")) == "" and shown_path(Path("runs/a")) == "runs/a"
    monkeypatch.setenv(JOB_CONFIG, json.dumps({"metadata": {"job_submission_id": "mine"}}))
    assert submission_id() == "mine"
    assert shown_path(Path("runs/a")) == f"{tmp_path}/runs/a (on {socket.gethostname()})"
    assert runs_may_be_lost(Path("runs")).startswith(f"{tmp_path}/runs is in this job's copy of the working directory")
    assert runs_may_be_lost(Path("/elsewhere/runs")) == ""


@contextlib.contextmanager
def prometheus(head: Head, folder: Path) -> Iterator[Callable[[str], list[Any]]]:
    """Debian's, with the files that the command writes; what it answers to an expression over the last ten minutes.
    Where it is not installed every expression has an answer."""
    program = shutil.which("prometheus") or shutil.which(str(ROOT / ".venv" / "prometheus" / "usr/bin/prometheus"))
    if program is None:
        yield lambda expression: ["no prometheus here"]
        return
    configuration = write_dashboard(folder / "monitoring", head.folder)[-1]
    configuration.write_text(configuration.read_text().replace(SCRAPE, "2s"))
    port = free_port()
    process = subprocess.Popen(
        [program, f"--config.file={configuration}", f"--storage.tsdb.path={folder / 'tsdb'}",
         f"--web.listen-address=127.0.0.1:{port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ask(expression: str) -> list[Any]:
        now = time.time()
        query = urllib.parse.urlencode({"query": expression, "start": now - 600, "end": now, "step": 2})
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query_range?{query}", timeout=30) as answer:
            return list(json.load(answer)["data"]["result"])

    try:
        yield ask
    finally:
        process.kill()
        process.wait()


ASKED = """
import json, sys
from orchestrator.cluster.admission import check_admission
from orchestrator.cluster.joining import prepare_environment
from searchspaces.errors import ClusterError
address, dashboard = sys.argv[1:]
prepare_environment(address)
from ray._private.ray_constants import KV_NAMESPACE_CLUSTER
from ray._raylet import GcsClient
def asked(where):
    try:
        check_admission(where)
        print("welcome")
    except ClusterError as error:
        print(error)
store, key = GcsClient(address=address), b"CLUSTER_METADATA"
known = store.internal_kv_get(key, namespace=KV_NAMESPACE_CLUSTER)
asked(address)
try:
    for change in ({"ray_version": "2.41.0"}, {"python_version": "3.9.1"}):
        changed = json.dumps(json.loads(known) | change).encode()
        store.internal_kv_put(key, changed, True, namespace=KV_NAMESPACE_CLUSTER)
        asked(address)
finally:
    store.internal_kv_put(key, known, True, namespace=KV_NAMESPACE_CLUSTER)
asked(dashboard)
"""


@pytest.mark.slow
def test_a_cluster_that_cannot_be_joined_is_refused_in_one_sentence(head: Head) -> None:
    """Another Ray and Python are what the cluster's own store says; the token is a wrong one."""
    wrong = start("targets", "--no-probe", "--address", head.address, environment={"RAY_AUTH_TOKEN": "0" * 64})
    output = finish(wrong)
    assert wrong.returncode == 2 and output.splitlines() == [
        f"error: the Ray cluster at {head.address} refuses the token in RAY_AUTH_TOKEN; bring ~/.ray/auth_token of its "
        f"head to {TOKEN_FILE} on this machine, and set RAY_AUTH_MODE=token"]
    dashboard = head.dashboard.removeprefix("http://")
    done = subprocess.run([sys.executable, "-c", ASKED, head.address, dashboard], cwd=ROOT, capture_output=True,
                          text=True, timeout=PATIENCE_S)
    mine = f"Python {platform.python_version()}"
    assert done.stdout.splitlines() == [
        "welcome",
        f"the cluster at {head.address} runs Ray 2.41.0 with {mine}, this machine has Ray {ray_version} with {mine}; "
        "install the same on both",
        f"the cluster at {head.address} runs Ray {ray_version} with Python 3.9.1, this machine has Ray {ray_version} "
        f"with {mine}; install the same on both",
        f"what listens at {dashboard} does not answer as a Ray cluster (UNAVAILABLE); give the address of its head, "
        "port 6379 where nobody chose another (8265 is the dashboard's)"], done.stdout + done.stderr
    port = int(dashboard.rpartition(":")[2])
    listening = {each.laddr.ip for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN
                 and each.laddr.port == port}
    assert listening == {"127.0.0.1"}, "nobody asked for a dashboard that others reach"


@pytest.mark.soak
def test_a_working_directory_that_is_too_large(head: Head, tmp_path: Path) -> None:
    """Ray takes 512 MB. It says what to do, and .rayignore does it."""
    with (tmp_path / "images.bin").open("wb") as file:
        file.truncate(600 * 2**20)
    submit = ("submit", "--working-dir", str(tmp_path), "--", "ls", "-a")
    refused = job(head, *submit)
    output = finish(refused)
    assert refused.returncode != 0 and "exceeds the maximum size" in output and ".rayignore" in output, output
    (tmp_path / ".rayignore").write_text("images.bin\n")
    accepted = job(head, *submit)
    output = finish(accepted)
    assert accepted.returncode == 0 and "\nimages.bin" not in output, output
