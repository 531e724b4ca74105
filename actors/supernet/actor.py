"""The actor that holds the shared weights: trains them, publishes them by version, finishes single subnets.

    service = SupernetService(space, splits.train, preprocessing, settings, "runs/mine/checkpoints")
    while ray.get(service.actor.train_epoch.remote())["epoch"] < settings.epochs: ...
    version, weights = service.publish()       # a reference that the driver owns

The state on disk is the truth: one checkpoint per epoch, and whoever constructs the actor again (Ray after a crash, a
resumed run) goes on from the newest whole one. A killed actor loses at most the epoch it was in, and the repeated epoch
is the same epoch, because batches and subnets depend on the seed and the step only. Methods are safe to call again.
The version of the weights is the number of epochs that made them.
"""
from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import ActorDiedError, RayError

from actors.data import Batches, LabelledImages, Preprocessing, calibration_images
from actors.evaluator import share_correct
from actors.objectpath import AnyPath, absolute, as_path
from actors.remote import fetch, last_line
from actors.supernet.checkpoints import read_newest, write_checkpoint
from actors.supernet.finetune import arrays, fine_tuned_weights, recalibrate
from actors.supernet.ranks import RankGroup
from actors.supernet.training import SupernetSettings, Trainer, whole_batches
from actors.supernet.tuning import TuningSettings, submit_tuning
from searchspaces.errors import ClusterError, ParetorayError, StoreError
from searchspaces.space import SearchSpace, Tokens
from searchspaces.training.training import Latencies

__all__ = ["SupernetActor", "SupernetService", "SupernetSettings", "fine_tuned_weights", "load_weights"]
log = logging.getLogger(__name__)
NAME = "supernet"
GROUP = "status"    # the concurrency group that answers while an epoch is trained
GROUP_ATTEMPTS = 3
START_TIME_OUT_S = 60.0
START_ATTEMPTS = 10
PROBE_IMAGES = 512  # training images on which largest and smallest are watched; not a result, a sign of life


class SupernetActor:
    """See the module docstring. A plain class: Ray wraps it, tests may use it as it is."""

    def __init__(self, space: SearchSpace, train: LabelledImages | Sequence[ray.ObjectRef],
                 preprocessing: Preprocessing, settings: SupernetSettings, checkpoint_dir: str | AnyPath,
                 name: str = NAME) -> None:
        """`train` as a list of one reference is fetched here, in every life of the actor. `name` is for people."""
        self._name = name
        # Ray derives OMP_NUM_THREADS from num_cpus on some paths only.
        torch.set_num_threads(max(1, int(settings.num_cpus)))
        images: LabelledImages = train if isinstance(train, LabelledImages) else ray.get(train[0])
        self._space, self._train, self._preprocessing, self._settings = space, images, preprocessing, settings
        self._folder = as_path(checkpoint_dir)
        self._damaged: tuple[str, ...] = ()
        self._progress: dict[str, float] = {}
        self._group: RankGroup | None = None
        self._ranks = 1     # that trained the last epoch
        self._trainer = self._restore()

    # --- training ----------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Epochs done and planned, the version of the weights, the last epoch's progress (loss and so on, none before
        the first epoch), how often the values of tokens have been trained, and the checkpoints that had to
        be set aside.

        `updates`: per position of the space (most, least) updates of one of its values; `updates_most` and
        `updates_least` are those of all positions, so that a value that hardly learns shows.
        """
        updates = self._trainer.training.update_counts()
        return {**self._progress, "updates": updates, "updates_most": max(most for most, _ in updates.values()),
                "updates_least": min(least for _, least in updates.values()),
                "epoch": self._trainer.epoch, "epochs": self._settings.epochs, "version": self._trainer.epoch,
                "workers": self._ranks,
                "rank_pids": self._group.pids() if self._group else [], "damaged": list(self._damaged),
                "device": self._trainer.device.type, "host": socket.gethostname(),
                "pid": os.getpid()}

    @ray.method(concurrency_group=GROUP, max_task_retries=0)
    def epochs_done(self) -> float:
        """With the part of the epoch that is being trained: answers at once, from a thread of its own."""
        trainer = self._trainer
        return trainer.training.steps_done / trainer.batches.steps

    def begin_epoch(self) -> dict[str, Tokens]:
        """By label of a goal, architectures whose latency for it the next epoch needs; {} for methods without."""
        return dict(self._trainer.begin_epoch())

    def distribution(self) -> dict[str, NDArray[np.float64]]:
        """What the training method learned beside the weights (`Training.distribution`)."""
        return self._trainer.training.distribution()

    def train_epoch(self, latencies: Latencies | None = None) -> dict[str, Any]:
        """Trains the next epoch, writes its checkpoint and returns `status()`. Does nothing after the last epoch.
        `latencies` in ms answer `begin_epoch`, row by row; nan where measuring failed."""
        if self._trainer.epoch < self._settings.epochs:
            try:
                known = latencies or {}
                progress = (self._train_with_ranks(known) if self._wanted_ranks > 1
                            else self._trainer.train_epoch(known))
                self._ranks = self._group.ranks if self._group else 1
            except BaseException:
                self._trainer = self._restore()  # never go on from the middle of an epoch
                raise
            smallest, largest = self._space.extremes()
            self._progress = progress | {"accuracy_largest": self._probe(largest),
                                         "accuracy_smallest": self._probe(smallest)}
            self._save()
            if self._trainer.epoch == self._settings.epochs:
                self._end_group()   # what it holds is for the search now
        return self.status()

    def _train_with_ranks(self, latencies: Latencies) -> dict[str, float]:
        """One epoch on all ranks. If a rank is lost, the epoch is repeated with a new group, at last alone."""
        for attempt in range(GROUP_ATTEMPTS):
            try:
                if self._group is None:
                    self._group = RankGroup(self._space, self._train, self._preprocessing, self._settings,
                                            self._wanted_ranks, self._name)
                    if self._group.ranks > 1:
                        self._trainer = self._restore(self._group.ranks)
                        self._group.join(self._trainer)
                return self._group.train_epoch(self._trainer, latencies)
            except ParetorayError:
                self._end_group()
                raise
            except (RuntimeError, RayError, TimeoutError) as error:  # gloo raises RuntimeError
                log.warning("a supernet rank was lost (%s); epoch %d is repeated, attempt %d of %d",
                            (str(error).splitlines() or [""])[0], self._trainer.epoch + 1, attempt + 1, GROUP_ATTEMPTS)
                self._end_group()
                self._trainer = self._restore()
        log.warning("supernet ranks were lost %d times in one epoch; it is trained by one worker", GROUP_ATTEMPTS)
        return self._trainer.train_epoch(latencies)

    @property
    def _wanted_ranks(self) -> int:
        """A rank without a part of the batch would have nothing to do."""
        return min(self._settings.workers, self._trainer.training.schedule.parts)

    def rank_states(self) -> list[dict[str, torch.Tensor]]:
        """The other ranks' whole states, to check that they agree with this one."""
        return self._group.states() if self._group else []

    def _end_group(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None

    # --- weights -----------------------------------------------------------------------------------------------------

    def weights(self, version: int | None = None) -> tuple[int, dict[str, NDArray[np.generic]]]:
        """(version, the supernet's state dict); StoreError if another version was asked for. The caller puts them into
        the object store: an object that this actor put would die with it."""
        self._check_version(version)
        return self._trainer.epoch, arrays(self._trainer.training.supernet)

    def subnet(self, tokens_T: Tokens, version: int | None = None) -> dict[str, NDArray[np.generic]]:
        """Weights of one subnet as they are, to be finished elsewhere. StoreError as in `weights`."""
        self._check_version(version)
        return arrays(self._trainer.training.supernet.extract(tokens_T))

    def extract_state(self, tokens_T: Tokens) -> dict[str, NDArray[np.generic]]:
        """Weights of one subnet, batch-norm statistics recalibrated, without fine-tuning."""
        return self.fine_tune(tokens_T, epochs=0, learning_rate=0.0)

    def fine_tune(self, tokens_T: Tokens, epochs: int, learning_rate: float,
                  version: int | None = None) -> dict[str, NDArray[np.generic]]:
        """Weights of one subnet after `epochs` of its own training, batch-norm statistics recalibrated. The supernet
        stays as it is. StoreError if it holds another `version` than asked for."""
        self._check_version(version)
        network = self._trainer.training.supernet.extract(tokens_T).to(self._trainer.device)
        return fine_tuned_weights(network, self._batches(), epochs, learning_rate, self._settings.calibration_images)

    def mixture_gradient(self, mixture: Sequence[NDArray[np.floating]],
                         batch_index: int) -> tuple[float, list[NDArray[np.float32]]]:
        """The narrow second interface of gradient systems: cross-entropy on one training batch of the mixture of
        choices (`Supernet.forward_mixture`), and its gradient with respect to each position's weights float[V_t]."""
        batches = self._batches()
        device = self._trainer.device
        images, labels = (tensor.to(device) for tensor in batches.get(*divmod(batch_index, batches.steps)))
        weights = [torch.tensor(np.asarray(w), dtype=torch.float32, device=device, requires_grad=True) for w in mixture]
        supernet = self._trainer.training.supernet.train()
        loss = torch.nn.functional.cross_entropy(supernet.forward_mixture(images, weights), labels)
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        return float(loss.detach()), [np.zeros(len(w), np.float32) if g is None else g.cpu().numpy()
                             for w, g in zip(weights, gradients)]

    # --- inside ------------------------------------------------------------------------------------------------------

    def _check_version(self, version: int | None) -> None:
        """A restart behind a damaged checkpoint holds older weights, or fresh ones, until they are trained again."""
        if version is not None and version != self._trainer.epoch:
            raise StoreError(f"the supernet in {self._folder} came back with the weights of epoch "
                             f"{self._trainer.epoch}, because its checkpoint of epoch {version} is damaged or missing; "
                             "resume the run to train the epochs between again")

    def _batches(self) -> Batches:
        return whole_batches(self._train, self._preprocessing, self._settings)

    def _restore(self, ranks: int = 1) -> Trainer:
        """A trainer at the newest whole checkpoint, or at the start."""
        trainer = Trainer(self._space, self._train, self._preprocessing, self._settings, 0, ranks)
        checkpoint = read_newest(self._folder, NAME)
        if checkpoint is not None:
            self._damaged += checkpoint.damaged
            if checkpoint.about["space_id"] != self._space.space_id:
                raise StoreError(f"the supernet in {self._folder} belongs to {checkpoint.about['space_id']}, not to "
                                 f"{self._space.space_id}; use another run name or the options it was trained with")
            trainer.load(checkpoint.tensors)
            self._progress = checkpoint.about["progress"]
        return trainer

    def _save(self) -> None:
        epoch, training = self._trainer.epoch, self._trainer.training
        write_checkpoint(self._folder, NAME, epoch, training.state_dict(), {
            "space_id": self._space.space_id, "epoch": epoch, "version": epoch, "step": training.steps_done,
            "progress": self._progress})

    def _probe(self, tokens_T: Tokens) -> float:
        """Accuracy of one subnet on a few training images, with statistics of these images."""
        network = self._trainer.training.supernet.extract(tokens_T).to(self._trainer.device)
        batches = self._batches()
        recalibrate(network, self._train, batches, PROBE_IMAGES)
        probe = calibration_images(self._train, PROBE_IMAGES, batches.seed)
        return share_correct(network.eval(), self._preprocessing.tensor(probe.read()), torch.from_numpy(probe.labels))

    def __repr__(self) -> str:
        return f"SupernetActor({self._name})"


class SupernetService:
    """Driver side: starts the actor, and keeps alive what its restarts need and what it publishes.

    The images are an argument of the actor's constructor. Ray runs the constructor again after a crash and finds them
    only as long as somebody holds this reference; the same goes for weights that an actor would put itself. `check` is
    called while waiting and may raise to stop.
    """

    def __init__(self, space: SearchSpace, train: LabelledImages, preprocessing: Preprocessing,
                 settings: SupernetSettings, checkpoint_dir: str | AnyPath, name: str = NAME,
                 check: Callable[[], None] = lambda: None) -> None:
        self._train = ray.put(train)
        self._parts = (space, [self._train], preprocessing, settings, absolute(checkpoint_dir))
        self._name = name
        self.actor = self._start(check)

    def _start(self, check: Callable[[], None]) -> Any:
        """The actor, once it answers. A process that never comes up is given up and another one started: Ray has been
        seen to lose one without noticing. Patient enough for a node that is still being added."""
        settings = self._parts[3]
        for _ in range(START_ATTEMPTS):
            options: Any = ray.remote(concurrency_groups={GROUP: 1})(SupernetActor).options(  # type: ignore[call-overload]
                name=f"{self._name}.{uuid.uuid4().hex[:6]}", num_cpus=settings.num_cpus, num_gpus=settings.num_gpus,
                max_restarts=-1, max_task_retries=-1)  # every method may be called again
            with _silent_stderr():  # Ray warns that the images must be kept alive, which `_train` does
                actor = options.remote(*self._parts, self._name)
            answer, deadline = actor.status.remote(), time.monotonic() + START_TIME_OUT_S
            while time.monotonic() < deadline:
                if ray.wait([answer], timeout=0.5)[0]:
                    try:
                        fetch(answer)
                    except ActorDiedError as error:  # its constructor raised: no other process would do better
                        raise ClusterError(f"the supernet actor cannot start ({last_line(error)})") from error
                    return actor
                check()
            log.warning("the supernet actor did not start within %g s; starting another one", START_TIME_OUT_S)
            ray.kill(actor)
        raise ClusterError(f"the supernet actor did not start in {START_ATTEMPTS * START_TIME_OUT_S:g} s; it needs "
                           f"{settings.num_cpus:g} CPU and {settings.num_gpus:g} GPU free on one node, lower "
                           "supernet.cpus or supernet.gpus, or add nodes")

    def publish(self, timeout_s: float | None = None, version: int | None = None) -> tuple[int, ray.ObjectRef]:
        """(version, reference to the current weights), mapped once per node by whoever gets it. StoreError if they are
        not of the `version` asked for."""
        current, weights = fetch(self.actor.weights.remote(version), timeout_s)
        return current, ray.put(weights)

    def finish(self, tokens_T: Tokens, epochs: int, learning_rate: float, version: int, threads: int) -> ray.ObjectRef:
        """`SupernetActor.fine_tune` as a task of its own; a reference to its result."""
        space, (train,), preprocessing, settings, _ = self._parts
        tuning = TuningSettings(epochs, learning_rate, settings.batch_size, settings.seed, settings.augmentation,
                                settings.calibration_images, device="cpu")
        return submit_tuning(f"fine-tune-{space.arch_id(tokens_T)}.{self._name}", space.graph(tokens_T),
                             self.actor.subnet.remote(tokens_T, version), train, preprocessing, tuning,
                             num_cpus=threads)

    def close(self) -> None:
        ray.kill(self.actor)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Hides what native code prints on the process's stderr meanwhile."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def newest_version(checkpoint_dir: str | AnyPath) -> int:
    """Version of the newest whole checkpoint, 0 without one. Damaged newer ones are set aside."""
    checkpoint = read_newest(as_path(checkpoint_dir), NAME)
    return 0 if checkpoint is None else int(checkpoint.about["version"])


def load_weights(checkpoint_dir: str | AnyPath,
                 version: int | None = None) -> tuple[int, dict[str, NDArray[np.generic]]]:
    """(version, state dict) of the newest whole checkpoint, without an actor. StoreError if there is none, or if it is
    not of the `version` asked for."""
    checkpoint = read_newest(as_path(checkpoint_dir), NAME)
    if checkpoint is None:
        raise StoreError(f"{checkpoint_dir} holds no usable supernet checkpoint; train one first or resume the run")
    if version is not None and version != checkpoint.about["version"]:
        raise StoreError(f"the supernet's checkpoint of epoch {version} in {checkpoint_dir} is damaged or missing, the "
                         f"newest whole one is of epoch {checkpoint.about['version']}; resume the run to train the "
                         "epochs between again")
    prefix = "model."
    return int(checkpoint.about["version"]), {name.removeprefix(prefix): tensor.numpy() for name, tensor in
                                              checkpoint.tensors.items() if name.startswith(prefix)}
