"""Proxy training: an architecture's accuracy after E epochs of its own (FNAS section 4.1; specification fnas.md 8).

    factory = ProxyEvaluatorFactory(space, train, preprocessing, validation, ProxySettings(epochs=1), folder)
    pool = RolloutPool(factory, PoolSettings(workers=4))

Every architecture is trained alone, several at once by several rollout workers. Initial weights depend on (seed,
arch_id), batches on (seed, epoch, step): it does not matter which worker trains what, or in which order. With a
knowledge pool (section 4.3) the initial weights are those of similar blocks trained before, where there are enough.

After every epoch the state goes to `folder`/ARCH_ID. Whoever is given the same architecture next, because the first
trainer was killed, goes on from there and arrives at the same accuracy. A result is kept on disk in place of the
weights: if the driver dies before it has recorded it, nothing is trained again. Nodes that do not share the folder
train from the start, with the same result where there is no pool.
"""
from __future__ import annotations

import hashlib
import logging
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.actor import ActorHandle

from actors.data import Augmentation, Batches, Inputs, LabelledImages, Preprocessing, mapped
from actors.devices import Device, training_device
from actors.evaluator import Evaluator, Weights, share_correct, tensor_of
from actors.knowledge.link import KnowledgeLink
from actors.knowledge.pool import KnowledgePool
from actors.objectpath import AnyPath, as_path
from actors.remote import fetched
from actors.supernet.checkpoints import read_newest, remove_checkpoints, write_checkpoint
from actors.supernet.finetune import NetworkTraining, Recipe, arrays, recalibrate
from searchspaces.errors import ConfigError, EvaluationError, StoreError
from searchspaces.network import GraphNetwork
from searchspaces.space import SearchSpace, Tokens

log = logging.getLogger(__name__)
EPOCH, RESULT = "epoch", "result"  # names of the files in an architecture's folder
RETRAIN_RETRIES = 20


@dataclass(frozen=True)
class ProxySettings:
    """SGD with momentum, cosine to zero over `epochs`. `device` auto: the GPU where the worker has been given one."""

    epochs: int = 1
    batch_size: int = 64
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 4e-5
    label_smoothing: float = 0.1
    seed: int = 0
    augmentation: Augmentation = Augmentation()
    calibration_images: int = 512
    device: Device = "auto"

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ConfigError(f"proxy training over {self.epochs} epochs trains nothing; give at least 1 epoch")
        if self.batch_size < 2:
            raise ConfigError(f"batch_size of proxy training is {self.batch_size}; batch norm needs at least 2 images")

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.epochs, self.learning_rate, self.momentum, self.weight_decay, self.label_smoothing)


@dataclass(frozen=True, eq=False)
class Trained:
    """A network trained over all epochs, in evaluation mode with its own batch-norm statistics, and how it came about.

    `start` are the numbers of its warm start (empty for a cold one), `resumed_epoch` where this process took it up.
    """

    network: GraphNetwork
    loss: float
    resumed_epoch: int
    iterations: int
    start: dict[str, Any]


class ArchitectureTrainer:
    """Trains architectures of `space`, one at a time, resuming what `folder` holds. One per process."""

    def __init__(self, space: SearchSpace, train: LabelledImages, preprocessing: Preprocessing,
                 settings: ProxySettings, folder: AnyPath, knowledge: KnowledgeLink | None = None) -> None:
        self.space, self.settings, self.knowledge = space, settings, knowledge
        batch = min(settings.batch_size, len(train))
        self._batches = Batches(train, preprocessing, settings.augmentation, batch, settings.seed)
        self._folder = folder
        self._device = training_device(settings.device)
        # What must be equal for a training to be the same training. The device may change.
        self.facts = {"space_id": space.space_id, "images": len(train), "knowledge": knowledge is not None,
                      **{name: value for name, value in asdict(settings).items() if name != "device"}}

    def train(self, tokens_T: Tokens) -> Trained:
        """EvaluationError where the network cannot take the images, or where its training diverges."""
        network = self._fresh(tokens_T)
        training = NetworkTraining(network, self._batches, self.settings.recipe)
        about = self._resume(tokens_T, training) or self._start(tokens_T, network, training)
        resumed = training.epoch
        while training.epoch < self.settings.epochs:
            about["loss"] = training.train_epoch()
            self._save(tokens_T, training, about)
        recalibrate(network, self._batches.data, self._batches, self.settings.calibration_images)
        network.eval()
        return Trained(network, about["loss"], resumed, self.settings.epochs * self._batches.steps,
                       about["start"])

    def folder(self, tokens_T: Tokens) -> AnyPath:
        return self._folder / self.space.arch_id(tokens_T)

    def _fresh(self, tokens_T: Tokens) -> GraphNetwork:
        """The network with initial weights that depend on the seed and the architecture only."""
        graph = self.space.graph(tokens_T)
        empty = [node for node in graph.nodes if min(node.shape) < 1]
        if empty:
            raise EvaluationError(f"map {empty[0].name} of the network has shape {empty[0].shape}: nothing is left of "
                                  f"images of {graph.input_shape}; choose a larger resolution or fewer strides")
        text = f"{self.settings.seed}/{self.space.arch_id(tokens_T)}".encode()
        with torch.random.fork_rng(devices=[]):  # initial weights are always made on the CPU
            torch.manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "big"))
            network = GraphNetwork(graph)
        return network.to(self._device)

    def _resume(self, tokens_T: Tokens, training: NetworkTraining) -> dict[str, Any] | None:
        """What was noted with the newest epoch on disk, which is loaded; None if there is none of this training."""
        checkpoint = read_newest(self.folder(tokens_T), EPOCH)
        if checkpoint is None:
            return None
        if checkpoint.about["facts"] != self.facts:
            remove_checkpoints(self.folder(tokens_T), EPOCH)
            return None
        training.load_state_dict(checkpoint.tensors, checkpoint.about["epoch"])
        return checkpoint.about

    def _start(self, tokens_T: Tokens, network: GraphNetwork, training: NetworkTraining) -> dict[str, Any]:
        """Only weights are inherited: the optimiser starts empty. Batch-norm statistics are re-estimated once, after
        training, which normalises by its batches and never reads them."""
        about: dict[str, Any] = {"start": {}, "loss": math.nan}
        if self.knowledge is not None:
            about["start"] = self.knowledge.warm_start(tokens_T, network)
            self._save(tokens_T, training, about)  # asked again later, the pool might answer otherwise
        return about

    def _save(self, tokens_T: Tokens, training: NetworkTraining, about: dict[str, Any]) -> None:
        """A disk that refuses costs the way back, not the training."""
        about |= {"facts": self.facts, "epoch": training.epoch}
        try:
            write_checkpoint(self.folder(tokens_T), EPOCH, training.epoch, training.state_dict(), about)
        except StoreError as error:
            log.warning("%s; a killed training would start again", error)


class ProxyEvaluator(Evaluator):
    """Validation accuracy after proxy training. Weights from outside are not used; their version is always 0."""

    source = "proxy"

    def __init__(self, trainer: ArchitectureTrainer, validation: Inputs) -> None:
        self._trainer = trainer
        self._images, self._labels = tensor_of(validation), mapped(validation.labels)

    def set_weights(self, version: int, weights: Weights) -> None:
        self.weights_version = version

    def accuracy(self, tokens_T: Tokens) -> float:
        folder, facts = self._trainer.folder(tokens_T), self._trainer.facts | {"validation": len(self._labels)}
        known = read_newest(folder, RESULT)
        if known is not None and known.about["facts"] == facts:
            self.details = known.about["details"]
            return float(known.about["accuracy"])
        try:
            trained = self._trainer.train(tokens_T)
            accuracy = share_correct(trained.network, self._images, self._labels)
        except EvaluationError:
            remove_checkpoints(folder, EPOCH)
            raise
        self.details = self._details(trained)
        if self._trainer.knowledge is not None:
            self._trainer.knowledge.insert(
                tokens_T, arrays(trained.network), trained.iterations, trained.start["lineage"])
        try:
            write_checkpoint(folder, RESULT, trained.iterations, {},
                             {"facts": facts, "accuracy": accuracy, "details": self.details})
            remove_checkpoints(folder, EPOCH)
        except StoreError as error:
            log.warning("%s; the result is only in memory", error)
        return accuracy

    def _details(self, trained: Trained) -> dict[str, float]:
        """`lineage`: iterations along the chain of warm starts including these, over the network's blocks."""
        details = {"epochs": self._trainer.settings.epochs, "iterations": trained.iterations, "loss": trained.loss,
                   "start_epoch": trained.resumed_epoch}
        if self._trainer.knowledge is None:
            return details
        start = trained.start
        lineage = start["lineage"]
        batch = {name: start[name] for name in ("batch",) if name in start}
        return details | batch | {"warm": float(start["active"]), "hits": start["hits"], "queries": start["queries"],
                          "lineage_min": trained.iterations + min(lineage, default=0),
                          "lineage_max": trained.iterations + max(lineage, default=0)}


@dataclass(frozen=True)
class ProxyEvaluatorFactory:
    """Builds the evaluator inside a rollout worker. References are resolved there: one copy of the data per node.

    `folder` should be on a disk that all nodes share. `knowledge`: the pool's actor, or a pool of this process.
    """

    space: SearchSpace
    train: LabelledImages | ray.ObjectRef
    preprocessing: Preprocessing
    validation: Inputs | ray.ObjectRef
    settings: ProxySettings
    folder: str | AnyPath
    knowledge: KnowledgePool | ActorHandle | None = None

    def __call__(self) -> ProxyEvaluator:
        train: LabelledImages = fetched(self.train)
        validation: Inputs = fetched(self.validation)
        link = None if self.knowledge is None else KnowledgeLink(self.knowledge)
        trainer = ArchitectureTrainer(self.space, train, self.preprocessing, self.settings, as_path(self.folder),
                                      link)
        return ProxyEvaluator(trainer, validation)


def retrained_weights(space: SearchSpace, tokens_T: Tokens, train: LabelledImages, preprocessing: Preprocessing,
                      settings: ProxySettings, folder: str | AnyPath,
                      threads: int = 1) -> dict[str, NDArray[np.generic]]:
    """State dict of one architecture trained from scratch, batch-norm statistics re-estimated: what is handed over.

    Goes on from what `folder` holds and leaves the last checkpoint there, so that calling it again costs nothing.
    """
    torch.set_num_threads(threads)
    return arrays(ArchitectureTrainer(space, train, preprocessing, settings, as_path(folder)).train(tokens_T).network)


def submit_retraining(space: SearchSpace, tokens_T: Tokens, train: ray.ObjectRef, preprocessing: Preprocessing,
                      settings: ProxySettings, folder: str | AnyPath, num_cpus: float = 1, num_gpus: float = 0,
                      run: str = "") -> ray.ObjectRef:
    """`retrained_weights` as a Ray task; `run` is for its name. Killed, it is started again by Ray, and loses at most
    one epoch."""
    task: Any = ray.remote(retrained_weights).options(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=RETRAIN_RETRIES,
                                                      name=f"retrain-{space.arch_id(tokens_T)}.{run}")
    return task.remote(space, tokens_T, train, preprocessing, settings, folder, max(1, int(num_cpus)))
