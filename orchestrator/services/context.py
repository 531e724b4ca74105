"""What the stages of a run share: configuration, data, space, store, services, progress, and the stop flag."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from actors.data import Preprocessing, Splits
from actors.remote import fetch
from orchestrator.config import Config, TargetPlugin
from orchestrator.controllers.controller import LatencyModel
from orchestrator.data.datasets import load_dataset
from orchestrator.data.filecheck import check_files
from orchestrator.interrupt import StopFlag
from orchestrator.prediction.predictor import LatencyPredictor
from orchestrator.record.goals import Goal, read_goals, target_state, trial_latencies
from orchestrator.record.metrics import RunMetrics
from orchestrator.record.progress import Progress
from orchestrator.record.store import RunStore, Trial
from orchestrator.services.services import Services
from orchestrator.services.states import intact_state, state_name
from searchspaces.catalogue import make_space
from searchspaces.space import SearchSpace, Tokens

POLL_S = 0.5


@dataclass
class Leaders:
    """The best trial under each budget so far, with the latency that counts for the budget, and how evaluations went.
    Memory does not grow with the trials."""

    goals: Sequence[Goal] = ()
    labels: Sequence[str] = ()      # of all targets
    best: dict[tuple[str, float], tuple[Trial, float]] = field(default_factory=dict)    # by goal and budget
    successes: int = 0
    failures: int = 0
    last_error: str = ""

    def add(self, trial: Trial) -> None:
        if trial.accuracy is None or trial.latency_ms is None:
            self.failures += 1
            self.last_error = trial.error
            return
        self.successes += 1
        by_target = {label: [ms] for label, ms in trial_latencies(trial, self.labels).items()}
        for goal in self.goals:
            latency_ms = float(goal.latency_ms(by_target)[0])
            for budget_ms in goal.budgets_ms:
                leader = self.best.get((goal.label, budget_ms))
                better = leader is None or trial.accuracy > (leader[0].accuracy or 0.0)
                if latency_ms <= budget_ms and better:
                    self.best[goal.label, budget_ms] = (trial, latency_ms)


@dataclass
class RunTarget:
    """One target of a run: what was measured on it, and what predicts the rest (fitted by the first stage, again where
    its file is damaged)."""

    plugin: TargetPlugin
    measured_ms: dict[str, float] = field(default_factory=dict)     # by arch_id
    predictor: LatencyPredictor | None = None

    @property
    def label(self) -> str:
        return self.plugin.label

    def latencies(self, arch_ids: Sequence[str], tokens_NT: Tokens) -> list[tuple[float, str]]:
        """Latency in ms and its source, measured where there is a measurement."""
        assert self.predictor is not None, "measuring comes before predicting"
        predicted_N = self.predictor.predict(tokens_NT)
        return [(self.measured_ms[arch_id], "cached") if arch_id in self.measured_ms else (float(ms), "predicted")
                for arch_id, ms in zip(arch_ids, predicted_N)]


@dataclass
class RunContext:
    """One driver's view of one run. Everything that must survive is in `store`."""

    config: Config
    store: RunStore
    space: SearchSpace
    splits: Splits
    preprocessing: Preprocessing
    services: Services
    progress: Progress
    stop: StopFlag
    metrics: RunMetrics
    leaders: Leaders = field(default_factory=Leaders)
    targets: list[RunTarget] = field(default_factory=list)      # in the order of the configuration

    def __post_init__(self) -> None:
        for plugin in self.config.targets:
            measured_ms = recorded_latencies(self.store, target_state(self.store, plugin.label).get("target_id"))
            state = intact_state(self.store, state_name("predictor", plugin.label, self.config))
            predictor = None if state is None else LatencyPredictor.from_state(self.space, state)
            self.targets.append(RunTarget(plugin, measured_ms, predictor))

    def wait(self, reference: ray.ObjectRef, meanwhile: Callable[[], None] = lambda: None) -> Any:
        """The result of a remote call, or the error of ours it ended with, however long it takes, unless the user stops
        the run. `meanwhile` is called now and then."""
        while not ray.wait([reference], timeout=POLL_S)[0]:
            self.poll()
            meanwhile()
        self.stop.check()
        return fetch(reference)

    def poll(self) -> None:
        """To be called in every loop that waits: it may end here, and gives way to other searches."""
        self.stop.check()
        self.services.give_way()

    @property
    def goals(self) -> list[Goal]:
        return read_goals(self.store, self.config)

    @property
    def predictors(self) -> dict[str, LatencyModel]:
        """By label, of all targets."""
        found = {target.label: target.predictor for target in self.targets if target.predictor is not None}
        assert len(found) == len(self.targets), "measuring comes before predicting"
        return {**found}


def checked_data(config: Config) -> list[str]:
    """What a user should hear of the images in files; DataError where no classifier can be trained on them."""
    data = config.data
    if data.train is None:
        return []
    return check_files(data.name, data.train, data.test, data.classes if isinstance(data.classes, list) else None)


def data_and_space(config: Config) -> tuple[Splits, SearchSpace]:
    """The configured dataset, and the space for its classes and channels."""
    splits = load_dataset(config.data)
    return splits, make_space(config.space.name, classes=len(splits.classes), channels=splits.channels,
                              options=config.space.options)


def recorded_latencies(store: RunStore, target_id: str | None) -> dict[str, float]:
    """Latency in ms by arch_id, measured on this target; {} for None."""
    table = store.latency.read(["arch_id", "target_id", "latency_ms", "error"]).to_pylist()
    return {row["arch_id"]: row["latency_ms"] for row in table if not row["error"] and row["target_id"] == target_id}
