"""Searches of one cluster that want the same device measure in turn.

Every latency worker is a claim on a device: an actor that needs the device's resource, with the device and its search
in its name. Ray gives the resource to one of them, in no promised order; the others wait as pending actors. Whoever has
it gives way when others wait: at once while it has nothing to measure, otherwise after a share of time. It claims the
device again when no more claims are left than the cluster has such devices, so that all who waited come first.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import ray

from actors.latency.status import NAMESPACE, PREFIX

BETWEEN = "@"       # of device and search in a name; neither Ray's resources nor runs have it


def device_key(actor_options: Mapping[str, Any]) -> str:
    """Of the Ray options of a worker: what its device is called among searches; "" where nothing is exclusive."""
    return "+".join([*sorted(actor_options.get("resources", {})), *(["GPU"] if actor_options.get("num_gpus") else [])])


def claim_name(key: str, search: str, tag: str) -> str:
    """`tag`: makes it unique, without a dot."""
    return f"{PREFIX}{key}{BETWEEN}{search}.{tag}"


def waiting_claims() -> dict[str, str]:
    """Key by name of all claims of the cluster that have no device now."""
    from ray._private.state import state

    found = [entry["Name"] for status in ("PENDING_CREATION", "RESTARTING")
             for entry in state.actor_table(None, None, status).values()]
    return dict(_claims(found))


def claims_on(key: str) -> list[str]:
    """Names of all claims on these devices, with and without one."""
    entries = ray.util.list_named_actors(all_namespaces=True)
    named = [entry["name"] for entry in entries if entry["namespace"] == NAMESPACE]
    return [name for name, other in _claims(named) if other == key]


def search_of(name: str) -> str:
    return name.rpartition(BETWEEN)[2].rpartition(".")[0]


def _claims(names: list[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        before, found, _ = name.rpartition(BETWEEN)
        if found and before.startswith(PREFIX):
            yield name, before.removeprefix(PREFIX)
