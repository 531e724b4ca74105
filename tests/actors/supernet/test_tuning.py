"""A given network fine-tuned as a Ray task, killed in the middle."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from actors.data import Augmentation, Preprocessing
from actors.supernet.finetune import arrays
from actors.supernet.tuning import TuningSettings, submit_tuning, tuned_weights
from orchestrator.data.datasets import DataSettings, load_dataset
from searchspaces.network import GraphNetwork
from tests.actors.fatal import fatal
from tests.actors.tinyspace import TinySpace

DATA = load_dataset(DataSettings(limit=300))
STEPS = len(DATA.train) // 64
SETTINGS = TuningSettings(3, 0.05, 64, 1, Augmentation(1), 100)


@pytest.mark.slow
def test_killed_tuning_goes_on_by_itself(ray_local: None, tmp_path: Path, one_thread: None) -> None:
    graph, preprocessing = TinySpace().graph(np.array([1, 1], dtype=np.int8)), Preprocessing.fit(DATA.train, 16)
    torch.manual_seed(0)
    start = arrays(GraphNetwork(graph))
    expected = tuned_weights(graph, start, DATA.train, preprocessing, SETTINGS, str(tmp_path / "here"))
    assert not any(np.array_equal(array, start[name]) for name, array in expected.items())
    dies = fatal(preprocessing, tmp_path / "mark", dies_at=2 * STEPS + 1)
    weights = ray.get(submit_tuning("tiny", graph, ray.put(start), ray.put(DATA.train), dies, SETTINGS,
                                    str(tmp_path / "task"), num_cpus=0.5), timeout=90)
    assert all(np.array_equal(array, expected[name]) for name, array in weights.items())
    before_death = (tmp_path / "task" / "epoch-000002.json").stat().st_mtime_ns
    assert before_death <= (tmp_path / "mark").stat().st_mtime_ns   # epochs 1 and 2 were not trained twice
