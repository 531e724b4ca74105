"""Trainers and the knowledge pool: what is inherited helps, and a pool in trouble costs nothing but the help."""
from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from actors.data import Augmentation, Preprocessing
from actors.evaluator import Evaluation
from actors.knowledge.link import KnowledgeLink
from actors.knowledge.pool import KnowledgePool, KnowledgeService
from actors.rollout.pool import PoolSettings, RolloutPool
from actors.rollout.trainer import ArchitectureTrainer, ProxyEvaluatorFactory, ProxySettings
from actors.supernet.finetune import arrays
from orchestrator.data.datasets import DataSettings, load_dataset
from searchspaces.graph import Graph
from searchspaces.space import Tokens
from tests.actors.fatal import fatal
from tests.actors.tinyspace import TinySpace

DATA = load_dataset(DataSettings(limit=600))
PREPROCESSING = Preprocessing.fit(DATA.train, 8)
SETTINGS = ProxySettings(epochs=1, batch_size=32, augmentation=Augmentation(1))
STEPS = len(DATA.train) // 32
ROWS = np.array([[w, k] for w in range(3) for k in range(2)], dtype=np.int8)


class KeyedTiny(TinySpace):
    """Its one block is known by both tokens: blocks that differ in one of them are similar enough."""

    def graph(self, tokens_T: Tokens) -> Graph:
        graph = super().graph(tokens_T)
        return replace(graph, blocks=(replace(graph.blocks[0], key=tuple(int(t) for t in tokens_T)),))


SPACE = KeyedTiny()


def evaluate(folder: Path, knowledge: object = None, rows: Tokens = ROWS, seed: int = 0) -> list[Evaluation]:
    made = ProxyEvaluatorFactory(SPACE, DATA.train, PREPROCESSING, PREPROCESSING.prepare(DATA.val),
                                 replace(SETTINGS, seed=seed), str(folder), knowledge)  # type: ignore[arg-type]
    found = made().evaluate(rows)
    assert not [e.error for e in found if e.error]
    return found


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool that was filled by one training of every architecture, and switched on."""
    folder = tmp_path_factory.mktemp("filled")
    pool = KnowledgePool(folder / "pool", SPACE, epochs=1, gate_file=folder / "gate.json")
    assert all(e.details["warm"] == 0 for e in evaluate(folder / "fill", pool))
    while not pool.ready():
        pool.start(ROWS[0])
    return folder


@pytest.fixture
def ready_pool(filled: Path, tmp_path: Path) -> KnowledgePool:
    """A copy of it, with the trainings behind it in `fill`."""
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    return KnowledgePool(tmp_path / "pool", SPACE, epochs=1, gate_file=tmp_path / "gate.json")


def test_warm_starts_are_better_after_equal_epochs(ready_pool: KnowledgePool, tmp_path: Path) -> None:
    cold, warm = evaluate(tmp_path / "cold", seed=1), evaluate(tmp_path / "warm", ready_pool, seed=1)
    gain = np.mean([w.accuracy - c.accuracy for w, c in zip(warm, cold)])
    assert gain > 0.04
    assert all((w.details["warm"], w.details["hits"], w.details["queries"]) == (1, 1, 1) for w in warm)


def test_lineage_counts_the_iterations_of_the_chain(ready_pool: KnowledgePool, tmp_path: Path) -> None:
    again = [evaluate(tmp_path / str(i), ready_pool, ROWS[:1])[0].details for i in range(2)]
    assert [d["lineage_max"] for d in again] == [2 * STEPS, 3 * STEPS]
    assert all(d["lineage_min"] == d["lineage_max"] and d["iterations"] == STEPS for d in again)


def test_what_is_inherited_is_the_stored_network(ready_pool: KnowledgePool, tmp_path: Path) -> None:
    """Same architecture: the network computes what the stored one computed, before it is trained on."""
    link = KnowledgeLink(ready_pool)
    trained = ArchitectureTrainer(SPACE, DATA.train, PREPROCESSING, SETTINGS, tmp_path / "fill").train(ROWS[3]).network
    link.insert(ROWS[3], arrays(trained), STEPS, [0])
    fresh = ArchitectureTrainer(SPACE, DATA.train, PREPROCESSING, SETTINGS, tmp_path / "new")._fresh(ROWS[3])
    images = PREPROCESSING.tensor(DATA.val.images[:20])
    with torch.no_grad():
        assert not torch.allclose(fresh.eval()(images), trained(images), atol=0.1)
        assert link.warm_start(ROWS[3], fresh)["lineage"] == [STEPS]
        torch.testing.assert_close(fresh.eval()(images), trained(images), atol=1e-4, rtol=1e-4)


def test_a_resumed_training_keeps_the_start_it_had(ready_pool: KnowledgePool, tmp_path: Path) -> None:
    """Meanwhile the pool has learnt: asked again it would give another start, and another accuracy."""
    first = ArchitectureTrainer(SPACE, DATA.train, PREPROCESSING, replace(SETTINGS, epochs=3), tmp_path / "undisturbed",
                                KnowledgeLink(ready_pool)).train(ROWS[2])
    interrupted = ArchitectureTrainer(SPACE, DATA.train, PREPROCESSING, replace(SETTINGS, epochs=3), tmp_path / "cut",
                                      KnowledgeLink(ready_pool))
    interrupted.train(ROWS[2])
    for path in interrupted.folder(ROWS[2]).glob("epoch-000003.*"):
        path.unlink()
    evaluate(tmp_path / "meanwhile", ready_pool, ROWS[2:3])
    resumed = interrupted.train(ROWS[2])
    assert resumed.resumed_epoch == 2 and resumed.start == first.start
    expected = arrays(first.network)
    assert all(np.array_equal(array, expected[name]) for name, array in arrays(resumed.network).items())


# --- the pool as an actor --------------------------------------------------------------------------------------------


@ray.remote(num_cpus=0)
class Silent:
    """A pool that takes calls and never answers."""

    def start(self, tokens_T: Tokens) -> None:
        time.sleep(1000)

    def pid(self) -> int:
        return os.getpid()


@pytest.fixture
def services(ray_local: None) -> Iterator[list[KnowledgeService]]:
    opened: list[KnowledgeService] = []
    yield opened
    for service in opened:
        service.close()


@pytest.mark.slow
def test_trainer_and_pool_on_other_processes(services: list[KnowledgeService], ready_pool: KnowledgePool,
                                             tmp_path: Path) -> None:
    """Used by trainers behind the rollout pool, the trainer killed in its last training."""
    services.append(KnowledgeService(tmp_path / "pool", SPACE, 1, gate_file=tmp_path / "gate.json"))
    dies = fatal(PREPROCESSING, tmp_path / "mark", dies_at=2 * STEPS)
    made = ProxyEvaluatorFactory(SPACE, ray.put(DATA.train), dies, ray.put(PREPROCESSING.prepare(DATA.val)), SETTINGS,
                                 str(tmp_path / "proxy"), services[0].actor)
    pool = RolloutPool(made, PoolSettings(workers=1, num_cpus=0.5))
    pool.submit(list(enumerate(ROWS)))
    found: dict[object, Evaluation] = {}
    deadline = time.monotonic() + 90
    while pool.outstanding and time.monotonic() < deadline:
        found |= dict(pool.collect(timeout_s=1))
    pool.close()
    assert len(found) == len(ROWS) and (tmp_path / "mark").exists()
    assert all(not e.error and e.details["warm"] == 1 for e in found.values())
    assert all(e.details["lineage_max"] >= 2 * STEPS for e in found.values())


def test_a_dead_or_silent_pool_costs_the_warm_start_only(services: list[KnowledgeService], tmp_path: Path,
                                                         caplog: pytest.LogCaptureFixture) -> None:
    silent, victim = Silent.remote(), Silent.remote()
    trainers = {"cold": None, "silent": KnowledgeLink(silent, time_out_s=1.0)}
    os.kill(ray.get(victim.pid.remote(), timeout=60), signal.SIGKILL)
    trainers["dead"] = KnowledgeLink(victim, time_out_s=30)
    found = {name: ArchitectureTrainer(SPACE, DATA.train, PREPROCESSING, SETTINGS, tmp_path / name, link).train(ROWS[1])
             for name, link in trainers.items()}
    ray.kill(silent)
    assert caplog.text.count("the knowledge pool gives no answer") == 2
    assert found["silent"].start == found["dead"].start == {"active": False, "hits": 0, "queries": 0, "lineage": [0]}
    weights = {name: arrays(trained.network) for name, trained in found.items()}
    assert all(np.array_equal(array, weights["dead"][name]) and np.array_equal(array, weights["silent"][name])
               for name, array in weights["cold"].items())
