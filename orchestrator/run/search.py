"""One run from configuration to ONNX files: an explicit state machine over the stages in orchestrator/run/stages/.

Each stage does what its recorded results lack, so entering it again after a crash is how a run resumes.
"""
from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path

from rich.console import Console

from actors.latency.worker import input_shape
from actors.objectpath import AnyPath, as_path
from actors.targets.catalogue import check_options
from orchestrator.cluster.jobs import runs_may_be_lost, shown_path, tell_job
from orchestrator.cluster.joining import connected, environment, is_local
from orchestrator.cluster.ownmodules import own_modules
from orchestrator.cluster.sharing import check_shared
from orchestrator.cluster.watch import EXIT_CODE, Watch
from orchestrator.comparison.compared import Comparison, compared_table
from orchestrator.comparison.fixed import check_comparison
from orchestrator.config import Config, dump_config, load_config
from orchestrator.controllers.catalogue import check_controller_options
from orchestrator.data.sources import check_accuracy
from orchestrator.handover.architectures import announcements
from orchestrator.handover.delivered import Delivered, refuse_missed
from orchestrator.handover.generated import delivered_entries, final_rows
from orchestrator.interrupt import Interrupted, StopFlag
from orchestrator.record.files import check_writable
from orchestrator.record.goals import target_state
from orchestrator.record.metrics import RunMetrics
from orchestrator.record.progress import Progress
from orchestrator.record.store import NARROW, RUNS, RunStore, run_path
from orchestrator.report.page import write_report
from orchestrator.resources.devices import local_devices
from orchestrator.run.narrow import check_narrowing, narrowed, narrowing
from orchestrator.run.repair import repair
from orchestrator.run.stages.compare import compare
from orchestrator.run.stages.deliver import deliver
from orchestrator.run.stages.explore import explore
from orchestrator.run.stages.measure import measure
from orchestrator.run.stages.train import train
from orchestrator.services.context import Leaders, RunContext, checked_data, data_and_space
from orchestrator.services.elite import check_inheritance, freeze_weights, with_ranges
from orchestrator.services.pretrained import check_start, preprocessing_for, with_absolute_start
from orchestrator.services.recipes import check_training, slots_needed, trains
from orchestrator.services.services import Services
from orchestrator.services.warmstart import check_earlier, freeze_earlier, is_frozen
from searchspaces.errors import BudgetError, ClusterError


class Stage(Enum):
    """NARROW -> MEASURE -> TRAIN -> SEARCH -> DELIVER -> COMPARE -> DONE.

    NARROW is a whole search for spaces in a run of its own, where the configuration asks for one (narrow.py). COMPARE
    is there where the configuration asks for it too, also for a run that was done without.
    MEASURE needs no training, so a budget out of reach is refused in seconds. TRAIN is empty unless accuracies come
    from a supernet. From any stage an error, a signal or a kill leaves the run at that stage; `paretoray resume` enters
    it again.
    """

    NARROW = "narrow"
    MEASURE = "measure"
    TRAIN = "train"
    SEARCH = "search"
    DELIVER = "deliver"
    COMPARE = "compare"
    DONE = "done"


STEPS: dict[Stage, Callable[[RunContext], None]] = {
    Stage.MEASURE: measure, Stage.TRAIN: train, Stage.SEARCH: explore, Stage.DELIVER: deliver,
    Stage.COMPARE: compare,
}


class Search:
    """`Search(load_config("mine.yaml")).run()` from Python; the same object behind `paretoray search` and `resume`."""

    def __init__(self, config: Config, *, runs: str | AnyPath = RUNS, name: str | None = None,
                 address: str | None = None, console: Console | None = None, resumed: RunStore | None = None,
                 outer: RunStore | None = None, share: int = 1) -> None:
        """`resumed`: the existing run to go on with, see `resume`. `outer`: the run that this one searches spaces for,
        and that a user resumes. `share`: so many runs are to find room in the cluster at a time."""
        self.runs = runs = as_path(runs)
        self.share = share
        self.config = config = with_ranges(config, runs)
        self.address = address
        self.console = console or Console()
        self.stop = StopFlag()
        if resumed is None:
            name = config.name or default_name(Path("run")) if name is None else name
            run_path(runs, name)        # refuses a name that is no folder's, before anything is read
        self._notes = checked_data(config) if resumed is None and outer is None else []
        self._splits, self._space = data_and_space(config)
        check_accuracy(config.accuracy, self._space)
        for target in config.targets:
            check_options(target.name, target.options)
        check_controller_options(config.controller.name, config.controller.options)
        check_training(config, self._splits.train, self._space)
        check_comparison(config)
        if config.narrow is not None:
            check_narrowing(config)
            check_training(narrowing(config), self._splits.train, self._space)
        if resumed is None:
            check_inheritance(config, self._space.classes, self._space.channels)
            check_start(config, self._space)
            self.config = config = with_absolute_start(config)
        if resumed is None:
            check_earlier(config, runs, self._space, self._splits)
        check_writable(runs if resumed is None else resumed.path)
        self._new, self._outer = resumed is None, outer
        self._open: Callable[[], RunStore] = lambda: resumed or RunStore.create(
            runs, str(name), dump_config(config), environment())

    @classmethod
    def resume(cls, name: str, *, runs: str | AnyPath = RUNS, address: str | None = None,
               console: Console | None = None, outer: RunStore | None = None, share: int = 1) -> Search:
        """A search that goes on in the folder of an existing run, with that run's configuration."""
        store = RunStore.open(as_path(runs), name)
        return cls(load_config(store.path / "config.yaml"), runs=runs, address=address, console=console, resumed=store,
                   outer=outer, share=share)

    def run(self, until: Stage = Stage.DONE) -> list[Delivered]:
        """Runs the stages that are left, up to and without `until`; returns what was handed over, one entry per budget.

        Raises BudgetError at the end, after everything is written, if a budget of the user's got no model;
        ParetorayError for what a user can repair and Interrupted after Ctrl-C or SIGTERM: then a note on the error says
        how to resume. A new run that recorded nothing leaves no folder.
        """
        store: RunStore | None = None
        try:
            if self.config.narrow is not None:
                store = self._opened()
                self._narrow(store)
            slots, devices = slots_needed(self.config), local_devices(self.config, self.address)
            with connected(self.config.cluster, self.address, slots, devices, own_modules(self.config)) \
                    as watch, self.stop.installed():
                store = self._opened()      # from here on there is something to resume
                return self._run(store, watch, until)
        except BaseException as error:
            if store is not None and (advice := self._advice(store, error)):
                error.add_note(advice)
            raise
        finally:
            if store is not None:
                store.unlock()

    def _opened(self) -> RunStore:
        """The run's folder, claimed for this process."""
        store = self._open()
        self._open = lambda: store
        store.lock()
        return store

    def _narrow(self, store: RunStore) -> None:
        """Searches the space first; this run's space is then what was found."""
        store.update_state(stage=Stage.NARROW.value)
        begun = (store.path / NARROW / "config.yaml").exists()
        inner = (Search.resume(NARROW, runs=store.path, address=self.address, console=self.console, outer=store,
                               share=self.share)
                 if begun else Search(narrowing(self.config), runs=store.path, name=NARROW, address=self.address,
                                      console=self.console, outer=store, share=self.share))
        inner.run(until=Stage.DELIVER)
        self.config = with_ranges(narrowed(self.config, store.path / NARROW), self.runs)
        self._splits, self._space = data_and_space(self.config)
        store.replace_config(dump_config(self.config))
        store.update_state(stage=Stage.MEASURE.value)

    def _run(self, store: RunStore, watch: Watch, until: Stage) -> list[Delivered]:
        preprocessing = preprocessing_for(self.config, self._space, self._splits.train, input_shape(self._space)[1],
                                          store)
        store.update_state(dataset=self._splits.name, classes=list(self._splits.classes),
                           channels=self._splits.channels)
        notes = self._notes + announcements(self.config) + list(filter(None, [runs_may_be_lost(self.runs)]))
        if not is_frozen(store, self.config):
            earlier = check_earlier(self.config, self.runs, self._space, self._splits)
            notes += freeze_earlier(store, earlier, self.config, self._space)
        freeze_weights(store, self.config)
        with contextlib.ExitStack() as stack:
            services = stack.enter_context(contextlib.closing(
                Services(self.config, self._space, self._splits, preprocessing, store, is_local(self.address),
                         self.stop.check, self.share)))
            metrics = stack.enter_context(contextlib.closing(
                RunMetrics(store.path, store.name, target_state(store, self.config.labels[0]).get("slowest_ms"))))
            progress = stack.enter_context(Progress(self.console, title=f"paretoray {store.name}", heard=tell_job))
            watch.farewell = functools.partial(self._farewell, store, progress)
            services.say = progress.note
            context = RunContext(self.config, store, self._space, self._splits, preprocessing, services, progress,
                                 self.stop, metrics, Leaders())
            for note in notes:
                progress.note(note)
            if trains(self.config):
                check_shared(store.path, progress.note)
            repair(context)
            if _reached(store) is Stage.DONE and self.config.compare and not Comparison(store).entries:
                store.update_state(stage=Stage.COMPARE.value)
            for stage, step in STEPS.items():
                if _reached(store) is stage and stage is not until:
                    metrics.stage(stage.value)
                    store.event("stage", stage=stage.value)
                    watch.at_death(self._how_to_go_on(store, "was killed"))
                    step(context)
                    store.update_state(stage=self._next(stage).value)
            metrics.stage(_reached(store).value)
        watch.at_death("")
        if _reached(store) is not Stage.DONE:
            write_report(store.path, self._space)
            return []
        entries = delivered_entries(store, self.config)
        progress.final_table(final_rows(entries))
        if compared := Comparison(store).entries:
            self.console.print(compared_table(entries, compared))
        self.console.print(f"report: {shown_path(write_report(store.path, self._space))}", highlight=False,
                           soft_wrap=True)
        refuse_missed([entry for entry in entries if self._asked_for(entry)])
        return entries

    def _next(self, stage: Stage) -> Stage:
        order = [known for known in Stage if known is not Stage.COMPARE or self.config.compare]
        return order[order.index(stage) + 1]

    def _asked_for(self, entry: Delivered) -> bool:
        """Is this budget the user's, or one that was spread over what the device reaches?"""
        labels = self.config.labels
        label = entry.target if entry.target in labels else labels[0]
        return entry.budget_ms in self.config.budgets.of(label).values_ms

    def _advice(self, store: RunStore, error: BaseException) -> str:
        """What becomes of the run after this error; "" where there is nothing to say."""
        what = "stopped" if isinstance(error, Interrupted | KeyboardInterrupt) else "ended with an error"
        if self._outer is not None:     # whose advice is the one to follow
            return ""
        if self._new and not store.recorded:
            store.discard()
            return f"run {store.name} {what} before anything was recorded; its folder is removed"
        # A budget that nobody can meet is refused again, however often the run is resumed.
        if _reached(store) is Stage.DONE or isinstance(error, BudgetError):
            return ""
        return self._how_to_go_on(store, what)

    def _how_to_go_on(self, store: RunStore, what: str) -> str:
        stage = _reached(store).value
        if self._outer is not None:
            store, stage = self._outer, f"{Stage.NARROW.value}: {stage}"
        return (f"run {store.name} {what} in stage '{stage}'; everything recorded is kept, go on with: "
                f"{store.resume_command}")

    def _farewell(self, store: RunStore, progress: Progress, reason: str) -> tuple[int, list[str]]:
        """Ray has died and this process ends: what the main thread would say if it still could."""
        progress.close()
        try:
            self.stop.check()
        except Interrupted as stop:     # whoever ended this process ended Ray with it
            return 128 + stop.signal_number, [self._advice(store, stop)]
        error = ClusterError(reason)
        return EXIT_CODE, [f"error: {error}", self._advice(store, error)]


def _reached(store: RunStore) -> Stage:
    return Stage(store.state().get("stage", Stage.MEASURE.value))


def default_name(config: Path) -> str:
    return f"{config.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
