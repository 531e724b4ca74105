"""One device as its pool sees it: the actor's handle, what it is doing, and whether it can be trusted.

    starting --probe answers--> ready --send--> busy --outcomes--> ready --release--> waiting --its turn--> starting
       ^   |                                     |
       |   +-- max_failures probes fail, or it rests for more than rest_s --> quarantined (for good)
       +------ worker died, no answer in time, nothing in the call worked, it has to rest

While another search has the device a start is waiting too, and no failure.
"""
from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.latency.status import GROUP, NAMESPACE
from actors.latency.turns import claim_name, claims_on, device_key, search_of, waiting_claims
from actors.latency.worker import LatencyWorker, Probe
from actors.targets.target import LatencySample
from searchspaces.errors import DeviceRestingError, ParetorayError
from searchspaces.space import SearchSpace, Tokens

log = logging.getLogger(__name__)
LONGEST_WAIT_S = 30.0
LOOK_S = 5.0        # between two looks at who wants or has a device
DeviceState = Literal["starting", "ready", "waiting", "quarantined"]
Outcome = LatencySample | str | None    # a string says why there is no sample; None: it was not tried


@dataclass(frozen=True)
class LatencyPoolSettings:
    """`per_call`: networks that travel in one call, None: as many as the target says. A call may take `time_out_s` for
    every network and visit in it. `rest_s`: how long a device may rest (heat, another user) before it is given up.
    `share_s`: how long a search measures while others wait for the device; one that has to wait for more than
    `turn_time_out_s` gives it up."""

    per_call: int | None = None
    time_out_s: float = 120.0
    start_time_out_s: float = 60.0
    max_failures: int = 3
    retry_wait_s: float = 0.5
    rest_s: float = 900.0
    share_s: float = 120.0
    turn_time_out_s: float = 3600.0


@dataclass(frozen=True)
class DeviceHealth:
    """`pid` is 0 while no process has answered. `measured` counts networks since the pool was made."""

    name: str
    state: DeviceState
    reason: str
    host: str
    pid: int
    measured: int


@dataclass
class Job:
    """`tickets`: who waits for it."""

    arch_id: str
    tokens_T: Tokens
    client: str
    visits: int
    tickets: list[int]
    model: bytes | None = None
    failures: int = 0


class Device:
    """`call` is the one answer that is awaited: of a probe while `jobs` is empty, of a measurement otherwise. `search`:
    who measures, for names."""

    def __init__(self, search: str, options: Mapping[str, Any], settings: LatencyPoolSettings,
                 arguments: tuple[SearchSpace, str, Mapping[str, Any], tuple[int, int] | None]) -> None:
        self.key = device_key(options)
        self.name, self._search, self._tag = self.key or arguments[1], search, uuid.uuid4().hex[:6]
        self._settings, self._options = settings, options
        self._arguments = (*arguments, f"{self.name} for {search}")
        self._created = 0
        self._handle: Any = self._create()      # None: another search's turn
        self.holder = ""                        # the search that has the device while this one waits
        self.call: ray.ObjectRef | None = None
        self.probe: Probe | None = None
        self.quarantined = ""           # the reason
        self.trouble = ""               # of the last failure since it was ready
        self.measured = 0
        self._jobs: list[Job] = []
        self._deadline = self._not_before = 0.0
        self._failed_probes = 0
        self._down_since = self._held_since = self._used = self._looked = time.monotonic()
        self._turn_since: float | None = None

    @property
    def claim(self) -> str:
        """The name of its worker."""
        return claim_name(self.name, self._search, f"{self._tag}-{self._created}")

    @property
    def due(self) -> bool:
        """Should be probed now."""
        return (self.probe is None and self.call is None and not self.quarantined
                and time.monotonic() >= self._not_before)

    @property
    def ready(self) -> bool:
        return self.probe is not None and self.call is None and not self.quarantined

    @property
    def released(self) -> bool:
        return self._handle is None

    def activity(self) -> str:
        """One word for metrics."""
        return ("quarantined" if self.quarantined else "measuring" if self._jobs else "waiting" if self.holder or
                self.released else "starting" if self.probe is None else "idle")

    def spared(self, needed: bool) -> bool:
        """May another search have it now? `needed`: networks wait for it here."""
        now = time.monotonic()
        enough = now - self._held_since >= self._settings.share_s
        return bool(self.key) and self.ready and (enough if needed else now - self._used >= LOOK_S)

    def release(self) -> None:
        """To another search; the next probe claims it again."""
        ray.kill(self._handle)
        self._handle, self.call, self.probe = None, None, None
        self._not_before = time.monotonic() + LOOK_S    # who waits is faster

    def send_probe(self, reference_ms: float | None) -> None:
        now = time.monotonic()
        if self._handle is None:
            if len(claims_on(self.key)) > self._units():
                self._stand_in_line()
                return
            self._handle = self._create()
        self.call = self._handle.probe.remote(reference_ms)
        self._deadline, self._looked = now + self._settings.start_time_out_s, now

    def send(self, jobs: list[Job], reference_ms: float, waiting: int) -> None:
        """`waiting`: requests that stay behind in the queue."""
        first = jobs[0]
        self.call = (self._handle.measure_file.remote(first.model, first.visits, reference_ms, waiting)
                     if first.model is not None else
                     self._handle.measure.remote([job.tokens_T for job in jobs], first.visits, reference_ms, waiting))
        self._jobs = jobs
        self._deadline = time.monotonic() + self._settings.time_out_s * len(jobs) * first.visits

    def receive(self) -> list[tuple[Job, Outcome]]:
        """Outcomes of the call if it has ended or must end now; nothing while it goes on, and for probes."""
        if self.call is None:
            return []
        if not ray.wait([self.call], timeout=0)[0]:
            if self.probe is None:
                self._look_whose_turn()
            return self._expire() if time.monotonic() > self._deadline else []
        try:
            answer = ray.get(self.call)
        except RayTaskError as error:           # the worker lives, the call raised
            if isinstance(error.cause, DeviceRestingError):
                return self._rest(str(error.cause))
            known = isinstance(error.cause, ParetorayError)
            return self._end(str(error.cause) if known else f"{type(error.cause).__name__}: {error.cause}")
        except ActorUnavailableError as error:
            patience_s = self._down_since + self._settings.start_time_out_s - time.monotonic()
            if not self._jobs and patience_s > 0:   # its new process is on the way
                self.call, self._not_before = None, time.monotonic() + self._settings.retry_wait_s
                return []
            if not self._jobs and self._waits_for_turn():   # Ray gave the device away while it restarted
                self.release()
                return []
            return self._end(f"the latency worker died ({str(error).splitlines()[0]})")
        except RayError as error:
            if isinstance(error, ActorDiedError) and not self._jobs:
                ray.kill(self._handle)          # it will not come back by itself
                self._handle = self._create()
            died = isinstance(error, RayActorError)
            return self._end(f"the latency worker {'died' if died else 'was lost'} ({str(error).splitlines()[0]})")
        if isinstance(answer, Probe):
            self.call, self.probe, self.trouble, self._failed_probes = None, answer, "", 0
            self._held_since = self._used = time.monotonic()
            self.holder, self._turn_since = "", None
            return []
        return self._take_in(answer if isinstance(answer, list) else [answer])

    def health(self) -> DeviceHealth:
        state: DeviceState = ("quarantined" if self.quarantined else "waiting" if self.holder or self.released else
                              "starting" if self.probe is None else "ready")
        host, pid = (self.probe.host, self.probe.pid) if self.probe is not None else ("", 0)
        return DeviceHealth(self.name, state, self.quarantined or self.trouble, host, pid, self.measured)

    def quarantine(self, reason: str) -> None:
        log.warning("latency device %s is quarantined: %s", self.name, reason)
        self.quarantined, self.probe = reason, None
        if self._handle is not None:
            self._handle.quarantine.remote(reason)      # nobody waits for the answer: the worker may be gone

    def close(self) -> None:
        if self._handle is not None:
            ray.kill(self._handle)

    def _take_in(self, outcomes: list[LatencySample | str]) -> list[tuple[Job, Outcome]]:
        jobs, self._jobs, self.call = self._jobs, [], None
        self._used = time.monotonic()
        samples = [outcome for outcome in outcomes if isinstance(outcome, LatencySample)]
        self.measured += len(samples)
        if not samples:
            self.probe = None       # the networks, or the device? It is asked before it gets more work
        return list(zip(jobs, outcomes, strict=True))

    def _expire(self) -> list[tuple[Job, Outcome]]:
        if self._jobs:
            ray.kill(self._handle, no_restart=False)
            return self._end(f"no answer within {self._settings.time_out_s:g} s per network (latency.time_out_s)")
        ray.kill(self._handle)  # a process that never came up does not restart either: a new actor
        self._handle = self._create()
        return self._end(f"the latency worker did not start within {self._settings.start_time_out_s:g} s; it needs "
                         f"{self._options}, and one CPU, free on one node")

    def _end(self, reason: str) -> list[tuple[Job, Outcome]]:
        """The call failed as a whole: the jobs go back, the device is probed again after a while."""
        if self.probe is not None:
            self._down_since = time.monotonic()
        jobs, self._jobs, self.call, self.probe, self.trouble = self._jobs, [], None, None, reason
        if not jobs:
            self._failed_probes += 1
            wait_s = self._settings.retry_wait_s * 2 ** (self._failed_probes - 1)
            self._not_before = time.monotonic() + min(wait_s, LONGEST_WAIT_S)
            if self._failed_probes >= self._settings.max_failures:
                self.quarantine(reason)
        return [(job, reason) for job in jobs]

    def _rest(self, reason: str) -> list[tuple[Job, Outcome]]:
        """Nobody's fault: the jobs go back as they were, the device is asked again until it has rested enough."""
        if self.probe is not None:
            self._down_since = time.monotonic()
        jobs, self._jobs, self.call, self.probe, self.trouble = self._jobs, [], None, None, reason
        self._not_before = time.monotonic() + min(LONGEST_WAIT_S, 10 * self._settings.retry_wait_s)
        if time.monotonic() - self._down_since > self._settings.rest_s:
            self.quarantine(f"{reason}; it has rested for {self._settings.rest_s:g} s")
        return [(job, None) for job in jobs]

    def _stand_in_line(self) -> None:
        """Others come first, but not for ever."""
        now = time.monotonic()
        self._turn_since, self._not_before = self._turn_since or now, now + LOOK_S
        if now - self._turn_since > self._settings.turn_time_out_s:
            self.quarantine(f"other searches have had it for {self._settings.turn_time_out_s:g} s without a pause")

    def _look_whose_turn(self) -> None:
        """A start that waits for another search has more time."""
        now = time.monotonic()
        if now - self._looked >= LOOK_S and self.key:
            self._looked = now
            if self._waits_for_turn():
                self._deadline = now + self._settings.start_time_out_s

    def _waits_for_turn(self) -> bool:
        """Does another search have the device, and is the wait for it not too long yet?"""
        waiting = waiting_claims()
        others = [name for name in claims_on(self.key) if name != self.claim and name not in waiting]
        self.holder = search_of(others[0]) if others else ""
        now = time.monotonic()
        if not self.holder:
            return False
        self._turn_since, self.trouble = self._turn_since or now, f"waits for its turn: {self.holder} measures on it"
        return now - self._turn_since < self._settings.turn_time_out_s

    def _units(self) -> float:
        """How many such devices the cluster has."""
        offered, wanted = ray.cluster_resources(), dict(self._options.get("resources", {}))
        if self._options.get("num_gpus"):
            wanted["GPU"] = self._options["num_gpus"]
        return min(offered.get(name, 0) / amount for name, amount in wanted.items())

    def _create(self) -> Any:
        # Retries are the pool's: Ray restarts the process, and only the pool knows which networks may go back to it.
        self._created += 1
        options = {"name": self.claim, "namespace": NAMESPACE, "num_cpus": 1, "max_restarts": -1,
                   "max_task_retries": 0, **self._options}
        if not (options["num_cpus"] or options.get("num_gpus") or options.get("resources")):
            # It takes nothing, so Ray may put it anywhere, and a node that an autoscaler added could not leave.
            here = ray.get_runtime_context().get_node_id()
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(here, soft=False)
        worker: Any = ray.remote(concurrency_groups={GROUP: 1})(LatencyWorker)  # type: ignore[call-overload]
        return worker.options(**options).remote(*self._arguments)
