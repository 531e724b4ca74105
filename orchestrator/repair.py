"""What a resumed run makes again because its file was damaged after the stage that wrote it.

A run is resumed at the stage it had reached, and earlier stages are not entered again; so what they left behind is
looked at here. Everything follows from the recorded trials and latencies, and from the epochs before.
"""
from __future__ import annotations

from actors.supernet import newest_version
from orchestrator.context import RunContext, intact_state
from orchestrator.stages.explore import learn_and_save, replayed_controller
from orchestrator.stages.measure import fit_predictor
from orchestrator.stages.train import train_epochs


def repair(run: RunContext) -> None:
    """Does nothing where all is whole."""
    state = run.store.state()
    if run.predictor is None and "slowest_ms" in state:  # measured and fitted
        run.progress.note("the latency predictor is damaged or missing: it is fitted again to all measurements")
        run.predictor = fit_predictor(run)
        run.save_predictor(run.predictor)
    _weights(run)
    if state.get("stage") in ("deliver", "done") and intact_state(run.store, "controller") is None:
        run.progress.note("the controller's state is damaged or missing: it learns again from all trials")
        learn_and_save(run, replayed_controller(run))


def _weights(run: RunContext) -> None:
    """The supernet as the trials and the lineage name it: an epoch that is trained again is the same epoch."""
    version = run.store.state().get("weights_version", 0)  # 0 before the supernet is trained, and where there is none
    found = newest_version(run.store.path / "checkpoints") if version else 0
    if found < version:
        run.progress.note(f"the supernet's checkpoint of epoch {version} is damaged or missing, the newest whole one "
                          f"is of epoch {found}: the epochs between are trained again")
        train_epochs(run)
