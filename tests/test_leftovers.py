"""A run that leaves something behind fails and says what. The run is a real one, of a test file made here."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.leftovers import is_zombie

ROOT = Path(__file__).parents[1]
TIDY = """
import tempfile
def test_tidy():
    with tempfile.TemporaryDirectory():
        pass
"""
UNTIDY = """
import subprocess, tempfile, pathlib
def test_untidy():
    tempfile.mkdtemp(prefix="profile")
    sleeper = subprocess.Popen(["sleep", "600"], start_new_session=True)
    pathlib.Path(__file__).with_name("pid").write_text(str(sleeper.pid))
"""


def test_what_is_left_is_named_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(test: str, *workers: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "test_it.py").write_text(test)
        return subprocess.run([sys.executable, "-c", "import sys, pytest, tests.leftovers as it; it.PATIENCE_S = 0.5; "
                               "sys.exit(pytest.main(sys.argv[1:], plugins=[it]))", *workers, f"--rootdir={tmp_path}",
                               "-p", "no:cacheprovider", str(tmp_path)],
                              cwd=ROOT, capture_output=True, text=True, timeout=120)

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    tidy = run(TIDY)
    assert tidy.returncode == 0 and not list(tmp_path.glob("prt-*")), tidy.stdout + tidy.stderr
    untidy = run(UNTIDY, "--numprocesses=1")
    sleeper = int((tmp_path / "pid").read_text())
    assert untidy.returncode == 1 and "1 passed" in untidy.stdout, untidy.stdout + untidy.stderr
    assert f"process {sleeper}, sleep 600, started during test_it.py::test_untidy (call)\n" in untidy.stdout
    assert len(list(tmp_path.glob("prt-*/profile*"))) == 1 and "/profile" in untidy.stdout
    assert not psutil.pid_exists(sleeper) or is_zombie(psutil.Process(sleeper))
