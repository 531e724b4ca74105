"""One search of a sweep: a trial of Tune, and the actor in which the search runs.

Tune starts trials in placement groups, and what a process of such a group starts is captured by the group, where it
would wait for ever: the group holds nothing but a mark that pins it to the sweep's node. So the search runs in an actor
outside of it, as it would in a process of its own. The trial watches the run folder, reports to Tune at every rung (so
that who is stopped does not depend on how often it looks), and ends the search when it is ended itself.
"""
from __future__ import annotations

import contextlib
import logging
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from orchestrator.interrupt import Interrupted
from orchestrator.record.store import RunStore
from orchestrator.run.search import Search, Stage
from orchestrator.sweep.folder import LOGS, State, SweepFolder, wait_until_free
from orchestrator.sweep.recorded import Recorded, at, rungs
from orchestrator.sweep.settings import SweepSettings, Values
from searchspaces.errors import ParetorayError

log = logging.getLogger(__name__)
POLL_S = 1.0            # between two reports: so long an ended sweep waits for its trials
STOP_S = 60.0           # for a search to end cleanly; then it is killed, and nothing recorded is lost
START_S = 30.0          # for a search of a killed sweep to end
LOG_WIDTH = 120
EVALUATIONS, HYPERVOLUME, STATE, NOTE = "evaluations", "hypervolume", "state", "note"


@dataclass(frozen=True)
class Workplace:
    """What all searches of a sweep have in common. `directory` is where the sweep was started, for relative paths."""

    sweep: Path
    settings: SweepSettings
    directory: str
    address: str | None
    share: int


class SearchActor:
    """Runs one search to its end, in a thread of its own."""

    def __init__(self, place: Workplace, name: str, values: Values) -> None:
        os.chdir(place.directory)
        if place.address is None:
            os.environ.pop("RAY_ADDRESS", None)     # the Ray of the sweep is this machine's
        self._place, self._name, self._values = place, name, values
        self._search: Search | None = None
        self._ended = False

    def run(self) -> tuple[State, str]:
        """What has become of it, and the sentence of an error."""
        place = self._place
        path = place.sweep / LOGS / f"{self._name}.log"
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            console = Console(file=file, width=LOG_WIDTH)
            try:
                self._search = self._made(console)
                if self._ended:
                    return State.RUNNING, ""
                self._search.run()
            except Interrupted:
                return State.RUNNING, ""
            except ParetorayError as error:
                console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
                return (State.DONE if self._delivered() else State.FAILED), str(error)
            except Exception as error:      # of a user's plug-in, say: the other searches go on
                console.print_exception()
                return State.FAILED, f"{type(error).__name__}: {error} (see {path})"
        return State.DONE, ""

    def stop(self) -> None:
        """The search ends as after Ctrl-C."""
        self._ended = True
        if self._search is not None:
            self._search.stop.set(signal.SIGTERM)

    def _made(self, console: Console) -> Search:
        place = self._place
        if (place.sweep / self._name / "config.yaml").exists():
            wait_until_free(place.sweep / self._name, START_S)
            return Search.resume(self._name, runs=place.sweep, address=place.address, console=console,
                                 share=place.share)
        return Search(place.settings.config(self._values), runs=place.sweep, name=self._name, address=place.address,
                      console=console, share=place.share)

    def _delivered(self) -> bool:
        """Did it come to its end, though a budget got no model?"""
        folder = self._place.sweep / self._name
        return folder.exists() and RunStore(folder).state().get("stage") == Stage.DONE.value


class MemberTrial(tune.Trainable):
    """Tune's side of one search. Its name says which: sweep.json has its values."""

    def setup(self, config: dict[str, Any], place: Workplace | None = None) -> None:
        assert place is not None, "Tune gives it"
        name, settings = str(self.trial_name), place.settings
        values = SweepFolder(place.sweep).member(name).values
        halving, evaluations = settings.stop_early, settings.config(values).search.evaluations
        self._rungs = rungs(halving.after, halving.factor, evaluations) if halving else []
        self._recorded, self._reported = Recorded(place.sweep, name), 0
        node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        kind: Any = ray.remote(SearchActor)
        self._actor = kind.options(num_cpus=0, max_concurrency=2, scheduling_strategy=node).remote(place, name, values)
        self._running = self._actor.run.remote()

    def step(self) -> dict[str, Any]:
        """One report: of the next rung, once that is reached; of nothing new after a while; of the end. RayError where
        the search's process died: Tune then starts another trial, which goes on with the run."""
        ended = bool(ray.wait([self._running], timeout=POLL_S)[0])
        state, note = ray.get(self._running) if ended else (State.RUNNING, "")
        self._recorded.look()
        done = len(self._recorded.history)
        if self._rungs and done >= self._rungs[0]:
            return self._report(self._rungs.pop(0))
        if ended:
            return self._report(done) | {STATE: state.value, NOTE: note, "done": True}
        return self._report(self._reported)

    def _report(self, evaluations: int) -> dict[str, Any]:
        self._reported = evaluations
        return {EVALUATIONS: evaluations, HYPERVOLUME: at(self._recorded.history, evaluations)}

    def cleanup(self) -> None:
        with contextlib.suppress(RayError):
            self._actor.stop.remote()
            if not ray.wait([self._running], timeout=STOP_S)[0]:
                log.warning("search %s did not end within %g s and is killed; what it recorded is kept",
                            self.trial_name, STOP_S)
        ray.kill(self._actor)
