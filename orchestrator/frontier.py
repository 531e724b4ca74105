"""Pareto fronts of latency (ms, smaller is better) and accuracy (0..1, larger is better).

Shapes: N trials in the order of observation. A trial whose latency or accuracy is not finite failed: it is on no front,
under no budget and adds no hypervolume. "Dominated" is the usual relation: another trial is at least as good in both
and better in one; equal trials do not dominate each other and stay together.
"""
from __future__ import annotations

from bisect import bisect_left, bisect_right

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray


def pareto_mask(latency_N: ArrayLike, accuracy_N: ArrayLike) -> NDArray[np.bool_]:
    """bool[N]: which trials no other trial dominates."""
    latency, accuracy = _pair(latency_N, accuracy_N)
    mask = np.isfinite(latency) & np.isfinite(accuracy)
    if mask.any():
        points = np.column_stack([latency[mask], accuracy[mask]])
        mask[mask] = moocore.is_nondominated(points, maximise=[False, True], keep_weakly=True)
    return mask


def hypervolume(latency_N: ArrayLike, accuracy_N: ArrayLike, reference_latency_ms: float,
                reference_accuracy: float = 0.0) -> float:
    """Area (ms times accuracy) dominated by the trials and bounded by the reference; 0 where none reaches it."""
    latency, accuracy = _pair(latency_N, accuracy_N)
    # A point on the far side of the reference bounds no area; it must not enter with a negative side.
    inside = (latency < reference_latency_ms) & (accuracy > reference_accuracy) & np.isfinite(latency + accuracy)
    if not inside.any():
        return 0.0
    points = np.column_stack([latency[inside], accuracy[inside]])
    return float(moocore.hypervolume(points, ref=[reference_latency_ms, reference_accuracy], maximise=[False, True]))


def hypervolume_history(latency_N: ArrayLike, accuracy_N: ArrayLike, reference_latency_ms: float,
                        reference_accuracy: float = 0.0) -> NDArray[np.float64]:
    """float64[N]: hypervolume after each trial, never decreasing."""
    latency, accuracy = _pair(latency_N, accuracy_N)
    front = RunningFront(reference_latency_ms, reference_accuracy)
    history = np.empty(len(latency))
    for i, (x, y) in enumerate(zip(latency.tolist(), accuracy.tolist())):
        front.add(x, y)
        history[i] = front.hypervolume
    return history


def best_under(budget_ms: float, latency_N: ArrayLike, accuracy_N: ArrayLike) -> int:
    """Index of the most accurate trial with latency at or under the budget, -1 if none; ties go to the faster one."""
    latency, accuracy = _pair(latency_N, accuracy_N)
    allowed = np.flatnonzero((latency <= budget_ms) & np.isfinite(latency) & np.isfinite(accuracy))
    if not len(allowed):
        return -1
    return int(allowed[np.lexsort((latency[allowed], -accuracy[allowed]))[0]])


class RunningFront:
    """The front so far, one trial at a time; memory is the front's, not the number of trials.

    `latency_ms` and `accuracy` are both strictly increasing; equal trials are kept once.
    """

    def __init__(self, reference_latency_ms: float, reference_accuracy: float = 0.0) -> None:
        self.latency_ms: list[float] = []
        self.accuracy: list[float] = []
        self.hypervolume = 0.0
        self._reference = (reference_latency_ms, reference_accuracy)

    def add(self, latency_ms: float, accuracy: float) -> bool:
        """True if the trial entered the front (then it pushed out those it dominates)."""
        if not (np.isfinite(latency_ms) and np.isfinite(accuracy)):
            return False
        end = bisect_right(self.latency_ms, latency_ms)  # members [0, end) are at least as fast
        if end and self.accuracy[end - 1] >= accuracy:   # and the last of them is the most accurate
            return False
        # Dominated members are neighbours: not faster (from `start` on) and not more accurate (up to `stop`).
        start, stop = bisect_left(self.latency_ms, latency_ms), bisect_right(self.accuracy, accuracy)
        self.latency_ms[start:stop] = [latency_ms]
        self.accuracy[start:stop] = [accuracy]
        self.hypervolume = hypervolume(self.latency_ms, self.accuracy, *self._reference)
        return True


def _pair(latency_N: ArrayLike, accuracy_N: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    latency, accuracy = np.asarray(latency_N, dtype=np.float64), np.asarray(accuracy_N, dtype=np.float64)
    assert latency.ndim == 1 and latency.shape == accuracy.shape, (latency.shape, accuracy.shape)
    return latency, accuracy
