"""How the GPUs of a cluster are shared among the workers of a run.

`auto` (the default everywhere) uses what there is and falls back to the CPU where there is nothing:

- supernet training: a whole GPU for each of its workers;
- rollout workers that evaluate with the supernet's weights share the GPUs that it leaves. Where it leaves none both
  share them: they never work at the same time, and Ray's shares are bookkeeping, each may use the whole GPU;
- proxy trainings and retrainings share all GPUs, at most `PER_GPU` on each.

A number is taken as it is; one that no node can give is a ClusterError, because Ray would wait for it in silence.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from orchestrator.data.accuracy import Gpus
from searchspaces.errors import ClusterError

PER_GPU = 4     # processes on one GPU: small networks leave most of it idle, and each process costs about 0.5 GB of it


@dataclass(frozen=True)
class GpuOffer:
    """What a cluster has: in total, and the most on one node."""

    total: float
    largest_node: float

    @staticmethod
    def of_nodes(nodes: Sequence[Mapping[str, Any]]) -> GpuOffer:
        """From `ray.nodes()`."""
        each = [float(node["Resources"].get("GPU", 0)) for node in nodes if node["Alive"]]
        return GpuOffer(sum(each), max(each, default=0.0))

    @staticmethod
    def here() -> GpuOffer:
        """Of the cluster that this process is connected to."""
        return GpuOffer.of_nodes(ray.nodes())

    def shared(self, runs: int) -> GpuOffer:
        """What each of so many runs may take; whole ones, where there is one for each."""
        if runs == 1:
            return self
        total = float(self.total // runs) if self.total >= runs else self.total / runs
        return GpuOffer(total, min(self.largest_node, total))

    def check(self, asked: float, setting: str) -> float:
        """`asked` of one worker. ClusterError if no node has as much."""
        if asked > self.largest_node:
            raise ClusterError(f"{setting} asks for {asked:g} GPU per worker and no node of the cluster has more than "
                               f"{self.largest_node:g}; lower it, write auto, or add a node that has them")
        if asked > 1 and asked != int(asked):
            raise ClusterError(f"{setting} asks for {asked:g} GPU per worker; above 1 only whole numbers can be had")
        return asked


def supernet_share(asked: Gpus, workers: int, rollouts: Gpus,
                   offer: GpuOffer) -> float:
    """GPUs of each of the supernet's `workers`; room is left for rollout workers that want some."""
    if asked != "auto":
        return offer.check(asked, "supernet.gpus")
    if rollouts == 0 or offer.total >= workers + 1:
        return share(workers, offer.total)
    return share(2 * workers, offer.total)


def rollout_share(asked: Gpus, workers: int, taken: float, offer: GpuOffer) -> float:
    """GPUs of each of `workers` rollout workers, with `taken` GPUs held by the supernet."""
    return offer.check(asked, "search.gpus") if asked != "auto" else share(workers, offer.total - taken)


def trainer_share(asked: Gpus, by_cpu: int, offer: GpuOffer) -> float:
    """GPUs of each trainer where the processors allow `by_cpu` of them."""
    if asked != "auto":
        return offer.check(asked, "accuracy.gpus")
    return share(min(by_cpu, PER_GPU * int(offer.total)), offer.total)


def share(workers: int, gpus: float) -> float:
    """The largest equal share with which all of `workers` find a place, at most a whole GPU each; 0 without GPUs.

    A worker's share lies on one GPU: three workers on two GPUs get a half each.
    """
    if gpus <= 0 or workers < 1:
        return 0.0
    if gpus < 1:
        return _floor(gpus / workers)
    return _floor(1.0 / math.ceil(workers / math.floor(gpus)))


def places(each: float, offer: GpuOffer) -> int:
    """How many workers with so many GPUs each find a place."""
    return math.floor(offer.total / each) if each >= 1 else math.floor(1.0 / each) * math.floor(offer.total)


def _floor(value: float) -> float:
    """To the 4 decimals in which Ray counts."""
    return math.floor(value * 1e4 + 1e-6) / 1e4
