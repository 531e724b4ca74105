"""How many searches of a sweep find room at a time.

A search starts actors as it goes: it measures, trains, evaluates. Two searches that both hold a part of what they need
would wait for each other for ever, so only as many are started as all of their actors fit. In the Ray that a sweep
starts on this machine there are slots for as many as were asked for; in a cluster each search takes its share
(`Search(share=...)`), and the share must be enough for one. Devices are measured on in turn (actors/latency), but
for the processor of the machine that the searches themselves keep busy: they would disturb each other's latencies.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.targets.catalogue import claims
from actors.targets.target import CPU_RESOURCE
from orchestrator.config import Config
from orchestrator.data.accuracy import Recipe
from orchestrator.resources.waiting import wanted_resource
from orchestrator.services.recipes import controller_cpus, slots_needed
from searchspaces.errors import ClusterError

CPU, GPU = "CPU", "GPU"


@dataclass(frozen=True)
class Room:
    """Searches at a time, and, where these are fewer than asked for, why."""

    searches: int
    why: str = ""


def least_cpus(config: Config, resources: Mapping[str, float]) -> int:
    """Without which a search cannot go on; what is left to it (auto) counts as one."""
    accuracy, supernet = config.accuracy, config.supernet
    measuring = sum(1 for target in config.targets if any(
        claim.actor.get("num_cpus", 1) for claim in claims(target.name, target.options, resources)[:1]))
    rollouts = _or_one(config.search.rollouts)
    if accuracy.source == "training":
        rollouts = _or_one(accuracy.workers) * accuracy.cpus
    training = _or_one(supernet.workers) * _or_one(supernet.cpus) if accuracy.source == "supernet" else 0
    return measuring + training + rollouts + controller_cpus(config)


def least_gpus(config: Config, resources: Mapping[str, float]) -> float:
    """The same of GPUs; what is left to the search (auto) counts as a whole one where there are any."""
    accuracy, supernet, search = config.accuracy, config.supernet, config.search
    if isinstance(accuracy, Recipe):
        asked = [(_or_one(accuracy.workers), accuracy.gpus)]
    else:
        asked = [(_or_one(supernet.workers), supernet.gpus), (_or_one(search.rollouts), search.gpus)]
    fixed = sum(count * gpus for count, gpus in asked if gpus != "auto")
    left = any(gpus == "auto" for _, gpus in asked) and resources.get(GPU, 0) >= 1
    return max(fixed, 1.0 if left else 0.0)


def room(asked: int, configs: Sequence[Config], resources: Mapping[str, float], local: bool) -> Room:
    """For searches of these configurations, in a Ray with these resources (in all, `ray.cluster_resources`).

    `local`: it is this machine's, where a search sizes itself by the cores. ClusterError where a search would never
    find room.
    """
    found = Room(asked)
    for config in configs:
        label = _measured_here(config, resources, local)
        if label and found.searches > 1:
            found = Room(1, f"each measures this machine's processor (target {label}), which the others would disturb")
        for name, needed, has, enough in _needs(config, resources, local):
            if enough > has:
                raise ClusterError(f"a search of this sweep needs {enough:g} {name} and the cluster has {has:g}; lower "
                                   "what its configuration asks for, or add nodes (section search, supernet and "
                                   "accuracy: workers, rollouts, cpus and gpus)")
            fitting = max(1, int(has // needed)) if needed else asked
            if fitting < found.searches:
                found = Room(fitting, f"each needs {needed:g} {name}, of {has:g}")
    return found


def slots(searches: int, configs: Sequence[Config]) -> int:
    """Of a Ray that is started here."""
    return searches * max(slots_needed(config) for config in configs)


def _needs(config: Config, resources: Mapping[str, float], local: bool) -> list[tuple[str, float, float, float]]:
    """Per resource: its name, what one search takes beside others, what there is, and what one alone cannot do
    without."""
    cpus, gpus = least_cpus(config, resources), least_gpus(config, resources)
    return [("CPUs", slots_needed(config) if local else cpus, resources.get(CPU, 0), cpus),
            ("GPUs", gpus, resources.get(GPU, 0), gpus)]


def _measured_here(config: Config, resources: Mapping[str, float], local: bool) -> str:
    """Label of a target that is the processor of the sweep's own machine; "" without one."""
    for target in config.targets:
        found = [claim.actor for claim in claims(target.name, target.options, resources)]
        announced = any(CPU_RESOURCE in actor.get("resources", {}) for actor in found)
        if announced and local or not found and wanted_resource(target.name, target.options) == CPU_RESOURCE:
            return target.label
    return ""


def _or_one(count: int | float | str) -> int:
    return 1 if isinstance(count, str) else int(count)
