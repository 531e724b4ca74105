"""`paretoray worker`: the `ray start` line with which this machine joins a cluster and announces its devices.

The Ray slots of a node are its cores without those reserved for measuring. A worker of the CPU target stays on the last
core that it may use (actors/targets/host.py), so what a reserved core keeps free is that one: with a slot less than
cores, the system has a core to move other work to. The worker that measures takes one of the slots itself, as every
worker does; a node without slots could not measure, so one is always left.
"""
from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from actors.targets.target import CPU_RESOURCE
from orchestrator.cluster.admission import check_admission, has_token, make_token
from orchestrator.cluster.embedded import usable_cores
from orchestrator.cluster.joining import check_reachable, host_and_port
from orchestrator.config import load_config
from orchestrator.interrupt import Interrupted
from orchestrator.resources.devices import (
    GPU,
    Announcement,
    ask,
    configured_kinds,
    gpu_resources,
    known_kinds,
    named_kinds,
)
from searchspaces.errors import ClusterError, ConfigError

HEAD_PORT = 6379
END_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class NodeOffer:
    """What this machine brings into the cluster at `address`, or into one that it starts (None).

    `authenticate`: the node presents its token, or as a head asks for it, which Ray does only where RAY_AUTH_MODE says
    so.
    """

    address: str | None
    cores: int
    measure_cores: int
    gpus: int
    announcements: tuple[Announcement, ...]
    authenticate: bool = False

    @property
    def slots(self) -> int:
        return max(1, self.cores - self.measure_cores)

    @property
    def resources(self) -> dict[str, float]:
        merged: dict[str, float] = {}
        for announcement in self.announcements:
            merged |= announcement.resources
        return {name: int(amount) if float(amount).is_integer() else amount for name, amount in merged.items()}

    @property
    def _devices(self) -> dict[tuple[str, str], float]:
        """By kind and resource; two targets of a configuration may be the same device."""
        return {(announcement.kind.name, name): amount for announcement in self.announcements
                for name, amount in announcement.resources.items()}

    @property
    def arguments(self) -> list[str]:
        """Of `ray`."""
        where = [f"--address={self.address}"] if self.address is not None else ["--head", f"--port={HEAD_PORT}"]
        offered = [f"--resources={json.dumps(self.resources)}"] if self.resources else []
        return ["start", *where, f"--num-cpus={self.slots}", *offered]

    @property
    def line(self) -> str:
        """For a shell: `ray start ... --resources='{"latency_cpu": 1}'`, every value quoted where it must be."""
        words = [f"{flag}={shlex.quote(value)}" if value else flag
                 for flag, _, value in (argument.partition("=") for argument in self.arguments)]
        return " ".join([*(f"{name}={value}" for name, value in self.environment.items()), "ray", *words])

    @property
    def environment(self) -> dict[str, str]:
        """What `ray` is to find in its environment."""
        return {"RAY_AUTH_MODE": "token"} if self.authenticate else {}

    def sentences(self) -> list[str]:
        """One per device, and one per kind that could not be asked."""
        said = [f"{kind}: {_sentence(name, amount)}" for (kind, name), amount in self._devices.items()]
        said += [f"GPU {index}: Ray finds it by itself and offers it as GPU" for index in range(self.gpus)]
        said += [f"{announcement.kind.name}: not announced, because {announcement.problem}"
                 for announcement in self.announcements if announcement.problem]
        kept = f"{self.measure_cores} of {self.cores} cores reserved for measuring" if self.measure_cores else \
            f"no core of {self.cores} reserved for measuring"
        said = said or ["no device to measure on was found; this node only trains and evaluates"]
        said.append(f"{kept}: {self.slots} slot{'s' if self.slots > 1 else ''} for Ray's workers")
        if self.address is not None and not self.authenticate:
            said.append("no token was found; if the cluster asks for one, copy ~/.ray/auth_token from its head")
        if self.address is None and self.authenticate and not has_token():
            said.append("no token was found; 'ray get-auth-token --generate' makes the cluster's, --start does so by "
                        "itself")
        if self.address is None and not self.authenticate:
            said.append("RAY_AUTH_MODE is disabled: whoever reaches this machine can run anything on the cluster")
        return said

    def as_json(self) -> dict[str, Any]:
        return {"line": self.line, "command": ["ray", *self.arguments], "environment": self.environment,
                "address": self.address, "cores": self.cores, "measure_cores": self.measure_cores,
                "num_cpus": self.slots, "gpus": self.gpus, "resources": self.resources,
                "devices": [{"kind": kind, "resource": name, "amount": amount}
                            for (kind, name), amount in self._devices.items()],
                "problems": {announcement.kind.name: announcement.problem
                             for announcement in self.announcements if announcement.problem}}


def inspect(address: str | None, names: Sequence[str], config: Path | None, measure_cores: int | None) -> NodeOffer:
    """What this machine has. ConfigError for unusable arguments; a device that cannot be asked is only reported."""
    if names and config is not None:
        raise ConfigError(f"--target {names[0]} and --config {config} were both given; give one of them")
    if address is not None:
        host_and_port(address)
    if config is not None:
        kinds = configured_kinds(load_config(config))
    else:
        kinds = named_kinds(names) if names else known_kinds()
    announcements = tuple(ask(kinds))
    cores = usable_cores()
    if measure_cores is None:
        processor = any(CPU_RESOURCE in announcement.resources for announcement in announcements)
        measure_cores = min(1, cores - 1) if processor else 0
    elif measure_cores >= cores:
        raise ConfigError(f"--measure-cores {measure_cores} leaves Ray none of this machine's {cores} usable cores; "
                          f"reserve at most {cores - 1}")
    mode = os.environ.get("RAY_AUTH_MODE")
    authenticate = mode != "disabled" if address is None else mode == "token" and has_token()
    return NodeOffer(address, cores, measure_cores, int(gpu_resources().get(GPU, 0)), announcements, authenticate)


def start_node(offer: NodeOffer) -> None:
    """Runs the node in the foreground until it ends or a signal ends it. ClusterError where it does not start."""
    if offer.address is not None:
        check_reachable(offer.address)
        check_admission(offer.address)
    elif offer.authenticate and not has_token():
        make_token()
    stopped: list[int] = []
    # A session of its own: Ctrl-C reaches the node once, from here.
    node = subprocess.Popen([*ray_command(), *offer.arguments, "--block"], start_new_session=True,
                            env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"} | offer.environment)

    def end(number: int, _frame: FrameType | None) -> None:
        stopped.append(number)
        node.terminate()

    previous = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = _wait(node, stopped)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if stopped:
        raise Interrupted(stopped[0])
    if code != 0:
        raise ClusterError(f"'{offer.line}' ended with exit code {code}; its output above says why")


def ray_command() -> list[str]:
    """The `ray` that belongs to this Python."""
    script = Path(sys.executable).parent / "ray"
    return [str(script)] if script.exists() else [sys.executable, "-m", "ray.scripts.scripts"]


def _wait(node: subprocess.Popen[bytes], stopped: Sequence[int]) -> int:
    """The exit code; a node that was asked to end and does not is killed."""
    while True:
        try:
            return node.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            if stopped:
                node.kill()


def _sentence(name: str, amount: float) -> str:
    if name != CPU_RESOURCE:
        return f"offered as {amount:g} of the resource '{name}'"
    core = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    where = f"; the worker that measures stays on core {core}" if core is not None else ""
    return f"this machine's processor, offered as the resource '{name}'{where}"
