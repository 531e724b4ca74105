"""One process's share of supernet training: the network, its batches, and one epoch at a time."""
from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from actors.data import Augmentation, Batches, LabelledImages, Preprocessing, stratified
from actors.devices import Device, training_device
from searchspaces.space import SearchSpace
from searchspaces.training.sandwich import SandwichSettings
from searchspaces.training.training import (
    Batch,
    Latencies,
    Schedule,
    TrainingMethod,
    Wishes,
    running_statistics,
)


@dataclass(frozen=True)
class SupernetSettings:
    """`batch_size` is that of all `workers` together, and a batch is cut into at least `parts`, so that the number of
    workers changes the speed and not the training: only where there are more of them than parts is it cut further.
    `num_cpus` and `num_gpus` are each worker's. `device` auto: the GPU where the worker has been given one."""

    training: TrainingMethod = field(default_factory=SandwichSettings)
    epochs: int = 30
    batch_size: int = 64
    seed: int = 0
    augmentation: Augmentation = Augmentation()
    calibration_images: int = 2000
    workers: int = 1
    parts: int = 1
    num_cpus: float = 1
    num_gpus: float = 0
    device: Device = "auto"
    rank_time_out_s: float = 60.0

    def parts_of(self, images: int) -> int:
        """Of a batch with `images`: two images at least, or batch norm has nothing to count."""
        return max(1, min(max(self.parts, self.workers, self.training.least_parts), images // 2))


class Ring:
    """All-reduce among `ranks` processes (gloo over TCP). Every wait ends after `time_out_s` with a RuntimeError."""

    def __init__(self, address: str, rank: int, ranks: int, time_out_s: float) -> None:
        self.rank, self.ranks = rank, ranks
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks,
                                timeout=timedelta(seconds=time_out_s))

    def sum_scaled(self, tensors: Iterable[Tensor], scale: float) -> None:
        """Each tensor becomes the sum over the ranks of `scale` times itself; one message for all of them."""
        tensors = list(tensors)
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).mul_(scale).cpu()
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view(tensor.shape))

    def close(self) -> None:
        """Ends the connections: ranks that still wait for this one fail at once."""
        if dist.is_initialized():
            dist.destroy_process_group()


class Trainer:
    """Trains in this process. With a ring, on this rank's part of every batch with gradients of the whole batch."""

    def __init__(self, space: SearchSpace, train: LabelledImages, preprocessing: Preprocessing,
                 settings: SupernetSettings, rank: int = 0, ranks: int = 1) -> None:
        self.settings = settings
        train, held_out = halves(train, settings.training.held_out_share, settings.seed)
        batch = min(settings.batch_size, len(train))
        self.batches = Batches(train, preprocessing, settings.augmentation, batch, settings.seed, rank, ranks,
                               settings.parts_of(min(batch, len(held_out) or batch)))
        self._held_out = replace(self.batches, data=held_out, batch=min(batch, len(held_out)),
                                  augmentation=settings.augmentation.unmixed()) if held_out else None
        torch.manual_seed(settings.seed)  # the same initial weights on every rank and after every restart
        self.device = training_device(settings.device)
        schedule = Schedule(settings.epochs, self.batches.steps, settings.seed, rank, ranks, self.batches.parts)
        self.training = settings.training.start(space.make_supernet().to(self.device), schedule)
        self._ring: Ring | None = None

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.training.steps_done // self.batches.steps

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.training.load_state_dict(state)

    def join(self, ring: Ring) -> None:
        self._ring = ring

        def reduce(parameters: Iterable[nn.Parameter]) -> None:
            # Mean over the batch = sum over ranks of (share of the batch) x (mean over the rank's parts).
            ring.sum_scaled((p.grad for p in parameters if p.grad is not None), self._share)

        self.training.reduce_gradients = reduce

    @property
    def _share(self) -> float:
        """Of a batch's images, this rank's."""
        return len(self.batches.rows_here(self.batches.batch)) / self.batches.batch

    def begin_epoch(self) -> Wishes:
        """Architectures whose latencies the next epoch needs; the same on every rank."""
        return self.training.begin_epoch()

    def train_epoch(self, latencies: Latencies | None = None) -> dict[str, float]:
        """The next epoch; means over its steps and all ranks, and images per second of all ranks together."""
        epoch, start = self.epoch, time.perf_counter()
        self.training.begin_epoch()
        self.training.give(latencies or {})
        sums = dict.fromkeys(self.training.scalars, 0.0)
        for batch, held_out in zip(self.batches.epoch(epoch), self._held_out_batches(epoch), strict=True):
            scalars = self.training.step(self._on_device(batch), held_out and self._on_device(held_out))
            sums = {name: total + scalars[name] for name, total in sums.items()}
        means = torch.tensor([total / self.batches.steps for total in sums.values()], dtype=torch.float64)
        if self._ring is not None:
            self._average_statistics(self._ring)
            self._ring.sum_scaled([means], self._share)
        seconds = time.perf_counter() - start
        images = self.batches.steps * self.batches.batch
        return dict(zip(sums, means.tolist())) | {"images_per_s": images / seconds, "duration_s": seconds}

    def _held_out_batches(self, epoch: int) -> Iterable[Batch | None]:
        """One for each step. Held-out images go round at their own pace."""
        steps = self.batches.steps
        if self._held_out is None:
            return [None] * steps
        return self._held_out.of([divmod(epoch * steps + step, self._held_out.steps) for step in range(steps)])

    def _on_device(self, batch: Batch) -> Batch:
        images, labels = batch
        return images.to(self.device), labels.to(self.device)

    def _average_statistics(self, ring: Ring) -> None:
        """Running statistics saw other parts on every rank; averaged, all ranks hold the same network again."""
        statistics = running_statistics(self.training.supernet)
        if statistics:
            ring.sum_scaled(statistics, len(self.training.schedule.mine) / self.training.schedule.parts)


def whole_batches(train: LabelledImages, preprocessing: Preprocessing, settings: SupernetSettings) -> Batches:
    """For what one process trains alone, whatever the number of ranks."""
    return Batches(train, preprocessing, settings.augmentation, min(settings.batch_size, len(train)), settings.seed)


def halves(train: LabelledImages, held_out_share: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """(images that weights learn from, images held out from them), every class at its share in both."""
    rows = np.arange(len(train))
    if not held_out_share:
        return train, train.take(rows[:0])
    count = round(held_out_share * len(train))
    held_out, rest = stratified(np.random.default_rng([seed, len(train)]), train.labels, rows, count)
    return train.take(rest), train.take(held_out)
