"""What stages share: waiting for actors, and states that survive damage."""
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.data import Preprocessing
from actors.supernet import SupernetService, SupernetSettings
from orchestrator.context import RunContext
from orchestrator.datasets import DataSettings, load_dataset
from orchestrator.interrupt import StopFlag
from orchestrator.store import RunStore
from searchspaces.errors import StoreError
from tests.actors.tinyspace import TinySpace


def context(folder: Path) -> RunContext:
    """Of a run that has only begun; its services are never used."""
    unused: Any = SimpleNamespace()
    store = RunStore.create(folder, "run", "", {})
    return RunContext(unused, store, TinySpace(), unused, unused, unused, unused, StopFlag(), unused)


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
