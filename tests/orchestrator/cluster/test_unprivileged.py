"""A search of a user who may do nothing else on this machine."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.leftovers import mark
from tests.orchestrator.run.test_search import PATIENCE_S, ROOT, TINY, check_finished_run

NOBODY = 65534
AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs", "--inh-caps=-all"]


@pytest.mark.soak
def test_search_as_nobody(tmp_path: Path) -> None:
    """No root, no home of its own but a folder, and no other variable of ours."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can become another user, with setpriv")
    readable = "test -x " + str(Path(sys.executable).resolve())
    if subprocess.run([*AS_NOBODY, "sh", "-c", readable], timeout=60).returncode != 0:
        pytest.skip(f"{Path(sys.executable).resolve()} is closed to other users; run this with a Python that is not")
    home = Path(f"/tmp/nobody-{os.getpid()}")       # short, and every folder above it is open to all
    home.mkdir(mode=0o700)
    (home / "tiny.yaml").write_text(TINY)
    for path in (home, home / "tiny.yaml"):
        os.chown(path, NOBODY, NOBODY)
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
                   "TMPDIR": str(home), "RAY_TMPDIR": str(home / "ray"), "PYTHONDONTWRITEBYTECODE": "1", **mark()}
    line = [*AS_NOBODY, sys.executable, "-m", "orchestrator", "search", "tiny.yaml", "--name", "mine", "--runs", "runs"]
    try:
        done = subprocess.run(line, cwd=home, env=environment, capture_output=True, text=True, timeout=3 * PATIENCE_S)
        assert done.returncode == 0, done.stdout + done.stderr
        check_finished_run(home / "runs" / "mine")
        owners = {path.stat().st_uid for path in home.rglob("*") if not path.is_symlink()}
        assert owners == {NOBODY}
    finally:
        shutil.rmtree(home, ignore_errors=True)
