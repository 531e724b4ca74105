"""How a run ends that does not finish: what is left of it, and what its user reads last."""
from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.config import dump_config, load_config
from orchestrator.record.store import RunStore
from orchestrator.run.search import Search
from searchspaces.errors import ClusterError
from tests.orchestrator.run.test_search import TINY

TOY = "tests.orchestrator.cluster.nodetargets:ToyTarget"    # no node offers one


def test_only_a_new_run_that_recorded_nothing_leaves_no_folder(tmp_path: Path, ray_local: None) -> None:
    (tmp_path / "toy.yaml").write_text(TINY.replace("onnx_cpu", f'"{TOY}"'))
    config, console = load_config(tmp_path / "toy.yaml"), Console(quiet=True)
    with pytest.raises(ClusterError, match="no node of the cluster announces a device") as failed:
        Search(config, runs=tmp_path, name="new", console=console).run()
    assert failed.value.__notes__ == ["run new ended with an error before anything was recorded; its folder is removed"]
    assert not (tmp_path / "new").exists()
    RunStore.create(tmp_path, "known", dump_config(config), {})
    with pytest.raises(ClusterError) as failed:
        Search.resume("known", runs=tmp_path, console=console).run()
    assert failed.value.__notes__[0].endswith("in stage 'measure'; everything recorded is kept, go on with: "
                                              "paretoray resume known")
    assert (tmp_path / "known" / "config.yaml").exists()


@pytest.mark.parametrize("table", ["latency", "trials", "checkpoints"])
def test_what_counts_as_recorded(tmp_path: Path, table: str) -> None:
    store = RunStore.create(tmp_path, "run", "", {})
    store.event("stage", stage="measure")
    store.update_state(stage="measure")
    assert not store.recorded
    if table == "checkpoints":
        (store.path / table).mkdir()
        (store.path / table / "supernet-0.safetensors").touch()
    else:
        getattr(store, table).append([{"arch_id": "a", "tokens": [0], "error": "worker lost"}])
    assert store.recorded
