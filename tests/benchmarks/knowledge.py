"""Does a start from the knowledge pool rank architectures better after the same few epochs? FNAS Fig. 3b and 3c.

    python -m tests.benchmarks.knowledge [--data cifar10] [--architectures 50] [--fill 100] [--epochs 1 2 4] [--long 16]
        [--images 1000] [--workers 2] [--gpus 0.25] [--folder DIR]

Random architectures of mnas-s16 are trained on half of scikit-learn's digits and validated on the other half and the
validation split, or trained and validated on that many images of CIFAR-10 at 16 pixels (PARETORAY_SHARED or
../shared/data, folder cifar10). Their ranking after E epochs is compared (Spearman) with that after a long training,
mean of two seeds:

    cold          E epochs from random weights
    pool          E epochs from blocks of other random architectures, each trained E epochs from random weights
    cold x 2      2 E epochs from random weights: as many iterations as stand behind the weights of `pool`
    cold x M      M E epochs, M = 1 + fill / architectures: as many iterations in total, filling the pool included
    seeds         the two long trainings with each other: no short training can be expected to rank better

The last columns are the gains of the pool over `cold` and over `cold x M` with their 95 % intervals (bootstrap over
architectures). 20 minutes on two idle cores for digits; with --folder an interrupted run goes on where it was.
"""
from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
from numpy.typing import NDArray
from scipy.stats import spearmanr

from actors.data import Augmentation, Images, Preprocessing
from actors.evaluator import Evaluation
from actors.knowledge.pool import KnowledgePool, Start
from actors.rollout.pool import PoolSettings, RolloutPool
from actors.rollout.trainer import ProxyEvaluatorFactory, ProxySettings
from orchestrator.data.datasets import DataSettings, load_dataset
from searchspaces.mnas.space import MnasS16
from searchspaces.space import Tokens

BATCH, FILL_SEED, SHORT_SEED, LONG_SEEDS = 32, 9, 0, (1, 2)
RESAMPLES = 2000
VALIDATION = 2000  # images of CIFAR-10: an accuracy's standard error is a percentage point
CLAIM = ("FNAS Fig. 3b,c (50 architectures, no numbers): started from stored blocks, training reaches a higher "
         "correlation with the final ranking in fewer epochs; Tab. 4: 1 to 2 epochs with the pool match 4 without")


@dataclass
class OpenPool:
    """A pool on disk, opened by the process that uses it. While it is `filling` all starts are cold; afterwards all
    are warm, and nothing is added: every architecture meets the same pool."""

    folder: Path
    space: MnasS16
    epochs: int
    filling: bool
    _pool: KnowledgePool | None = None

    @property
    def pool(self) -> KnowledgePool:
        self._pool = self._pool or KnowledgePool(self.folder, self.space, self.epochs)
        return self._pool

    def start(self, tokens_T: Tokens) -> Start:
        return self.pool.start(tokens_T, active=not self.filling)

    def insert(self, *network: object) -> None:
        if self.filling:
            self.pool.insert(*network)  # type: ignore[arg-type]


def digits() -> tuple[Images, Images]:
    """(train, validation): half of the training split, and the rest of it with the validation split."""
    splits = load_dataset(DataSettings())
    half = len(splits.train) // 2
    rows = np.random.default_rng(0).permutation(len(splits.train))
    rest = splits.train.take(rows[half:])
    return splits.train.take(rows[:half]), Images(np.concatenate([rest.images, splits.val.images]),
                                                  np.concatenate([rest.labels, splits.val.labels]))


def cifar10(images: int) -> tuple[Images, Images]:
    """(`images` to train on, VALIDATION others), both of the training file."""
    default = Path(__file__).parents[3] / "shared" / "data"
    folder = Path(os.environ.get("PARETORAY_SHARED", default)) / "cifar10"
    splits = load_dataset(DataSettings(name="parquet", train=folder / "train.parquet", test=folder / "test.parquet",
                                       limit=images + VALIDATION, val_fraction=VALIDATION / (images + VALIDATION)))
    return splits.train, splits.val


class Bench:
    """Trains rows by the settings that differ, through the rollout pool as a search does."""

    def __init__(self, data: str, images: int, folder: Path, workers: int, gpus: float) -> None:
        train, validation = digits() if data == "digits" else cifar10(images)
        self.space = MnasS16(channels=train.images.shape[3])
        self._augmentation = Augmentation(1) if data == "digits" else Augmentation(4, flip=True)
        self._preprocessing = Preprocessing.fit(train, 16)
        self._train, self._validation = ray.put(train), ray.put(self._preprocessing.prepare(validation))
        self._folder, self._workers, self._gpus = folder, workers, gpus
        self.sizes = len(train), len(validation)

    def train(self, name: str, rows_NT: Tokens, epochs: int, seed: int,
              knowledge: OpenPool | None = None) -> list[Evaluation]:
        settings = ProxySettings(epochs, BATCH, seed=seed, augmentation=self._augmentation)
        made = ProxyEvaluatorFactory(self.space, self._train, self._preprocessing, self._validation, settings,
                                     str(self._folder / name), knowledge)  # type: ignore[arg-type]
        pool = RolloutPool(made, PoolSettings(workers=self._workers, num_gpus=self._gpus, call_time_out_s=3600))
        pool.submit(list(enumerate(rows_NT)))
        found: dict[object, Evaluation] = {}
        while pool.outstanding:
            found |= dict(pool.collect(timeout_s=10))
            print(f"\r{name}: {len(found)} of {len(rows_NT)} ", end="", file=sys.stderr, flush=True)
        pool.close()
        errors = [e.error for e in found.values() if e.error]
        if errors:
            sys.exit(f"{len(errors)} trainings of {name} failed: {errors[0]}")
        return [found[i] for i in range(len(rows_NT))]


def accuracies(found: Sequence[Evaluation]) -> NDArray[np.float64]:
    return np.array([evaluation.accuracy for evaluation in found])


def correlation(short_N: NDArray[np.float64], final_N: NDArray[np.float64]) -> float:
    return float(spearmanr(short_N, final_N).statistic)


def gain(better_N: NDArray[np.float64], than_N: NDArray[np.float64], final_N: NDArray[np.float64]) -> str:
    """The gain in correlation, and 95 % of the gains over resampled architectures."""
    rng = np.random.default_rng(0)
    picks = rng.integers(len(final_N), size=(RESAMPLES, len(final_N)))
    gains = [correlation(better_N[i], final_N[i]) - correlation(than_N[i], final_N[i]) for i in picks]
    low, high = np.nanquantile(gains, [0.025, 0.975])
    return f"{correlation(better_N, final_N) - correlation(than_N, final_N):+.3f} [{low:+.3f}, {high:+.3f}]"


def run(bench: Bench, folder: Path, arguments: argparse.Namespace) -> None:
    space, rng = bench.space, np.random.default_rng(arguments.seed)
    rows_NT, fill_NT = space.sample_uniform(rng, arguments.architectures), space.sample_uniform(rng, arguments.fill)
    long = [accuracies(bench.train(f"long-{seed}-{arguments.long}", rows_NT, arguments.long, seed))
            for seed in LONG_SEEDS]
    final_N = np.mean(long, axis=0)
    multiple = 1 + round(arguments.fill / arguments.architectures)
    print(f"\r{len(rows_NT)} architectures, long training {arguments.long} epochs: accuracy {final_N.min():.3f} to "
          f"{final_N.max():.3f}, Spearman of the two seeds {correlation(*long):.3f}")
    print(f"{'epochs':>6} {'cold':>7} {'pool':>7} {'cold x 2':>8} {f'cold x {multiple}':>8}   "
          f"{'accuracy of these':23}   hits   {'gain over cold':22}  gain over cold x {multiple}")
    for epochs in arguments.epochs:
        filling, full = (OpenPool(folder / f"pool-{epochs}", space, epochs, filling=filling)
                         for filling in (True, False))
        cold_N, twice_N, equal_N = (accuracies(bench.train(f"cold-{e}", rows_NT, e, SHORT_SEED))
                                    for e in (epochs, 2 * epochs, multiple * epochs))
        bench.train(f"fill-{epochs}", fill_NT, epochs, FILL_SEED, filling)
        found = bench.train(f"warm-{epochs}", rows_NT, epochs, SHORT_SEED, full)
        pool_N = accuracies(found)
        hits = sum(e.details["hits"] for e in found) / sum(e.details["queries"] for e in found)
        kinds = (cold_N, pool_N, twice_N, equal_N)
        ranks = [correlation(short_N, final_N) for short_N in kinds]
        print(f"\r{epochs:6d} {ranks[0]:7.3f} {ranks[1]:7.3f} {ranks[2]:8.3f} {ranks[3]:8.3f}   "
              + " ".join(f"{short_N.mean():5.3f}" for short_N in kinds) + f"   {hits:6.1%} "
              f"{gain(pool_N, cold_N, final_N)}  {gain(pool_N, equal_N, final_N)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, default=50)
    parser.add_argument("--fill", type=int, default=100, help="architectures trained to fill each pool")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--long", type=int, default=16)
    parser.add_argument("--data", choices=["digits", "cifar10"], default="digits")
    parser.add_argument("--images", type=int, default=1000, help="of CIFAR-10 to train on")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0.0, help="of each worker, 0.25 for four of them on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keeps results; a later run with the same options goes on")
    arguments = parser.parse_args()
    print(f"paper: {CLAIM}\nours:  python -m tests.benchmarks.knowledge {' '.join(sys.argv[1:])}")
    ray.init(address="local", num_cpus=arguments.workers, num_gpus=math.ceil(arguments.workers * arguments.gpus),
             include_dashboard=False, log_to_driver=False)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).absolute()
        folder /= f"{arguments.data}-{arguments.seed}-{arguments.fill}"
        bench = Bench(arguments.data, arguments.images, folder, arguments.workers, arguments.gpus)
        print("{}, {} training and {} validation images".format(arguments.data, *bench.sizes))
        run(bench, folder, arguments)
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes with {arguments.workers} workers")


if __name__ == "__main__":
    main()
