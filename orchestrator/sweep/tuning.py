"""The searches of a sweep as trials of Ray Tune: which comes next, how many run, which is stopped.

Tune keeps its own record of an experiment and can restore it, but it writes that record now and then, and a scheduler's
part not at all. Here run folders and sweep.json are the record: a sweep that is resumed is a new experiment of what is
not settled, and its scheduler and Optuna are told what the settled searches reached.
"""
from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any, Self

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from orchestrator.run.search import Stage
from orchestrator.sweep.folder import TUNE, Member, SweepFolder
from orchestrator.sweep.recorded import Recorded, State, at, rungs, stage
from orchestrator.sweep.settings import StopEarly, SweepSettings, Values, Variation
from orchestrator.sweep.trial import EVALUATIONS, HYPERVOLUME, NEVER, NOTE, STATE, MemberTrial
from orchestrator.sweep.workplace import Workplace

MEMBER = "member"       # the key by which Tune knows a search whose values were drawn before
MODE = "max"
RETRIES = 2             # of a search whose process died
PINNED = 0.001          # of a node's own resource
ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",             # ours ends the searches cleanly
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",      # the run folders have it all
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000000",
    "RAY_AIR_NEW_OUTPUT": "0",                      # which prints also where it is told not to
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


def run_trials(folder: SweepFolder, place: Workplace, parallel: int, say: Callable[[str], None],
               stopped: Callable[[], bool]) -> None:
    """Runs every search that is not settled, until all are or `stopped` says so; then they have ended cleanly."""
    settings = folder.settings
    os.environ.update(ENVIRONMENT | {"TUNE_MAX_PENDING_TRIALS_PG": str(parallel)})
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)    # Reporter says what a person should know
    open_members = [member for member in folder.members if not member.settled]
    suggesting = settings.search == "optuna"
    left = settings.count - (len(folder.members) - len(open_members)) if suggesting else 1
    shutil.rmtree(folder.path / TUNE, ignore_errors=True)
    if not open_members and not (suggesting and left):
        return
    tune.Tuner(
        tune.with_resources(tune.with_parameters(MemberTrial, place=place),
                            tune.PlacementGroupFactory([{this_node(): PINNED}])),
        param_space={} if suggesting else {MEMBER: tune.grid_search([member.name for member in open_members])},
        tune_config=tune.TuneConfig(
            num_samples=left, max_concurrent_trials=parallel,
            scheduler=halving(folder, settings.stop_early) if settings.stop_early else None,
            search_alg=optuna_search(folder, settings) if suggesting else None,
            trial_name_creator=Names(folder, settings)),
        run_config=tune.RunConfig(
            name="trials", storage_path=str(folder.path / TUNE), stop=StopAll(stopped), verbose=0,
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),   # run folders hold all of it
            callbacks=[Reporter(folder, say, stopped)]),
    ).fit()
    shutil.rmtree(folder.path / TUNE, ignore_errors=True)


def this_node() -> str:
    """The resource that every node has of its own, of the one that this process is on."""
    node_id = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == node_id)
    return next(name for name in node["Resources"] if name.startswith("node:") and not name.startswith("node:__"))


class Unrecorded:
    """Tune writes what it is given into a file that nobody reads here; of this process's own objects it gets none."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return object, ()

    def __deepcopy__(self, memo: object) -> Self:
        return self


# --- which comes next -------------------------------------------------------------------------------------------------


class Names(Unrecorded):
    """Called by Tune when it has made a trial: its name is that of a search, which from now on is in sweep.json."""

    def __init__(self, folder: SweepFolder, settings: SweepSettings) -> None:
        self._folder, self._settings = folder, settings
        self._open = [member for member in folder.members if not member.settled]

    def __call__(self, trial: Trial) -> str:
        if MEMBER in trial.config:
            return str(trial.config[MEMBER])
        values = values_of(self._settings, trial.config)
        again = next((member for member in self._open if member.values == values), None)
        if again is not None:
            self._open.remove(again)
            return again.name
        member = Member(self._folder.free_name(values), values)
        self._folder.add(member)
        return member.name


def optuna_search(folder: SweepFolder, settings: SweepSettings) -> Searcher:
    """Optuna's TPE, told what the settled searches reached; first it suggests again what is not settled."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {key: distribution(variation) for key, variation in settings.over.items()}
    search = OptunaSearch(distributions, metric=HYPERVOLUME, mode=MODE, seed=settings.seed + len(folder.members),
                          points_to_evaluate=[suggestion_of(settings, member.values) for member in folder.members
                                              if not member.settled])
    for member in folder.members:
        if member.settled:
            search.add_evaluated_point(suggestion_of(settings, member.values), member.hypervolume)
    return search


def distribution(variation: Variation) -> Any:
    """Optuna's. A list goes by number: it may hold lists and sections."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if variation.choice is not None:
        return CategoricalDistribution(range(len(variation.choice)))
    if variation.integers is not None:
        return IntDistribution(*variation.integers)
    low, high = variation.uniform or variation.log_uniform or (0.0, 0.0)
    return FloatDistribution(low, high, log=variation.uniform is None)


def values_of(settings: SweepSettings, suggestion: Mapping[str, Any]) -> dict[str, Any]:
    """What Optuna suggests, as values of keys."""
    return {key: variation.choice[suggestion[key]] if variation.choice is not None else suggestion[key]
            for key, variation in settings.over.items()}


def suggestion_of(settings: SweepSettings, values: Values) -> dict[str, Any]:
    """The reverse."""
    return {key: variation.choice.index(values[key]) if variation.choice is not None else values[key]
            for key, variation in settings.over.items()}


# --- which is stopped -------------------------------------------------------------------------------------------------


def halving(folder: SweepFolder, settings: StopEarly) -> TrialScheduler:
    """ASHA, as it was when the settled searches had passed their rungs."""
    scheduler = ASHAScheduler(EVALUATIONS, HYPERVOLUME, MODE, max_t=NEVER, grace_period=settings.after,
                              reduction_factor=settings.factor, stop_last_trials=False)
    controller: Any = None      # asked by neither call
    for member in folder.members:
        recorded = Recorded(folder.path, member.name)
        if member.settled:
            recorded.look()
        trial = Trial(MemberTrial.__name__, stub=True)
        scheduler.on_trial_add(controller, trial)
        passed = min(member.evaluations, len(recorded.history))
        for rung in takewhile(lambda rung: rung <= passed, rungs(settings.after, settings.factor)):  # noqa: B023
            scheduler.on_trial_result(controller, trial, {EVALUATIONS: rung,
                                                          HYPERVOLUME: at(recorded.history, rung)})
    return scheduler


class StopAll(Unrecorded, tune.Stopper):
    """Ends the experiment, all of its trials cleanly, when `stopped` says so."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._stopped()


# --- what is told -----------------------------------------------------------------------------------------------------


class Reporter(Unrecorded, tune.Callback):
    """A line for every change of a search's state or stage, and the states to sweep.json."""

    def __init__(self, folder: SweepFolder, say: Callable[[str], None], stopped: Callable[[], bool]) -> None:
        self._folder, self._say, self._stopped = folder, say, stopped
        self._stages: dict[str, str] = {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        name = str(trial)
        again = (self._folder.path / name / "config.yaml").exists()
        self._folder.update(name, state=State.RUNNING, note="")
        self._stages[name] = ""
        self._say(f"{name}: {'goes on' if again else 'started'}")

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        for name, last in self._stages.items():
            now = stage(self._folder.path / name)
            if now not in ("", last, Stage.DONE.value):
                self._stages[name] = now
                self._say(f"{name}: {now}")

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        name, result = str(trial), trial.last_result
        self._stages.pop(name, None)
        state, note = State(result.get(STATE, State.STOPPED.value)), str(result.get(NOTE, ""))
        if state is State.RUNNING or (STATE not in result and self._stopped()):
            return      # it was ended with the sweep, and goes on with it
        evaluations, hypervolume = int(result[EVALUATIONS]), float(result[HYPERVOLUME])
        if state is State.STOPPED and stage(self._folder.path / name) == Stage.DONE.value:  # it was faster
            recorded = Recorded(self._folder.path, name)
            recorded.look()
            state, evaluations, hypervolume = State.DONE, len(recorded.history), recorded.history[-1]
        member = self._folder.update(name, state=state, note=note, evaluations=evaluations, hypervolume=hypervolume)
        self._say(sentence(member))

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._say(f"{trial}: its process died; it is started again")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        name = str(trial)
        self._stages.pop(name, None)
        reason = (str(trial.get_error() or "").strip().splitlines() or [""])[-1]
        note = f"its process could not be kept alive, {RETRIES + 1} attempts ({reason})"
        self._say(sentence(self._folder.update(name, state=State.FAILED, note=note)))


def sentence(member: Member) -> str:
    """What has become of a search."""
    reached = f" after {member.evaluations} evaluations, hypervolume {member.hypervolume:.4f}"
    if member.state is State.FAILED:
        return f"{member.name}: failed: {member.note}"
    return f"{member.name}: {member.state.value}{reached}" + (f"; {member.note}" if member.note else "")
