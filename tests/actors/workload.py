"""An Evaluator whose tokens say what happens: seconds to sleep, and how to misbehave. For faults and for timing."""
from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

import numpy as np

from actors.evaluator import Evaluator, Weights
from searchspaces.errors import EvaluationError
from searchspaces.space import Tokens

SUCCEED, RAISE, DIE, HANG = range(4)


@dataclass(frozen=True)
class Workload:
    """Factory. A row is [number, behaviour]; its accuracy is (number + offset of the weights) / 1000."""

    sleep_s: float = 0.0

    def __call__(self) -> WorkloadEvaluator:
        return WorkloadEvaluator(self.sleep_s)


class WorkloadEvaluator(Evaluator):
    source = "supernet"

    def __init__(self, sleep_s: float) -> None:
        self._sleep_s, self._offset = sleep_s, 0

    def set_weights(self, version: int, weights: Weights) -> None:
        self.weights_version, self._offset = version, int(weights["offset"][0])

    def accuracy(self, tokens_T: Tokens) -> float:
        number, behaviour = tokens_T.tolist()
        self.details = {"number": float(number)} if number % 2 else {}
        if behaviour == RAISE:
            raise EvaluationError(f"number {number} is not wanted")
        if behaviour == DIE:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1000 if behaviour == HANG else self._sleep_s)
        return (number + self._offset) / 1000


@dataclass(frozen=True)
class Broken:
    """A factory that always fails."""

    def __call__(self) -> WorkloadEvaluator:
        raise EvaluationError("no weights file on this node")


def rows(count: int, behaviour: int = SUCCEED, start: int = 0) -> list[tuple[int, Tokens]]:
    return [(start + i, np.array([i % 100, behaviour], dtype=np.int8)) for i in range(count)]
