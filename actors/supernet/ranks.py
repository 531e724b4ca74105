"""Further ranks of data-parallel supernet training: actors started and ended by the supernet actor."""
from __future__ import annotations

import logging
import os
import socket
import uuid
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from torch import Tensor

from actors.data import LabelledImages, Preprocessing
from actors.encoded import COPY_TIME_OUT_S
from actors.supernet.training import Ring, SupernetSettings, Trainer
from searchspaces.space import SearchSpace
from searchspaces.training.training import Latencies

log = logging.getLogger(__name__)


class RankActor:
    """Rank 1, 2, ...: holds a copy of the weights, follows rank 0 epoch by epoch, writes nothing."""

    def __init__(self, space: SearchSpace, train: LabelledImages, preprocessing: Preprocessing,
                 settings: SupernetSettings, name: str) -> None:
        torch.set_num_threads(max(1, int(settings.num_cpus)))
        self._parts = (space, train, preprocessing, settings)
        self._name = name
        self._ring: Ring | None = None

    def ready(self) -> int:
        return os.getpid()

    def prepare(self) -> None:
        """Images of a Parquet file are copied before other ranks wait for this one."""
        self._parts[1].prepare()

    def join(self, address: str, rank: int, ranks: int, state: dict[str, Tensor]) -> None:
        """Takes rank 0's state and waits for all ranks."""
        self._trainer = Trainer(*self._parts, rank=rank, ranks=ranks)
        self._trainer.load({name: tensor.clone() for name, tensor in state.items()})
        self._ring = Ring(address, rank, ranks, self._parts[3].rank_time_out_s)
        self._trainer.join(self._ring)

    def train_epoch(self, latencies: Latencies) -> int:
        """Trains along; the epochs done. On failure the connections are closed so that nobody waits for this rank."""
        assert self._ring is not None, "join first"
        try:
            self._trainer.train_epoch(latencies)
        except BaseException:
            self._ring.close()
            raise
        return self._trainer.epoch

    def state(self) -> dict[str, Tensor]:
        """Equal on all ranks after every epoch; a difference means that training has gone wrong."""
        return self._trainer.training.state_dict()

    def __repr__(self) -> str:
        return f"RankActor({self._name})"


class RankGroup:
    """Rank 0's view of the others, `wanted` ranks with itself. Lost ranks are not replaced one by one: the group ends
    and a new one starts."""

    def __init__(self, space: SearchSpace, train: LabelledImages, preprocessing: Preprocessing,
                 settings: SupernetSettings, wanted: int, name: str = "supernet") -> None:
        self._settings = settings
        data = ray.put(train)  # one copy per node for all ranks there
        actor: Any = ray.remote(RankActor)
        handles = [actor.options(name=f"{name}-rank-{rank}.{uuid.uuid4().hex[:6]}", num_cpus=settings.num_cpus,
                                 num_gpus=settings.num_gpus, max_restarts=0).remote(
            space, data, preprocessing, settings, f"{name}, rank {rank}") for rank in range(1, wanted)]
        self.handles = _those_that_start(handles, settings.rank_time_out_s)
        ray.get([handle.prepare.remote() for handle in self.handles], timeout=COPY_TIME_OUT_S)
        self.ranks = 1 + len(self.handles)
        self._ring: Ring | None = None

    def join(self, trainer: Trainer) -> None:
        """Connects all ranks and gives them rank 0's state."""
        address = f"tcp://{ray.util.get_node_ip_address()}:{_free_port()}"
        state = ray.put(trainer.training.state_dict())
        joining = [handle.join.remote(address, rank, self.ranks, state)
                   for rank, handle in enumerate(self.handles, start=1)]
        self._ring = Ring(address, 0, self.ranks, self._settings.rank_time_out_s)
        ray.get(joining, timeout=self._settings.rank_time_out_s)
        trainer.join(self._ring)

    def train_epoch(self, trainer: Trainer, latencies: Latencies) -> dict[str, float]:
        """One epoch on all ranks. RuntimeError or RayError if one of them is lost."""
        others = [handle.train_epoch.remote(latencies) for handle in self.handles]
        progress = trainer.train_epoch(latencies)
        ray.get(others, timeout=self._settings.rank_time_out_s)
        return progress

    def pids(self) -> list[int]:
        return list(ray.get([handle.ready.remote() for handle in self.handles],
                            timeout=self._settings.rank_time_out_s))

    def states(self) -> list[dict[str, Tensor]]:
        return list(ray.get([handle.state.remote() for handle in self.handles],
                            timeout=self._settings.rank_time_out_s))

    def close(self) -> None:
        if self._ring is not None:
            self._ring.close()
        for handle in self.handles:
            ray.kill(handle)


def _those_that_start(handles: list[Any], time_out_s: float) -> list[Any]:
    """Ranks for which the cluster has room; the rest are given up, training goes on with fewer."""
    started = []
    references = {handle.ready.remote(): handle for handle in handles}
    answered, _ = ray.wait(list(references), num_returns=len(references), timeout=time_out_s)
    for reference, handle in references.items():
        try:
            if reference in answered:
                ray.get(reference)
                started.append(handle)
                continue
        except RayError as error:
            log.warning("a supernet rank failed to start: %s", error)
        ray.kill(handle)
    if len(started) < len(handles):
        log.warning("%d of %d supernet workers started within %g s; training goes on with these",
                    1 + len(started), 1 + len(handles), time_out_s)
    return started


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
