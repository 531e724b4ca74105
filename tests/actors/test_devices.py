"""Training on another device than the CPU, as far as that shows without one: on torch's device without memory ("meta")
every operation on two devices is an error, and nothing has values."""
from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch

from actors import devices
from actors.devices import training_device
from actors.evaluator import SupernetEvaluatorFactory
from searchspaces.catalogue import make_space
from searchspaces.errors import ConfigError
from searchspaces.training.sandwich import SandwichSettings
from searchspaces.training.training import Schedule
from tests.actors.supernet.test_supernet import DATA, PREPROCESSING, TOKENS, make_actor
from tests.actors.tinyspace import TinySpace

META = torch.device("meta")


@pytest.mark.parametrize("name", ["mobilenetv3-s16", "nasbench201"])
def test_supernets_work_wholly_on_their_device(name: str) -> None:
    space = make_space(name, classes=10, channels=1, options={})
    supernet = space.make_supernet().to(META).train()
    images = torch.empty(4, 1, 16, 16, device=META)
    for row in space.sample_uniform(np.random.default_rng(0), 3):
        supernet.set_active(row)
        supernet(images).sum().backward()
    weights = [torch.empty(size, device=META, requires_grad=True) for size in space.vocabulary_sizes]
    logits = supernet.forward_mixture(images, weights)
    logits.sum().backward()
    tensors = [*supernet.buffers(), *(p.grad for p in supernet.parameters() if p.grad is not None)]
    assert logits.device == META and {tensor.device for tensor in tensors} == {META}
    with pytest.raises(RuntimeError, match="device"):    # so a mixture would have shown
        supernet(torch.zeros(4, 1, 16, 16))


def test_checkpoints_are_on_the_cpu_and_their_own() -> None:
    """What goes to disk and to other workers must not need the device, nor change with the next step."""
    training = SandwichSettings().start(TinySpace().make_supernet(), Schedule(1, 4, 0))
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) % 10
    training.step((images, labels))
    state = training.state_dict()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    assert {tensor.device.type for tensor in state.values()} == {"cpu"} and "momentum.conv.weight" in state
    training.step((images, labels))
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    assert not torch.equal(training.state_dict()["model.conv.weight"], kept["model.conv.weight"])


def given(monkeypatch: pytest.MonkeyPatch, gpus: list[str] | None, cuda: bool) -> None:
    """`gpus` None: outside of Ray's workers."""
    context = SimpleNamespace(get_task_id=lambda: None if gpus is None else "task",
                              get_accelerator_ids=lambda: {"GPU": gpus})
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *arguments, **options: None)


@pytest.mark.parametrize(("gpus", "cuda", "device"), [
    (None, True, "cuda"), (None, False, "cpu"), ([], True, "cpu"), (["0"], True, "cuda"), (["0"], False, "cpu")])
def test_auto_is_the_gpu_that_was_given(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
                                        gpus: list[str] | None, cuda: bool, device: str) -> None:
    given(monkeypatch, gpus, cuda)
    with caplog.at_level(logging.WARNING, devices.__name__):
        assert training_device("auto").type == device and training_device("cpu").type == "cpu"
    wasted = bool(gpus) and not cuda
    assert ("cannot use, so it works on the CPU" in caplog.text) == wasted
    if device == "cpu":
        with pytest.raises(ConfigError, match="'cuda' is asked for and this worker has no GPU"):
            training_device("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a torch built for CUDA")
def test_supernet_on_a_gpu_trains_scores_and_finishes_as_on_the_cpu(tmp_path: Path) -> None:
    actors = {device: make_actor(tmp_path / device, device=device) for device in ("cpu", "cuda")}
    losses, scores = {}, {}
    for device, actor in actors.items():
        status = actor.train_epoch()
        assert status["device"] == device
        losses[device] = status["loss"]
        evaluator = SupernetEvaluatorFactory(TinySpace(), PREPROCESSING.prepare(DATA.val),
                                             PREPROCESSING.prepare(DATA.train), device=device)()  # type: ignore[arg-type]
        evaluator.set_weights(*actor.weights())
        scores[device] = evaluator.accuracy(TOKENS)
        loss, gradients = actor.mixture_gradient([np.array([0.2, 0.5, 0.3]), np.array([0.6, 0.4])], 0)
        assert np.isfinite(loss) and [len(g) for g in gradients] == [3, 2] and actor.fine_tune(TOKENS, 1, 0.01)
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.02)
    assert scores["cuda"] == pytest.approx(scores["cpu"], abs=0.05)
    make_actor(tmp_path / "cuda", device="cpu").train_epoch()    # a checkpoint of one device goes on on another
