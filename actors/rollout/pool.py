"""Rollout workers evaluate architectures; the pool in front of them keeps every row safe.

    pool = RolloutPool(factory, PoolSettings(workers=4))
    pool.set_weights(version, reference)
    pool.submit([(0, tokens_T), (1, tokens_T)])
    while pool.outstanding:
        for row_id, evaluation in pool.collect(timeout_s=0.5): ...

A worker may die at any moment. Its rows are sent to others, Ray restarts it, the pool gives it the weights again, and
every submitted row comes back exactly once: as an accuracy, or after `max_failures` failures as an error.
"""
from __future__ import annotations

import logging
import math
import time
import uuid
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from actors.evaluator import Evaluation, Evaluator
from actors.remote import last_line
from actors.rollout.worker import RolloutActor, first_line
from searchspaces.errors import ClusterError, EvaluationError
from searchspaces.space import Tokens

log = logging.getLogger(__name__)

TARGET_CALL_S = 0.1  # cheap rows travel together until a call lasts this long; its round trip is about 1 ms
MAX_CALLS_PER_S = 125  # of all workers together, each 2 ms of the driver: with more workers calls last longer
MAX_ROWS_PER_CALL = 256
PREFETCH_BELOW_S = 1.0  # shorter calls get a second one queued behind them, so that the worker never waits


@dataclass(frozen=True)
class PoolSettings:
    """`rows_per_call` None: chosen so that calls last about TARGET_CALL_S, longer where there are many workers."""

    workers: int = 1
    num_cpus: float = 1
    num_gpus: float = 0
    rows_per_call: int | None = None
    call_time_out_s: float = 600.0
    start_time_out_s: float = 120.0
    max_failures: int = 3


@dataclass
class _Row:
    row_id: Hashable
    tokens_T: Tokens
    failures: int = 0


@dataclass
class _Call:
    reference: ray.ObjectRef
    rows: list[_Row]


@dataclass
class _Worker:
    """`starting` is the pending answer of `prepare`; None while the worker can take rows. Calls run in order."""

    name: str
    handle: Any
    starting: ray.ObjectRef | None
    since: float  # when the start, or the first of `calls`, began
    version: int | None = None  # weights sent to it since it (re)started
    calls: deque[_Call] = field(default_factory=deque)
    retiring: bool = False


def target_call_s(workers: int) -> float:
    """How long a call of cheap rows should take."""
    return max(TARGET_CALL_S, workers / MAX_CALLS_PER_S)


def rows_per_call(row_s: float, workers: int) -> int:
    """How many rows of so many seconds travel together."""
    return max(1, min(MAX_ROWS_PER_CALL, round(target_call_s(workers) / max(row_s, 1e-9))))


class RolloutPool:
    """Driver side, single-threaded. Ray must be initialised. Rows in flight are bounded by `capacity`."""

    def __init__(self, factory: Callable[[], Evaluator], settings: PoolSettings, name: str = "rollout") -> None:
        self._factory, self._settings, self._name = factory, settings, name
        self._workers: list[_Worker] = []
        self._queue: deque[_Row] = deque()
        self._done: list[tuple[Hashable, Evaluation]] = []
        self._ids: set[Hashable] = set()
        self._weights: tuple[int, ray.ObjectRef] | None = None
        self._row_s: float | None = None  # moving average of a row's seconds in its worker
        self._created = 0
        self._start_failures = 0
        self.restarts = 0
        self.resize(settings.workers)

    # --- what the driver calls ---------------------------------------------------------------------------------------

    @property
    def outstanding(self) -> int:
        """Rows submitted and not yet collected."""
        return len(self._ids)

    @property
    def capacity(self) -> int:
        """How many more rows keep all workers busy until the next look."""
        return max(0, 2 * self.workers * self._rows_per_call() - self.outstanding)

    @property
    def workers(self) -> int:
        """With those that are still starting, or wait for a node."""
        return sum(not worker.retiring for worker in self._workers)

    @property
    def ready_workers(self) -> int:
        return sum(worker.starting is None and not worker.retiring for worker in self._workers)

    def set_weights(self, version: int, weights: ray.ObjectRef) -> None:
        """Weights of all calls sent from now on. The reference must be owned by the driver: what an actor owns dies
        with it. Rows already in flight come back with the version they were computed with."""
        self._weights = (version, weights)

    def submit(self, rows: Sequence[tuple[Hashable, Tokens]]) -> None:
        """Adds rows under ids that are new to the pool."""
        for row_id, tokens_T in rows:
            assert row_id not in self._ids, f"row {row_id} is already in the pool"
            self._ids.add(row_id)
            self._queue.append(_Row(row_id, np.asarray(tokens_T, dtype=np.int8)))
        self._dispatch()

    def collect(self, timeout_s: float) -> list[tuple[Hashable, Evaluation]]:
        """Finished rows: at once where there are any, otherwise the first ones within `timeout_s`, or []."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._dispatch()
            waiting = self._waiting()
            if not self._done and waiting:
                patience = min(0.5, max(0.0, deadline - time.monotonic()))
                ray.wait(waiting, num_returns=1, timeout=patience)
            if waiting:
                self._settle(set(ray.wait(waiting, num_returns=len(waiting), timeout=0)[0]))
            self._check_times()
            if self._done or not self._ids or time.monotonic() >= deadline:
                break
        self._dispatch()  # the workers go on while the caller looks at what came back
        done, self._done = self._done, []
        self._ids -= {row_id for row_id, _ in done}
        return done

    def resize(self, workers: int) -> None:
        """Grows at once; shrinks as workers finish what they have."""
        active = [worker for worker in self._workers if not worker.retiring]
        for worker in active[workers:]:
            worker.retiring = True
        for _ in range(workers - len(active)):
            self._workers.append(self._start())
        self._retire()

    def pids(self) -> list[int]:
        """Process ids of the workers, asked from each; for a look at the machine, and for fault tests."""
        return list(ray.get([worker.handle.pid.remote() for worker in self._workers],
                            timeout=self._settings.start_time_out_s))

    def close(self) -> None:
        """Ends all workers. Rows still inside are forgotten."""
        for worker in self._workers:
            ray.kill(worker.handle)
        self._workers, self._ids = [], set()
        self._queue.clear()

    # --- sending ----------------------------------------------------------------------------------------------------

    def _start(self) -> _Worker:
        name = f"{self._name}-{self._created}"
        self._created += 1
        # Retries are the pool's: it alone knows which rows are safe to send again, and where. The suffix keeps the name
        # free of clashes with a worker of an earlier pool that is still ending.
        actor: Any = ray.remote(RolloutActor).options(
            name=f"{name}.{uuid.uuid4().hex[:6]}", num_cpus=self._settings.num_cpus, num_gpus=self._settings.num_gpus,
            max_restarts=-1, max_task_retries=0)
        handle = actor.remote(name, self._settings.num_cpus)
        return _Worker(name, handle, handle.prepare.remote(self._factory), time.monotonic())

    def _rows_per_call(self) -> int:
        if self._settings.rows_per_call is not None:
            return self._settings.rows_per_call
        if self._row_s is None:
            return 1
        return rows_per_call(self._row_s, len(self._workers))

    def _dispatch(self) -> None:
        """Free workers first, then a second call behind short ones."""
        rows_per_call = self._rows_per_call()
        short_s = max(PREFETCH_BELOW_S, 2 * target_call_s(len(self._workers)))
        prefetch = self._row_s is not None and self._row_s * rows_per_call < short_s
        for depth in range(2 if prefetch else 1):
            for worker in self._workers:
                free = worker.starting is None and not worker.retiring and len(worker.calls) == depth
                # A row that has failed is never queued behind another: if it kills the worker, it alone is to blame.
                if self._queue and free and not (depth and self._queue[0].failures):
                    self._send(worker, rows_per_call)

    def _send(self, worker: _Worker, rows_per_call: int) -> None:
        # Fair share, so that the last rows spread over all workers; a row that has failed travels alone.
        share = math.ceil(len(self._queue) / max(1, self.ready_workers))
        rows = [self._queue.popleft()]
        together = 1 if rows[0].failures else min(rows_per_call, share)
        while len(rows) < together and self._queue and not self._queue[0].failures:
            rows.append(self._queue.popleft())
        version = None
        if self._weights is not None:
            version, weights = self._weights
            if worker.version != version:
                worker.handle.set_weights.remote(version, weights)
                worker.version = version
        reference = worker.handle.evaluate.remote(np.stack([row.tokens_T for row in rows]), version)
        if not worker.calls:
            worker.since = time.monotonic()
        worker.calls.append(_Call(reference, rows))

    # --- receiving --------------------------------------------------------------------------------------------------

    def _waiting(self) -> list[ray.ObjectRef]:
        starting = [worker.starting for worker in self._workers if worker.starting is not None]
        return starting + [call.reference for worker in self._workers for call in worker.calls]

    def _settle(self, ready: set[ray.ObjectRef]) -> None:
        for worker in list(self._workers):
            if worker.starting is not None and worker.starting in ready:
                self._settle_start(worker, worker.starting)
            while worker.calls and worker.calls[0].reference in ready:
                self._settle_call(worker)
        self._retire()

    def _settle_start(self, worker: _Worker, starting: ray.ObjectRef) -> None:
        try:
            ray.get(starting)
        except RayError as error:
            in_time = time.monotonic() - worker.since < self._settings.start_time_out_s
            if isinstance(error, ActorUnavailableError) and in_time:
                worker.starting = worker.handle.prepare.remote(self._factory)
            else:  # the factory or the constructor failed
                self._replace(worker, error)
            return
        worker.starting = None
        self._start_failures = 0

    def _settle_call(self, worker: _Worker) -> None:
        """The oldest call of a worker has ended, one way or the other."""
        call = worker.calls.popleft()
        worker.since = time.monotonic()
        try:
            seconds, outcomes = ray.get(call.reference)
        except RayTaskError as error:  # the worker lives and the call raised, or it has restarted unnoticed
            self._failed(call.rows, f"{type(error.cause).__name__}: {error.cause}")
            self._recover(worker)
        except RayActorError as error:
            log.warning("rollout worker %s died; its rows go to others while it restarts", worker.name)
            self.restarts += 1
            self._failed(call.rows, f"worker {worker.name} died ({first_line(error)})")
            self._recover(worker)
        except RayError as error:  # for example a result lost with its node
            self._failed(call.rows, f"{type(error).__name__}: {first_line(error)}")
        else:
            assert len(outcomes) == len(call.rows), f"{worker.name} returned {len(outcomes)} of {len(call.rows)} rows"
            row_s = seconds / len(outcomes)
            self._row_s = row_s if self._row_s is None else 0.7 * self._row_s + 0.3 * row_s
            self._done += [(row.row_id, Evaluation(row.tokens_T, *outcome))
                           for row, outcome in zip(call.rows, outcomes)]

    def _failed(self, rows: list[_Row], reason: str) -> None:
        """Back into the queue, or given up with the reason."""
        for row in reversed(rows):
            row.failures += 1
            if row.failures < self._settings.max_failures:
                self._queue.appendleft(row)
                continue
            log.warning("row %s failed %d times: %s", row.row_id, row.failures, reason)
            version = self._weights[0] if self._weights else 0
            self._done.append((row.row_id, Evaluation(row.tokens_T, math.nan, "", version, 0.0, "",
                                                      f"failed {row.failures} times, last: {reason}")))

    def _recover(self, worker: _Worker) -> None:
        """The process is gone (Ray restarts it) or has lost its evaluator: prepare it again. Calls queued behind the
        lost one are not to blame."""
        for call in reversed(worker.calls):
            self._queue.extendleft(reversed(call.rows))
        worker.calls.clear()
        worker.version = None
        worker.since = time.monotonic()
        worker.starting = worker.handle.prepare.remote(self._factory)

    def _replace(self, worker: _Worker, error: Exception) -> None:
        """A worker that cannot start. Others may, on another node; after `max_failures` in a row nobody tries."""
        self._start_failures += 1
        self._workers.remove(worker)
        ray.kill(worker.handle)
        if self._start_failures >= self._settings.max_failures and not self.ready_workers:
            raise EvaluationError(f"rollout workers cannot start ({last_line(error)})") from error
        if self._start_failures < self._settings.max_failures and not worker.retiring:
            self._workers.append(self._start())

    def _check_times(self) -> None:
        """Ends calls that take too long, and the whole pool where no worker ever starts."""
        now = time.monotonic()
        for worker in self._workers:
            if worker.calls and now - worker.since > self._settings.call_time_out_s:
                ray.kill(worker.handle, no_restart=False)
                self.restarts += 1
                self._failed(worker.calls.popleft().rows,
                             f"took longer than {self._settings.call_time_out_s:g} s (search.time_out_s)")
                self._recover(worker)
        starts = [now - worker.since for worker in self._workers if worker.starting is not None]
        if self._ids and len(starts) == len(self._workers) and min(starts, default=0) > self._settings.start_time_out_s:
            free = ray.available_resources().get("CPU", 0)
            raise ClusterError(f"none of {len(starts)} rollout workers started within "
                               f"{self._settings.start_time_out_s:g} s; each needs {self._settings.num_cpus:g} CPU and "
                               f"{free:g} are free, lower search.rollouts or add nodes")

    def _retire(self) -> None:
        for worker in [w for w in self._workers if w.retiring and not w.calls]:
            ray.kill(worker.handle)
            self._workers.remove(worker)

