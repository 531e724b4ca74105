"""Room for workers on nodes that are not there yet: ask for it, say what is waited for, and do not wait in vain.

A pending placement group is what an autoscaler counts as demand, and what it refuses by name. Once there is room the
group is given back, and whoever asked starts its actors or tasks there.
"""
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from ray.util.placement_group import placement_group, remove_placement_group

from orchestrator.record.store import RunStore
from orchestrator.resources.autoscaler import (
    Bundle,
    Outlook,
    autoscales,
    held_by_a_node,
    in_words,
    outlook,
    type_needed,
)
from searchspaces.errors import ClusterError

POLL_S = 1
SAY_AFTER_S = 5.0   # what was freed or found by then is not worth a word
LOOK_S = 2.0        # between two looks at what the autoscaler says
SURE_S = 12.0       # it looks every 5 s, and again after a change of its file: refused for so long is refused
MISSING_S = 10.0    # between two looks at workers that are still to come


@dataclass(frozen=True)
class Need:
    """`count` workers need a `bundle` of resources each, all at the same time. `who` begins a sentence; `setting` is
    what a user could lower."""

    who: str
    bundle: Bundle
    count: int = 1
    setting: str = ""

    @staticmethod
    def of_workers(who: str, cpus: float, gpus: float = 0.0, count: int = 1, setting: str = "") -> Need:
        return Need(who, {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}, count, setting)

    def __str__(self) -> str:
        return in_words(self.bundle) if self.count == 1 else f"{self.count} times {in_words(self.bundle)}"


class Answer(Enum):
    """THERE: room now. REFUSED: no node with it can be added. LATE: none came in time."""

    THERE = "there"
    REFUSED = "refused"
    LATE = "late"


def wait_for_room(need: Need, wait_s: float, say: Callable[[str], None], check: Callable[[], None],
                  opening: str = "", found: Callable[[], bool] = lambda: False) -> Answer:
    """At most `wait_s`. `say` hears the `opening` where it takes a while, and which nodes are being started. `check` is
    called while waiting and may raise to stop; `found` ends the wait too."""
    group = placement_group([dict(need.bundle)] * need.count)
    begun = looked = time.monotonic()
    refused_s, said = 0.0, {""}
    try:
        while not group.wait(POLL_S) and not found():
            check()
            now = time.monotonic()
            if now - begun > wait_s:
                return Answer.LATE
            if now - looked < LOOK_S:
                continue
            seen = outlook() or Outlook()
            refused_s = refused_s + now - looked if group.id.hex() in seen.refused_groups else 0.0
            looked = now
            if refused_s > SURE_S:
                return Answer.REFUSED
            if now - begun > SAY_AFTER_S and not refused_s:
                for sentence in (opening, f"{need.who}: {seen.nodes()}" if seen.nodes() else ""):
                    if sentence not in said:
                        said.add(sentence)
                        say(sentence)
        return Answer.THERE
    finally:
        remove_placement_group(group)


def room_when_there(need: Need, wait_s: float, say: Callable[[str], None], check: Callable[[], None]) -> None:
    """Returns when the workers of `need` find room, at once where no autoscaler looks after the cluster, and also where
    nodes that have what they need are only taken: then it is as on a cluster that does not grow. Of several workers
    some may find no room. ClusterError where none ever will, or none did in time."""
    if not autoscales():
        return
    one = replace(need, count=1)
    opening = "{who}: waiting for a node with room for {need}, up to {wait_s:g} s".format
    if need.count > 1:
        if wait_for_room(need, wait_s, say, check, opening(who=need.who, need=need, wait_s=wait_s)) is Answer.THERE:
            return
        say(f"{need.who}: the cluster has no room for {need}; going on with as many as find it")
    answer = wait_for_room(one, wait_s, say, check, opening(who=need.who, need=one, wait_s=wait_s))
    if answer is Answer.THERE or (answer is Answer.REFUSED and held_by_a_node(need.bundle)):
        return
    lower = f"; or lower {need.setting}" if need.setting else ""
    if answer is Answer.REFUSED:
        raise ClusterError(f"{need.who}: no node of the cluster has {one}, and {type_needed(need.bundle)}{lower}")
    raise ClusterError(f"{need.who}: no node with room for {one} came within {wait_s:g} s (cluster.device_wait_s); "
                       f"'ray status' on the head says what the autoscaler does{lower}")


class Waits:
    """What a run waits for on a cluster that grows: said to the user, and in state.json (`waiting`) until it is over.
    Where Ray was started for this run there is nothing to wait for."""

    def __init__(self, store: RunStore, wait_s: float, local: bool, check: Callable[[], None]) -> None:
        self._store, self._wait_s, self._local, self._check = store, wait_s, local, check
        self._missing_since: float | None = None
        self._looked, self._told = 0.0, ""

    def room(self, need: Need, say: Callable[[str], None]) -> None:
        """See `room_when_there`."""
        if self._local:
            return
        try:
            room_when_there(need, self._wait_s, self._kept(need.who, say), self._check)
        finally:
            self._over(need.who)

    def start_time_out_s(self, usual_s: float) -> float:
        """Of workers that may have to wait for a node, also for one in the place of theirs."""
        return usual_s if self._local or not autoscales() else usual_s + self._wait_s

    def workers(self, need: Need, ready: int, wanted: int, say: Callable[[str], None]) -> None:
        """To be called now and then while `ready` of `wanted` workers are there: says what keeps the others."""
        now = time.monotonic()
        if self._local or ready >= wanted:
            if self._told:
                self._over(need.who)
            self._missing_since, self._told = None, ""
            return
        self._missing_since = self._missing_since or now
        if now - max(self._missing_since, self._looked) < MISSING_S:
            return
        self._looked, seen = now, outlook()
        if seen is None or dict(need.bundle) not in seen.asked:     # they have a place and start slowly
            return
        why = seen.nodes() or ("the cluster has no room for more" if dict(need.bundle) in seen.refused else
                               f"the others wait for a node with {in_words(need.bundle)}")
        if why != self._told:
            self._told = why
            self._kept(need.who, say)(f"{ready} of {wanted} {need.who} are there; {why}")

    def _kept(self, who: str, say: Callable[[str], None]) -> Callable[[str], None]:
        def keep(sentence: str) -> None:
            say(sentence)
            self._store.update_state(waiting=self._store.state().get("waiting", {}) | {who: sentence})

        return keep

    def _over(self, who: str) -> None:
        waiting = self._store.state().get("waiting", {})
        if who in waiting:
            self._store.update_state(waiting={name: sentence for name, sentence in waiting.items() if name != who})
