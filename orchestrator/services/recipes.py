"""What the configuration means to the services: settings of the actors, folders, and the CPUs that a run holds."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from actors.data import LabelledImages
from actors.objectpath import AnyPath, absolute
from actors.rollout.trainer import ProxySettings
from actors.supernet.actor import SupernetSettings
from orchestrator.cluster.embedded import usable_cores
from orchestrator.config import Config
from orchestrator.controllers.catalogue import check_controller_options, controller_class
from orchestrator.controllers.controller import LatencyModel
from orchestrator.data.accuracy import Recipe, TrainingAccuracy
from orchestrator.handover.architectures import look_ups
from orchestrator.record.goals import Goal
from orchestrator.record.store import RunStore
from orchestrator.resources.team import ALONE, Team, most_cpus
from searchspaces.errors import ConfigError
from searchspaces.space import SearchSpace
from searchspaces.training.sandwich import SandwichSettings
from searchspaces.training.training import TrainingMethod
from searchspaces.training.weights import WeightSettings


def slots_needed(config: Config) -> int:
    """Ray CPUs that all of a run holds at once: measuring, supernet, rollouts, learning controllers, one to spare."""
    rollouts = usable_cores() if config.search.rollouts == "auto" else config.search.rollouts
    training = most_cpus(config.supernet, training_cores(config))
    return 1 + len(config.targets) + training + rollouts + controller_cpus(config)


def training_cores(config: Config) -> int:
    """Of this machine: real ones, whatever number of slots its Ray has."""
    return min(config.cluster.cpus or usable_cores(), usable_cores())


def single_threads(config: Config) -> int:
    """Of the training of one network alone: several go on at once, so that more than one must be asked for."""
    return 1 if config.supernet.cpus == "auto" else config.supernet.cpus


def controller_cpus(config: Config) -> int:
    """Of the learners of all controllers, one per goal."""
    name, options = config.controller.name, config.controller.options
    goals = 1 if config.budgets.together else len(config.targets)
    return goals * controller_class(name).cpus(check_controller_options(name, options))


def knowledge_folder(accuracy: TrainingAccuracy, store: RunStore) -> AnyPath:
    return store.path / "knowledge" if accuracy.knowledge == "own" else absolute(accuracy.knowledge)


def proxy_settings(config: Config, epochs: int) -> ProxySettings:
    """The trainer's settings from the recipe in section `accuracy`."""
    recipe = config.accuracy
    assert isinstance(recipe, Recipe), "a supernet's accuracies come without a recipe"
    return ProxySettings(epochs=epochs, batch_size=recipe.batch_size, learning_rate=recipe.learning_rate,
                         weight_decay=recipe.weight_decay, label_smoothing=recipe.label_smoothing, seed=config.seed,
                         augmentation=recipe.augmentation(),
                         calibration_images=config.search.calibration_images)


def trains(config: Config) -> bool:
    """Does anything train in such a run, be it for the hand-over?"""
    return config.accuracy.source != "table" or len(look_ups(config)) < len(config.targets)


def trains_itself(config: Config) -> bool:
    """Does the controller bring its own training of the supernet?"""
    return config.accuracy.source == "supernet" and controller_class(config.controller.name).trains_supernet


def own_training(config: Config, goals: Sequence[Goal], latency: Mapping[str, LatencyModel],
                 parts: int = 1) -> TrainingMethod | None:
    """How the controller has the supernet trained; None where that is up to section `supernet`. `latency` by label of
    the goal."""
    if not trains_itself(config):
        return None
    name, s = config.controller.name, config.supernet
    return controller_class(name).training(
        check_controller_options(name, config.controller.options), {goal.label: goal.budgets_ms for goal in goals},
        WeightSettings(lr=s.learning_rate, weight_decay=s.weight_decay, body_rate=s.body_rate), parts, latency)


def check_training(config: Config, train: LabelledImages, space: SearchSpace) -> None:
    """ConfigError where the controller's own training of the supernet cannot work, before anything starts."""
    name = config.controller.name
    if controller_class(name).finds_spaces and config.accuracy.source != "supernet":
        raise ConfigError(f"controller {name} learns beside a supernet's weights, accuracy is "
                          f"{config.accuracy.source}; set accuracy: supernet, or choose another controller")
    method = own_training(config, [Goal("any", (), (1.0,))], {})
    if method is not None:
        method.check(space)
    share = 0.0 if method is None else method.held_out_share
    count, batch = round(share * len(train)), config.supernet.batch_size
    if share and min(count, len(train) - count) < batch:
        raise ConfigError(f"controller {name} holds {share:g} of {len(train)} training images out, which leaves "
                          f"{count} and {len(train) - count}, too few for a batch of {batch}; change "
                          "controller.validation, or lower supernet.batch_size")


def supernet_settings(config: Config, goals: Sequence[Goal] = (),
                      latency: Mapping[str, LatencyModel] | None = None, team: Team = ALONE) -> SupernetSettings:
    """The actor's settings from the configuration's section; `goals` and their latency models for a controller that
    trains for its budgets."""
    s = config.supernet
    training = own_training(config, goals, latency or {}, team.parts) or SandwichSettings(
        lr=s.learning_rate, weight_decay=s.weight_decay, sampler=s.sampler, subnets=s.subnets,
        distill_weight=s.distillation, body_rate=s.body_rate, teacher=s.teacher)
    return SupernetSettings(training=training, epochs=s.epochs, batch_size=s.batch_size, seed=config.seed,
                            augmentation=s.augmentation(),
                            calibration_images=config.search.calibration_images, workers=team.workers, parts=team.parts,
                            num_cpus=team.cpus, num_gpus=team.gpus)
