"""Proxy training: the same accuracy whoever trains, in whatever order, and whoever is killed on the way."""
from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from actors.data import Augmentation, Preprocessing
from actors.devices import training_device
from actors.evaluator import Evaluation
from actors.rollout.pool import PoolSettings, RolloutPool
from actors.rollout.trainer import (
    ArchitectureTrainer,
    ProxyEvaluatorFactory,
    ProxySettings,
    retrained_weights,
    submit_retraining,
)
from actors.supernet.finetune import arrays
from orchestrator.data.datasets import DataSettings, load_dataset
from searchspaces.errors import ConfigError
from searchspaces.mobilenetv3.space import MobileNetV3S16
from searchspaces.space import SearchSpace, Tokens
from tests.actors.fatal import fatal
from tests.actors.tinyspace import TinySpace

DATA = load_dataset(DataSettings(limit=600))
PREPROCESSING = Preprocessing.fit(DATA.train, 8)
VALIDATION = PREPROCESSING.prepare(DATA.val)
SPACE = TinySpace()
ROWS = np.array([[w, k] for w in range(3) for k in range(2)], dtype=np.int8)
SETTINGS = ProxySettings(epochs=3, batch_size=64, augmentation=Augmentation(1), seed=1)
STEPS = len(DATA.train) // 64
PATIENCE_S = 90


pytestmark = pytest.mark.usefixtures("one_thread")


def factory(folder: Path, space: SearchSpace = SPACE, settings: ProxySettings = SETTINGS,
            preprocessing: Preprocessing = PREPROCESSING, **more: object) -> ProxyEvaluatorFactory:
    return ProxyEvaluatorFactory(space, DATA.train, preprocessing, VALIDATION, settings, str(folder),
                                 **more)  # type: ignore[arg-type]


def accuracies(found: list[Evaluation]) -> list[float]:
    assert not [e.error for e in found if e.error]
    return [e.accuracy for e in found]


def trainer(folder: Path, settings: ProxySettings = SETTINGS) -> ArchitectureTrainer:
    return ArchitectureTrainer(SPACE, DATA.train, PREPROCESSING, settings, folder)


# --- one process -----------------------------------------------------------------------------------------------------


def test_result_depends_on_seed_and_architecture_only(tmp_path: Path) -> None:
    first = accuracies(factory(tmp_path / "a")().evaluate(ROWS))
    torch.manual_seed(1234)
    backwards = accuracies(factory(tmp_path / "b")().evaluate(ROWS[::-1]))
    assert backwards[::-1] == first
    other = accuracies(factory(tmp_path / "c", settings=replace(SETTINGS, seed=2))().evaluate(ROWS))
    assert other != first and len(set(first)) > 3


def test_weights_are_bitwise_equal_and_the_random_state_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    a = arrays(trainer(tmp_path / "a").train(ROWS[3]).network)
    torch.manual_seed(7)
    b = arrays(trainer(tmp_path / "b").train(ROWS[3]).network)
    assert torch.equal(torch.rand(1), expected)
    assert all(np.array_equal(a[name], b[name]) for name in a)
    c = arrays(trainer(tmp_path / "c", replace(SETTINGS, seed=2)).train(ROWS[3]).network)
    assert not any(np.array_equal(a[name], c[name]) for name in a)


def test_details_say_what_was_done(tmp_path: Path) -> None:
    found = factory(tmp_path)().evaluate(ROWS[:1])[0]
    assert found.source == "proxy" and found.weights_version == 0
    assert found.details.keys() == {"epochs", "iterations", "loss", "start_epoch"}
    assert found.details["epochs"] == 3 and found.details["iterations"] == 3 * STEPS
    assert found.details["start_epoch"] == 0 and 0 < found.details["loss"] < 5


def test_a_result_takes_the_place_of_the_weights_and_is_never_trained_again(tmp_path: Path) -> None:
    found = factory(tmp_path)().evaluate(ROWS[:1])[0]
    folder = tmp_path / SPACE.arch_id(ROWS[0])
    assert not list(folder.glob("epoch-*")) and len(list(folder.glob("result-*"))) == 2
    dead = fatal(PREPROCESSING, tmp_path / "mark", dies_at=1)  # one batch would end this process
    again = factory(tmp_path, preprocessing=dead)().evaluate(ROWS[:1])[0]
    assert (again.accuracy, again.details) == (found.accuracy, found.details)


def test_results_and_checkpoints_of_other_settings_are_not_used(tmp_path: Path) -> None:
    shorter = replace(SETTINGS, epochs=2)
    trainer(tmp_path / "a").train(ROWS[0])  # leaves epoch 3 of 3 behind
    factory(tmp_path / "a")().evaluate(ROWS[1:2])
    here, there = (factory(tmp_path / name, settings=shorter)().evaluate(ROWS[:2]) for name in "ab")
    assert accuracies(here) == accuracies(there)
    assert [e.details["iterations"] for e in here] == [2 * STEPS] * 2


def test_interrupted_training_goes_on_from_its_last_whole_epoch(tmp_path: Path) -> None:
    """What a trainer that died in epoch 3 leaves behind, the newest file of it damaged."""
    expected = arrays(trainer(tmp_path / "whole").train(ROWS[5]).network)
    interrupted = trainer(tmp_path / "cut")
    interrupted.train(ROWS[5])
    folder = interrupted.folder(ROWS[5])
    newest = folder / "epoch-000003.safetensors"
    newest.write_bytes(newest.read_bytes()[:-10])
    resumed = trainer(tmp_path / "cut").train(ROWS[5])
    assert resumed.resumed_epoch == 2
    assert all(np.array_equal(array, expected[name]) for name, array in arrays(resumed.network).items())


def test_divergence_fails_one_architecture_with_a_reason(tmp_path: Path) -> None:
    found = factory(tmp_path, space=TinySpace(norm=False), settings=replace(SETTINGS, learning_rate=1e30))()
    evaluation = found.evaluate(ROWS[:1])[0]
    assert np.isnan(evaluation.accuracy) and "diverged in epoch 1" in evaluation.error
    assert not list(tmp_path.rglob("epoch-*"))


def test_images_too_small_for_the_network_fail_it_with_a_reason(tmp_path: Path) -> None:
    evaluation = factory(tmp_path, space=TinySpace(resolution=1))().evaluate(ROWS[:1])[0]
    assert "would have shape (4, 0, 0)" in evaluation.error and "larger resolution" in evaluation.error


def test_a_disk_that_refuses_costs_no_training(tmp_path: Path) -> None:
    expected = accuracies(factory(tmp_path / "good")().evaluate(ROWS[:2]))
    (tmp_path / "file").touch()  # a folder below a file cannot be made, not even by root
    assert accuracies(factory(tmp_path / "file" / "proxy")().evaluate(ROWS[:2])) == expected


@pytest.mark.parametrize(("change", "sentence"), [
    ({"epochs": 0}, "at least 1 epoch"), ({"batch_size": 1}, "at least 2 images")])
def test_settings_that_train_nothing_are_refused(change: dict[str, int], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        replace(SETTINGS, **change)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no GPU"):
        factory(tmp_path, settings=replace(SETTINGS, device="cuda"))()


def test_a_worker_without_declared_gpus_leaves_those_it_sees_alone(ray_local: None) -> None:
    def device() -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            return str(training_device("auto"))

    assert ray.get(ray.remote(device).options(num_cpus=0.5).remote(), timeout=PATIENCE_S) == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_training_is_deterministic_and_agrees_with_the_cpu(tmp_path: Path) -> None:
    a, b = (factory(tmp_path / name, settings=replace(SETTINGS, device="cuda"))().evaluate(ROWS) for name in "ab")
    assert accuracies(a) == accuracies(b)
    cpu = accuracies(factory(tmp_path / "cpu", settings=replace(SETTINGS, device="cpu"))().evaluate(ROWS))
    assert np.abs(np.array(cpu) - accuracies(a)).max() < 0.05


def test_digits_are_learnt(tmp_path: Path) -> None:
    """Chance is 0.1."""
    space = MobileNetV3S16(classes=10, channels=1)
    settings = ProxySettings(epochs=6, batch_size=32)
    preprocessing = Preprocessing.fit(DATA.train, 16)
    evaluator = ProxyEvaluatorFactory(space, DATA.train, preprocessing, preprocessing.prepare(DATA.val), settings,
                                      str(tmp_path))()
    assert accuracies(evaluator.evaluate(space.extremes()[:1]))[0] > 0.6


# --- the cluster -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pools(ray_local: None) -> Iterator[list[RolloutPool]]:
    opened: list[RolloutPool] = []
    yield opened
    for pool in opened:
        pool.close()


def through_pool(pools: list[RolloutPool], made: ProxyEvaluatorFactory, workers: int,
                 rows: Tokens = ROWS) -> list[Evaluation]:
    shared = replace(made, train=ray.put(made.train), validation=ray.put(made.validation))
    pool = RolloutPool(shared, PoolSettings(workers=workers, num_cpus=0.5))
    pools.append(pool)
    pool.submit(list(enumerate(rows)))
    found: dict[object, Evaluation] = {}
    deadline = time.monotonic() + PATIENCE_S
    while pool.outstanding:
        assert time.monotonic() < deadline, f"{pool.outstanding} trainings are missing"
        found |= dict(pool.collect(timeout_s=1))
    return [found[i] for i in range(len(rows))]


@pytest.mark.slow
def test_any_number_of_workers_finds_the_same(pools: list[RolloutPool], tmp_path: Path) -> None:
    alone = factory(tmp_path / "here")().evaluate(ROWS)
    two = through_pool(pools, factory(tmp_path / "two"), workers=2)
    assert accuracies(two) == accuracies(alone)
    assert [e.details for e in two] == [e.details for e in alone]
    assert {e.source for e in two} == {"proxy"}


@pytest.mark.slow
def test_killed_trainer_loses_no_epoch_and_changes_no_result(pools: list[RolloutPool], tmp_path: Path) -> None:
    """The process ends in the middle of epoch 2; the pool gives the row to another one."""
    expected = factory(tmp_path / "here")().evaluate(ROWS)
    dies = fatal(PREPROCESSING, tmp_path / "mark", dies_at=STEPS + STEPS // 2)
    found = through_pool(pools, factory(tmp_path / "killed", preprocessing=dies), workers=1)
    assert pools[-1].restarts == 1 and (tmp_path / "mark").exists()
    assert accuracies(found) == accuracies(expected)
    assert sorted(e.details["start_epoch"] for e in found) == [0] * (len(ROWS) - 1) + [1]


@pytest.mark.slow
def test_killed_retraining_goes_on_by_itself(ray_local: None, tmp_path: Path) -> None:
    expected = retrained_weights(SPACE, ROWS[2], DATA.train, PREPROCESSING, SETTINGS, str(tmp_path / "here"))
    dies = fatal(PREPROCESSING, tmp_path / "mark", dies_at=2 * STEPS + 1)
    weights = ray.get(submit_retraining(SPACE, ROWS[2], ray.put(DATA.train), dies, SETTINGS, str(tmp_path / "task"),
                                        num_cpus=0.5), timeout=PATIENCE_S)
    assert (tmp_path / "mark").exists()
    assert all(np.array_equal(array, expected[name]) for name, array in weights.items())
    folder = tmp_path / "task" / SPACE.arch_id(ROWS[2])
    assert (folder / "epoch-000003.json").exists()  # left for whoever asks again
    before_death = (folder / "epoch-000002.json").stat().st_mtime_ns
    assert before_death <= (tmp_path / "mark").stat().st_mtime_ns  # epochs 1 and 2 were not trained twice
