"""One search of a sweep, run as `paretoray search` or `resume` would: its folder is beside those of the others."""
from __future__ import annotations

import os
import signal

from rich.console import Console

from orchestrator.interrupt import Interrupted
from orchestrator.run.search import Search, Stage
from orchestrator.sweep.folder import LOGS, SweepFolder, wait_until_free
from orchestrator.sweep.recorded import State, stage
from orchestrator.sweep.workplace import Workplace
from searchspaces.errors import ParetorayError

START_S = 30.0          # for a search of a killed sweep to end
LOG_WIDTH = 120


class MemberSearch:
    """`run` and `stop` are called from different threads."""

    def __init__(self, place: Workplace, name: str) -> None:
        os.chdir(place.directory)
        if place.address is None:
            os.environ.pop("RAY_ADDRESS", None)     # the Ray of the sweep is this machine's
        self._place, self._name, self._run = place, name, place.sweep / name
        self._search: Search | None = None
        self._ended = False

    def run(self) -> tuple[State, str]:
        """What has become of it (RUNNING where it was stopped), and the sentence of an error."""
        path = self._place.sweep / LOGS / f"{self._name}.log"
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
                # It may have come to its end, though a budget got no model.
                return State.DONE if stage(self._run) == Stage.DONE.value else State.FAILED, str(error)
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
        if (self._run / "config.yaml").exists():
            wait_until_free(self._run, START_S)
            return Search.resume(self._name, runs=place.sweep, address=place.address, console=console,
                                 share=place.share)
        folder = SweepFolder(place.sweep)
        return Search(folder.settings.config(folder.member(self._name).values), runs=place.sweep, name=self._name,
                      address=place.address, console=console, share=place.share)
