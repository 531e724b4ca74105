"""The supernet actor as a plain object: resuming, damage, publishing, finishing subnets, the gradient interface."""
from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from actors.data import Augmentation, Preprocessing
from actors.evaluator import SupernetEvaluator, share_correct
from actors.supernet.actor import SupernetActor, SupernetSettings, load_weights, newest_version
from actors.supernet.checkpoints import read_newest
from actors.supernet.tuning import TuningSettings, tuned_weights
from orchestrator.data.datasets import DataSettings, load_dataset
from searchspaces.errors import EvaluationError, StoreError
from searchspaces.network import GraphNetwork
from searchspaces.training.sandwich import SandwichSettings
from tests.actors.tinyspace import TinySpace

DATA = load_dataset(DataSettings(limit=600))
PREPROCESSING = Preprocessing.fit(DATA.train, 8)
TOKENS = np.array([1, 1], dtype=np.int8)


def settings(**changes: object) -> SupernetSettings:
    defaults: dict[str, object] = {"epochs": 4, "batch_size": 32, "augmentation": Augmentation(1), "seed": 5,
                                   "calibration_images": 200}
    return SupernetSettings(**(defaults | changes))  # type: ignore[arg-type]


def make_actor(folder: Path, space: TinySpace | None = None, **changes: object) -> SupernetActor:
    return SupernetActor(space or TinySpace(), DATA.train, PREPROCESSING, settings(**changes), str(folder))


def assert_equal_weights(a: SupernetActor, b: SupernetActor) -> None:
    (version_a, weights_a), (version_b, weights_b) = a.weights(), b.weights()
    assert version_a == version_b and weights_a.keys() == weights_b.keys()
    for name, array in weights_a.items():
        np.testing.assert_array_equal(array, weights_b[name], err_msg=name)


def test_training_learns_and_reports(tmp_path: Path) -> None:
    actor = make_actor(tmp_path, epochs=12)
    first, *_, last = [actor.train_epoch() for _ in range(12)]
    assert (first["epoch"], last["epoch"], last["epochs"], last["version"]) == (1, 12, 12, 12)
    assert last["loss"] < 0.75 * first["loss"] and last["accuracy_largest"] > 0.5
    assert last["images_per_s"] > 0
    before = actor.weights()[1]["conv.weight"]
    assert actor.train_epoch()["epoch"] == 12  # done: nothing more happens
    np.testing.assert_array_equal(actor.weights()[1]["conv.weight"], before)


@pytest.mark.parametrize("sampler", ["fair", "sandwich"])
def test_status_says_how_often_values_were_trained(tmp_path: Path, sampler: Literal["fair", "sandwich"]) -> None:
    """Three widths and two kernels. Fair steps train every width once; sandwiches favour the ends."""
    def actor() -> SupernetActor:
        return make_actor(tmp_path, training=SandwichSettings(sampler=sampler))

    assert (actor().status()["updates_most"], actor().status()["updates_least"]) == (0, 0)
    status = actor().train_epoch()
    status = actor().train_epoch()  # counts go on after a restart
    steps = 2 * (len(DATA.train) // 32)
    width, kernel = status["updates"]["width"], status["updates"]["kernel"]
    if sampler == "fair":
        assert width == (steps, steps) and sum(kernel) == 3 * steps
    else:
        assert width[0] > 1.3 * width[1] > 0
    assert status["updates_most"] == max(width[0], kernel[0])
    assert status["updates_least"] == min(width[1], kernel[1])


def test_reconstructed_actor_goes_on_bit_identically(tmp_path: Path) -> None:
    straight = make_actor(tmp_path / "a", parts=2)
    for _ in range(4):
        straight.train_epoch()
    for _ in range(2):
        make_actor(tmp_path / "b", parts=2).train_epoch()  # a new actor for each epoch, as after a kill
    third = make_actor(tmp_path / "b", parts=2)
    assert third.status()["epoch"] == 2 and third.status()["loss"] > 0
    third.train_epoch()
    third.train_epoch()
    assert_equal_weights(straight, third)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "json"])
def test_damaged_checkpoint_is_set_aside_and_the_one_before_used(tmp_path: Path, damage: str) -> None:
    actor = make_actor(tmp_path)
    actor.train_epoch()
    actor.train_epoch()
    newest = tmp_path / "supernet-000002.safetensors"
    if damage == "flip":
        content = bytearray(newest.read_bytes())
        content[-5] ^= 1
        newest.write_bytes(content)
    elif damage == "truncate":
        newest.write_bytes(newest.read_bytes()[:-100])
    elif damage == "delete":
        newest.unlink()
    else:
        newest.with_suffix(".json").write_text("{")
    again = make_actor(tmp_path)
    assert again.status()["epoch"] == 1 and again.status()["damaged"] == ["supernet-000002"]
    assert (tmp_path / "supernet-000002.json.damaged").exists() and not newest.exists()
    again.train_epoch()
    assert_equal_weights(actor, again)


def test_interrupted_write_does_not_count(tmp_path: Path) -> None:
    make_actor(tmp_path).train_epoch()
    (tmp_path / "supernet-000002.safetensors").write_bytes(b"the JSON never came")
    (tmp_path / ".supernet-000002.json.123").write_text("{}")
    again = make_actor(tmp_path)
    assert again.status()["epoch"] == 1 and again.status()["damaged"] == []
    assert again.train_epoch()["epoch"] == 2
    checkpoint = read_newest(tmp_path, "supernet")
    assert checkpoint is not None and checkpoint.about["epoch"] == 2


def test_only_the_two_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    actor = make_actor(tmp_path)
    for _ in range(4):
        actor.train_epoch()
    assert sorted(os.listdir(tmp_path)) == ["supernet-000003.json", "supernet-000003.safetensors",
                                            "supernet-000004.json", "supernet-000004.safetensors"]


def test_full_disk_is_one_sentence_and_keeps_what_was_there(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    actor = make_actor(tmp_path)
    actor.train_epoch()
    os.symlink("/dev/full", tmp_path / f".supernet-000002.safetensors.{os.getpid()}")
    with pytest.raises(StoreError, match="No space left on device"):
        actor.train_epoch()
    assert make_actor(tmp_path).status()["epoch"] == 1


def test_checkpoint_of_another_space_is_refused(tmp_path: Path) -> None:
    make_actor(tmp_path).train_epoch()
    with pytest.raises(StoreError, match="norm=True.*not to.*norm=False"):
        make_actor(tmp_path, space=TinySpace(norm=False))


def test_diverging_epoch_is_an_error_and_starts_over_from_the_checkpoint(tmp_path: Path) -> None:
    actor = make_actor(tmp_path, training=SandwichSettings(lr=1e30, warmup_fraction=0.0))
    with pytest.raises(EvaluationError, match="lower its learning rate"):
        actor.train_epoch()
    assert actor.status()["epoch"] == 0
    assert all(np.isfinite(array).all() for array in actor.weights()[1].values())


def test_published_weights_give_the_evaluator_the_same_network(tmp_path: Path) -> None:
    actor = make_actor(tmp_path)
    actor.train_epoch()
    version, weights = actor.weights()
    assert version == 1 and all(array.flags.c_contiguous for array in weights.values())
    stored_version, stored = load_weights(tmp_path)
    assert stored_version == 1 and stored.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(stored[name], array)
    validation = PREPROCESSING.prepare(DATA.val)
    evaluator = SupernetEvaluator(TinySpace(), validation, PREPROCESSING.prepare(DATA.train))
    evaluator.set_weights(version, weights)
    network = GraphNetwork(TinySpace().graph(TOKENS))
    network.load_state_dict({n: torch.from_numpy(a) for n, a in actor.extract_state(TOKENS).items()})
    ours = evaluator.network(TOKENS)
    # both recalibrate on training images; here on all of them against 200, so outputs are close, weights equal
    np.testing.assert_array_equal(network.state_dict()["conv.weight"], ours.state_dict()["conv.weight"])
    images, labels = torch.from_numpy(validation.images), torch.from_numpy(validation.labels)
    assert share_correct(ours, images, labels) == evaluator.evaluate(TOKENS[None])[0].accuracy


def test_missing_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no usable supernet checkpoint"):
        load_weights(tmp_path)


def test_weights_of_another_version_are_refused(tmp_path: Path) -> None:
    actor = make_actor(tmp_path)
    actor.train_epoch()
    actor.train_epoch()
    assert actor.weights(2)[0] == load_weights(tmp_path, 2)[0] == newest_version(tmp_path) == 2
    newest = max(tmp_path.glob("supernet-*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-1])
    again = make_actor(tmp_path)
    for ask in (lambda: again.weights(2), lambda: again.fine_tune(TOKENS, 0, 0.0, 2),
                lambda: load_weights(tmp_path, 2)):
        with pytest.raises(StoreError, match="epoch 2.*resume the run"):
            ask()
    assert newest_version(tmp_path) == 1 and newest_version(tmp_path / "nowhere") == 0
    again.train_epoch()
    for name, array in again.weights(2)[1].items():
        np.testing.assert_array_equal(array, actor.weights()[1][name])


def test_fine_tuning_improves_a_subnet_and_leaves_the_supernet_alone(tmp_path: Path) -> None:
    actor = make_actor(tmp_path, epochs=3)
    for _ in range(3):
        actor.train_epoch()
    before = actor.weights()[1]
    images, labels = torch.from_numpy(PREPROCESSING.prepare(DATA.train).images), torch.from_numpy(DATA.train.labels)

    def accuracy(state: dict) -> float:
        network = GraphNetwork(TinySpace().graph(TOKENS))
        network.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
        return share_correct(network.eval(), images, labels)

    tuned = actor.fine_tune(TOKENS, epochs=8, learning_rate=0.1)
    assert accuracy(tuned) > accuracy(actor.extract_state(TOKENS)) + 0.05
    for name, array in actor.weights()[1].items():
        np.testing.assert_array_equal(array, before[name])
    np.testing.assert_array_equal(actor.fine_tune(TOKENS, 8, 0.1)["linear.weight"], tuned["linear.weight"])
    same = settings()
    alone = TuningSettings(8, 0.1, same.batch_size, same.seed, same.augmentation, same.calibration_images)
    elsewhere = tuned_weights(TinySpace().graph(TOKENS), actor.subnet(TOKENS), DATA.train, PREPROCESSING, alone)
    assert elsewhere.keys() == tuned.keys()
    for name, array in elsewhere.items():
        np.testing.assert_array_equal(array, tuned[name], err_msg=name)


def test_mixture_gradient_is_that_of_finite_differences(tmp_path: Path) -> None:
    actor = make_actor(tmp_path)
    mixture = [np.array([0.2, 0.5, 0.3]), np.array([0.6, 0.4])]
    loss, gradients = actor.mixture_gradient(mixture, batch_index=15)
    assert actor.mixture_gradient(mixture, 15)[0] == loss and actor.mixture_gradient(mixture, 2)[0] != loss
    for position, value in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]:
        ends = []
        for sign in (1, -1):
            moved = [weights.copy() for weights in mixture]
            moved[position][value] += sign * 1e-2
            ends.append(actor.mixture_gradient(moved, 15)[0])
        assert gradients[position][value] == pytest.approx((ends[0] - ends[1]) / 2e-2, abs=2e-3)


def test_one_hot_mixture_is_the_single_architecture(tmp_path: Path) -> None:
    actor = make_actor(tmp_path)
    supernet = actor._trainer.training.supernet.eval()
    images = PREPROCESSING.tensor(DATA.val.images)
    supernet.set_active(TOKENS)
    torch.testing.assert_close(supernet.forward_mixture(images, [torch.eye(3)[1], torch.eye(2)[1]]), supernet(images))
