"""What the stages of a run share: configuration, data, space, store, services, progress, and the stop flag."""
from __future__ import annotations

import bisect
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
from orchestrator.config import Config
from orchestrator.controllers.controller import Controller
from orchestrator.datasets import load_dataset
from orchestrator.interrupt import StopFlag
from orchestrator.metrics import RunMetrics
from orchestrator.predictors import LatencyPredictor
from orchestrator.progress import Progress
from orchestrator.services import Services
from orchestrator.store import RunStore, Trial, write_atomically, write_json
from searchspaces.catalogue import make_space
from searchspaces.errors import StoreError
from searchspaces.space import SearchSpace

POLL_S = 0.5
DIGEST = "sha256"  # of the tensors, in the JSON beside them
log = logging.getLogger(__name__)


@dataclass
class Leaders:
    """The best trial under each budget so far, and how evaluations went. Memory does not grow with the trials."""

    budgets_ms: Sequence[float] = ()
    best: dict[float, Trial] = field(default_factory=dict)
    successes: int = 0
    failures: int = 0
    last_error: str = ""

    def add(self, trial: Trial) -> None:
        if trial.accuracy is None or trial.latency_ms is None:
            self.failures += 1
            self.last_error = trial.error
            return
        self.successes += 1
        ordered = sorted(self.budgets_ms)
        for budget in ordered[bisect.bisect_left(ordered, trial.latency_ms):]:
            leader = self.best.get(budget)
            if leader is None or trial.accuracy > (leader.accuracy or 0.0):
                self.best[budget] = trial


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
    predictor: LatencyPredictor | None = None  # fitted by the first stage, again where its file is damaged
    measured_ms: dict[str, float] = field(default_factory=dict)  # by arch_id

    def __post_init__(self) -> None:
        self.measured_ms = recorded_latencies(self.store)
        state = intact_state(self.store, "predictor")
        if state is not None:
            self.predictor = LatencyPredictor.from_state(self.space, state)

    def wait(self, reference: ray.ObjectRef) -> Any:
        """The result of a remote call, or the error of ours it ended with, however long it takes, unless the user stops
        the run."""
        while not ray.wait([reference], timeout=POLL_S)[0]:
            self.stop.check()
        self.stop.check()
        return fetch(reference)

    @property
    def budgets_ms(self) -> list[float]:
        return list(self.store.state()["budgets_ms"])

    @property
    def target_id(self) -> str:
        return str(self.store.state()["target_id"])

    def save_predictor(self, predictor: LatencyPredictor) -> None:
        save_state(self.store, "predictor", predictor.state_dict())

    def save_controller(self, controller: Controller) -> None:
        save_state(self.store, "controller", controller.state_dict())


def data_and_space(config: Config) -> tuple[Splits, SearchSpace]:
    """The configured dataset, and the space for its classes and channels."""
    splits = load_dataset(config.data)
    return splits, make_space(config.space.name, classes=len(splits.classes), channels=splits.channels,
                              options=config.space.options)


def recorded_latencies(store: RunStore) -> dict[str, float]:
    """Measured latency in ms by arch_id."""
    table = store.latency.read(["arch_id", "latency_ms", "error"]).to_pylist()
    return {row["arch_id"]: row["latency_ms"] for row in table if not row["error"]}


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
