"""Android phones over adb: the paired protocol on the phone itself, in batches (latency.md section 5).

    prepare   graph -> ONNX file -> pushed under its checksum (device.py)
    measure   cool enough? -> one runner call for up to `per_call` networks, pinned to the big cores -> timings
              -> rounds of a drifting reference are discarded -> again for the networks that need more rounds

Everything that needs the link is repeated after a reconnection, three attempts in all; then TargetError, so that the
pool quarantines the phone and hands its work to others. Phones of one model serve one pool: the identity names the
model and the cores, a sample's details the serial and the state of the phone.
"""
from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from actors.targets.android.adb import NO_PHONE, PREFIX, Serials, Server, allowed, offered_serials, only
from actors.targets.android.device import Phone
from actors.targets.android.files import MODELS, bounded, digest, program, program_folder, with_sizes
from actors.targets.android.rounds import Progress, without_cold
from actors.targets.android.runners import Outcome, Plan, make_runner
from actors.targets.android.state import State, choose_cores, describe, foreign_load, look, mask
from actors.targets.pairing import Protocol, percentile_25
from actors.targets.reference import graph_hash, reference_graph
from actors.targets.target import Claim, Health, LatencySample, LatencyTarget, TargetIdentity, Workload
from searchspaces import plugins
from searchspaces.errors import ConfigError, DeviceRestingError, NoDeviceError, ParetorayError, TargetError
from searchspaces.onnxgraph import to_onnx

log = logging.getLogger(__name__)
QUIET_ROUNDS = 10
KEPT_FILES = 64         # models that stay on the phone
START_S = 15.0          # of a runner call, beside `time_out_s` per network
GRACE_S = 5.0           # that the phone has to end a runner by itself
COOL_POLL_S = 2.0
HOST_CPUS = 0.2         # of a worker: it writes files and waits


@dataclass(frozen=True)
class PushedModel:
    """A handle. The content stays here, because a phone may have lost the file when it comes back."""

    path: str
    content: bytes = field(repr=False)


class AndroidTarget(LatencyTarget):
    """`runner`: the program's file on this machine, for the phone's processor; `libraries` travel beside it.

    `serial`: one phone, a list of them, or "all"; may be left out where there is exactly one. `converter`:
    "module:function" from the bytes of an ONNX file to those of the adapter's model file. `cores`: "big" is the fastest
    cluster and as many more as `threads` needs. `cooling_s`: longest wait for a hot phone before a call. `time_out_s`:
    of a runner call, per network in it. `reconnect_s`: longest wait for a phone to come back.
    """

    per_call = 16

    def __init__(self, input_shape: tuple[int, ...], reference_ms: float | None = None, *, runner: str,
                 serial: str | Sequence[str] | None = None,
                 adapter: Literal["paretoray", "benchmark_model", "onnxruntime_perf_test", "benchncnn"] = "paretoray",
                 libraries: Sequence[str] = (), converter: str | None = None, threads: int = 1, batch: int = 1,
                 cores: Literal["big", "all"] | Sequence[int] = "big", max_battery_c: float = 40.0,
                 cooling_s: float = 45.0, max_drift: float = 0.05, per_call: int = 16, time_out_s: float = 20.0,
                 reconnect_s: float = 15.0, adb_host: str | None = None, adb_port: int | None = None,
                 protocol: Protocol | None = None) -> None:
        if min(threads, batch, per_call) < 1:
            raise ConfigError(f"target android: threads is {threads}, batch {batch} and per_call {per_call}; all must "
                              "be at least 1")
        if min(max_drift, time_out_s, reconnect_s) <= 0 or cooling_s < 0:
            raise ConfigError(f"target android: max_drift is {max_drift:g}, time_out_s {time_out_s:g}, reconnect_s "
                              f"{reconnect_s:g} and cooling_s {cooling_s:g}; only cooling_s may be 0, none below")
        self._runner = make_runner(adapter, batch, converter)
        self._convert = plugins.load_object(converter) if converter is not None else None
        self._protocol = protocol or Protocol()
        self._batch, self._per_call, self._time_out_s = batch, per_call, time_out_s
        self._max_battery_c, self._cooling_s, self._max_drift = max_battery_c, cooling_s, max_drift
        server = Server.of(adb_host, adb_port)
        self._program = program(runner, libraries)
        graph = reference_graph(input_shape[0], input_shape[1])
        self._phone = Phone(server, only(serial, server), reconnect_s)
        self._present: dict[str, int] = {}      # files on the phone -> the phone's recoveries when they were checked
        self._reference = self._file(to_onnx(graph, batch=batch).SerializeToString())
        self._cores: list[int] = []
        self._plan = Plan(f"{program_folder(self._program)}/runner", self._reference.path, (), self._protocol.warm_up,
                          self._protocol.least_rounds, self._protocol.small_runs, threads, batch, tuple(input_shape),
                          cores == "big")
        device, runtime, quiet_ms = self._phone.persistently(lambda: self._set_up(cores, reference_ms is None))
        self._reference_ms = quiet_ms if reference_ms is None else reference_ms
        if self._reference_ms >= self._protocol.small_ms:
            self._plan = replace(self._plan, runs=self._protocol.candidate_runs)
        self._identity = TargetIdentity("android", device, runtime or f"{adapter} {digest(self._program['runner'])}",
                                        self._runner.precision, threads, batch, tuple(input_shape), graph_hash(graph))

    @classmethod
    def announced(cls, options: Mapping[str, Any]) -> dict[str, float]:
        """One resource per phone in state `device`. NoDeviceError without adbutils, server or phones, TargetError where
        no phone can be used."""
        server = Server.of(options.get("adb_host"), options.get("adb_port"))
        try:
            phones = server.phones()
        except TargetError as error:
            raise NoDeviceError(str(error)) from error
        usable = {f"{PREFIX}{serial}": 1.0 for serial, state in phones.items() if state == "device"}
        if not phones:
            raise NoDeviceError(NO_PHONE)
        if not usable:
            raise TargetError("; ".join(server.trouble(serial) for serial in sorted(phones)))
        return usable

    @classmethod
    def claims(cls, options: Mapping[str, Any], offered: Mapping[str, float]) -> list[Claim]:
        serials: Serials = options.get("serial")
        return [Claim({"resources": {f"{PREFIX}{serial}": 1}, "num_cpus": HOST_CPUS}, {"serial": serial})
                for serial in allowed(serials, offered_serials(offered))]

    def identity(self) -> TargetIdentity:
        return self._identity

    def health(self) -> Health:
        """Tries once to get a lost phone back, within `reconnect_s`. A hot one will be well by itself."""
        try:
            if self._phone.server.trouble(self._phone.serial):
                self._phone.reconnect()
            heat = look(self._phone).heat(self._max_battery_c)
        except TargetError as error:
            return Health(False, str(error))
        if heat:
            return Health(False, f"phone {self._phone.serial} is too hot to measure: {heat}", passing=True)
        return Health(True)

    def reference_ms(self) -> float:
        return self._reference_ms

    def prepare(self, workloads: Sequence[Workload]) -> list[Any]:
        handles = [self._file(self._content(workload)) for workload in workloads]
        self._phone.persistently(lambda: self._push(handles))
        return handles

    def measure(self, handles: Sequence[Any]) -> list[LatencySample]:
        return [sample for start in range(0, len(handles), self._per_call)
                for sample in self._measure_batch(handles[start:start + self._per_call])]

    def close(self) -> None:
        """Removes our models from the phone, if it is there."""
        models = [path for path in self._present if path.startswith(f"{MODELS}/")]
        self._present = {}
        if models and not self._phone.server.trouble(self._phone.serial):
            try:
                self._phone.shell(["rm", "-f", *models], GRACE_S)
            except TargetError as error:
                log.info("models stay on the phone: %s", error)

    # --- files ------------------------------------------------------------------------------------------------------

    def _content(self, workload: Workload) -> bytes:
        if workload.graph is not None:
            return to_onnx(workload.graph, batch=self._batch).SerializeToString()
        if workload.onnx is None:
            raise TargetError("target android needs a graph or the bytes of an ONNX file, and got neither")
        return with_sizes(workload.onnx, self._batch)

    def _file(self, content: bytes) -> PushedModel:
        if self._convert is not None:
            try:
                content = self._convert(content)
            except ParetorayError:
                raise
            except Exception as error:      # a user's function may raise anything, and means this network
                raise TargetError(f"the converter failed with {type(error).__name__}: {error}") from error
        return PushedModel(f"{MODELS}/{digest(content)}.{self._runner.suffix}", content)

    def _push(self, handles: Sequence[PushedModel]) -> None:
        """Files not checked since the phone last came back."""
        now = self._phone.recoveries
        files = {handle.path: handle.content for handle in handles if self._present.pop(handle.path, -1) != now}
        if files:
            self._phone.push(files)
        self._present.update(dict.fromkeys((handle.path for handle in handles), now))     # the last used come last
        surplus = list(self._present)[:max(0, len(self._present) - max(KEPT_FILES, len(handles)))]
        if surplus:
            self._phone.shell(["rm", "-f", *surplus])
            for path in surplus:
                del self._present[path]

    # --- measuring --------------------------------------------------------------------------------------------------

    def _set_up(self, cores: str | Sequence[int], quiet: bool) -> tuple[str, str, float]:
        """Device, runtime and quiet reference time; leaves the runner and the reference network on the phone."""
        name, _ = describe(self._phone)
        self._cores = choose_cores(cores, look(self._phone).highest(), self._plan.threads)
        folder = program_folder(self._program)
        self._phone.push({f"{folder}/{file}": content for file, content in self._program.items()}, 0o755)
        self._phone.shell(["find", MODELS, "-mtime", "+1", "-exec", "rm", "-f", "{}", "+"])
        self._push([self._reference])
        pinned = ("taskset", mask(self._cores)) if self._cores else ()
        self._plan = replace(self._plan, prefix=("env", f"LD_LIBRARY_PATH={folder}", *pinned))
        self._cool()
        outcome = self._call([self._reference], replace(self._plan, rounds=QUIET_ROUNDS if quiet else 1))[0]
        if isinstance(outcome, str):
            raise TargetError(f"the runner on phone {self._phone.serial} cannot time the reference network: {outcome}")
        rounds = (*outcome.reference_ms, *outcome.candidate_ms)
        quartiles = [percentile_25(without_cold(ms, self._protocol) if outcome.single else ms) for ms in rounds]
        where = f", cores {','.join(map(str, self._cores))}" if self._cores else ""
        return name + where, outcome.runtime, percentile_25(quartiles)

    def _measure_batch(self, handles: Sequence[PushedModel]) -> list[LatencySample]:
        started_at, started = time.time(), time.monotonic()
        every = [Progress(self._phone.serial, self._protocol, self._max_drift) for _ in handles]
        todo = list(range(len(handles)))
        while todo:
            batch = [handles[index] for index in todo]
            outcomes, after, load = self._phone.persistently(partial(self._look_and_call, batch))
            for index, outcome in zip(todo, outcomes):
                if isinstance(outcome, str):
                    raise TargetError(f"phone {self._phone.serial} cannot run the network: {outcome}")
                every[index].take_in(outcome, self._identity.runtime, load, after)
            elapsed_s = (time.monotonic() - started) / len(handles)
            todo = [index for index in todo if not every[index].enough(elapsed_s)]
        duration_s = (time.monotonic() - started) / len(handles)
        where = {"serial": self._phone.serial, "recoveries": self._phone.recoveries}
        return [progress.sample(self._identity, self._reference_ms, self._cores, where, started_at, duration_s)
                for progress in every]

    def _look_and_call(self, handles: Sequence[PushedModel]) -> tuple[list[Outcome], State, float]:
        before = self._cool()
        self._push([self._reference, *handles])
        started = time.monotonic()
        outcomes = self._call(handles, self._plan)
        own_s = (time.monotonic() - started) * self._plan.threads
        after = look(self._phone)
        return outcomes, after, foreign_load(before, after, own_s)

    def _call(self, handles: Sequence[PushedModel], plan: Plan) -> list[Outcome]:
        """One runner call. LinkError where it did not end, TargetError where the runner failed."""
        paths = [handle.path for handle in handles]
        limit_s = START_S + self._time_out_s * len(handles)
        answer = self._phone.shell(bounded(self._runner.command(plan, paths), limit_s), limit_s + GRACE_S)
        if answer.code != 0:
            said = (answer.err or answer.out).strip().splitlines() or ["it said nothing"]
            late = f", the time-out is {limit_s:g} s" if answer.code in (124, 137) else ""
            raise TargetError(f"the runner on phone {self._phone.serial} ended with exit code {answer.code}{late}: "
                              f"{said[-1]}")
        return self._runner.read(answer.out, paths, plan)

    def _cool(self) -> State:
        """The phone's state once it is cool; DeviceRestingError where that takes longer than `cooling_s`."""
        end = time.monotonic() + self._cooling_s
        while heat := (state := look(self._phone)).heat(self._max_battery_c):
            left_s = end - time.monotonic()
            if left_s <= 0:
                raise DeviceRestingError(f"phone {self._phone.serial} is too hot to measure after waiting "
                                         f"{self._cooling_s:g} s (cooling_s): {heat}")
            time.sleep(min(COOL_POLL_S, left_s))
        return state
