"""What the stages of a run share: configuration, data, space, store, services, progress, and the stop flag."""
from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import ray
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from actors.data import Preprocessing, Splits
from actors.remote import fetch
from orchestrator.config import Config, TargetPlugin
from orchestrator.controllers.controller import LatencyModel
from orchestrator.data.datasets import load_dataset
from orchestrator.interrupt import StopFlag
from orchestrator.prediction.predictor import LatencyPredictor
from orchestrator.record.goals import Goal, read_goals, target_state, trial_latencies
from orchestrator.record.metrics import RunMetrics
from orchestrator.record.progress import Progress
from orchestrator.record.store import RunStore, Trial, write_atomically, write_json
from orchestrator.services.services import Services
from searchspaces.catalogue import make_space
from searchspaces.errors import StoreError
from searchspaces.space import SearchSpace, Tokens

POLL_S = 0.5
DIGEST = "sha256"  # of the tensors, in the JSON beside them
log = logging.getLogger(__name__)


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

    def wait(self, reference: ray.ObjectRef) -> Any:
        """The result of a remote call, or the error of ours it ended with, however long it takes, unless the user stops
        the run."""
        while not ray.wait([reference], timeout=POLL_S)[0]:
            self.stop.check()
        self.stop.check()
        return fetch(reference)

    @property
    def goals(self) -> list[Goal]:
        return read_goals(self.store, self.config)

    @property
    def predictors(self) -> dict[str, LatencyModel]:
        """By label, of all targets."""
        found = {target.label: target.predictor for target in self.targets if target.predictor is not None}
        assert len(found) == len(self.targets), "measuring comes before predicting"
        return {**found}


def data_and_space(config: Config) -> tuple[Splits, SearchSpace]:
    """The configured dataset, and the space for its classes and channels."""
    splits = load_dataset(config.data)
    return splits, make_space(config.space.name, classes=len(splits.classes), channels=splits.channels,
                              options=config.space.options)


def recorded_latencies(store: RunStore, target_id: str | None) -> dict[str, float]:
    """Latency in ms by arch_id, measured on this target; {} for None."""
    table = store.latency.read(["arch_id", "target_id", "latency_ms", "error"]).to_pylist()
    return {row["arch_id"]: row["latency_ms"] for row in table if not row["error"] and row["target_id"] == target_id}


def state_name(kind: str, label: str, config: Config) -> str:
    """Of a checkpoint: a run with one target or goal needs no label in it."""
    return kind if len(config.targets) == 1 else f"{kind}-{label}"


def load_predictor(store: RunStore, config: Config, space: SearchSpace, label: str) -> LatencyPredictor | None:
    """The target's predictor; None before it is fitted."""
    name = state_name("predictor", label, config)
    return LatencyPredictor.from_state(space, load_state(store, name)) if has_state(store, name) else None


def save_state(store: RunStore, name: str, state: dict[str, Any]) -> None:
    """A flat dictionary: tensors and arrays to NAME.safetensors, everything else to NAME.json."""
    folder = store.path / "checkpoints"
    tensors = {key: torch.as_tensor(value).contiguous() for key, value in state.items()
               if isinstance(value, torch.Tensor | np.ndarray)}
    content = save(tensors)
    with write_atomically(folder / f"{name}.safetensors") as temporary:
        temporary.write_bytes(content)
    facts = {key: value for key, value in state.items() if key not in tensors}
    write_json(folder / f"{name}.json", facts | {DIGEST: sha256(content).hexdigest()})


def has_state(store: RunStore, name: str) -> bool:
    return (store.path / "checkpoints" / f"{name}.json").exists()  # written last


def load_state(store: RunStore, name: str) -> dict[str, Any]:
    """What `save_state` wrote. StoreError if it is missing or damaged."""
    folder = store.path / "checkpoints"
    try:
        facts = json.loads((folder / f"{name}.json").read_text())
        content = (folder / f"{name}.safetensors").read_bytes()
        digest = facts.pop(DIGEST, None)  # runs of earlier versions have none
        if digest not in (None, sha256(content).hexdigest()):
            raise ValueError("its tensors do not have the digest that was written")
        return facts | load(content)
    except (OSError, ValueError, SafetensorError) as error:
        raise StoreError(f"{folder / name}.* is missing or damaged ({error}); resume the run to make it "
                         "again") from error


def intact_state(store: RunStore, name: str) -> dict[str, Any] | None:
    """What `save_state` wrote, None where there is nothing whole: what is damaged is set aside, to be made again."""
    if not has_state(store, name):
        return None
    try:
        return load_state(store, name)
    except StoreError as error:
        log.warning("%s.* in %s is damaged and set aside as *.damaged (%s)", name, store.path / "checkpoints",
                    error.__cause__)
        for suffix in ("json", "safetensors"):
            file = store.path / "checkpoints" / f"{name}.{suffix}"
            with contextlib.suppress(FileNotFoundError):
                os.replace(file, file.with_name(file.name + ".damaged"))
        return None
