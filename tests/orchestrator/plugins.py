"""Plug-ins of a user's, a good and a broken one of each kind, for `paretoray check`."""
from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.numpy_helper import to_array
from pydantic import BaseModel

from actors.targets.table import TableTarget
from actors.targets.target import Claim, Health, LatencySample, LatencyTarget, TargetIdentity, Workload
from orchestrator.controllers.baselines.random import RandomSearch
from orchestrator.controllers.controller import NoSettings, Proposal
from searchspaces.errors import TargetError
from searchspaces.onnxgraph import to_onnx
from searchspaces.space import Tokens
from tests.actors.tinyspace import TinySpace


class BrokenSpace(TinySpace):
    def cost(self, tokens_NT: Tokens) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        madds, params = super().cost(tokens_NT)
        return madds + 1, params


class Weighing(LatencyTarget):
    """A device on which a network takes as long as it has weights. `unit` is the time of one, in ms."""

    def __init__(self, input_shape: tuple[int, ...], reference_ms: float | None = None, *, unit: float) -> None:
        self._unit = unit
        self._identity = TargetIdentity("scale", "kitchen", "1", "float32", 1, 1, input_shape)

    def identity(self) -> TargetIdentity:
        return self._identity

    def health(self) -> Health:
        return Health(True)

    def reference_ms(self) -> float:
        return 2.0

    def prepare(self, workloads: Sequence[Workload]) -> list[float]:
        return [self._unit * _weights(workload) for workload in workloads]

    def measure(self, handles: Sequence[Any]) -> list[LatencySample]:
        return [LatencySample(self._identity.target_id, ms, 2.0, ms / 2.0, 0.0, 1, 0.0, 0.0, ((ms,),), ((2.0,),),
                              time.time(), 0.0) for ms in handles]

    def close(self) -> None:
        pass


class Sizing(Weighing):
    """A device on which a network takes as long as it has weights, for every pixel of its image; `unit` is for both."""

    def prepare(self, workloads: Sequence[Workload]) -> list[float]:
        return [ms * _pixels(workload) for ms, workload in zip(super().prepare(workloads), workloads)]


class BrokenTarget(Weighing):
    """Mixes up whose sample is whose."""

    def measure(self, handles: Sequence[Any]) -> list[LatencySample]:
        return super().measure(sorted(handles))


class BusyTable(TableTarget):
    """A table whose reader takes a CPU, for as long as the search runs."""

    @classmethod
    def claims(cls, options: Mapping[str, Any], offered: Mapping[str, float]) -> list[Claim]:
        return [Claim({"num_cpus": 1})]


def _weights(workload: Workload) -> int:
    try:
        model = to_onnx(workload.graph) if workload.graph is not None else onnx.load_from_string(workload.onnx or b"")
        onnx.checker.check_model(model)
    except Exception as error:
        raise TargetError(f"the scale cannot weigh this model ({type(error).__name__})") from error
    return sum(to_array(tensor).size for tensor in model.graph.initializer)


def _pixels(workload: Workload) -> int:
    if workload.graph is not None:
        return int(np.prod(workload.graph.input_shape[1:]))
    shape = onnx.load_from_string(workload.onnx or b"").graph.input[0].type.tensor_type.shape.dim
    return int(shape[2].dim_value * shape[3].dim_value)


class LazySettings(NoSettings):
    most: int


class Lazy(RandomSearch):
    """Random search that proposes at most so many at a time."""

    @classmethod
    def settings_model(cls) -> type[BaseModel]:
        return LazySettings

    def propose(self, n: int) -> list[Proposal]:
        return super().propose(min(n, self.settings.most))


class HeavySettings(NoSettings):
    heavy: bool = False


class Heavy(RandomSearch):
    """Random search; if `heavy`, only of cells without an empty edge, the slow ones, and one a second."""

    @classmethod
    def settings_model(cls) -> type[BaseModel]:
        return HeavySettings

    def is_new(self, tokens_T: Tokens) -> bool:
        return super().is_new(tokens_T) and not (self.settings.heavy and (tokens_T == 0).any())

    def propose(self, n: int) -> list[Proposal]:
        if self.settings.heavy:
            time.sleep(1.0)
        return super().propose(1 if self.settings.heavy else n)


class BrokenController(RandomSearch):
    """Proposes the same for ever."""

    def is_new(self, tokens_T: Tokens) -> bool:
        return True

    def propose(self, n: int) -> list[Proposal]:
        return [Proposal(self.space.canonical(self.space.extremes())[0])]


class Stripes:
    """Images with a line across or down."""

    def __init__(self, count: int = 40) -> None:
        self.count = count

    def __call__(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        rng, labels = np.random.default_rng(0), np.arange(self.count) % 2
        images = rng.integers(0, 99, (self.count, 8, 8)).astype(np.uint8)
        for image, label in zip(images, labels):
            (image if label else image.T)[3] = 255
        return images, labels


def stripes() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    return Stripes()()


class BrokenDataset(Stripes):
    def __call__(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        images, labels = super().__call__()
        return images, labels[1:]


class NeedyDataset(Stripes):
    def __init__(self, folder: str) -> None:
        super().__init__()


class Nothing:
    """None of what can be certified."""
