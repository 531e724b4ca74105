"""Time and memory of an NSS step beside a sandwich step of the same supernet, side by side in one run.

    python -m tests.benchmarks.nss_step [--pairs 5] [--batch 64]

Time: processor time on one thread, steps of both in turn, median of the ratios; at the first temperature, where all
values of a mixture run, and at the last, where one does. Memory: peak of the bytes that autograd keeps for a backward
pass (maps, masks and whatever else is saved, parameters left out), which needs no clock and no operating system; bytes
of parameters, gradients and momentum are the same for both and printed beside. An NSS step is a forward and backward
pass on held-out images and one on training images; a sandwich step is four of single networks.
"""
from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from searchspaces.catalogue import make_space
from searchspaces.space import SearchSpace
from searchspaces.training.nss import NssSettings, SpaceAim
from searchspaces.training.sandwich import SandwichSettings
from searchspaces.training.spaces import SpaceCosts, SpaceOfSpaces
from searchspaces.training.training import Batch, Schedule, Training

SPACES = (("mobilenetv3-s16", 0.5), ("mobilenetv3-s16", 1.0), ("mobilenetv3-s16", 2.0), ("expanded-s16", None))
MB = 2**20
SCHEDULE = Schedule(1000, 10, 0)


class Kept:
    """Peak of the bytes that autograd has saved and not yet read back: a backward pass ends what was saved so far."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._left_out = {p.untyped_storage().data_ptr() for p in parameters}
        self._now: dict[int, int] = {}
        self._backward = False
        self.peak = 0

    def pack(self, tensor: Tensor) -> Tensor:
        if self._backward:
            self._now, self._backward = {}, False
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._left_out:
            self._now[storage.data_ptr()] = storage.nbytes()
            self.peak = max(self.peak, sum(self._now.values()))
        return tensor

    def unpack(self, tensor: Tensor) -> Tensor:
        self._backward = True
        return tensor


def kept_bytes(training: Training, work: Callable[[], object], steps: int = 4) -> int:
    kept = Kept(list(training.supernet.parameters()))
    with saved_tensors_hooks(kept.pack, kept.unpack):
        for _ in range(steps):
            work()
    return kept.peak


def nss(space: SearchSpace, tau: float) -> Training:
    low, high = SpaceCosts(SpaceOfSpaces(space), None, 0).reachable()
    settings = NssSettings(aims=(SpaceAim((low + high) / 2),), warm_up=0.0, first_temperature=tau,
                           last_temperature=tau)
    return settings.start(space.make_supernet(), SCHEDULE)


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def ratios(ours: Callable[[], object], other: Callable[[], object], pairs: int) -> Iterator[float]:
    ours(), other()
    for _ in range(pairs):
        yield seconds(ours) / seconds(other)


def compared(space: SearchSpace, tau: float, options: argparse.Namespace) -> str:
    """The rest of a line of the table."""
    shape = space.graph(space.extremes()[1]).input_shape
    batch: Batch = (torch.randn(options.batch, *shape), torch.arange(options.batch) % 10)
    training, sandwich = nss(space, tau), SandwichSettings().start(space.make_supernet(), SCHEDULE)
    mine = kept_bytes(training, lambda: training.step(batch, batch)) / MB
    theirs = kept_bytes(sandwich, lambda: sandwich.step(batch)) / MB
    found = list(ratios(lambda: training.step(batch, batch), lambda: sandwich.step(batch), options.pairs))
    held = 3 * sum(p.numel() * p.element_size() for p in sandwich.supernet.parameters()) / MB
    return (f"{np.median(found):6.2f} ({min(found):.2f}-{max(found):.2f}) {mine:13.0f} {theirs:10.0f} "
            f"{mine / theirs:7.2f}   {held:.1f} MB")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"NSS step over sandwich step (python -m tests.benchmarks.nss_step --batch {options.batch})\n"
          "space                   width  temperature   time, median (range)   kept MB   sandwich   ratio   weights, "
          "gradients, momentum")
    for name, width in SPACES:
        space = make_space(name, classes=10, channels=3, options={} if width is None else {"width": width})
        for tau in (5.0, 0.001):
            print(f"{name:22s} {width or '':6}  {tau:11g}   {compared(space, tau, options)}", flush=True)


if __name__ == "__main__":
    main()
