"""A user's own modules travel to a cluster; what is installed there or ours does not travel twice."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cluster.ownmodules import own_modules
from orchestrator.config import parse_config

ROOT = Path(__file__).parents[3]


def test_files_and_folders_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_target_file.py").write_text("")
    (tmp_path / "own_controller_package" / "inner").mkdir(parents=True)
    (tmp_path / "own_controller_package" / "__init__.py").write_text("")
    (tmp_path / "own_loose_folder").mkdir()
    config = parse_config({
        "data": "own_loose_folder.images:Stripes", "space": "searchspaces.nasbench201.space:NasBench201",
        "targets": [{"name": "own_target_file:Weighing", "label": "a"}, {"name": "onnx_cpu", "label": "b"}],
        "controller": "own_controller_package.inner.lazy:Lazy"}, "test")
    assert own_modules(config) == [str(tmp_path / name) for name in
                                   ("own_controller_package", "own_loose_folder", "own_target_file.py")]


@pytest.mark.parametrize("space", ["mobilenetv3-s16", "pytest:Item", "json.decoder:JSONDecoder", "nowhere_at_all:X"])
def test_what_is_shipped_or_installed_stays(space: str) -> None:
    assert own_modules(parse_config({"space": space}, "test")) == []


JOIN = """
import sys
from pathlib import Path
import ray
from orchestrator.cluster import joining
from orchestrator.config import parse_config
from orchestrator.cluster.ownmodules import own_modules
folder = sys.argv[1]
sys.path.insert(0, folder)
own = own_modules(parse_config({"space": "own_space_far_away:Space"}, "test"))
sys.path.remove(folder)  # workers get the driver's path, and must not find it there

joining.check_reachable = joining.check_admission = lambda address: None
with joining.connected(None, "local", own=own):
    @ray.remote
    def where():
        import own_space_far_away
        return own_space_far_away.__file__
    print(ray.get(where.remote(), timeout=100))
"""


@pytest.mark.slow
def test_a_module_arrives_where_only_the_cluster_could_have_brought_it(tmp_path: Path) -> None:
    """With a Ray of its own in the place of a cluster."""
    (tmp_path / "own_space_far_away.py").write_text("Space = None\n")
    done = subprocess.run([sys.executable, "-c", JOIN, str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
                          timeout=240)
    assert done.returncode == 0, done.stderr
    arrived = Path(done.stdout.split()[-1])
    assert arrived.name == "own_space_far_away.py" and arrived.parent != tmp_path
