"""One process's share of supernet training: the network, its batches, and one epoch at a time."""
from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from actors.data import Augmentation, Batches, Images, Preprocessing
from actors.devices import Device, training_device
from searchspaces.space import SearchSpace
from searchspaces.training.steps import SupernetTraining, TrainingSettings


@dataclass(frozen=True)
class SupernetSettings:
    """`batch_size` is that of all `workers` together, so that their number changes the speed and not the training.
    `num_cpus` and `num_gpus` are each worker's. `device` auto: the GPU where the worker has been given one."""

    training: TrainingSettings = field(default_factory=TrainingSettings)
    epochs: int = 30
    batch_size: int = 64
    seed: int = 0
    augmentation: Augmentation = Augmentation()
    calibration_images: int = 2000
    workers: int = 1
    num_cpus: float = 1
    num_gpus: float = 0
    device: Device = "auto"
    rank_time_out_s: float = 60.0


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

    def __init__(self, space: SearchSpace, train: Images, preprocessing: Preprocessing, settings: SupernetSettings,
                 rank: int = 0, ranks: int = 1) -> None:
        self.settings = settings
        batch = min(settings.batch_size, len(train))
        self.batches = Batches(train, preprocessing, settings.augmentation, batch, settings.seed, rank, ranks)
        torch.manual_seed(settings.seed)  # the same initial weights on every rank and after every restart
        total = settings.epochs * self.batches.steps
        self.device = training_device(settings.device)
        self.training = SupernetTraining(space.make_supernet().to(self.device), settings.training, total, settings.seed)
        self._ring: Ring | None = None

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.training.steps_done // self.batches.steps

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.training.load_state_dict(state)

    def join(self, ring: Ring) -> None:
        self._ring = ring
        images = len(self.batches.order(0)[:self.batches.batch])
        share = len(range(images)[ring.rank::ring.ranks]) / images  # sizes of numpy.array_split's parts

        def reduce(parameters: Iterable[nn.Parameter]) -> None:
            # Mean over the batch = sum over ranks of (share of the batch) x (mean over the rank's part).
            ring.sum_scaled((p.grad for p in parameters if p.grad is not None), share)

        self.training.reduce_gradients = reduce

    def train_epoch(self) -> dict[str, float]:
        """The next epoch; means over its steps, and images per second of all ranks together."""
        epoch, start = self.epoch, time.perf_counter()
        order = self.batches.order(epoch)
        sums = {"loss": 0.0, "accuracy": 0.0}
        for step in range(self.batches.steps):
            images, labels = (tensor.to(self.device) for tensor in self.batches.get(epoch, step, order))
            scalars = self.training.step(images, labels)
            sums = {name: total + scalars[name] for name, total in sums.items()}
        if self._ring is not None:
            self._average_statistics(self._ring)
        seconds = time.perf_counter() - start
        means = {name: total / self.batches.steps for name, total in sums.items()}
        return means | {"images_per_s": self.batches.steps * self.batches.batch / seconds, "duration_s": seconds}

    def _average_statistics(self, ring: Ring) -> None:
        """Running statistics saw other images on every rank; averaged, all ranks hold the same network again."""
        buffers = [buffer for buffer in self.training.supernet.buffers() if buffer.is_floating_point()]
        if buffers:
            ring.sum_scaled(buffers, 1 / ring.ranks)
