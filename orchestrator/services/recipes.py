"""What the configuration means to the services: settings of the actors, folders, and the CPUs that a run holds."""
from __future__ import annotations

from pathlib import Path

from actors.data import Augmentation
from actors.rollout.trainer import ProxySettings
from actors.supernet.actor import SupernetSettings
from orchestrator.cluster.embedded import usable_cores
from orchestrator.config import Config
from orchestrator.controllers.catalogue import check_controller_options, controller_class
from orchestrator.data.accuracy import Recipe, TrainingAccuracy
from orchestrator.record.store import RunStore
from searchspaces.training.steps import TrainingSettings


def slots_needed(config: Config) -> int:
    """Ray CPUs that all of a run holds at once: measuring, supernet, rollouts, learning controllers, one to spare."""
    rollouts = usable_cores() if config.search.rollouts == "auto" else config.search.rollouts
    return 1 + len(config.targets) + config.supernet.cpus * config.supernet.workers + rollouts + controller_cpus(config)


def controller_cpus(config: Config) -> int:
    """Of the learners of all controllers, one per goal."""
    name, options = config.controller.name, config.controller.options
    goals = 1 if config.budgets.together else len(config.targets)
    return goals * controller_class(name).cpus(check_controller_options(name, options))


def knowledge_folder(accuracy: TrainingAccuracy, store: RunStore) -> Path:
    return store.path / "knowledge" if accuracy.knowledge == "own" else Path(accuracy.knowledge).expanduser()


def proxy_settings(config: Config, epochs: int) -> ProxySettings:
    """The trainer's settings from the recipe in section `accuracy`."""
    recipe = config.accuracy
    assert isinstance(recipe, Recipe), "a supernet's accuracies come without a recipe"
    return ProxySettings(epochs=epochs, batch_size=recipe.batch_size, learning_rate=recipe.learning_rate,
                         weight_decay=recipe.weight_decay, label_smoothing=recipe.label_smoothing, seed=config.seed,
                         augmentation=Augmentation(padding=recipe.crop_padding, flip=recipe.flip),
                         calibration_images=config.search.calibration_images)


def supernet_settings(config: Config) -> SupernetSettings:
    """The actor's settings from the configuration's section."""
    s = config.supernet
    training = TrainingSettings(lr=s.learning_rate, weight_decay=s.weight_decay, sampler=s.sampler,
                                subnets=s.subnets, distill_weight=s.distillation)
    return SupernetSettings(training=training, epochs=s.epochs, batch_size=s.batch_size, seed=config.seed,
                            augmentation=Augmentation(padding=s.crop_padding, flip=s.flip),
                            calibration_images=config.search.calibration_images, workers=s.workers, num_cpus=s.cpus)
