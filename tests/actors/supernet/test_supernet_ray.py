"""The supernet actor on a real Ray: kills, data-parallel ranks, and weights that are shared but never written."""
from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from actors.data import Augmentation, Preprocessing
from actors.evaluator import SupernetEvaluatorFactory
from actors.rollout.pool import PoolSettings, RolloutPool
from actors.supernet.actor import SupernetActor, SupernetService, SupernetSettings
from orchestrator.data.datasets import DataSettings, load_dataset
from searchspaces.errors import ClusterError
from searchspaces.training.latencyterm import Aim, LatencySettings
from searchspaces.training.training import Wishes
from searchspaces.training.unas import UnasSettings
from tests.actors.tinyspace import TinySpace

DATA = load_dataset(DataSettings(limit=600))
PREPROCESSING = Preprocessing.fit(DATA.train, 8)
PATIENCE_S = 120


def settings(**changes: object) -> SupernetSettings:
    """`num_cpus` as in the rollouts: several of these fit into the tests' small Ray."""
    defaults: dict[str, object] = {"epochs": 3, "batch_size": 33, "augmentation": Augmentation(1), "num_cpus": 0.5}
    return SupernetSettings(**(defaults | changes))  # type: ignore[arg-type]


def alone(folder: Path, space: TinySpace, epochs: int, parts: int = 1) -> dict[str, np.ndarray]:
    """What one worker in this process arrives at."""
    actor = SupernetActor(space, DATA.train, PREPROCESSING, settings(parts=parts), str(folder))
    for _ in range(epochs):
        actor.train_epoch()
    return actor.weights()[1]


@pytest.fixture
def started(ray_local: None) -> Iterator[list[SupernetService]]:
    services: list[SupernetService] = []
    yield services
    for service in services:
        service.close()


def start(started: list[SupernetService], folder: Path, space: TinySpace, **changes: object) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while ray.available_resources().get("CPU", 0) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)     # actors of the test before give their CPUs back when their processes have ended
    started.append(SupernetService(space, DATA.train, PREPROCESSING, settings(**changes), folder))
    return started[-1].actor


def get(reference: ray.ObjectRef) -> Any:
    return ray.get(reference, timeout=PATIENCE_S)


def assert_close(a: dict[str, np.ndarray], b: dict[str, np.ndarray], atol: float) -> None:
    assert a.keys() == b.keys()
    for name, array in a.items():
        np.testing.assert_allclose(array, b[name], atol=atol, rtol=0, err_msg=name)


def test_killed_actor_goes_on_by_itself_with_the_same_result(started: list[SupernetService], tmp_path: Path) -> None:
    actor = start(started, tmp_path / "ray", TinySpace())
    status = get(actor.train_epoch.remote())
    assert status["epoch"] == 1
    os.kill(status["pid"], signal.SIGKILL)
    while status["epoch"] < 3:
        status = get(actor.train_epoch.remote())
    assert_close(get(actor.weights.remote())[1], alone(tmp_path / "alone", TinySpace(), 3), atol=1e-6)


def test_tells_how_far_an_epoch_is_while_it_is_trained(started: list[SupernetService], tmp_path: Path) -> None:
    actor = start(started, tmp_path, TinySpace(), batch_size=2)     # nearly 200 steps
    assert get(actor.epochs_done.remote()) == 0.0
    epoch, seen = actor.train_epoch.remote(), []
    while not ray.wait([epoch], timeout=0.05)[0]:
        seen.append(get(actor.epochs_done.remote()))
    assert seen == sorted(seen) and any(0 < done < 1 for done in seen), seen
    get(epoch)
    assert get(actor.epochs_done.remote()) == 1.0


@pytest.mark.slow
def test_two_ranks_hold_equal_weights_and_those_of_one_worker(started: list[SupernetService], tmp_path: Path) -> None:
    """33 images are parts of 11, one for one rank and two for the other; batch norm counts each by itself."""
    space = TinySpace()
    actor = start(started, tmp_path / "two", space, workers=2, parts=3)
    for _ in range(2):
        status = get(actor.train_epoch.remote())
    assert status["workers"] == 2 and status["epoch"] == 2
    expected = alone(tmp_path / "one", space, 2, parts=3)
    assert_close(get(actor.weights.remote())[1], expected, atol=1e-5)
    other = {name.removeprefix("model."): array for name, array in get(actor.rank_states.remote())[0].items()
             if name.startswith("model.")}
    assert_close(other, get(actor.weights.remote())[1], atol=0)


@pytest.mark.slow
def test_lost_rank_costs_an_epoch_not_the_training(started: list[SupernetService], tmp_path: Path) -> None:
    space = TinySpace(norm=False)
    actor = start(started, tmp_path / "two", space, workers=2, epochs=3)
    get(actor.train_epoch.remote())
    os.kill(get(actor.status.remote())["rank_pids"][0], signal.SIGKILL)
    status = get(actor.train_epoch.remote())
    assert status["epoch"] == 2 and status["workers"] == 2
    assert_close(get(actor.weights.remote())[1], alone(tmp_path / "one", space, 2), atol=1e-5)


@pytest.mark.slow
def test_unas_on_two_ranks_learns_what_one_worker_learns(started: list[SupernetService], tmp_path: Path) -> None:
    """Two architectures a step, each with half of the batch; the latencies are made up, the same for both. A rank that
    is lost costs its epoch, and neither weights nor distributions show it."""
    method = UnasSettings(aims=(Aim("cpu", 2.0),), latency=LatencySettings(networks=4, samples=6), architectures=2,
                          warm_up=0.34, learning_rate=0.2)
    space = TinySpace(norm=False)

    def told(wishes: Wishes) -> dict[str, np.ndarray]:
        return {label: 1.0 + rows.sum(axis=1).astype(float) for label, rows in wishes.items()}

    one = SupernetActor(space, DATA.train, PREPROCESSING, settings(training=method), str(tmp_path / "one"))
    for _ in range(3):
        one.train_epoch(told(one.begin_epoch()))
    actor = start(started, tmp_path / "two", space, workers=2, training=method)
    for epoch in range(3):
        status = get(actor.train_epoch.remote(told(get(actor.begin_epoch.remote()))))
        if epoch == 0:
            os.kill(get(actor.status.remote())["rank_pids"][0], signal.SIGKILL)
    assert status["workers"] == 2 and status["epoch"] == 3
    assert_close(get(actor.weights.remote())[1], one.weights()[1], atol=1e-4)
    assert_close(get(actor.distribution.remote()), one.distribution(), atol=1e-4)
    assert max(np.abs(logits).max() for logits in one.distribution().values()) > 0.1


def test_ranks_without_room_are_given_up(started: list[SupernetService], tmp_path: Path) -> None:
    space = TinySpace(norm=False)
    actor = start(started, tmp_path / "many", space, workers=3, num_cpus=2.5, rank_time_out_s=1.0)
    status = get(actor.train_epoch.remote())
    assert status["workers"] == 1 and status["epoch"] == 1
    assert_close(get(actor.weights.remote())[1], alone(tmp_path / "one", space, 1), atol=1e-6)


def test_weights_are_shared_by_workers_written_by_none_and_outlive_the_actor(started: list[SupernetService],
                                                                             tmp_path: Path) -> None:
    space = TinySpace()
    actor = start(started, tmp_path, space)
    get(actor.train_epoch.remote())
    version, reference = started[0].publish(PATIENCE_S)
    before = {name: array.copy() for name, array in ray.get(reference).items()}
    started.pop().close()
    factory = SupernetEvaluatorFactory(space, ray.put(PREPROCESSING.prepare(DATA.val)),
                                       ray.put(PREPROCESSING.prepare(DATA.train)))
    pool = RolloutPool(factory, PoolSettings(workers=2, num_cpus=0.5))
    try:
        pool.set_weights(version, reference)
        os.kill(pool.pids()[0], signal.SIGKILL)
        everything = [(i, np.array([i // 2, i % 2], dtype=np.int8)) for i in range(6)]
        pool.submit(everything)
        found, deadline = {}, time.monotonic() + PATIENCE_S
        while pool.outstanding and time.monotonic() < deadline:
            found |= dict(pool.collect(timeout_s=1))
    finally:
        pool.close()
    evaluator = SupernetEvaluatorFactory(space, PREPROCESSING.prepare(DATA.val), PREPROCESSING.prepare(DATA.train))()
    evaluator.set_weights(version, before)
    for i, row in everything:
        assert found[i].accuracy == evaluator.accuracy(row) and found[i].weights_version == 1 and not found[i].error
    for name, array in ray.get(reference).items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


def test_an_actor_that_cannot_start_says_why_in_one_sentence(ray_local: None, tmp_path: Path) -> None:
    alone(tmp_path, TinySpace(norm=False), 1)
    with pytest.raises(ClusterError, match="cannot start .*belongs to tiny.*use another run name") as caught:
        SupernetService(TinySpace(), DATA.train, PREPROCESSING, settings(), tmp_path)
    assert "\n" not in str(caught.value)


def test_evaluator_does_not_write_into_the_object_store(ray_local: None) -> None:
    """In this process the mapped arrays are the store's own memory: anything written would show here."""
    space = TinySpace()
    evaluator = SupernetEvaluatorFactory(space, ray.put(PREPROCESSING.prepare(DATA.val)),
                                         ray.put(PREPROCESSING.prepare(DATA.train)))()
    reference = ray.put({n: t.numpy() for n, t in space.make_supernet().state_dict().items()})
    mapped = ray.get(reference)
    assert not mapped["conv.weight"].flags.writeable
    copies = {name: array.copy() for name, array in mapped.items()}
    evaluator.set_weights(1, mapped)
    evaluator.evaluate(np.array([[2, 1], [0, 0]], dtype=np.int8))
    with torch.no_grad():
        for tensor in evaluator._supernet.state_dict().values():
            tensor.add_(1)  # the evaluator's own memory
    for name, array in ray.get(reference).items():
        np.testing.assert_array_equal(array, copies[name])
