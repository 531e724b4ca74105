"""A test run ends what it started: hooks that say what is left of it, end that, and fail the run.

Every process started in a run inherits its mark, and its temporary files go to a folder of the run, so that nothing of
anybody else's is ever counted. The folder also keeps the run's Rays apart from a cluster of this machine; it is removed
unless the run failed.
"""
from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from contextlib import suppress
from multiprocessing.util import Finalize
from pathlib import Path

import psutil
import pytest

MARK = "PARETORAY_TEST_RUN"     # in the environment of all processes of a run
PATIENCE_S = 30.0               # Ray's processes end a little later than their driver
# Ray's logs; locks, which are made to stay; torch's cache; onnxruntime's number; what multiprocessing removes at exit
EXPECTED = ("ray", "paretoray-*.lock", "torchinductor_*", ".ses", "pymp-*")
HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")    # of this process, which end with it
FOLDER, LEFT = pytest.StashKey[Path](), pytest.StashKey[list[str]]()


def mark() -> dict[str, str]:
    """For a process that is started with an environment of its own."""
    return {MARK: os.environ[MARK]} if MARK in os.environ else {}


@pytest.hookimpl(tryfirst=True)     # before pytest-xdist starts its workers
def pytest_sessionstart(session: pytest.Session) -> None:
    if _is_worker(session.config):
        return
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())   # tmp_path stays where one looks for it
    os.environ[MARK] = uuid.uuid4().hex
    # short, because paths of sockets are limited to 107 characters
    session.config.stash[FOLDER] = folder = Path(tempfile.mkdtemp(prefix="prt-"))
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)


@pytest.hookimpl(trylast=True)      # after pytest-xdist has ended its workers
def pytest_sessionfinish(session: pytest.Session) -> None:
    if _is_worker(session.config):
        return
    folder = session.config.stash[FOLDER]
    left = [_end(process) for process in _processes()]
    left += [str(path) for path in sorted(folder.iterdir()) if not any(map(path.match, EXPECTED))]
    session.config.stash[LEFT] = left
    if left and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if not session.exitstatus:      # when multiprocessing has removed what it has there
        Finalize(None, shutil.rmtree, (folder, True), exitpriority=-200)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    left, folder = config.stash.get(LEFT, []), config.stash.get(FOLDER, None)
    if left:
        terminalreporter.section("left behind by this run, which fails for it", red=True)
        terminalreporter.write("".join(f"{line}\n" for line in left))
    if (left or exitstatus) and folder is not None and folder.exists():
        terminalreporter.write(f"Temporary files of this run are in {folder}\n")


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def _processes() -> list[psutil.Process]:
    """Those of this run that do not end by themselves in time. A worker of Ray has its title where its environment was,
    so children count too."""
    found = set(psutil.Process().children(recursive=True))
    for process in psutil.process_iter():
        if process.pid != os.getpid() and _environment(process).get(MARK) == os.environ[MARK]:
            found.add(process)
            with suppress(psutil.Error):
                found |= set(process.children(recursive=True))
    found = {process for process in found if not any(helper in _command(process) for helper in HELPERS)}
    return [process for process in psutil.wait_procs(found, timeout=PATIENCE_S)[1] if not is_zombie(process)]


def is_zombie(process: psutil.Process) -> bool:
    """Ended, but its parent has not asked for its exit code."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True


def _end(process: psutil.Process) -> str:
    """What it was."""
    said = f"process {process.pid}, {_command(process)[:200]}"
    test = _environment(process).get("PYTEST_CURRENT_TEST")
    with suppress(psutil.Error):
        process.kill()
    return said + (f", started during {test}" if test else "")


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _environment(process: psutil.Process) -> dict[str, str]:
    """{} for other people's and for dead ones."""
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}
