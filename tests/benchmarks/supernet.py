"""Images per second of the supernet against the same subnets as plain torch networks, side by side in one run.

    python -m tests.benchmarks.supernet [--space mobilenetv3-s32] [--batch 64] [--rounds 8] [--resolution 64]
    python -m tests.benchmarks.supernet --workers [--images 512]

Ratios near 1 mean that weight sharing costs nothing; the target is at least 0.9. Both sides run the same subnets,
loss, distillation, memory format and one thread; CPU time, so that other programs matter little; the sides alternate,
and the medians over the rounds are compared. The step is also compared with itself under torch's own gradient of
depthwise weights.

With --workers instead: images per second of wall clock of one worker and of as many as `supernet.workers: auto` gives
here, each a real actor with its ranks, alternating epoch by epoch, on random images.
"""
from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import ray
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actors.data import Images, Preprocessing
from actors.supernet.actor import SupernetService, SupernetSettings
from orchestrator.cluster import embedded
from orchestrator.config import ClusterSettings, SearchSettings
from orchestrator.config import SupernetSettings as Section
from orchestrator.resources import gpus, team
from searchspaces import depthwise
from searchspaces.catalogue import SPACES, make_space
from searchspaces.network import recalibrate_batch_norm
from searchspaces.space import SearchSpace, Tokens
from searchspaces.training.sandwich import SandwichSettings, evaluate
from searchspaces.training.training import Schedule


class PlainTraining:
    """What one would write by hand for four separate networks; one optimiser step, on the largest one's parameters."""

    def __init__(self, networks: list[nn.Module], settings: SandwichSettings) -> None:
        self.networks, self.settings = networks, settings
        self.optimizer = torch.optim.SGD(networks[0].parameters(), lr=1e-3, momentum=settings.momentum, nesterov=True,
                                         weight_decay=settings.weight_decay)

    def step(self, images: Tensor, labels: Tensor) -> None:
        teacher: Tensor | None = None
        for network in self.networks:
            network.zero_grad(set_to_none=True)
            logits = network(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.settings.label_smoothing)
            if teacher is None:
                teacher = logits.detach().softmax(1)
            else:
                loss = loss + self.settings.distill_weight * F.cross_entropy(logits, teacher)
            loss.backward()
            float(loss.detach())
        nn.utils.clip_grad_norm_(self.networks[0].parameters(), self.settings.grad_clip)
        self.optimizer.step()


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def compare(ours: Callable[[], object], peer: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median CPU seconds of both, alternating; the first round warms up."""
    times = np.array([(seconds(ours), seconds(peer)) for _ in range(rounds + 1)])[1:]
    return float(np.median(times[:, 0])), float(np.median(times[:, 1]))


def report(name: str, images: int, ours_s: float, peer_s: float) -> None:
    print(f"{name:28s} peer (plain torch) {images / peer_s:8.1f} images/s   ours {images / ours_s:8.1f} images/s   "
          f"ratio {peer_s / ours_s:.3f}")


def compare_workers(space: SearchSpace, batch: int, images: int, rounds: int) -> None:
    rng = np.random.default_rng(0)
    channels, side, _ = space.graph(space.extremes()[1]).input_shape
    train = Images(rng.integers(0, 255, (images, side, side, channels)).astype(np.uint8), rng.integers(0, 10, images))
    auto = team.supernet_team(Section(batch_size=batch), SearchSettings(), embedded.usable_cores(), gpus.GpuOffer(0, 0))
    embedded.start_embedded(ClusterSettings(), 2 + auto.workers * auto.cpus, {})
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        services = [stack.enter_context(contextlib.closing(SupernetService(
            space, train, Preprocessing.fit(train, side), SupernetSettings(
                epochs=rounds + 2, batch_size=batch, parts=auto.parts, workers=workers, num_cpus=cpus),
            Path(folder) / str(workers)))) for workers, cpus in ((1, 1), (auto.workers, auto.cpus))]
        speeds = np.array([[ray.get(service.actor.train_epoch.remote())["images_per_s"] for service in services]
                           for _ in range(rounds + 1)])[1:]
    one, several = np.median(speeds, axis=0)
    ratio = np.median(speeds[:, 1] / speeds[:, 0])
    print(f"{auto.parts} parts of {batch} images: 1 worker {one:.1f} images/s, {auto.workers} workers ({auto.cpus} "
          f"threads) {several:.1f} images/s; median ratio of {rounds} pairs {ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="mobilenetv3-s32", choices=[n for n in SPACES if not n.startswith("mnas")])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--workers", action="store_true")
    parser.add_argument("--images", type=int, default=512, help="of an epoch, with --workers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    space = make_space(arguments.space, classes=10, channels=3,
                       options={"resolution": arguments.resolution} if arguments.resolution else {})
    if arguments.workers:
        compare_workers(space, arguments.batch, arguments.images, arguments.rounds)
        return
    settings = SandwichSettings(lr=1e-3)
    training = settings.start(space.make_supernet(), Schedule(1, 1000, seed=0))
    rows: Tokens = training.subnets_of_step(0)
    training.subnets_of_step = lambda step: rows  # type: ignore[method-assign]  # the same subnets in every round
    images = torch.randn(arguments.batch, *space.graph(rows[0]).input_shape).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (arguments.batch,))
    networks = [training.supernet.extract(row).train() for row in rows]
    plain = PlainTraining(networks, settings)

    print(f"{arguments.space}, batch {arguments.batch}, {len(rows)} subnets per step, torch {torch.__version__}")
    step_s = compare(lambda: training.step((images, labels)), lambda: plain.step(images, labels), arguments.rounds)
    report("training step", arguments.batch * len(rows), *step_s)

    def torchs() -> None:
        least, depthwise.LEAST_SIDE = depthwise.LEAST_SIDE, sys.maxsize
        training.step((images, labels))
        depthwise.LEAST_SIDE = least

    ours_s, theirs_s = compare(lambda: training.step((images, labels)), torchs, arguments.rounds)
    print(f"training step with torch's gradient of depthwise weights {arguments.batch * len(rows) / theirs_s:.1f} "
          f"images/s, with ours {arguments.batch * len(rows) / ours_s:.1f} images/s, ratio {theirs_s / ours_s:.2f}")

    def evaluate_shared() -> None:
        for row in rows:
            training.supernet.set_active(row)
            evaluate(training.supernet, images, labels)

    def evaluate_plain() -> None:
        for network in networks:
            evaluate(network, images, labels)

    report("evaluation", arguments.batch * len(rows), *compare(evaluate_shared, evaluate_plain, arguments.rounds))
    extract_s = np.median([seconds(lambda: training.supernet.extract(rows[2])) for _ in range(10)])
    recalibrate_s = np.median([seconds(lambda: recalibrate_batch_norm(networks[2], [images])) for _ in range(5)])
    print(f"extracting one subnet takes {1e3 * extract_s:.1f} ms, recalibrating it {1e3 * recalibrate_s:.1f} ms per "
          "batch")
    print("command: python -m tests.benchmarks.supernet " + " ".join(sys.argv[1:]))


if __name__ == "__main__":
    main()
