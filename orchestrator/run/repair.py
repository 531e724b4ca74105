"""What a resumed run makes again because its file was damaged after the stage that wrote it.

A run is resumed at the stage it had reached, and earlier stages are not entered again; so what they left behind is
looked at here. Everything follows from the recorded trials and latencies, and from the epochs before.
"""
from __future__ import annotations

import contextlib

from actors.supernet.actor import newest_version
from orchestrator.record.goals import target_state
from orchestrator.run.stages.explore import learn_and_save, replayed_panel
from orchestrator.run.stages.measure import fit_and_save
from orchestrator.run.stages.train import train_epochs
from orchestrator.services.context import RunContext
from orchestrator.services.states import intact_state, state_name


def repair(run: RunContext) -> None:
    """Does nothing where all is whole."""
    for target in run.targets:
        if target.predictor is None and "slowest_ms" in target_state(run.store, target.label):  # measured and fitted
            run.progress.note(f"the latency predictor of {target.label} is damaged or missing: it is fitted again to "
                              "all measurements")
            fit_and_save(run, target)
    _weights(run)
    if run.store.state().get("stage") not in ("deliver", "done"):
        return
    names = [state_name("controller", goal.label, run.config) for goal in run.goals]
    if any(intact_state(run.store, name) is None for name in names):
        run.progress.note("the controller's state is damaged or missing: it learns again from all trials")
        with contextlib.closing(replayed_panel(run)) as panel:
            learn_and_save(run, panel)


def _weights(run: RunContext) -> None:
    """The supernet as the trials and the lineage name it: an epoch that is trained again is the same epoch."""
    version = run.store.state().get("weights_version", 0)  # 0 before the supernet is trained, and where there is none
    found = newest_version(run.store.path / "checkpoints") if version else 0
    if found < version:
        run.progress.note(f"the supernet's checkpoint of epoch {version} is damaged or missing, the newest whole one "
                          f"is of epoch {found}: the epochs between are trained again")
        train_epochs(run)
