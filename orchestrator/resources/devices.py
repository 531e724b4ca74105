"""What this machine has to measure on, and which devices a set of Ray resources stands for.

A target kind says what it finds (`announced`) and which devices resources mean (`claims`); both are asked here, every
question bounded in time, because an adb server or a driver may hang, and failing softly where only one of many kinds
is asked about.
"""
from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.targets.catalogue import TARGETS, announced, check_options, claims, target_class
from actors.targets.target import Claim
from orchestrator.cluster.joining import is_local
from orchestrator.config import Config
from searchspaces.errors import ClusterError, ConfigError, NoDeviceError, ParetorayError, TargetError

ANNOUNCE_TIMEOUT_S = 10.0
GPU, RESERVED = "GPU", ("CPU", "GPU", "memory", "object_store_memory")
ACCELERATOR_TYPE, OF_RAY = "accelerator_type:", ("accelerator_type:", "node:")    # resources that stand for no device


@dataclass(frozen=True)
class Kind:
    """A target kind to ask about: one of ours or "module:Class", with the options of a configuration."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Announcement:
    """The Ray resources by which this machine offers its devices of a kind, or the reason why there are none: `absent`
    where it simply has none."""

    kind: Kind
    resources: Mapping[str, float]
    problem: str = ""
    absent: bool = False


@dataclass(frozen=True)
class DeviceClaim:
    """One device of one node: `device` is its resource's name, or "GPU"."""

    kind: Kind
    device: str
    claim: Claim

    @property
    def options(self) -> dict[str, Any]:
        """The target's, with those that pick this device."""
        return {**self.kind.options, **self.claim.options}

    @property
    def problem(self) -> str:
        """Why the device cannot be opened with these options alone; "" where it can."""
        try:
            check_options(self.kind.name, self.options)
        except ConfigError as error:
            return f"{error} and give the file with --config"
        return ""

    @property
    def needs(self) -> dict[str, float]:
        """What must be free on the node."""
        return {**self.claim.actor.get("resources", {}), GPU: self.claim.actor.get("num_gpus", 0)}


def known_kinds(config: Config | None = None) -> list[Kind]:
    """The configuration's targets first, then all of ours that it does not name."""
    own = configured_kinds(config) if config is not None else []
    return own + [Kind(name) for name in TARGETS if name not in {kind.name for kind in own}]


def configured_kinds(config: Config) -> list[Kind]:
    kinds = [Kind(target.name, target.options) for target in config.targets]
    for kind in kinds:
        check_options(kind.name, kind.options)
    return kinds


def named_kinds(names: Sequence[str]) -> list[Kind]:
    """ConfigError for a name that is no target."""
    for name in names:
        target_class(name)
    return [Kind(name) for name in dict.fromkeys(names)]


def ask(kinds: Sequence[Kind], timeout_s: float = ANNOUNCE_TIMEOUT_S) -> list[Announcement]:
    """What this machine announces, all kinds asked at the same time; what fails says why."""
    answers = bounded([functools.partial(_announced, kind) for kind in kinds], timeout_s)
    return [Announcement(kind, {}, sentence(answer), isinstance(answer, NoDeviceError))
            if isinstance(answer, Exception) else Announcement(kind, answer) for kind, answer in zip(kinds, answers)]


def announced_resources(kinds: Iterable[Kind], timeout_s: float = ANNOUNCE_TIMEOUT_S) -> dict[str, float]:
    """The resources of all kinds together, for a Ray that is started here. TargetError where one cannot be asked."""
    found: dict[str, float] = {}
    for announcement in ask(list(kinds), timeout_s):
        if announcement.problem:
            raise TargetError(f"latency target {announcement.kind.name} cannot be used here: {announcement.problem}")
        found |= announcement.resources
    return found


def local_devices(config: Config, address: str | None) -> dict[str, float]:
    """What a Ray that is started here for this configuration offers; {} where a cluster is joined instead."""
    return announced_resources(configured_kinds(config)) if is_local(address) else {}


def gpu_resources(timeout_s: float = ANNOUNCE_TIMEOUT_S) -> dict[str, float]:
    """What Ray itself would find on this machine: "GPU" and how many, and the resource of their type; {} without."""
    from ray._private.accelerators import get_accelerator_manager_for_resource

    def look() -> dict[str, float]:
        manager = get_accelerator_manager_for_resource(GPU)
        if manager is None or not (present := manager.get_current_node_num_accelerators()):
            return {}
        visible = manager.get_current_process_visible_accelerator_ids()
        kind = manager.get_current_node_accelerator_type()
        count = present if visible is None else min(present, len(visible))
        return {GPU: float(count)} | ({f"{ACCELERATOR_TYPE}{kind}": 1.0} if kind else {}) if count else {}

    answer = bounded([look], timeout_s)[0]
    if isinstance(answer, Exception):
        raise ClusterError(f"cannot count this machine's GPUs: {sentence(answer)}") from answer
    found: dict[str, float] = answer
    return found


def device_claims_of(kind: Kind, offered: Mapping[str, float]) -> list[DeviceClaim]:
    """The kind's devices among the resources of one node; what takes no resource, such as a table, is no device."""
    found = []
    for claim in claims(kind.name, kind.options, offered):
        resources = device_names(claim.actor.get("resources", {}))
        if resources or claim.actor.get("num_gpus", 0) > 0:
            found.append(DeviceClaim(kind, "+".join(resources) or GPU, claim))
    return found


def device_names(resources: Iterable[str]) -> list[str]:
    """Those that stand for a device, GPUs aside."""
    return [name for name in resources if name not in RESERVED and not name.startswith(OF_RAY)]


def bounded(functions: Sequence[Callable[[], Any]], timeout_s: float) -> list[Any]:
    """All at the same time, each in a thread of its own: its result, or its exception, or a TargetError where it is
    not done after `timeout_s`. A thread that hangs is left behind and does not keep the process alive."""
    results: list[Any] = [TargetError(f"no answer within {timeout_s:g} s") for _ in functions]

    def run(index: int, function: Callable[[], Any]) -> None:
        try:
            results[index] = function()
        except Exception as error:      # of a user's target or a driver's binding: the caller decides
            results[index] = error

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in enumerate(functions)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return list(results)


def sentence(error: Exception) -> str:
    return str(error) if isinstance(error, ParetorayError) else f"{type(error).__name__}: {error}"


def _announced(kind: Kind) -> dict[str, float]:
    found = announced(kind.name, kind.options)
    for name, amount in found.items():
        if not name or not device_names([name]) or amount <= 0:
            raise ConfigError(f"latency target {kind.name} announces {amount} of the resource '{name}'; a device is a "
                              "positive amount of a resource of its own")
    return found
