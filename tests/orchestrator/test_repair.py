"""Files damaged after the stage that wrote them: `generate` says so, `resume` makes them again."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from orchestrator.store import RunStore
from tests.orchestrator.test_cli import paretoray
from tests.orchestrator.test_search import TINY, check_finished_run, finish, start


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repair")
    (folder / "tiny.yaml").write_text(TINY)
    process = start("search", str(folder / "tiny.yaml"), "--name", "tiny", "--runs", str(folder / "runs"))
    output = finish(process)
    assert process.returncode == 0, output
    return folder / "runs" / "tiny"


def damage(path: Path) -> bytes:
    """Turns one byte in the middle over, as a bad disk does; what was there."""
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1:])
    return content


def new_budget(run: Path) -> str:
    budgets = [entry["budget_ms"] for entry in json.loads((run / "generated.json").read_text())]
    return f"{sum(budgets) / len(budgets):.6f}ms"


@pytest.mark.slow
def test_damaged_supernet_is_trained_again(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "tiny"))
    newest = max((run / "checkpoints").glob("supernet-*.safetensors"))
    whole = damage(newest)
    refused = paretoray("generate", "tiny", "--budget", new_budget(run), "--runs", str(tmp_path))
    assert refused.returncode == 2
    assert "checkpoint of epoch 2" in refused.stderr and "resume" in refused.stderr
    assert "Traceback" not in refused.stderr
    RunStore(run).update_state(stage="deliver")
    shutil.rmtree(run / "models")  # so that delivering needs the weights
    resumed = paretoray("resume", "tiny", "--runs", str(tmp_path))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "epochs between are trained again" in resumed.stdout
    assert newest.read_bytes() == whole, "an epoch that is trained again is the same epoch"
    check_finished_run(run)
    assert {json.loads(path.read_text())["weights_version"] for path in (run / "models").glob("*.json")} == {2}
    done = paretoray("generate", "tiny", "--budget", new_budget(run), "--runs", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
