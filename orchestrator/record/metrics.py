"""Numbers of a run for machines: TensorBoard under the run folder, `paretoray_*` in Ray's metrics.

    metrics = RunMetrics(run_dir, "quickstart")
    metrics.set_reference(slowest_ms)            # as soon as it is known: hypervolume is written from here on
    metrics.stage("collect")                     # gauge paretoray_stage, label stage
    metrics.in_flight(8, left=292)
    metrics.trial(row)                           # a row of the trial store, in order of observation
    metrics.latency_measurements(20)
    metrics.devices("onnx_cpu", {"measuring": 1}, waiting=12)
    metrics.scalar("supernet/loss", 0.31, step=epoch)
    metrics.close()

One object per driver, one thread. Ray's metrics are written only while Ray is initialised (it appears on every node's
metrics port as `ray_paretoray_*` with the labels `run` and `controller`), TensorBoard always; what cannot
be written is left out, it never stops the run. A resumed run replays its
recorded trials through `replay`, which restores the front without writing anything a second time.
"""
from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary

from actors.objectpath import AnyPath, ObjectPath
from actors.wholefile import write_whole
from orchestrator.frontier import RunningFront
from orchestrator.record.raymetrics import (
    BEST,
    DEVICES,
    EPOCH,
    EVALUATION_S,
    FAILED,
    HYPERVOLUME,
    IMAGES,
    IN_FLIGHT,
    LEFT,
    MEASUREMENTS,
    QUEUE,
    RESTARTS,
    ROLLOUTS,
    STAGE,
    STORE_ERRORS,
    TRIALS,
    RayMetrics,
)

FLUSH_S = 5.0
UPLOAD_S = 60.0     # to an object store
log = logging.getLogger(__name__)


class RunMetrics:
    """See the module docstring. `reference_latency_ms` bounds the hypervolume (the slowest latency of the space);
    until it is known no hypervolume is written."""

    def __init__(self, run_dir: AnyPath, run_name: str, reference_latency_ms: float | None = None) -> None:
        self._ray = RayMetrics(run_name) if ray.is_initialized() else None
        self._store_errors = 0
        self._events = _EventFile(run_dir / "tensorboard", self._store_error)
        self._front = RunningFront(reference_latency_ms or 0.0)
        self._bounded = reference_latency_ms is not None
        if self._ray is not None:
            self._ray.set(STORE_ERRORS, self._store_errors)

    def scalar(self, name: str, value: float, step: int) -> None:
        """One point of a TensorBoard curve; `step` is a trial sequence or an epoch."""
        self._events.scalars({name: value}, step)

    def trial(self, row: Mapping[str, Any]) -> None:
        """One recorded trial, failed ones too. Columns as in the trial store."""
        accuracy, latency_ms = _number(row.get("accuracy")), _number(row.get("latency_ms"))
        self._front.add(latency_ms, accuracy)
        step = int(row["sequence"])
        values = {"trial/accuracy": accuracy, "trial/latency_ms": latency_ms,
                  "trial/reward": _number(row.get("reward")), "trial/duration_s": _number(row.get("duration_s")),
                  "front/best_accuracy": self.best_accuracy}
        if self._bounded:
            values["front/hypervolume"] = self._front.hypervolume
        # Failed trials have no accuracy; nan would tear the curve.
        self._events.scalars({name: value for name, value in values.items() if value == value}, step)
        if self._ray is not None:
            self._trial_in_ray(self._ray, row)

    def _trial_in_ray(self, metrics: RayMetrics, row: Mapping[str, Any]) -> None:
        controller, duration_s = str(row.get("controller") or "none"), _number(row.get("duration_s"))
        metrics.count(TRIALS, controller=controller)
        if row.get("error"):
            metrics.count(FAILED, controller=controller)
        if duration_s >= 0:
            metrics.observe(EVALUATION_S, duration_s, controller=controller)
        metrics.set(BEST, self.best_accuracy)
        metrics.set(HYPERVOLUME, self.hypervolume)

    def set_reference(self, latency_ms: float) -> None:
        """The bound of the hypervolume from now on; the front so far is kept."""
        known = self._front
        self._front, self._bounded = RunningFront(latency_ms), True
        for point in zip(known.latency_ms, known.accuracy):
            self._front.add(*point)

    def replay(self, latency_ms: float, accuracy: float) -> None:
        """A trial recorded by an earlier process of this run."""
        self._front.add(latency_ms, accuracy)

    @property
    def best_accuracy(self) -> float:
        return self._front.accuracy[-1] if self._front.accuracy else float("nan")

    @property
    def hypervolume(self) -> float:
        """Of the front so far; nan until its reference is known."""
        return self._front.hypervolume if self._bounded else float("nan")

    def stage(self, name: str) -> None:
        if self._ray is not None:
            self._ray.set_one(STAGE, "stage", {name: 1})

    def in_flight(self, trials: int, left: int) -> None:
        """Evaluations under way, and trials that the search still lacks."""
        if self._ray is not None:
            self._ray.set(IN_FLIGHT, trials)
            self._ray.set(LEFT, left)

    def rollouts(self, ready: int, restarts: int) -> None:
        if self._ray is not None:
            self._ray.set(ROLLOUTS, ready)
            self._ray.set(RESTARTS, restarts)

    def epoch(self, epoch: int, images_per_s: float) -> None:
        """Of the supernet, once it is trained."""
        if self._ray is not None:
            self._ray.set(EPOCH, epoch)
            self._ray.set(IMAGES, images_per_s)

    def latency_measurements(self, count: int) -> None:
        """Visits of networks on the device, cached answers not counted."""
        if self._ray is not None:
            self._ray.count(MEASUREMENTS, count)

    def devices(self, target: str, states: Mapping[str, int], waiting: int) -> None:
        """How many devices of the target are in which state, and how many networks wait for them."""
        if self._ray is not None:
            self._ray.set_one(DEVICES, "state", states, target=target)
            self._ray.set(QUEUE, waiting, target=target)

    def close(self) -> None:
        self._events.close()
        if self._ray is not None:
            self._ray.close()

    def _store_error(self) -> None:
        self._store_errors += 1
        if self._ray is not None:
            self._ray.set(STORE_ERRORS, self._store_errors)


class _EventFile:
    """A TensorBoard file, written in the caller's thread.

    `SummaryWriter` has a thread that dies of a full disk, and a queue on which the caller then waits for ever. A curve
    is not worth a run: the first error is logged, and nothing is written from then on.
    """

    def __init__(self, folder: AnyPath, failed: Callable[[], None]) -> None:
        """`failed` is called when a write fails."""
        self._folder, self._failed = folder, failed
        self._writer: EventsWriter | None = None
        self._flushed_s = 0.0
        self._uploaded_s = time.monotonic()
        self._object: AnyPath | None = None     # which the file becomes
        try:
            if isinstance(folder, ObjectPath):
                self._begin_nameless(folder)
                return
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"))
        except OSError as error:
            self._give_up(error)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """One record for all of them: writing one costs more than what is in it."""
        if self._writer is None:
            return
        try:
            points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
            self._writer.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=points)))
            if time.monotonic() - self._flushed_s > FLUSH_S:
                self._writer.flush()
                self._flushed_s = time.monotonic()
                if self._flushed_s - self._uploaded_s > UPLOAD_S:
                    self._upload()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        if self._writer is not None:
            try:
                self._writer.flush()
                self._upload()
                self._writer.close()
            except OSError as error:
                self._give_up(error)
            self._writer = None

    def _begin_nameless(self, folder: ObjectPath) -> None:
        """A file on this disk that is gone with the process, however that ends."""
        with tempfile.TemporaryDirectory(prefix="paretoray-") as local:
            self._writer = EventsWriter(str(Path(local) / "events"))
            file = next(Path(local).iterdir())
            self._content, self._object = file.open("rb"), folder / file.name

    def _upload(self) -> None:
        """The whole file, as it cannot be appended to in an object store; nothing to do on a disk."""
        self._uploaded_s = time.monotonic()
        if self._object is not None:
            self._content.seek(0)
            write_whole(self._object, self._content.read())

    def _give_up(self, error: OSError) -> None:
        log.warning("no more TensorBoard scalars are written to %s (%s); the run goes on without them", self._folder,
                    error)
        self._failed()
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):  # it tries what it could not write once more
                writer.close()


def _number(value: Any) -> float:
    """float, nan for a null of the trial store."""
    return float("nan") if value is None else float(value)
