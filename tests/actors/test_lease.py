"""One process at a time, in a store without locks."""
from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.lease import HeldError, Lease
from actors.objectpath import ObjectPath, as_path, matching
from searchspaces.errors import StoreError
from tests.objectstore import Server

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from actors.lease import Lease
from actors.objectpath import as_path
Lease.claim(as_path(sys.argv[1]), heartbeat_s=1.0, silent_s=4.0)
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def folder(s3: Server, request: pytest.FixtureRequest) -> ObjectPath:
    path = as_path(s3.address(f"lease/{request.node.name}"))
    assert isinstance(path, ObjectPath)
    return path


def holder(folder: ObjectPath, seconds: float) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, folder.address, str(seconds)], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def living(folder: ObjectPath) -> Iterator[subprocess.Popen[str]]:
    process = holder(folder, 600)
    yield process
    process.kill()
    process.wait()


def test_a_living_holder_is_respected_and_a_killed_one_of_this_machine_replaced(
        folder: ObjectPath, living: subprocess.Popen[str], caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(HeldError, match="is being driven by another process") as error:
        Lease.claim(folder, heartbeat_s=1.0, silent_s=4.0)
    assert f"process {living.pid})" in str(error.value) and "waiting up to 6 s to see whether it lives" in caplog.text
    living.send_signal(signal.SIGKILL)
    living.wait()
    lease = Lease.claim(folder, patience_s=0.0)     # although its claim is seconds old
    lease.check()
    assert len(matching(folder / "lease", "*.json")) == 1
    lease.release()
    lease.release()
    assert not matching(folder / "lease", "*.json")


def test_a_holder_that_ends_by_itself_leaves_no_claim(folder: ObjectPath) -> None:
    assert holder(folder, 0).wait(60) == 0
    assert not matching(folder / "lease", "*.json")


def test_a_silent_holder_is_replaced_and_finds_out(folder: ObjectPath, caplog: pytest.LogCaptureFixture) -> None:
    suspended = Lease(folder, 1.0, 3.0)     # its heart does not beat
    suspended._take(0.0)
    suspended.check()
    successor = Lease.claim(folder, heartbeat_s=1.0, silent_s=3.0)
    assert "is taken over from a process that has been silent for" in caplog.text
    with pytest.raises(StoreError, match=r"was taken over by another process \(.*, process \d+\), because this one"):
        suspended.check()
    with pytest.raises(StoreError, match="was taken over"):
        suspended.check()
    successor.check()
    time.sleep(1.5)
    assert len(matching(folder / "lease", "*.json")) == 1    # the old one's heart never beats again
    successor.release()


def test_a_claim_of_another_machine_is_not_judged_by_its_number(folder: ObjectPath) -> None:
    elsewhere = folder / "lease" / "elsewhere.json"
    elsewhere.write_bytes(json.dumps({"owner": "lab-7, process 1", "pid": 1, "pids_of": "another boot"}).encode())
    with pytest.raises(HeldError, match="lab-7, process 1"):
        Lease.claim(folder, patience_s=0.0)
    assert matching(folder / "lease", "*.json") == [elsewhere]       # nothing of the refused one is left


def test_never_two_at_once(folder: ObjectPath, caplog: pytest.LogCaptureFixture) -> None:
    """Four that claim again and again without patience; whoever holds looks whether somebody else does."""
    caplog.set_level(logging.ERROR)
    inside, most, held = [0], [0], [0]

    def work() -> None:
        until = time.monotonic() + 1.2
        while time.monotonic() < until:
            try:
                lease = Lease.claim(folder, patience_s=0.0)
            except HeldError:
                continue
            inside[0] += 1
            most[0], held[0] = max(most[0], inside[0]), held[0] + 1
            time.sleep(0.02)
            inside[0] -= 1
            lease.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    Lease.claim(folder).release()       # nobody is in the way of the next one
    assert most[0] <= 1
