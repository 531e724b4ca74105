"""A small process beside a driver: when the driver dies, however it dies, it ends its Ray and has the last word.

The kernel ends Ray's server processes with their parent, but not the agents and workers that the raylet started: they
stay for minutes. And a driver that is killed, or that Ray ends from C++, cannot say that nothing is lost. The driver
holds the other end of this process's standard input and writes one JSON object per line: {"say": SENTENCE} is what to
say at its death, {"up": true} that Ray runs, {"done": true} that all ended in order. End of file is its death.

    python -m orchestrator.cluster.guard DRIVER < pipe
"""
from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil

from orchestrator.cluster.remains import kill, ray_processes

ALIVE_S = 1.0       # between two looks at the driver: a process that it forked may hold the pipe open
LOOK_S = 10.0       # between two looks at its Ray, once that runs: a look costs milliseconds, and it may be measuring


def messages(driver: psutil.Process, pipe: int) -> Iterator[dict[str, Any]]:
    """Until the driver is gone; {} where it said nothing for a while."""
    unread = b""
    while driver.is_running() and driver.status() != psutil.STATUS_ZOMBIE:
        if not select.select([pipe], [], [], ALIVE_S)[0]:
            yield {}
            continue
        received = os.read(pipe, 65536)
        if not received:
            return
        *lines, unread = (unread + received).split(b"\n")
        yield from map(json.loads, lines)


def guard(driver: psutil.Process, pipe: int) -> None:
    sentence, up, looked = "", False, 0.0
    known: set[psutil.Process] = set()
    try:
        for message in messages(driver, pipe):
            if message.get("done"):
                return
            sentence, up = message.get("say", sentence), up or "up" in message
            if not up or "up" in message or time.monotonic() - looked > LOOK_S:
                known |= ray_processes(driver)
                looked = time.monotonic()
    except psutil.NoSuchProcess:
        pass
    kill(known)
    if sentence:
        # A live panel hides the cursor and leaves it in its last line.
        start = "\x1b[?25h\n" if sys.stderr.isatty() else ""
        sys.stderr.write(f"{start}{sentence}\n")
        sys.stderr.flush()


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):   # it ends when the driver does
        signal.signal(number, signal.SIG_IGN)
    guard(psutil.Process(int(sys.argv[1])), sys.stdin.fileno())
