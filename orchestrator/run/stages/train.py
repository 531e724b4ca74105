"""Second stage: train the shared supernet in its actor, one epoch per call; a lost actor costs at most one epoch.

Where accuracies come from elsewhere there is nothing to train, and no supernet is ever made.
"""
from __future__ import annotations

from orchestrator.services.context import RunContext


def train(run: RunContext) -> None:
    source = run.config.accuracy.source
    if source != "supernet":
        run.progress.note(f"accuracies come from {source}: no supernet is trained")
        run.store.update_state(weights_version=0)
        return
    run.store.update_state(weights_version=train_epochs(run))


def train_epochs(run: RunContext) -> int:
    """Trains the epochs that the newest whole checkpoint lacks; the version of the weights after it."""
    supernet = run.services.supernet()
    run.progress.stage("train supernet", total=run.config.supernet.epochs)
    status = run.wait(supernet.status.remote())
    run.progress.advance(status["epoch"])
    while status["epoch"] < run.config.supernet.epochs:
        status = run.wait(supernet.train_epoch.remote())
        run.store.event("epoch", **status)
        for name in ("loss", "accuracy_largest", "accuracy_smallest", "images_per_s"):
            run.metrics.scalar(f"supernet/{name}", status[name], status["epoch"])
        run.progress.advance(1, loss=status["loss"], largest=status["accuracy_largest"],
                             smallest=status["accuracy_smallest"], images_per_s=status["images_per_s"])
    return int(status["version"])
