"""How the training of the supernet is spread over a machine or a cluster: the parts of a batch, and who does them.

What is learned depends on the parts, so these follow from the configuration and not from the cores: any machine trains
the same supernet, some faster. On GPUs parts are larger, because a GPU takes as long for 32 images as for 256.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.config import SearchSettings, SupernetSettings
from orchestrator.resources.gpus import GpuOffer, places, supernet_share

PART, GPU_PART = 32, 256    # images: fewer make poor batch statistics, and a step slower per image
MOST_PARTS = 16
MOST_THREADS = 4            # of a worker: more mostly wait for each other, and all do for a batch too small to be cut


@dataclass(frozen=True)
class Team:
    """`workers` with `cpus` threads and `gpus` each train the `parts` of every batch."""

    parts: int = 1
    workers: int = 1
    cpus: int = 1
    gpus: float = 0.0


ALONE = Team()


def supernet_team(supernet: SupernetSettings, search: SearchSettings, cores: int, offer: GpuOffer) -> Team:
    """`cores`: what training may use. ClusterError for GPUs that no node has."""
    on_gpus = supernet.gpus != 0 and offer.total > 0
    parts = _parts(supernet, on_gpus)
    if supernet.workers != "auto":
        workers = supernet.workers if supernet.parts == "auto" else min(supernet.workers, parts)
    elif on_gpus:
        workers = min(parts, math.floor(offer.total) if supernet.gpus == "auto" else places(supernet.gpus, offer))
    else:
        workers = min(parts, cores // (1 if supernet.cpus == "auto" else supernet.cpus))
    workers = max(1, workers)
    if supernet.workers == "auto":
        workers = math.ceil(parts / math.ceil(parts / workers))     # as few as end as early
    parts = max(parts, workers)
    threads = 1 if on_gpus or parts == 1 else max(1, min(cores // workers, MOST_THREADS))
    return Team(parts, workers, threads if supernet.cpus == "auto" else supernet.cpus,
                supernet_share(supernet.gpus, workers, search.gpus, offer))


def most_cpus(supernet: SupernetSettings, cores: int) -> int:
    """That a team of this machine may hold."""
    asked = (1 if supernet.workers == "auto" else supernet.workers) * (1 if supernet.cpus == "auto" else supernet.cpus)
    return asked if supernet.workers != "auto" and supernet.cpus != "auto" else max(asked, cores)


def _parts(supernet: SupernetSettings, on_gpus: bool) -> int:
    if supernet.parts != "auto":
        return supernet.parts
    return max(1, min(supernet.batch_size // (GPU_PART if on_gpus else PART), MOST_PARTS))
