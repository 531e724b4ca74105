"""The services of one run, started when a stage first needs them and closed together.

On one machine the stages take turns, so measuring is never disturbed by training: each service idles outside its
stage. Where GPUs are measured that are trained on too, the services whose turn it is not are closed, because a GPU is
measured by whoever has it alone. The supernet's weights travel once per node: the driver puts them into the object
store, rollout workers map them. The driver owns that object, because what an actor owns dies with it.
"""
from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from actors.data import Preprocessing, Splits, calibration_images
from actors.evaluator import Evaluator, SupernetEvaluatorFactory
from actors.knowledge.pool import KnowledgeService
from actors.knowledge.rules import GateSettings
from actors.latency.pool import LatencyPool, LatencyPoolSettings
from actors.objectpath import absolute
from actors.rollout.pool import PoolSettings, RolloutPool
from actors.rollout.trainer import ProxyEvaluatorFactory
from actors.supernet.actor import SupernetService
from actors.targets.target import Claim
from orchestrator.cluster.embedded import usable_cores
from orchestrator.cluster.joining import total_cpus
from orchestrator.config import Config
from orchestrator.controllers.controller import LatencyModel, Proposal
from orchestrator.data.accuracy import Gpus, Recipe, TableAccuracy, TrainingAccuracy
from orchestrator.data.sources import read_table
from orchestrator.record.goals import Goal, goal_model, read_goals, target_state
from orchestrator.record.store import RunStore
from orchestrator.resources.gpus import PER_GPU, GpuOffer, places, rollout_share, trainer_share
from orchestrator.resources.room import Need, Waits
from orchestrator.resources.team import Team, supernet_team
from orchestrator.resources.waiting import devices_when_there
from orchestrator.services.pretrained import timed_image_size
from orchestrator.services.recipes import (
    controller_cpus,
    knowledge_folder,
    proxy_settings,
    single_threads,
    supernet_settings,
    training_cores,
    trains_itself,
)
from orchestrator.services.states import load_predictor
from searchspaces.space import SearchSpace, Tokens

log = logging.getLogger(__name__)
KNOWLEDGE_TIME_OUT_S = 30.0
ROLLOUTS = "rollout workers"


class Services:
    """Latency pool, supernet actor, knowledge pool and rollout pool; Ray must be initialised. `local`: Ray was started
    for this run. `check` is called during long waits and raises when the run has to stop. `share`: so many runs are to
    find room, so this one takes its part of the CPUs and GPUs."""

    def __init__(self, config: Config, space: SearchSpace, splits: Splits, preprocessing: Preprocessing,
                 store: RunStore, local: bool, check: Callable[[], None] = lambda: None, share: int = 1) -> None:
        self._config, self._space, self._splits, self._store = config, space, splits, store
        self._preprocessing = preprocessing
        self._local, self._check, self._share = local, check, share
        self.say: Callable[[str], None] = log.warning       # what a user should hear
        self._waits = Waits(store, config.cluster.device_wait_s, local, self._poll)
        self._latency: dict[str, tuple[LatencyPool, list[Claim]]] = {}
        self._supernet: SupernetService | None = None
        self._rollouts: RolloutPool | None = None
        self._rollout_need = Need(ROLLOUTS, {})
        self._knowledge: KnowledgeService | None = None

    def latency(self, label: str) -> LatencyPool:
        """The queue in front of a target's devices. Pools that hold the same device take turns, and measuring and
        training take turns on GPUs: the others end."""
        if label not in self._latency:
            target = next(plugin for plugin in self._config.targets if plugin.label == label)
            devices = devices_when_there(target.name, target.options, self._config.cluster, self._said(label),
                                         self._poll)
            for other in [name for name, (_, held) in self._latency.items() if _overlap(devices, held)]:
                self._latency.pop(other)[0].close()
            if _on_gpus(devices) and self._trains_on_gpus():
                self.end_training()
            pool = LatencyPool(self._space, target.name, target.options, devices=devices,
                               settings=LatencyPoolSettings(time_out_s=self._config.latency.time_out_s),
                               reference_ms=target_state(self._store, label).get("reference_ms"),
                               image_size=timed_image_size(self._config, self._splits), search=self._store.name,
                               say=self.say, check=self._check)
            self._latency[label] = (pool, devices)
        return self._latency[label][0]

    def give_way(self) -> None:
        """To be called in loops that wait: other searches of the cluster may measure meanwhile. One that waits for room
        and keeps a device could wait for one that has the room and waits for the device."""
        for pool, _ in self._latency.values():
            pool.give_way()

    def _poll(self) -> None:
        self._check()
        self.give_way()

    def _said(self, label: str) -> Callable[[str], None]:
        """Where a target's devices come from is told in the panel and in state.json."""
        def say(sentence: str) -> None:
            self.say(sentence)
            self._store.update_state(devices=self._store.state().get("devices", {}) | {label: sentence})

        return say

    def supernet(self) -> Any:
        """Handle of the actor that owns the shared weights. It resumes from its newest checkpoint by itself. Ask for it
        again after measuring."""
        return self._supernet_service().actor

    def rollouts(self) -> RolloutPool:
        """Workers that evaluate architectures, by the configured source of accuracies."""
        self.begin_training()
        if self._rollouts is None:
            search, accuracy = self._config.search, self._config.accuracy
            if accuracy.source == "supernet":
                self._supernet_service()  # first: on a full cluster fewer workers will do, no supernet will not
            settings = PoolSettings(workers=self._rollout_count(), num_gpus=self._rollout_gpus(),
                                    call_time_out_s=search.time_out_s)
            if isinstance(accuracy, TrainingAccuracy):
                settings = replace(settings, workers=self.trainers(accuracy), num_cpus=accuracy.cpus,
                                   num_gpus=self.trainer_gpus(accuracy))
            self._rollout_need = _rollout_need(settings, accuracy.source)
            self._waits.room(self._rollout_need, self.say)      # one is enough to begin, the others may come later
            settings = replace(settings, start_time_out_s=self._waits.start_time_out_s(settings.start_time_out_s))
            self._rollouts = RolloutPool(self._evaluator_factory(), settings, name=f"rollout-{self._store.name}")
            if accuracy.source == "supernet":
                self._rollouts.set_weights(*self._supernet_service().publish(
                    version=self._store.state()["weights_version"]))
        return self._rollouts

    def tell_of_missing_rollouts(self) -> None:
        """Says now and then which workers of a search under way wait for a node."""
        if self._rollouts is not None:
            self._waits.workers(self._rollout_need, self._rollouts.ready_workers, self._rollouts.workers, self.say)

    def room_to_train(self, who: str, cpus: int, gpus: float, setting: str) -> None:
        """Waits until a network trained alone finds room, where a node for it has to be added first."""
        self._waits.room(Need.of_workers(who, cpus, gpus, setting=setting), self.say)

    def begin_batches(self, proposals: Sequence[Proposal]) -> None:
        """The trainings of a batch belong together: all of them start warm, or none. To be called before they are
        submitted, and waited for: they may ask for their start at once."""
        batches = {p.batch: [q.tokens for q in proposals if q.batch == p.batch]
                   for p in proposals if p.batch is not None}
        if self._knowledge is not None and batches:
            begun = [self._knowledge.actor.begin_batch.remote(batch, np.stack(rows)) for batch, rows in batches.items()]
            with contextlib.suppress(RayError):  # without its answer trainings start cold
                ray.get(begun, timeout=KNOWLEDGE_TIME_OUT_S)

    def knowledge_statistics(self) -> dict[str, float]:
        """What the knowledge pool says of itself; {} without one, or where it does not answer."""
        with contextlib.suppress(RayError):
            if self._knowledge is not None:
                return dict(ray.get(self._knowledge.actor.statistics.remote(), timeout=KNOWLEDGE_TIME_OUT_S))
        return {}

    def close_rollouts(self) -> None:
        """Frees what the rollout workers hold; `rollouts` starts new ones."""
        if self._rollouts is not None:
            self._rollouts.close()
            self._rollouts = None
            self._waits.workers(self._rollout_need, 0, 0, self.say)

    def trainers(self, recipe: Recipe) -> int:
        """How many architectures are trained at once."""
        if recipe.workers != "auto":
            return recipe.workers
        by_cpu, gpus = self._trainers_by_cpu(recipe), self.trainer_gpus(recipe)
        return max(1, min(by_cpu, places(gpus, self._offer())) if gpus else by_cpu)

    def trainer_gpus(self, recipe: Recipe) -> float:
        """GPUs of each of them."""
        by_cpu = self._trainers_by_cpu(recipe) if recipe.workers == "auto" else recipe.workers
        return trainer_share(recipe.gpus, by_cpu, self._offer_with(recipe.gpus, "accuracy.gpus"))

    def tuners(self) -> tuple[int, int, float]:
        """How many single networks are fine-tuned at once beside nothing else, and the CPUs and GPUs of each."""
        settings = self._config.supernet
        cpus = 1 if settings.cpus == "auto" else settings.cpus
        by_cpu = self._at_once(cpus)
        offer = self._offer_with(settings.gpus, "supernet.gpus")
        gpus = trainer_share(settings.gpus, by_cpu, offer)
        return max(1, min(by_cpu, places(gpus, offer))) if gpus else by_cpu, cpus, gpus

    def begin_training(self) -> None:
        """Frees GPUs that are measured on, if they are to be trained on too."""
        if self._trains_on_gpus():
            for label in [label for label, (_, devices) in self._latency.items() if _on_gpus(devices)]:
                self._latency.pop(label)[0].close()

    def close(self) -> None:
        for pool, _ in self._latency.values():
            with contextlib.suppress(Exception):
                pool.close()
        self.close_rollouts()
        for service in (self._supernet, self._knowledge):
            if service is not None:
                service.close()

    def end_training(self) -> None:
        """Frees what the supernet and the rollout workers hold."""
        self.close_rollouts()
        if self._supernet is not None:
            self._supernet.close()
            self._supernet = None

    def _trains_on_gpus(self) -> bool:
        accuracy = self._config.accuracy
        if isinstance(accuracy, Recipe):
            return accuracy.gpus != 0
        return self._config.supernet.gpus != 0 or self._config.search.gpus != 0

    def _supernet_service(self) -> SupernetService:
        self.begin_training()
        if self._supernet is None:
            team = self.team()
            settings = supernet_settings(self._config, *self.trained_for(), team)
            trained = "weights_version" in self._store.state()      # then its first worker is all that is needed
            self._waits.room(Need.of_workers("the supernet", team.cpus, team.gpus, 1 if trained else team.workers,
                                             "supernet.cpus or supernet.gpus"), self.say)
            self._supernet = SupernetService(
                self._space, self._splits.train, self._preprocessing, settings, self._store.path / "checkpoints",
                name=f"supernet-{self._store.name}", check=self._poll)
        return self._supernet

    def team(self) -> Team:
        """Who trains the supernet. Of a cluster that was joined, all CPUs but those of the driver, of measuring and of
        the controllers: these keep them, and rollout workers come when the supernet is trained."""
        config = self._config
        cores = (training_cores(config) if self._local
                 else self._cluster_cpus() - 1 - len(config.targets) - controller_cpus(config))
        return supernet_team(config.supernet, config.search, cores,
                             self._offer_with(config.supernet.gpus, "supernet.gpus"))

    def finish(self, tokens_T: Tokens) -> ray.ObjectRef:
        """A reference to the weights to hand over, which a task fine-tunes from the supernet's."""
        delivery = self._config.delivery
        return self._supernet_service().finish(tokens_T, delivery.fine_tune_epochs, delivery.fine_tune_learning_rate,
                                               self._store.state()["weights_version"], single_threads(self._config))

    def finishers(self) -> int:
        """How many such tasks find a core; 0: fine-tuning is the supernet actor's, which has the GPU, or all CPUs."""
        config, team = self._config, self.team()
        if team.gpus:
            return 0
        free = (training_cores(config) if self._local
                else self._cluster_cpus() - len(config.targets) - team.cpus - controller_cpus(config))
        return max(0, free) // single_threads(config)

    def trained_for(self) -> tuple[list[Goal], dict[str, LatencyModel]]:
        """The goals and their latency models, where the controller trains the supernet for them."""
        if not trains_itself(self._config):
            return [], {}
        goals, labels = read_goals(self._store, self._config), self._config.labels
        found = {label: load_predictor(self._store, self._config, self._space, label) for label in labels}
        models: dict[str, LatencyModel] = {label: model for label, model in found.items() if model is not None}
        return goals, {goal.label: goal_model(goal, models) for goal in goals}

    def _evaluator_factory(self) -> Callable[[], Evaluator]:
        accuracy = self._config.accuracy
        if isinstance(accuracy, TableAccuracy):
            return read_table(accuracy, self._space)
        if isinstance(accuracy, TrainingAccuracy):
            return self._trainer(accuracy)
        return self._supernet_evaluators()

    def _trainer(self, accuracy: TrainingAccuracy) -> ProxyEvaluatorFactory:
        if self._knowledge is None and accuracy.knowledge != "off":
            self._knowledge = KnowledgeService(
                knowledge_folder(accuracy, self._store), self._space, accuracy.epochs,
                accuracy.knowledge_mb, self._store.path / "checkpoints" / "knowledge.json",
                f"knowledge-{self._store.name}", GateSettings(accuracy.knowledge_window, accuracy.knowledge_hits))
        return ProxyEvaluatorFactory(
            self._space, ray.put(self._splits.train), self._preprocessing,
            ray.put(self._preprocessing.inputs(self._splits.val)), proxy_settings(self._config, accuracy.epochs),
            absolute(self._store.path / "checkpoints" / "proxy"),
            None if self._knowledge is None else self._knowledge.actor)

    def _supernet_evaluators(self) -> SupernetEvaluatorFactory:
        search = self._config.search
        validation = self._splits.val
        if search.validation_images and search.validation_images < len(validation):
            validation = calibration_images(validation, search.validation_images, self._config.seed)
        calibration = calibration_images(self._splits.train, search.calibration_images, self._config.seed)
        return SupernetEvaluatorFactory(self._space, ray.put(self._preprocessing.inputs(validation)),
                                        ray.put(self._preprocessing.prepare(calibration)))

    def _rollout_count(self) -> int:
        asked = self._config.search.rollouts
        if asked == "auto" and self._config.accuracy.source == "table":
            return 1  # looking up is no work
        if asked != "auto":
            return asked
        gpus = self._offer().total if self._config.search.gpus == "auto" else 0.0
        return min(self._spare_cpus(), PER_GPU * math.ceil(gpus)) if gpus else self._spare_cpus()

    def _rollout_gpus(self) -> float:
        if self._config.accuracy.source != "supernet":
            return 0.0
        asked = self._config.search.gpus
        return rollout_share(asked, self._rollout_count(), self.team().gpus, self._offer_with(asked, "search.gpus"))

    def _offer_with(self, asked: Gpus, setting: str) -> GpuOffer:
        """The cluster's GPUs, once a node has as many as one worker asks for, where such a node can be added."""
        if asked != "auto" and asked > GpuOffer.here().largest_node:
            self._waits.room(Need.of_workers(f"{setting} {asked:g}", 1, asked, setting=setting), self.say)
        return self._offer()

    def _trainers_by_cpu(self, recipe: Recipe) -> int:
        return self._at_once(recipe.cpus)

    def _at_once(self, cpus: int) -> int:
        """Trainings of so many CPUs that find a place."""
        cluster = self._cluster_cpus() - 1 - controller_cpus(self._config)
        return max(1, (usable_cores() if self._local else cluster) // cpus)

    def _cluster_cpus(self) -> int:
        return total_cpus() // self._share

    def _offer(self) -> GpuOffer:
        return GpuOffer.here().shared(self._share)

    def _spare_cpus(self) -> int:
        if self._local:
            return usable_cores()  # the other services idle during the search
        return max(1, self._cluster_cpus() - self.team().cpus - controller_cpus(self._config) - 1)


def _on_gpus(devices: Sequence[Claim]) -> bool:
    return any("num_gpus" in claim.actor for claim in devices)


def _overlap(wanted: Sequence[Claim], held: Sequence[Claim]) -> bool:
    """Do they ask for a device in common? Whole GPUs may be different ones, but only Ray knows: they count as one."""
    def names(claims: Sequence[Claim]) -> set[str]:
        pinned = [claim.actor for claim in claims]
        return ({name for actor in pinned for name in actor.get("resources", {})}
                | {"GPU" for actor in pinned if actor.get("num_gpus")}
                | {"driver's node" for actor in pinned if "scheduling_strategy" in actor})

    return bool(names(wanted) & names(held))


def _rollout_need(settings: PoolSettings, source: str) -> Need:
    lower = "accuracy.cpus or accuracy.gpus" if source == "training" else "search.gpus" if settings.num_gpus else ""
    return Need.of_workers(ROLLOUTS, settings.num_cpus, settings.num_gpus, setting=lower)
