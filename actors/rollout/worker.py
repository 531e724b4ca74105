"""The process of one rollout worker; the pool in front of it is in pool.py."""
from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

import torch

from actors.evaluator import Evaluator, Weights
from searchspaces.errors import EvaluationError
from searchspaces.space import Tokens

# An Evaluation without its tokens, which the pool already has.
Outcome = tuple[float, str, int, float, str, str, dict[str, float]]


class RolloutActor:
    """One worker process around one Evaluator. Created through `RolloutPool`, or as a plain object in tests.

    `prepare` comes first, again after every restart: the constructor has no argument in the object store, which Ray
    could have dropped by the time it restarts the actor.
    """

    def __init__(self, name: str = "rollout", num_cpus: float = 1) -> None:
        # Ray sets OMP_NUM_THREADS only on some paths; a worker must not use more cores than it has declared.
        torch.set_num_threads(max(1, int(num_cpus)))
        self._name = name
        self._evaluator: Evaluator | None = None
        self._refusal = ""

    def pid(self) -> int:
        return os.getpid()

    def prepare(self, factory: Callable[[], Evaluator]) -> str:
        """Builds the evaluator; the host's name."""
        self._evaluator = factory()
        return socket.gethostname()

    def set_weights(self, version: int, weights: Weights) -> None:
        try:
            self._prepared().set_weights(version, weights)
        except (RuntimeError, LookupError, ValueError) as error:
            # The caller does not wait for this answer; the next evaluation refuses and gives the reason.
            self._refusal = f" ({first_line(error)})"
            raise

    def evaluate(self, tokens_NT: Tokens, version: int | None = None) -> tuple[float, list[Outcome]]:
        """(seconds, one outcome per row). Refuses to work with other weights than those of `version`."""
        evaluator = self._prepared()
        if version is not None and version != evaluator.weights_version:
            raise EvaluationError(f"worker {self._name} holds weights version {evaluator.weights_version}, not "
                                  f"{version}{self._refusal}; set them again")
        start = time.perf_counter()
        outcomes = [(e.accuracy, e.source, e.weights_version, e.duration_s, e.node, e.error, dict(e.details))
                    for e in evaluator.evaluate(tokens_NT)]
        return time.perf_counter() - start, outcomes

    def _prepared(self) -> Evaluator:
        if self._evaluator is None:
            raise EvaluationError(f"worker {self._name} has restarted and holds no evaluator; prepare it again")
        return self._evaluator

    def __repr__(self) -> str:
        return f"RolloutActor({self._name})"


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
