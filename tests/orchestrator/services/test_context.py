"""What stages share: waiting for actors, and states that survive damage."""
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from actors.data import Preprocessing
from actors.supernet.actor import SupernetService, SupernetSettings
from orchestrator.config import Config
from orchestrator.data.datasets import DataSettings, load_dataset
from orchestrator.interrupt import StopFlag
from orchestrator.record.store import RunStore
from orchestrator.services.context import RunContext
from orchestrator.services.services import Services
from orchestrator.services.states import intact_state, load_state, save_state
from searchspaces.errors import StoreError
from tests.actors.tinyspace import TinySpace


def context(folder: Path) -> RunContext:
    """Of a run that has only begun; none of its services has been asked for."""
    unused: Any = SimpleNamespace()
    store = RunStore.create(folder, "run", "", {})
    services = Services(Config(), TinySpace(), unused, unused, store, local=True)
    return RunContext(Config(), store, TinySpace(), unused, unused, services, unused, StopFlag(), unused)


def test_what_an_actor_says_is_one_sentence(ray_local: None, tmp_path: Path) -> None:
    data = load_dataset(DataSettings(limit=100))
    folder = tmp_path / "checkpoints"
    service = SupernetService(TinySpace(), data.train, Preprocessing.fit(data.train, 8),
                              SupernetSettings(epochs=1, batch_size=32, num_cpus=0.5), folder)
    try:
        folder.touch()  # where the folder of checkpoints would be
        with pytest.raises(StoreError) as caught:
            context(tmp_path).wait(service.actor.train_epoch.remote())
    finally:
        service.close()
    assert type(caught.value) is StoreError
    assert str(caught.value).startswith("cannot write the checkpoint") and "\n" not in str(caught.value)


STATE = {"weights": np.arange(6, dtype=np.float32).reshape(2, 3), "count": 3, "name": "a"}


def test_saved_states_come_back(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path, "run", "", {})
    assert intact_state(store, "part") is None
    save_state(store, "part", STATE)
    for state in (load_state(store, "part"), intact_state(store, "part")):
        assert state is not None and state.keys() == STATE.keys() and (state["count"], state["name"]) == (3, "a")
        torch.testing.assert_close(state["weights"], torch.as_tensor(STATE["weights"]), rtol=0, atol=0)
    facts = store.path / "checkpoints" / "part.json"
    facts.write_text('{"count": 3, "name": "a"}')  # as an earlier version wrote it
    assert load_state(store, "part").keys() == STATE.keys()


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
@pytest.mark.parametrize("kind", ["turned bit", "cut", "gone"])
def test_damaged_states_are_refused_or_set_aside(tmp_path: Path, suffix: str, kind: str) -> None:
    store = RunStore.create(tmp_path, "run", "", {})
    save_state(store, "part", STATE)
    file = store.path / "checkpoints" / f"part.{suffix}"
    content = file.read_bytes()
    if kind == "gone":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(content[:len(content) // 2])
    else:
        file.write_bytes(content[:-2] + bytes([content[-2] ^ 4]) + content[-1:])
    with pytest.raises(StoreError, match="part.* is missing or damaged .*resume the run") as caught:
        load_state(store, "part")
    assert "\n" not in str(caught.value)
    assert intact_state(store, "part") is None
    if (suffix, kind) != ("json", "gone"):  # then it was never finished
        assert not list(file.parent.glob("part.json")) and list(file.parent.glob("part.*.damaged"))
    save_state(store, "part", STATE)
    assert intact_state(store, "part") is not None
