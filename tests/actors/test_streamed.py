"""Images that are decoded while they are needed are the images in memory, through real processes of a DataLoader."""
from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch

from actors.data import Augmentation, Batches, Preprocessing, Splits, chunks_of
from actors.encoded import cache_folder
from actors.evaluator import share_correct, tensor_of
from actors.loading import Crew, ahead, crew
from actors.rollout.trainer import ArchitectureTrainer, ProxySettings
from actors.streamed import StreamedImages
from actors.supernet.actor import SupernetActor, SupernetService, SupernetSettings
from orchestrator.data.datasets import DataSettings, load_dataset
from searchspaces.catalogue import make_space
from searchspaces.errors import DataError
from tests.orchestrator.data.test_datasets import encoded, make_folder, pictures, write_parquet

COUNT, TINY_MB = 60, 0.001


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Processes that decode have the environment of their fork server: one cache for all tests here."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture
def two_threads() -> Iterator[None]:
    """One for the training, one for a process that decodes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def source(kind: str, folder: Path) -> dict[str, Any]:
    if kind == "folder":
        return {"name": kind, "train": make_folder(folder / "train", {"ant": COUNT // 2, "zebra": COUNT // 2})}
    images = [encoded(pixels) for pixels in pictures(COUNT)]
    return {"name": kind, "train": write_parquet(folder / "train.parquet", images, [i % 2 for i in range(COUNT)])}


def both(kind: str, folder: Path, **options: Any) -> tuple[Splits, Splits]:
    """The same data in memory and streamed; what is read ahead may use as much memory as it likes."""
    how = source(kind, folder) | options
    streamed = load_dataset(DataSettings(**how, memory_mb=TINY_MB))
    parts = (part for part in (streamed.train, streamed.val, streamed.test))
    train, val, test = (replace(part, memory_mb=2048.0) for part in parts if isinstance(part, StreamedImages))
    return load_dataset(DataSettings(**how)), replace(streamed, train=train, val=val, test=test)


@pytest.mark.parametrize(("kind", "options"), [("folder", {"size": 9}), ("parquet", {"limit": 50, "channels": 1})])
def test_streamed_is_in_memory_bit_for_bit(tmp_path: Path, two_threads: None, kind: str,
                                           options: dict[str, Any]) -> None:
    memory, streamed = both(kind, tmp_path, **options)
    for name in ("train", "val", "test"):
        one, other = getattr(memory, name), getattr(streamed, name)
        assert isinstance(other, StreamedImages) and other.shape == one.shape and other.raw_mb == one.raw_mb
        np.testing.assert_array_equal(other.labels, one.labels)
        np.testing.assert_array_equal(other.read(), one.images)
        np.testing.assert_array_equal(other.take(np.array([5, 1])).read(np.array([1])), one.images[[1]])
    preprocessing = Preprocessing.fit(memory.train, 8)
    assert Preprocessing.fit(streamed.train, 8) == preprocessing
    chunks = preprocessing.inputs(streamed.val, at_most_mb=0).chunks(3)
    np.testing.assert_array_equal(torch.cat(list(chunks)).numpy(), preprocessing.prepare(memory.val).images)

    # All that an augmentation can do, on one rank of two.
    strong = Augmentation(**{field.name: type(field.default)(0.4) or 1 for field in fields(Augmentation)})
    one, other = (Batches(splits.train, preprocessing, strong, 8, 3, rank=1, ranks=2) for splits in (memory, streamed))
    state = torch.get_rng_state()
    for epoch in (0, 1):
        pairs = list(zip(one.epoch(epoch), other.epoch(epoch), strict=True))
        assert len(pairs) == one.steps
        for step, (a, b) in enumerate(pairs):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
            assert torch.equal(a[0], one.get(epoch, step)[0])
    assert torch.equal(torch.get_rng_state(), state)    # a training's own random numbers stay as they are
    resumed = list(other.of([(1, step) for step in range(2, other.steps)]))     # another process, the same batches
    assert torch.equal(resumed[0][0], pairs[2][0][0])


def test_a_network_trained_on_streamed_images_is_the_same_network(tmp_path: Path, one_thread: None) -> None:
    memory, streamed = both("parquet", tmp_path)
    space = make_space("nasbench201", classes=2, channels=3, options={"width": 4, "cells": 1, "resolution": 8})
    row = space.sample_uniform(np.random.default_rng(0), 1)[0]
    preprocessing = Preprocessing.fit(memory.train, 8)
    logits, accuracies = [], []
    for name, splits in (("memory", memory), ("streamed", streamed)):
        settings = ProxySettings(epochs=2, batch_size=8, augmentation=Augmentation(1, flip=True))
        network = ArchitectureTrainer(space, splits.train, preprocessing, settings, tmp_path / name).train(row).network
        inputs = preprocessing.inputs(splits.val, at_most_mb=0 if name == "streamed" else 100)
        accuracies.append(share_correct(network, tensor_of(inputs), torch.from_numpy(splits.val.labels), batch=5))
        with torch.inference_mode():
            logits.append(network(preprocessing.tensor(memory.test.read())))
    assert torch.equal(*logits) and accuracies[0] == accuracies[1]


def test_damage_and_absence_are_one_sentence(tmp_path: Path, two_threads: None) -> None:
    _, streamed = both("folder", tmp_path)
    batches = Batches(streamed.train, Preprocessing.fit(streamed.train, 8), Augmentation(), 8, 0)
    assert isinstance(streamed.train, StreamedImages)
    hurt = Path(streamed.train.source.where(int(streamed.train.rows[batches.order(0)[20]])))    # in the third step
    whole = hurt.read_bytes()
    hurt.write_bytes(whole[:60])    # the header is whole
    assert load_dataset(DataSettings(name="folder", train=tmp_path / "train", memory_mb=TINY_MB))
    seen = []
    with pytest.raises(DataError, match=f"^{hurt} is not a readable image .*; repair or remove it$"):
        for batch in batches.epoch(0):
            seen.append(batch)
    assert len(seen) == 2
    hurt.unlink()
    with pytest.raises(DataError, match=f"^node {socket.gethostname()} cannot read {hurt} .No such file") as caught:
        list(batches.epoch(0))
    assert "\n" not in str(caught.value)
    hurt.write_bytes(b"hello")      # what can be seen in a header is said before anything is trained
    with pytest.raises(DataError, match=f"{hurt} is not a readable image"):
        load_dataset(DataSettings(name="folder", train=tmp_path / "train", memory_mb=TINY_MB))


def test_a_lost_process_is_said(tmp_path: Path, two_threads: None) -> None:
    with pytest.raises(DataError, match=r"decodes images was lost .* lower data.memory_mb, now 500"):
        list(ahead(_die, [1, 2, 3], 1.0, 500.0))


def _die(key: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return key


def test_copies_of_parquet_follow_the_file(tmp_path: Path) -> None:
    how = source("parquet", tmp_path)
    settings = DataSettings(**how, memory_mb=TINY_MB)
    before = set(cache_folder().glob("*/ends.npy")) if cache_folder().exists() else set()
    first = load_dataset(settings)
    load_dataset(settings)
    made, = set(cache_folder().glob("*/ends.npy")) - before
    write_parquet(how["train"], [encoded(pixels) for pixels in pictures(COUNT, seed=5)], [i % 2 for i in range(COUNT)])
    second = load_dataset(settings)
    remade, = set(cache_folder().glob("*/ends.npy")) - before
    assert remade != made and not made.parent.exists()
    assert not np.array_equal(first.train.labels, second.train.labels) or not np.array_equal(
        pictures(COUNT)[0], second.train.read(np.array([0]))[0])
    how["train"].unlink()
    with pytest.raises(DataError, match=f"^node {socket.gethostname()} cannot read {how['train']} "):
        second.train.read()


def test_test_images_seen_in_training_are_noticed(tmp_path: Path) -> None:
    how = source("parquet", tmp_path)
    with pytest.raises(DataError, match="60 test images are also in train or val"):
        load_dataset(DataSettings(**how, test=how["train"], memory_mb=TINY_MB))


def test_processes_fit_into_memory_and_cpus() -> None:
    assert crew(100.0, 2048.0, cpus=1, shared_mb=1e6) == Crew(0, 1)         # they would take turns with the training
    assert crew(100.0, 2048.0, cpus=2, shared_mb=1e6) == Crew(1, 1)
    assert crew(100.0, 2112.0, cpus=16, shared_mb=1e6) == Crew(4, 3)        # 528 MB each
    assert crew(100.0, 2048.0, cpus=16, shared_mb=1000.0) == Crew(2, 7)     # 200 MB of /dev/shm each, half of it
    assert crew(100.0, 2048.0, cpus=16, shared_mb=64.0) == Crew(0, 16)      # a container's: decode here
    assert crew(100.0, 0.0, cpus=16, shared_mb=1e6) == Crew(0, 16)          # in memory
    assert [rows.tolist() for rows in chunks_of(5, 2)] == [[0, 1], [2, 3], [4]]


@pytest.mark.slow
def test_an_actor_trains_on_streamed_images_and_its_processes_end_with_it(tmp_path: Path, ray_local: None,
                                                                          two_threads: None) -> None:
    memory, streamed = both("folder", tmp_path)
    space = make_space("nasbench201", classes=2, channels=3, options={"width": 4, "cells": 1, "resolution": 8})
    preprocessing = Preprocessing.fit(memory.train, 8)
    settings = SupernetSettings(epochs=2, batch_size=4, augmentation=Augmentation(1), num_cpus=2)
    alone = SupernetActor(space, memory.train, preprocessing, settings, str(tmp_path / "alone"))
    service = SupernetService(space, streamed.train, preprocessing, settings, tmp_path / "ray")
    try:
        alone.train_epoch()
        alone.train_epoch()
        process = psutil.Process(ray.get(service.actor.train_epoch.remote(), timeout=120)["pid"])
        second = service.actor.train_epoch.remote()
        when_ready = time.monotonic() + 60
        while not (working := [child for child in process.children(recursive=True) if _decodes(child)]):
            assert time.monotonic() < when_ready
        process.kill()
        assert not psutil.wait_procs(working, timeout=60)[1]
        assert ray.get(second, timeout=120)["epoch"] == 2       # by the actor's next life
        _, weights = ray.get(service.actor.weights.remote(), timeout=60)
    finally:
        service.close()
    for name, array in alone.weights()[1].items():
        np.testing.assert_array_equal(array, weights[name])


def _decodes(process: psutil.Process) -> bool:
    """A child of the fork server."""
    try:
        return "forkserver" in " ".join(process.parent().cmdline())     # type: ignore[union-attr]
    except psutil.Error:
        return False
