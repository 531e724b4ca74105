"""A node that does not see the folder of the runs is found out before anything is measured or trained."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.objectstore import Server
from tests.orchestrator.cluster.test_nodes import ENVIRONMENT, end, start_ray
from tests.orchestrator.run.test_search import PATIENCE_S, ROOT, TINY, command

HIDES = "RAY_AUTH_MODE=token unshare --mount sh -c 'mount -t tmpfs none {} && exec \"$@\"' sh"
SCRIPT = """
import json, sys
from orchestrator.cluster.joining import prepare_environment

prepare_environment(sys.argv[1])
import ray
from actors.objectpath import as_path
from orchestrator.cluster import sharing
from searchspaces.errors import ClusterError

sharing.ANSWER_S = 100.0    # the machine may be busy
ray.init(address=sys.argv[1], log_to_driver=False)
said, found = [], []
for address in sys.argv[2:]:
    try:
        sharing.check_shared(as_path(address), said.append)
        found.append("")
    except ClusterError as error:
        found.append(str(error))
sharing.ANSWER_S = 0.0      # nobody is as fast
sharing.check_shared(as_path(sys.argv[-1]), said.append)
print(json.dumps([found, said]))
"""


def can_hide(folder: Path) -> bool:
    """May this user mount in a name space of its own?"""
    return shutil.which("unshare") is not None and subprocess.run(
        ["bash", "-c", f"{HIDES.format(folder)} true"], capture_output=True, timeout=60).returncode == 0


@pytest.mark.soak
def test_a_node_with_another_folder_of_that_name(tmp_path: Path, s3: Server) -> None:
    hidden, shared = tmp_path / "hidden", tmp_path / "shared"
    for folder in (hidden, shared):
        folder.mkdir()
    if not can_hide(hidden):
        pytest.skip("no mount name spaces here: needs unshare and the right to mount")
    (tmp_path / "tiny.yaml").write_text(TINY)
    sessions = tempfile.mkdtemp(prefix="share-")    # short: socket paths are limited to 107 characters
    head = start_ray("ray start --head --port=0 --num-cpus=4 --include-dashboard=false --node-name=head "
                     f"--temp-dir={sessions} --resources='{{\"latency_cpu\": 1}}'")
    try:
        gcs = (Path(sessions) / "ray_current_cluster").read_text().strip()
        node = start_ray(f"{HIDES.format(hidden)} ray start --address={gcs} --num-cpus=1 --node-name=lonely")
        try:
            search = subprocess.run(
                command("search", str(tmp_path / "tiny.yaml"), "--runs", str(hidden), "--address", gcs, "--name", "it"),
                cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE_S)
            told = search.stderr.splitlines()
            done = subprocess.run([sys.executable, "-c", SCRIPT, gcs, str(hidden), str(shared), s3.address("shared")],
                                  cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True,
                                  timeout=PATIENCE_S)
        finally:
            end(node)
    finally:
        end(head)
        shutil.rmtree(sessions, ignore_errors=True)
    refusal = f"node lonely does not share the run's folder {hidden}"
    assert search.returncode == 2 and told[0].startswith(f"error: {refusal}/it: "), search.stdout + search.stderr
    assert "in an object store (--runs s3://BUCKET/FOLDER)" in told[0] and "before anything was recorded" in told[1]
    assert "measure" not in search.stdout and not list(hidden.iterdir())
    (found, other, without_keys), said = json.loads(done.stdout.splitlines()[-1])
    assert found.startswith(refusal) and other == "", done.stderr
    assert without_keys.startswith("node lonely cannot use the run's folder s3://lab-runs/shared: access is denied")
    assert len(said) == 1 and said[0].startswith("lonely: no answer within 0 s whether the run's folder s3://lab-runs/")
    assert not list(hidden.iterdir()) and not list(shared.iterdir())
