"""What the stages of a run share: configuration, data, space, store, services, progress, and the stop flag."""
from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

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
from orchestrator.store import RunStore, Trial, read_json, write_atomically, write_json
from searchspaces.catalogue import make_space
from searchspaces.errors import StoreError
from searchspaces.space import SearchSpace

POLL_S = 0.5


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
    predictor: LatencyPredictor | None = None  # fitted by the first stage
    measured_ms: dict[str, float] = field(default_factory=dict)  # by arch_id

    def __post_init__(self) -> None:
        self.measured_ms = recorded_latencies(self.store)
        if has_state(self.store, "predictor"):
            self.predictor = LatencyPredictor.from_state(self.space, load_state(self.store, "predictor"))

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
    with write_atomically(folder / f"{name}.safetensors") as temporary:
        save_file(tensors, temporary)
    write_json(folder / f"{name}.json", {key: value for key, value in state.items() if key not in tensors})


def has_state(store: RunStore, name: str) -> bool:
    return (store.path / "checkpoints" / f"{name}.json").exists()  # written last


def load_state(store: RunStore, name: str) -> dict[str, Any]:
    folder = store.path / "checkpoints"
    try:
        tensors = load_file(folder / f"{name}.safetensors")
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{folder / name}.safetensors is missing or damaged ({error}); resume the run to make it "
                         "again") from error
    return read_json(folder / f"{name}.json") | tensors
