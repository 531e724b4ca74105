"""The Evaluator contract: token rows to accuracies, each with its provenance.

Lifecycle: built inside the process that uses it (rollout worker, or the driver in tests), from a factory that pickles;
`set_weights` whenever the shared weights have a new version, then `evaluate` as often as wanted. Calls come from one
thread, one at a time. Nothing survives a restart: the owner builds it again and sets the weights again.

Accuracies are shares, 0..1, on the validation split. The test split is reachable only through methods named `test_*`,
which nothing that searches may call.
"""
from __future__ import annotations

import logging
import math
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from actors.data import Inputs, Prepared, PreparedInChunks, mapped
from actors.devices import Device, device_of, training_device
from actors.remote import fetched
from searchspaces.errors import EvaluationError, ParetorayError
from searchspaces.network import input_of, recalibrate_batch_norm
from searchspaces.space import SearchSpace, Tokens
from searchspaces.supernet import Supernet

log = logging.getLogger(__name__)
EVALUATION_BATCH = 64  # measured on CPU: activations stay in the cache; batches of 250 take twice as long
GPU_BATCH = 512        # a GPU idles on small ones
Weights = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What is known about one architecture's accuracy. `accuracy` is nan exactly where `error` says why. `details` are
    numbers about how it came about (epochs, knowledge-pool hits ...), empty where the source says it all."""

    tokens: Tokens
    accuracy: float
    source: str  # supernet, proxy, table, critic
    weights_version: int
    duration_s: float
    node: str
    error: str = ""
    details: Mapping[str, float] = field(default_factory=dict)


class Evaluator(ABC):
    """See the module docstring. `source` names where its accuracies come from, as in the trials' `accuracy_source`.

    `accuracy` may set `details` to numbers that travel with its result; they are cleared before every call.
    """

    source: str
    weights_version: int = 0
    details: Mapping[str, float] = {}

    @abstractmethod
    def set_weights(self, version: int, weights: Weights) -> None:
        """Weights for the evaluations that follow. The arrays are shared by a whole node: they are copied from, never
        written to. Evaluators without shared weights only note the version."""

    @abstractmethod
    def accuracy(self, tokens_T: Tokens) -> float:
        """Validation accuracy of one canonical architecture, deterministic for given weights. Raises ParetorayError
        (or what torch raises) if it cannot be had."""

    def evaluate(self, tokens_NT: Tokens) -> list[Evaluation]:
        """One Evaluation per row, in order. The failure of one architecture is returned with it, never raised."""
        return [self._evaluate_one(row) for row in tokens_NT]

    def _evaluate_one(self, tokens_T: Tokens) -> Evaluation:
        start = time.perf_counter()
        accuracy, error = math.nan, ""
        self.details = {}
        try:
            accuracy = float(self.accuracy(tokens_T))
            if not 0 <= accuracy <= 1:
                accuracy, error = math.nan, f"accuracy {accuracy} is outside 0..1"
        except (ParetorayError, RuntimeError, ValueError, ArithmeticError, LookupError) as failure:
            log.warning("evaluation of %s failed", tokens_T.tolist(), exc_info=True)
            error = f"{type(failure).__name__}: {failure}"
        return Evaluation(tokens_T, accuracy, self.source, self.weights_version, time.perf_counter() - start,
                          socket.gethostname(), error, self.details)


class TableEvaluator(Evaluator):
    """Accuracies looked up in a table with one row per architecture, e.g. NAS-Bench-201."""

    source = "table"

    def __init__(self, tokens_NT: Tokens, accuracies: Sequence[float] | NDArray[np.floating]) -> None:
        self._accuracy = {np.asarray(row, dtype=np.int8).tobytes(): float(value)
                          for row, value in zip(tokens_NT, accuracies, strict=True)}

    @staticmethod
    def from_parquet(path: Path, token_columns: Sequence[str], accuracy_column: str,
                     unit: float = 0.01) -> TableEvaluator:
        """`token_columns` in the space's position order; `unit` is the value of 1 in the accuracy column."""
        schema = pq.read_schema(path)
        missing = [name for name in (*token_columns, accuracy_column) if name not in schema.names]
        if missing:
            raise EvaluationError(f"{path} has no column '{missing[0]}'; its columns are {', '.join(schema.names)}")
        table = pq.read_table(path, columns=[*token_columns, accuracy_column])
        tokens = np.stack([table[name].to_numpy() for name in token_columns], axis=1).astype(np.int8)
        return TableEvaluator(tokens, table[accuracy_column].to_numpy().astype(np.float64) * unit)

    def set_weights(self, version: int, weights: Weights) -> None:
        self.weights_version = version

    def accuracy(self, tokens_T: Tokens) -> float:
        value = self._accuracy.get(np.asarray(tokens_T, dtype=np.int8).tobytes())
        if value is None:
            raise EvaluationError(f"architecture {np.asarray(tokens_T).tolist()} is not in the table of "
                                  f"{len(self._accuracy)} architectures")
        return value


class SupernetEvaluator(Evaluator):
    """Weights of the shared supernet: extract, re-estimate batch-norm statistics, count hits on `validation`.

    `calibration` are training images without augmentation (2,000 in batches of 100 in the OFA recipe, specification
    searchspaces 2.4; fewer for small data). Both may be mapped read-only from the object store.
    """

    source = "supernet"

    def __init__(self, space: SearchSpace, validation: Inputs, calibration: Prepared, *,
                 calibration_batch: int = 100, batch: int | None = None, device: Device = "auto") -> None:
        """`device` auto: the GPU where this process has been given one; both sets of images are kept there."""
        self.space = space
        self._device = training_device(device)
        # The skeleton; built once, refilled by every version.
        self._supernet: Supernet = space.make_supernet().to(self._device)
        self._supernet.eval()
        self._images = tensor_of(validation, self._device)
        self._labels = mapped(validation.labels).to(self._device)
        self._calibration = even_chunks(mapped(calibration.images).to(self._device), calibration_batch)
        self._batch = batch or (EVALUATION_BATCH if self._device.type == "cpu" else GPU_BATCH)

    def set_weights(self, version: int, weights: Weights) -> None:
        # Plain load_state_dict copies; assign=True would let torch write into every reader's memory.
        self._supernet.load_state_dict({name: mapped(np.asarray(array)) for name, array in weights.items()})
        self.weights_version = version

    def accuracy(self, tokens_T: Tokens) -> float:
        return share_correct(self.network(tokens_T), self._images, self._labels, self._batch)

    def test_accuracy(self, tokens_T: Tokens, test: Inputs) -> float:
        """For the report of what is handed over. Nothing that searches may call this."""
        return share_correct(self.network(tokens_T), tensor_of(test), mapped(test.labels), self._batch)

    def network(self, tokens_T: Tokens) -> nn.Module:
        """The stand-alone network with its own batch-norm statistics, in evaluation mode."""
        network = self._supernet.extract(tokens_T).to(self._device).eval()
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # depthwise layers run faster
        recalibrate_batch_norm(network, self._calibration)
        return network


def tensor_of(images: Inputs, device: torch.device | None = None) -> Tensor | PreparedInChunks:
    """What `share_correct` takes: all images, on the device; or what prepares them a few at a time."""
    return images if isinstance(images, PreparedInChunks) else mapped(images.images).to(device)


def share_correct(network: nn.Module, images: Tensor | PreparedInChunks, labels: Tensor,
                  batch: int = EVALUATION_BATCH) -> float:
    """Share of images whose largest logit is the label's."""
    return int(hits(network, images, labels, batch).sum()) / len(labels)


def hits(network: nn.Module, images: Tensor | PreparedInChunks, labels: Tensor,
         batch: int = EVALUATION_BATCH) -> Tensor:
    """bool[images]: is the largest logit the label's? Logits that are not finite are an error, not chance."""
    found = []
    device = device_of(network)
    chunks = images.split(batch) if isinstance(images, Tensor) else images.chunks(batch)
    with torch.inference_mode():
        for start, chunk in zip(range(0, len(labels), batch), chunks, strict=True):
            chunk = input_of(network, chunk.to(device))
            logits = network(chunk.contiguous(memory_format=torch.channels_last))
            if not bool(torch.isfinite(logits).all()):
                raise EvaluationError("the network's outputs are not finite; its weights have diverged, lower the "
                                      "learning rate")
            found.append((logits.argmax(dim=1) == labels[start:start + batch].to(device)).cpu())
    return torch.cat(found)


def even_chunks(images: Tensor, size: int) -> list[Tensor]:
    """Chunks of about `size`, none of them tiny (statistics of few images would weigh as much as the others')."""
    chunks = torch.tensor_split(images, max(1, round(len(images) / size)))
    return [chunk.contiguous(memory_format=torch.channels_last) for chunk in chunks]


@dataclass(frozen=True)
class SupernetEvaluatorFactory:
    """Builds the evaluator inside a rollout worker. References are resolved there: one copy of the data per node."""

    space: SearchSpace
    validation: Inputs | ray.ObjectRef
    calibration: Prepared | ray.ObjectRef
    calibration_batch: int = 100
    batch: int | None = None
    device: Device = "auto"

    def __call__(self) -> SupernetEvaluator:
        validation: Inputs = fetched(self.validation)
        calibration: Prepared = fetched(self.calibration)
        return SupernetEvaluator(self.space, validation, calibration, calibration_batch=self.calibration_batch,
                                 batch=self.batch, device=self.device)
