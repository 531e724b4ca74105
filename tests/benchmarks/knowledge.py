"""Does a start from the knowledge pool rank architectures better after the same few epochs? FNAS Fig. 3b and 3c.

    python -m tests.benchmarks.knowledge [--architectures 50] [--fill 100] [--epochs 1 2 4] [--long 16] [--folder DIR]

Random architectures of mnas-s16 are trained on half of scikit-learn's digits and validated on the other half and the
validation split. Their ranking after E epochs is compared (Spearman) with that after a long training, mean of two
seeds:

    cold          E epochs from random weights
    pool          E epochs from blocks of other random architectures, each trained E epochs from random weights
    cold x 2      2 E epochs from random weights: as many iterations as stand behind the weights of `pool`
    seeds         the two long trainings with each other: no short training can be expected to rank better

The last column is the gain of the pool over `cold` with its 95 % interval (bootstrap over architectures). 20 minutes on
two idle cores; with --folder an interrupted run goes on where it was.
"""
from __future__ import annotations

import argparse
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
from actors.knowledge import KnowledgePool, Start
from actors.rollout import PoolSettings, RolloutPool
from actors.trainer import ProxyEvaluatorFactory, ProxySettings
from orchestrator.datasets import DataSettings, load_dataset
from searchspaces.mnas import MnasS16
from searchspaces.space import Tokens

BATCH, FILL_SEED, SHORT_SEED, LONG_SEEDS = 32, 9, 0, (1, 2)
RESAMPLES = 2000
CLAIM = ("FNAS Fig. 3b,c (50 architectures, no numbers): started from stored blocks, training reaches a higher "
         "correlation with the final ranking in fewer epochs; Tab. 4: 1 to 2 epochs with the pool match 4 without")


@dataclass
class OpenPool:
    """A pool on disk, opened by the process that uses it. While it is `filling` all starts are cold; afterwards all
    are warm, and nothing is added: every architecture meets the same pool."""

    folder: Path
    epochs: int
    filling: bool
    _pool: KnowledgePool | None = None

    @property
    def pool(self) -> KnowledgePool:
        self._pool = self._pool or KnowledgePool(self.folder, MnasS16(), self.epochs)
        return self._pool

    def start(self, tokens_T: Tokens) -> Start:
        return self.pool.start(tokens_T, active=not self.filling)

    def insert(self, *network: object) -> None:
        if self.filling:
            self.pool.insert(*network)  # type: ignore[arg-type]


class Bench:
    """Trains rows by the settings that differ, through the rollout pool as a search does."""

    def __init__(self, folder: Path, workers: int) -> None:
        splits = load_dataset(DataSettings())
        half = len(splits.train) // 2
        rows = np.random.default_rng(0).permutation(len(splits.train))
        rest = splits.train.take(rows[half:])
        train = splits.train.take(rows[:half])
        validation = Images(np.concatenate([rest.images, splits.val.images]),
                            np.concatenate([rest.labels, splits.val.labels]))
        self._preprocessing = Preprocessing.fit(train, 16)
        self._train, self._validation = ray.put(train), ray.put(self._preprocessing.prepare(validation))
        self._folder, self._workers = folder, workers
        self.sizes = len(train), len(validation)

    def train(self, name: str, rows_NT: Tokens, epochs: int, seed: int,
              knowledge: OpenPool | None = None) -> list[Evaluation]:
        settings = ProxySettings(epochs, BATCH, seed=seed, augmentation=Augmentation(1))
        made = ProxyEvaluatorFactory(MnasS16(), self._train, self._preprocessing, self._validation, settings,
                                     str(self._folder / name), knowledge)  # type: ignore[arg-type]
        pool = RolloutPool(made, PoolSettings(workers=self._workers, call_time_out_s=3600))
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


def gain_interval(better_N: NDArray[np.float64], than_N: NDArray[np.float64],
                  final_N: NDArray[np.float64]) -> tuple[float, float]:
    """95 % of the gains in correlation over resampled architectures."""
    rng = np.random.default_rng(0)
    picks = rng.integers(len(final_N), size=(RESAMPLES, len(final_N)))
    gains = [correlation(better_N[i], final_N[i]) - correlation(than_N[i], final_N[i]) for i in picks]
    low, high = np.nanquantile(gains, [0.025, 0.975])
    return float(low), float(high)


def run(bench: Bench, folder: Path, arguments: argparse.Namespace) -> None:
    space, rng = MnasS16(), np.random.default_rng(arguments.seed)
    rows_NT, fill_NT = space.sample_uniform(rng, arguments.architectures), space.sample_uniform(rng, arguments.fill)
    long = [accuracies(bench.train(f"long-{seed}", rows_NT, arguments.long, seed)) for seed in LONG_SEEDS]
    final_N = np.mean(long, axis=0)
    print(f"\r{len(rows_NT)} architectures, long training {arguments.long} epochs: accuracy {final_N.min():.3f} to "
          f"{final_N.max():.3f}, Spearman of the two seeds {correlation(*long):.3f}")
    print(f"{'epochs':>6} {'cold':>7} {'pool':>7} {'cold x 2':>8}   accuracy cold/pool/cold x 2   hits   gain [95 %]")
    cold = {e: accuracies(bench.train(f"cold-{e}", rows_NT, e, SHORT_SEED))
            for e in sorted({m * e for e in arguments.epochs for m in (1, 2)})}
    for epochs in arguments.epochs:
        where = folder / f"pool-{epochs}"
        bench.train(f"fill-{epochs}", fill_NT, epochs, FILL_SEED, OpenPool(where, epochs, filling=True))
        found = bench.train(f"warm-{epochs}", rows_NT, epochs, SHORT_SEED, OpenPool(where, epochs, filling=False))
        pool_N, cold_N, twice_N = accuracies(found), cold[epochs], cold[2 * epochs]
        hits = sum(e.details["hits"] for e in found) / sum(e.details["queries"] for e in found)
        low, high = gain_interval(pool_N, cold_N, final_N)
        r_cold, r_pool, r_twice = (correlation(short_N, final_N) for short_N in (cold_N, pool_N, twice_N))
        print(f"\r{epochs:6d} {r_cold:7.3f} {r_pool:7.3f} {r_twice:8.3f}   {cold_N.mean():13.3f} {pool_N.mean():.3f} "
              f"{twice_N.mean():.3f}      {hits:6.1%} {r_pool - r_cold:+.3f} [{low:+.3f}, {high:+.3f}]", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, default=50)
    parser.add_argument("--fill", type=int, default=100, help="architectures trained to fill each pool")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--long", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keeps results; a later run with the same options goes on")
    arguments = parser.parse_args()
    print(f"paper: {CLAIM}\nours:  python -m tests.benchmarks.knowledge {' '.join(sys.argv[1:])}")
    ray.init(address="local", num_cpus=arguments.workers, include_dashboard=False, log_to_driver=False)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).absolute()
        folder /= f"{arguments.seed}-{arguments.fill}"
        bench = Bench(folder, arguments.workers)
        print("digits, {} training and {} validation images".format(*bench.sizes))
        run(bench, folder, arguments)
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes with {arguments.workers} workers")


if __name__ == "__main__":
    main()
