"""Two nodes of a real cluster: the second joins with the line of `paretoray worker`, `paretoray targets` shows both."""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from actors.targets.catalogue import TARGETS
from orchestrator.resources.health import DeviceRow, ago, list_targets, targets_table
from tests.orchestrator.cluster.nodetargets import NETWORKS, SICK, WELL, Needy
from tests.orchestrator.cluster.test_jobs import SCRIPTS, free_port
from tests.orchestrator.run.test_search import PATIENCE_S, ROOT, TINY, command

MODULE = "tests.orchestrator.cluster.nodetargets"
TOY = f"{MODULE}:ToyTarget"
ENVIRONMENT = os.environ | {"PATH": f"{SCRIPTS}:{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0",
                            "PYTHONPATH": str(ROOT)}


def start_ray(line: str) -> subprocess.Popen[str]:
    """A shell's line; returns when the node is up."""
    private = f"--block --node-ip-address=127.0.0.1 --dashboard-agent-listen-port={free_port()}"
    process = subprocess.Popen(["bash", "-c", f"{line} {private}"], env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    await_line(process, "will now block")
    return process


def await_line(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return
    raise AssertionError("".join(lines))


def end(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> int:
    """The exit code; nothing that it started is left."""
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(number)
    code = process.wait(60)
    for child in psutil.wait_procs(children, timeout=10)[1]:
        child.kill()
    return code


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A head that measures its processor."""
    port = free_port()
    folder = tempfile.mkdtemp(prefix="nodes-")  # short: socket paths are limited to 107 characters
    head = start_ray(f"ray start --head --port={port} --num-cpus=2 --include-dashboard=false --temp-dir={folder} "
                     "--resources='{\"latency_cpu\": 1}' --node-name=head")
    yield f"127.0.0.1:{port}"
    end(head)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def toys(address: str) -> Iterator[subprocess.Popen[str]]:
    """The node with the toys."""
    line = paretoray("worker", "--address", address, "--target", TOY).stdout.strip()
    process = start_ray(f"{line} --node-name=toys")
    yield process
    end(process)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("nodes") / "toy.yaml"
    path.write_text(TINY.replace("onnx_cpu", f'"{TOY}"'))
    return str(path)


def paretoray(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(*arguments), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
                          timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def targets(*arguments: str) -> dict[str, dict[str, Any]]:
    rows = json.loads(paretoray("targets", "--json", *arguments).stdout)
    return {row["device"] or row["node"]: row for row in rows}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_devices_nobody_uses_are_looked_at(address: str, toys: subprocess.Popen[str], config: str) -> None:
    rows = targets("--address", address, "--config", config)
    assert {device: (row["node"], row["kind"], row["state"]) for device, row in rows.items()} == {
        "latency_cpu": ("head", "onnx_cpu", "idle"), WELL: ("toys", TOY, "idle"), SICK: ("toys", TOY, "idle")}
    assert rows["latency_cpu"]["health"] == rows[WELL]["health"] == "ok"
    assert rows["latency_cpu"]["identity"].startswith("onnx_cpu-") and rows[WELL]["identity"].startswith("toy-")
    assert rows[SICK]["health"] == "device 'it's \"$HOME\"' is hot"


@pytest.mark.slow
def test_device_in_a_measurement_answers_and_is_not_disturbed(address: str, toys: subprocess.Popen[str],
                                                              tmp_path: Path) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    driver = subprocess.Popen([sys.executable, "-m", MODULE, address, str(log), str(gate)], cwd=ROOT, env=ENVIRONMENT,
                              text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        await_line(driver, "submitted")
        until(log.exists)                       # the first network is being measured, until the gate opens
        rows = targets("--address", address)    # finds the workers without their configuration
        assert (rows[WELL]["state"], rows[WELL]["queue"], rows[WELL]["health"]) == ("measuring", NETWORKS - 1, "ok")
        assert (rows[WELL]["node"], rows[WELL]["kind"], rows[WELL]["name"]) == ("toys", TOY, "a toy")
        assert rows[WELL]["measured"] == 0 and rows[WELL]["drift"] is None
        assert rows[SICK]["state"] == "quarantined" and "is hot" in rows[SICK]["health"]
        assert rows["latency_cpu"]["state"] == "in use" and "other work" in rows["latency_cpu"]["health"]
        assert log.read_text() == "visit\n"
        gate.touch()
        await_line(driver, f"measured {NETWORKS}")
        assert driver.wait(60) == 0
    finally:
        driver.kill()
        driver.wait()
    assert log.read_text() == NETWORKS * "visit\n"


@pytest.mark.slow
def test_node_that_is_started_here_ends_with_the_command_and_is_gone(address: str) -> None:
    node = subprocess.Popen(command("worker", "--address", address, "--target", TOY, "--start"), cwd=ROOT, text=True,
                            env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    await_line(node, "will now block")
    assert end(node, signal.SIGINT) == 128 + signal.SIGINT
    rows: dict[str, dict[str, Any]] = {}

    def gone() -> list[str]:
        rows.update(targets("--address", address, "--no-probe"))
        return [row["health"] for row in rows.values() if row["state"] == "gone"]

    until(lambda: bool(gone()))
    assert gone()[0].startswith("the node is gone")
    assert (rows["latency_cpu"]["state"], rows["latency_cpu"]["identity"]) == ("not probed", "")


def test_options_that_only_a_configuration_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(TARGETS, "needy", Needy)
    row = {row["device"]: row for row in list_targets(None, None)}[WELL]
    assert row["state"] == "not probed" and "needs the option 'runner'" in row["health"] and "--config" in row["health"]
    (tmp_path / "needy.yaml").write_text(TINY.replace("onnx_cpu", "{name: needy, runner: there}"))
    row = {row["device"]: row for row in list_targets(tmp_path / "needy.yaml", None)}[WELL]
    assert (row["kind"], row["state"], row["health"]) == ("needy", "idle", "ok")


def test_this_machine_without_a_cluster(tmp_path: Path) -> None:
    """What cannot be asked says why, and does not hide the others."""
    (tmp_path / "broken.yaml").write_text(TINY.replace("onnx_cpu", f"{{name: '{MODULE}:NoDriver'}}"))
    rows = {row["kind"]: row for row in list_targets(tmp_path / "broken.yaml", None)}
    assert rows[f"{MODULE}:NoDriver"]["health"] == "no toy server answers; start one"
    assert rows["onnx_cpu"]["health"] == "ok" and rows["onnx_cpu"]["device"] == "latency_cpu"
    assert "table" not in rows
    (tmp_path / "toy.yaml").write_text(TINY.replace("onnx_cpu", f"{{name: '{TOY}'}}"))
    rows = {row["device"]: row for row in list_targets(tmp_path / "toy.yaml", None)}
    assert (rows[WELL]["health"], rows[WELL]["state"], rows[SICK]["state"]) == ("ok", "idle", "idle")
    assert "is hot" in rows[SICK]["health"]


def test_table_fits_and_cuts_nothing_off() -> None:
    row = DeviceRow(f"{MODULE}:ToyTarget", WELL, "Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz",
                    "a-host-in-the-rack-07", "0123456789ab", "the battery is at 44 degrees, above 40; let it cool",
                    "onnx_cpu-0123456789ab", "quarantined", 120, 4711, 7300.0, 0.0312)
    console = Console(width=120)
    with console.capture() as capture:
        console.print(targets_table([asdict(row)]))
    text = capture.get()
    assert max(map(len, text.splitlines())) <= 120 and "…" not in text
    for part in (WELL, "onnx_cpu-0123456789ab", "quarantined", "120", "4711", "2 h ago", "3.1%"):
        assert part in text
    assert [ago(seconds) for seconds in (None, 12.4, 60, 86400)] == ["", "12 s ago", "1 min ago", "1 d ago"]
