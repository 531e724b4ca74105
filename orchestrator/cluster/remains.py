"""Which processes belong to a Ray that a program started for itself, and how they are ended.

A process is told by its number and the time of its creation, which psutil compares before it ends one; never by its
name. Imports nothing of ours: the guard (orchestrator/cluster/guard.py) is a small process.
"""
from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable

import psutil

END_TIMEOUT_S = 10.0


def ray_processes(driver: psutil.Process) -> set[psutil.Process]:
    """Those of the Ray sessions that this living process started: its children that were given the session's folder,
    which carries its number, and their children: agents and workers. What a worker starts is not ours to end."""
    session = re.compile(rf"/session_[0-9_-]+_{driver.pid}(/|$)")
    found: set[psutil.Process] = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in driver.children():
            with contextlib.suppress(psutil.Error):
                if any(session.search(argument) for argument in child.cmdline()):
                    found |= {child, *child.children()}
    return found


def kill(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that lived."""
    killed = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
            killed.append(process)
    return killed


def end_processes(processes: Iterable[psutil.Process]) -> None:
    """Kills them, and waits until they are gone."""
    psutil.wait_procs(kill(processes), timeout=END_TIMEOUT_S)
