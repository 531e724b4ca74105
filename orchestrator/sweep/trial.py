"""A trial of Tune that stands for one search of a sweep, and the process in which the search runs.

Tune starts trials in placement groups, and what a process of such a group starts is captured by the group, where it
would wait for ever: the group holds nothing but a mark that pins it to the sweep's node. So the search runs in an actor
outside of it, as it would in a process of its own. The trial watches the run folder, reports to Tune at every rung (so
that who is stopped does not depend on how often it looks), and ends the search when it is ended itself.
"""
from __future__ import annotations

import contextlib
import logging
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.sweep.recorded import Recorded, State, at, rungs
from orchestrator.sweep.workplace import Workplace

log = logging.getLogger(__name__)
POLL_S = 1.0            # between two reports: so long an ended sweep waits for its trials
STOP_S = 60.0           # for a search to end cleanly; then it is killed, and nothing recorded is lost
NEVER = 10**9           # a rung that no search reaches
EVALUATIONS, HYPERVOLUME, STATE, NOTE = "evaluations", "hypervolume", "state", "note"


class SearchActor:
    """One search, in a process of its own: only this one imports what a search needs."""

    def __init__(self, place: Workplace, name: str) -> None:
        from orchestrator.sweep.member import MemberSearch

        self._search = MemberSearch(place, name)

    def run(self) -> tuple[str, str]:
        """What has become of it (a State), and the sentence of an error."""
        state, note = self._search.run()
        return state.value, note

    def stop(self) -> None:
        self._search.stop()


class MemberTrial(tune.Trainable):
    """Tune's side of one search. Its name says which: sweep.json has its values."""

    def setup(self, config: dict[str, Any], place: Workplace | None = None) -> None:
        assert place is not None, "Tune gives it"
        name = str(self.trial_name)
        self._recorded, self._reported = Recorded(place.sweep, name), 0
        self._rungs = rungs(place.after, place.factor) if place.after else iter(())
        self._rung = next(self._rungs, NEVER)
        node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        kind: Any = ray.remote(SearchActor)
        self._actor = kind.options(num_cpus=0, max_concurrency=2, scheduling_strategy=node).remote(place, name)
        self._running = self._actor.run.remote()

    def step(self) -> dict[str, Any]:
        """One report: of the next rung, once that is reached; of nothing new after a while; of the end. RayError where
        the search's process died: Tune then starts another trial, which goes on with the run."""
        ended = bool(ray.wait([self._running], timeout=POLL_S)[0])
        state, note = ray.get(self._running) if ended else (State.RUNNING.value, "")
        self._recorded.look()
        done = len(self._recorded.history)
        if done >= self._rung:
            passed, self._rung = self._rung, next(self._rungs, NEVER)
            return self._report(passed)
        return self._report(done) | {STATE: state, NOTE: note, "done": True} if ended else self._report(self._reported)

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
