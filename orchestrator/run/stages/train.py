"""Second stage: train the shared supernet in its actor, one epoch per call; a lost actor costs at most one epoch.

Between epochs a gradient system wishes for latencies of architectures that it drew: they are measured while the
supernet waits, so the two never disturb each other, and recorded like all others, so a repeated epoch finds them.

Where accuracies come from elsewhere there is nothing to train, and no supernet is ever made.
"""
from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from orchestrator.run.stages.collapse import collapsed
from orchestrator.services.context import RunContext
from orchestrator.services.distributions import save_distributions
from orchestrator.services.elite import begin_with_given
from orchestrator.services.evaluation import measure_architectures
from searchspaces.space import Tokens

ANSWER_S = 1.0
SHOWN = ("loss", "largest", "smallest", "gap", "entropy", "images_per_s")   # in the progress panel, where there is one
RECORDED = ("loss", "accuracy_largest", "accuracy_smallest", "images_per_s", "validation_loss", "gap", "entropy",
            "latency_loss", "surrogate_error")


def train(run: RunContext) -> None:
    source = run.config.accuracy.source
    if source != "supernet":
        run.progress.note(f"accuracies come from {source}: no supernet is trained")
        run.store.update_state(weights_version=0)
        return
    begin_with_given(run)
    version = train_epochs(run)
    save_distributions(run)
    run.store.update_state(weights_version=version)


def train_epochs(run: RunContext) -> int:
    """Trains the epochs that the newest whole checkpoint lacks; the version of the weights after it."""
    supernet = run.services.supernet()
    status = run.wait(supernet.status.remote())
    run.progress.stage("train supernet", total=run.config.supernet.epochs, done=status["epoch"],
                       tell="training the supernet")
    while status["epoch"] < run.config.supernet.epochs:
        wishes = run.wait(supernet.begin_epoch.remote())
        latencies = {label: measured(run, label, rows_NT) for label, rows_NT in wishes.items()}
        supernet = run.services.supernet()      # measuring may have ended it, where both want the same GPU
        status = run.wait(supernet.train_epoch.remote(latencies), functools.partial(_steps, run, supernet))
        _record(run, status, run.wait(supernet.distribution.remote()))
    return int(status["version"])


def _steps(run: RunContext, supernet: Any) -> None:
    """How far the epoch is that is being trained, where the actor answers at once: it may be starting again."""
    with contextlib.suppress(RayError):
        epochs = ray.get(supernet.epochs_done.remote(), timeout=ANSWER_S)
        if epochs % 1:
            run.progress.part(epochs % 1)


def measured(run: RunContext, label: str, tokens_NT: Tokens) -> np.ndarray:
    """float64[N]: latency in ms for the goal with this label; nan where measuring failed."""
    goal = next(goal for goal in run.goals if goal.label == label)
    rows_NT = run.space.canonical(tokens_NT)
    arch_ids = [run.space.arch_id(row) for row in rows_NT]
    by_target = {}
    for target in (target for target in run.targets if target.label in goal.targets):
        measure_architectures(run, target, rows_NT)
        by_target[target.label] = np.array([target.measured_ms.get(arch_id, np.nan) for arch_id in arch_ids])
    return goal.latency_ms(by_target)


def _record(run: RunContext, status: Mapping[str, Any], logits: Mapping[str, np.ndarray]) -> None:
    """`logits` say something once they are not all equal, after warm-up."""
    logits = logits if any(np.ptp(row) > 0 for row in logits.values()) else {}
    learned = {"logits": {name: [round(float(value), 4) for value in row] for name, row in logits.items()}}
    run.store.event("epoch", **status, **(learned if logits else {}))
    for name in RECORDED:
        if name in status:
            run.metrics.scalar(f"supernet/{name}", status[name], status["epoch"])
    run.metrics.epoch(status["epoch"], status.get("images_per_s", math.nan))
    shown = {"largest": status["accuracy_largest"], "smallest": status["accuracy_smallest"], **status}
    run.progress.advance(1, **{name: shown[name] for name in SHOWN if name in shown})
    if logits and (note := collapsed(logits, status["epoch"] / status["epochs"])):
        run.progress.note(note)
