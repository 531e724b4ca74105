"""`paretoray sweep`: from the file of a sweep to one table and one page about all of its searches."""
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from actors.objectpath import AnyPath
from orchestrator.cluster.joining import connected, is_local
from orchestrator.cluster.ownmodules import own_modules
from orchestrator.cluster.watch import EXIT_CODE, Watch
from orchestrator.config import Config
from orchestrator.interrupt import Interrupted, StopFlag
from orchestrator.record.store import RUNS, find_run
from orchestrator.resources.devices import gpu_resources, local_devices
from orchestrator.resources.waiting import autoscales
from orchestrator.run.generate import write_run_report
from orchestrator.run.search import Search
from orchestrator.sweep.capacity import CPU, Room, room, slots
from orchestrator.sweep.folder import Member, SweepFolder, member_name, on_disk, resume_command, sweeps
from orchestrator.sweep.page import write_sweep_report
from orchestrator.sweep.recorded import State, settle_reference
from orchestrator.sweep.results import Results, read_results, results_table
from orchestrator.sweep.settings import SweepSettings
from orchestrator.sweep.tuning import run_trials
from orchestrator.sweep.workplace import Workplace
from searchspaces.catalogue import ELITE
from searchspaces.errors import ClusterError, ParetorayError, StoreError

UNBOUNDED = 1e9     # slots of a Ray that is still to be started
UNCHECKED = frozenset({"name", "seed", "budgets", "latency", "search", "delivery"})     # no plug-in of theirs to fail


class Sweep:
    """`Sweep(load_sweep("configs/sweep.yaml")).run()` from Python; the same object behind `paretoray sweep`."""

    def __init__(self, settings: SweepSettings, *, runs: str | AnyPath = RUNS, name: str = "sweep",
                 address: str | None = None, console: Console | None = None,
                 resumed: SweepFolder | None = None) -> None:
        """`resumed`: the existing sweep to go on with, see `resume`. Whatever is wrong with any of the searches'
        configurations is said here, before anything starts."""
        root = on_disk(runs)
        self.settings = settings = settings if resumed else with_paths(settings, root)
        self.address = address or os.environ.get("RAY_ADDRESS")
        self.console = console or Console()
        self.stop = StopFlag()
        self._configs = [settings.config(values) for values in settings.probes()]
        if resumed is None:
            check_searches(self._configs, root)
        self._folder = resumed or SweepFolder.create(root, name, settings)

    @classmethod
    def resume(cls, name: str | None = None, *, runs: str | AnyPath = RUNS, address: str | None = None,
               console: Console | None = None) -> Sweep:
        """An existing sweep, or the newest that is not done; what failed is tried again."""
        root = on_disk(runs)
        if name is None:
            unfinished = [path for path in sweeps(root) if not _done(SweepFolder(path))]
            if not unfinished:
                raise StoreError(f"no sweep in {runs} is left to go on with; start one with: paretoray sweep "
                                 "configs/sweep.yaml")
            name = str(unfinished[-1])
        folder = SweepFolder.open(root, name)
        return cls(folder.settings, runs=root, address=address, console=console, resumed=folder)

    def run(self) -> Results:
        """Runs what is left, prints the table, and writes the page. Raises ParetorayError at the end if a search
        failed, and Interrupted after Ctrl-C or SIGTERM, with a note that says how to resume."""
        folder, configs = self._folder, self._configs
        folder.lock()
        try:
            local = is_local(self.address)
            devices: dict[str, float] = {}
            for config in {config.model_dump_json(include={"targets"}): config for config in configs}.values():
                devices |= local_devices(config, self.address)
            own = sorted({path for config in configs for path in own_modules(config)})
            with connected(configs[0].cluster, self.address, self._slots(devices) if local else 0, devices, own) \
                    as watch, self.stop.installed():
                self._run_searches(self._room(local), watch)
        except BaseException as error:
            if not folder.members:
                folder.discard()
            else:
                stopped = isinstance(error, Interrupted | KeyboardInterrupt)
                error.add_note(self._advice("stopped" if stopped else "ended with an error"))
            raise
        return self._conclude()

    def _slots(self, devices: Mapping[str, float]) -> int:
        """Of the Ray that is started here, for as many searches as its devices allow."""
        has = {**gpu_resources(), **devices, CPU: UNBOUNDED}
        return slots(room(self.settings.parallel, self._configs, has, local=True).searches, self._configs)

    def _room(self, local: bool) -> Room:
        try:
            return room(self.settings.parallel, self._configs, ray.cluster_resources(), local)
        except ClusterError:
            if not autoscales():
                raise
            return Room(1, "the nodes for more are not there yet")

    def _run_searches(self, places: Room, watch: Watch) -> None:
        settings, folder = self.settings, self._folder
        if settings.reference_ms is not None and not folder.members:
            settle_reference(folder.path, settings.reference_ms, "given")
        if not folder.members:
            folder.add(*(Member(member_name(number, values), values)
                         for number, values in enumerate(settings.points(), start=1)))
        fewer = f" instead of {settings.parallel} ({places.why})" if places.searches < settings.parallel else ""
        self._say(f"sweep {folder.name}: {settings.count} searches ({settings.search} over {', '.join(settings.over)})"
                  f", {places.searches} at a time{fewer}")
        watch.at_death(self._advice("was killed"))
        watch.farewell = self._farewell
        place = Workplace(folder.path.resolve(), os.getcwd(), self.address, places.searches,
                          *((halving.after, halving.factor) if (halving := settings.stop_early) else ()))
        run_trials(folder, place, places.searches, self._say, self._asked_to_stop)
        watch.at_death("")
        self.stop.check()

    def _conclude(self) -> Results:
        """The table and the page; ParetorayError where a search failed."""
        folder = self._folder
        for member in folder.members:
            run = folder.path / member.name
            if (run / "config.yaml").exists() and not (run / "report.html").exists():    # it did not come to its end
                write_run_report(member.name, folder.path)
        results = read_results(folder)
        folder.conclude(results=results.as_json())
        self.console.print(results_table(results))
        self._say(f"report: {write_sweep_report(folder)}")
        failed = [member.name for member in folder.members if member.state is State.FAILED]
        if failed:
            raise ParetorayError(f"{len(failed)} of {len(folder.members)} searches of sweep {folder.name} failed "
                                 f"({', '.join(failed)}); their reasons are above and in sweep.json, try them again "
                                 f"with: {resume_command(folder.path)}")
        return results

    def _asked_to_stop(self) -> bool:
        try:
            self.stop.check()
        except Interrupted:
            return True
        return False

    def _say(self, sentence: str) -> None:
        self.console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    def _advice(self, what: str) -> str:
        settled = sum(member.settled for member in self._folder.members)
        return (f"sweep {self._folder.name} {what} with {settled} of {self.settings.count} searches done; everything "
                f"recorded is kept, go on with: {resume_command(self._folder.path)}")

    def _farewell(self, reason: str) -> tuple[int, list[str]]:
        """Ray has died and this process ends."""
        try:
            self.stop.check()
        except Interrupted as stop:
            return 128 + stop.signal_number, [self._advice("stopped")]
        return EXIT_CODE, [f"error: {reason}", self._advice("ended with an error")]


def _done(folder: SweepFolder) -> bool:
    return len(folder.members) >= folder.settings.count and all(member.settled for member in folder.members)


def with_paths(settings: SweepSettings, runs: Path) -> SweepSettings:
    """Runs that the searches begin with, by their path: for a search in the sweep's folder, names are those beside it.
    """
    over = {key: variation if variation.choice is None else variation.model_copy(update={
        "choice": [_by_path(key, value, runs) for value in variation.choice]})
        for key, variation in settings.over.items()}
    base = {key: _by_path(key, value, runs) for key, value in settings.base.items()}
    return settings.model_copy(update={"base": base, "over": over})


def _by_path(key: str, value: Any, runs: Path) -> Any:
    if key == "warm_start" and isinstance(value, list):
        return [str(find_run(runs, str(name))) for name in value]
    if key == "space" and isinstance(value, dict) and value.get("name") == ELITE and "run" in value:
        return value | {"run": _by_path("space.run", value["run"], runs)}
    return str(find_run(runs, str(value))) if key == "space.run" else value


def check_searches(configs: Sequence[Config], runs: Path) -> None:
    """What a search checks before it begins: data, plug-ins and their options. Once for those that agree in them."""
    seen: set[str] = set()
    for config in configs:
        parts = config.model_dump_json(exclude=set(UNCHECKED))
        if parts not in seen:
            seen.add(parts)
            Search(config, runs=runs, name="checked")
