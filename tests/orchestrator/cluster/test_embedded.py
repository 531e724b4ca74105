"""A Ray of one's own that does not come up: one sentence, and nothing left behind. Real limits make it fail."""
from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[3]
CODE = """
import logging, sys, psutil
from orchestrator.cluster.joining import connected, prepare_environment
from orchestrator.config import ClusterSettings
from searchspaces.errors import ClusterError
logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
prepare_environment(None)
print("starting", flush=True)
try:
    with connected(ClusterSettings(object_store_mb={megabytes}), None):
        print("came up")
except ClusterError as error:
    print("refused:", error)
    print("left:", [child.cmdline() for child in psutil.Process().children(recursive=True) if child.is_running()])
"""


def begin(megabytes: int | None = None, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", CODE.format(megabytes=megabytes)], cwd=ROOT, text=True,
                            env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def check_refused(process: subprocess.Popen[str], reason: str) -> None:
    output = process.communicate(timeout=240)[0]
    refused = [line for line in output.splitlines() if line.startswith("refused: Ray did not start on this machine (")]
    assert len(refused) == 1 and reason in refused[0], output
    assert "RAY_TMPDIR" in refused[0] and "cluster.object_store_mb" in refused[0]
    assert "left: []" in output and "once more" not in output and "Traceback" not in output


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_refused(begin(RAY_TMPDIR=str(tmp_path / "file")), "Not a directory")


@pytest.mark.soak
def test_a_start_that_times_out_is_tried_once_more_and_one_that_is_refused_is_not() -> None:
    """No room for the raylet at first: it ends at once, and Ray waits half a minute for it."""
    huge = begin(megabytes=10**7)   # refused when parts of Ray run already
    process = begin(megabytes=3000)
    assert process.stdout is not None
    assert process.stdout.readline() == "starting\n"
    driver, limits = psutil.Process(process.pid), psutil.Process(process.pid).rlimit(resource.RLIMIT_AS)
    driver.rlimit(resource.RLIMIT_AS, (3 * 2**30, limits[1]))
    deadline = time.monotonic() + 120
    while not [child for child in driver.children() if child.name() == "raylet" and child.status() == "zombie"]:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    driver.rlimit(resource.RLIMIT_AS, limits)
    output = process.communicate(timeout=240)[0]
    assert "Ray did not start (The current node timed out" in output and "once more" in output, output
    assert "came up" in output and "refused" not in output, output
    check_refused(huge, "object store and redis memory usage")
