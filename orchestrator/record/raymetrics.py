"""The metrics of a run in Ray: one table, from which they are written here and drawn and watched in dashboard.py.

Ray shows each as `ray_NAME` on the metrics port of the driver's node, a counter as `ray_NAME_total`, a histogram as
`ray_NAME_bucket`, `_sum` and `_count`; a counter that was never raised is not shown. Measured with Ray 2.60: a gauge
vanishes 20 s after it was last set, a counter stays for minutes after its process has ended. So a thread sets every
gauge again now and then, and a gauge that is gone says that its driver is.
"""
from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ray.util.metrics import Counter, Gauge, Histogram

SECONDS = [0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000]
REFRESH_S = 5.0     # a gauge lives 20 s, twice the interval in which Ray's processes report
Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True)
class Metric:
    """`labels` beside those that Ray adds."""

    name: str
    kind: Kind
    description: str
    labels: tuple[str, ...] = ("run",)

    @property
    def series(self) -> str:
        """As Prometheus knows it; of a histogram the name before `_bucket`."""
        return f"ray_{self.name}" + ("_total" if self.kind == "counter" else "")


TRIALS = Metric("paretoray_trials", "counter", "Trials recorded", ("run", "controller"))
FAILED = Metric("paretoray_trials_failed", "counter", "Trials that ended in an error", ("run", "controller"))
EVALUATION_S = Metric("paretoray_evaluation_seconds", "histogram", "Duration of an evaluation", ("run", "controller"))
LEFT = Metric("paretoray_trials_left", "gauge", "Trials that the search still lacks")
IN_FLIGHT = Metric("paretoray_in_flight", "gauge", "Evaluations under way")
STAGE = Metric("paretoray_stage", "gauge", "1 for the stage of the run, 0 for the others", ("run", "stage"))
HYPERVOLUME = Metric("paretoray_hypervolume", "gauge", "Area under the Pareto front, ms times accuracy")
BEST = Metric("paretoray_best_accuracy", "gauge", "Best accuracy of any trial, 0..1")
MEASUREMENTS = Metric("paretoray_latency_measurements", "counter", "Networks timed on the device")
DEVICES = Metric("paretoray_devices", "gauge", "Devices of a target: idle, measuring, starting, waiting for another "
                                               "search, or quarantined", ("run", "target", "state"))
QUEUE = Metric("paretoray_latency_queue", "gauge", "Networks that wait to be timed", ("run", "target"))
EPOCH = Metric("paretoray_supernet_epoch", "gauge", "Epochs of the supernet that are trained")
IMAGES = Metric("paretoray_supernet_images_per_second", "gauge", "Training images per second in the last epoch")
ROLLOUTS = Metric("paretoray_rollout_workers", "gauge", "Rollout workers that are ready")
RESTARTS = Metric("paretoray_rollout_restarts", "gauge", "Rollout workers lost and started again in this search")
STORE_ERRORS = Metric("paretoray_store_errors", "gauge", "Writes to the run's folder that failed; the run went on")
METRICS = (TRIALS, FAILED, EVALUATION_S, LEFT, IN_FLIGHT, STAGE, HYPERVOLUME, BEST, MEASUREMENTS, DEVICES, QUEUE, EPOCH,
           IMAGES, ROLLOUTS, RESTARTS, STORE_ERRORS)


class RayMetrics:
    """Writes them for one run. Ray must be initialised. `close` before Ray ends."""

    def __init__(self, run_name: str) -> None:
        self._metrics = {metric.name: _made(metric) for metric in METRICS}
        for made in self._metrics.values():
            made.set_default_tags({"run": run_name})
        self._gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._lock, self._over = threading.Lock(), threading.Event()
        threading.Thread(target=self._refresh, name="ray-metrics", daemon=True).start()

    def count(self, metric: Metric, amount: float = 1, **labels: str) -> None:
        """0 is nothing: Ray does not take it."""
        if amount > 0:
            self._metrics[metric.name].inc(amount, labels)

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        self._metrics[metric.name].observe(value, labels)

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """nan is not known yet: it is left out."""
        if value == value:
            with self._lock:
                self._gauges[metric.name, tuple(sorted(labels.items()))] = value
                self._metrics[metric.name].set(value, labels)

    def set_one(self, metric: Metric, label: str, values: Mapping[str, float], **labels: str) -> None:
        """One series per value of `label`; those that were set before and are not in `values` become 0."""
        with self._lock:
            before = {dict(tags)[label] for name, tags in self._gauges
                      if name == metric.name and labels.items() <= dict(tags).items()}
        for value in sorted(before | values.keys()):
            self.set(metric, values.get(value, 0), **labels, **{label: value})

    def close(self) -> None:
        self._over.set()

    def _refresh(self) -> None:
        while not self._over.wait(REFRESH_S):
            with self._lock:
                for (name, tags), value in self._gauges.items():
                    self._metrics[name].set(value, dict(tags))


def _made(metric: Metric) -> Any:
    if metric.kind == "histogram":
        return Histogram(metric.name, metric.description, SECONDS, metric.labels)
    return (Counter if metric.kind == "counter" else Gauge)(metric.name, metric.description, metric.labels)
