"""`paretoray targets`: every measuring device, who uses it, and whether it can measure now.

Of a device that a search holds its latency worker tells, from beside the measurement (actors/latency/status.py);
nothing waits for it or disturbs it. A device that nobody holds is looked at by a short-lived worker that takes it
meanwhile.
One row per device:

    kind, device, name      target kind; its Ray resource or "GPU n"; what the device calls itself
    node, node_id           host (or the node's own name) and the start of Ray's id for it
    health                  "ok", or the sentence that says why it cannot measure
    identity                target_id; of a device that was only looked at, for inputs of EXAMPLE_SHAPE
    state                   idle, measuring, quarantined, not probed, in use, gone (its node)
    queue, measured         requests waiting in the pool that uses it; networks measured by its worker
    last_measured_s, drift  age of the last visit and drift of the reference in it (max / min - 1), null before one
"""
from __future__ import annotations

import functools
import itertools
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from orchestrator.cluster.joining import connected, is_local
from orchestrator.cluster.ownmodules import own_modules
from orchestrator.config import ClusterSettings, load_config
from orchestrator.resources.devices import (
    GPU,
    Announcement,
    DeviceClaim,
    Kind,
    ask,
    bounded,
    device_claims_of,
    device_names,
    gpu_resources,
    known_kinds,
    sentence,
)
from searchspaces.errors import ParetorayError

if TYPE_CHECKING:       # they import Ray, which is done late
    from actors.latency.probe import Seen
    from actors.latency.status import WorkerStatus

EXAMPLE_SHAPE = (3, 32, 32)
DEVICE_WIDTH = 24       # "onnx_cpu-" and 12 digits in one piece
PROBE_TIMEOUT_S = 30.0
STATUS_TIMEOUT_S = 5.0
IN_USE = f"taken by other work than measuring, or by a latency worker that did not answer within {STATUS_TIMEOUT_S:g} s"
SCALED_AWAY = 4         # Ray's reason for the death of an idle node that the autoscaler removed


@dataclass(frozen=True)
class DeviceRow:
    """See the module docstring; the fields are the keys of the JSON."""

    kind: str
    device: str
    name: str
    node: str
    node_id: str
    health: str
    identity: str
    state: str
    queue: int = 0
    measured: int = 0
    last_measured_s: float | None = None
    drift: float | None = None


@dataclass(frozen=True)
class Place:
    """A node; `row` is that of a device there of which nothing is known yet."""

    node: str
    node_id: str

    def row(self, kind: str, device: str, health: str = "not probed") -> DeviceRow:
        return DeviceRow(kind, device, "", self.node, self.node_id, health, "", "not probed")


def list_targets(config: Path | None, address: str | None, probe: bool = True) -> list[dict[str, Any]]:
    """This machine's devices, or those of the whole cluster at `address`. Takes seconds, at most about 40."""
    loaded = load_config(config) if config is not None else None
    kinds = known_kinds(loaded)
    if is_local(address):
        return [asdict(row) for row in _local_rows(kinds, probe)]
    with connected(ClusterSettings(), address, own=own_modules(loaded) if loaded else ()):
        return [asdict(row) for row in _cluster_rows(kinds, probe)]


def targets_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Fits 120 columns; what is longer folds, nothing is cut off."""
    table = Table(box=SIMPLE_HEAD)
    for title in ("kind", "device", "node", "health"):
        table.add_column(title, overflow="fold", width=DEVICE_WIDTH if title == "device" else None)
    table.add_column("state", no_wrap=True)
    for title in ("queue", "measured", "last", "drift"):
        table.add_column(title, no_wrap=True, justify="right")
    for row in rows:
        device = "\n".join(filter(None, (row["device"], row["name"], row["identity"])))
        drift = "" if row["drift"] is None else f"{row['drift']:.1%}"
        cells = (row["kind"], device, row["node"], row["health"], row["state"], str(row["queue"]), str(row["measured"]),
                 ago(row["last_measured_s"]), drift)
        table.add_row(*(Text(cell) for cell in cells))     # Text: a serial in brackets is no markup
    return table


def ago(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


# --- this machine ---------------------------------------------------------------------------------------------------

def _local_rows(kinds: Sequence[Kind], probe: bool) -> list[DeviceRow]:
    from actors.latency.probe import Seen, look

    place, announcements = Place(platform.node(), ""), ask(kinds)
    rows = [place.row(announcement.kind.name, "", announcement.problem)
            for announcement in announcements if announcement.problem and not _uninteresting(announcement)]
    offered: dict[str, float] = {}
    for announcement in announcements:
        offered |= announcement.resources
    try:
        offered |= gpu_resources()
    except ParetorayError as error:
        rows.append(place.row("", GPU, str(error)))
    devices, problems = _devices_of(kinds, offered, place)
    for device, found in devices.items():
        row = _not_probed(device, found, place)
        if probe and not found.problem:
            answer = bounded([functools.partial(look, found.kind.name, found.options, EXAMPLE_SHAPE)],
                             PROBE_TIMEOUT_S)[0]
            row = _seen(row, Seen("", "", sentence(answer)) if isinstance(answer, Exception) else answer)
        rows.append(row)
    return rows + problems


def _uninteresting(announcement: Announcement) -> bool:
    """A kind of which this machine has nothing, and which nobody configured."""
    return announcement.absent and not announcement.kind.options


# --- a cluster ------------------------------------------------------------------------------------------------------

def _cluster_rows(kinds: Sequence[Kind], probe: bool) -> list[DeviceRow]:
    import ray
    from ray._private.state import available_resources_per_node
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from actors.latency.probe import Look, look_at_all
    from actors.latency.status import worker_statuses

    nodes, statuses, free = ray.nodes(), worker_statuses(STATUS_TIMEOUT_S), available_resources_per_node()
    rows: list[DeviceRow] = []
    looks: dict[int, Look] = {}
    for node in filter(lambda node: node["Alive"], nodes):
        node_id = node["NodeID"]
        place, left = Place(_node_name(node), node_id[:12]), Counter(free.get(node_id, {}))
        held = [row for status in statuses if status.node_id == node_id for row in _held(status, place)]
        devices, problems = _devices_of(kinds, node["Resources"], place)
        rows += held + problems
        for device, found in devices.items():
            if device in {row.device for row in held}:
                continue
            row, needed = _not_probed(device, found, place), found.needs
            if any(left[resource] < amount for resource, amount in needed.items()):
                row = replace(row, state="in use", health=IN_USE)
            elif probe and not found.problem:
                left.subtract(needed)
                there = NodeAffinitySchedulingStrategy(node_id, soft=False)
                looks[len(rows)] = Look({**found.claim.actor, "scheduling_strategy": there}, found.kind.name,
                                        found.options)
            rows.append(row)
    for index, seen in zip(looks, look_at_all(list(looks.values()), EXAMPLE_SHAPE, PROBE_TIMEOUT_S)):
        rows[index] = _seen(rows[index], seen)
    return rows + _gone(nodes)


def _held(status: WorkerStatus, place: Place) -> list[DeviceRow]:
    """What a latency worker holds: its resources and GPUs, or one nameless device where it holds none."""
    devices = device_names(status.resources) + [f"{GPU} {index}" for index in status.gpus] or [""]
    return [DeviceRow(status.kind, device, status.device, place.node, place.node_id, status.health, status.target_id,
                      status.state, status.waiting, status.measured, status.last_s, status.drift)
            for device in devices]


def _gone(nodes: Sequence[Mapping[str, Any]]) -> list[DeviceRow]:
    """Nodes that died and did not come back; those that the autoscaler took away had nothing to do."""
    back = {node["NodeName"] for node in nodes if node["Alive"]}
    dead = {node["NodeName"]: node for node in nodes if node["NodeName"] not in back
            and node.get("DeathReason") != SCALED_AWAY}
    return [replace(Place(_node_name(node), node["NodeID"][:12]).row("", "", "the node is gone" + _reason(node)),
                    state="gone") for node in dead.values()]


def _reason(node: Mapping[str, Any]) -> str:
    said = " ".join(str(node.get("DeathReasonMessage") or "").split())
    return f" ({said})" if said else ""


def _node_name(node: Mapping[str, Any]) -> str:
    """The name that it was given (ray start --node-name), else its host's."""
    given = node["NodeName"] != node["NodeManagerAddress"]
    return str(node["NodeName"] if given else node["NodeManagerHostname"])


# --- both -----------------------------------------------------------------------------------------------------------

def _devices_of(kinds: Sequence[Kind], offered: Mapping[str, float],
                place: Place) -> tuple[dict[str, DeviceClaim], list[DeviceRow]]:
    """The devices of a node by name, each for the first kind that claims it, and kinds that could not say."""
    devices: dict[str, DeviceClaim] = {}
    problems = []
    for kind in kinds:
        try:
            gpus = itertools.count()
            for found in device_claims_of(kind, offered):
                devices.setdefault(f"{GPU} {next(gpus)}" if found.device == GPU else found.device, found)
        except ParetorayError as error:
            problems.append(place.row(kind.name, "", str(error)))
    return devices, problems


def _not_probed(device: str, found: DeviceClaim, place: Place) -> DeviceRow:
    return place.row(found.kind.name, device, found.problem or "not probed")


def _seen(row: DeviceRow, seen: Seen) -> DeviceRow:
    return replace(row, name=seen.device, identity=seen.target_id, health=seen.health, state="idle")
