"""Cost of orchestration: the rollout pool against a plain loop, and throughput against the number of workers.

    python -m tests.benchmarks.orchestration [--evaluations 40] [--workers 1 2 4 8 16 32] [--sleep-s 0.2]

Part 1 evaluates the same architectures twice with a real supernet: in one plain loop in this process, and through the
pool with one worker. Loop and pool alternate in small blocks, so that other load on the machine meets both alike.
Part 2 gives the pool work that sleeps, so that many workers fit on few cores.
"""
from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import ray
import torch

from actors.data import Preprocessing, calibration_images
from actors.evaluator import SupernetEvaluatorFactory
from actors.rollout.pool import PoolSettings, RolloutPool
from actors.supernet.actor import arrays
from orchestrator.data.datasets import DataSettings, load_dataset
from searchspaces.catalogue import make_space
from searchspaces.space import Tokens
from tests.actors.workload import Workload, rows

OVERHEAD_TARGET, SCALING_TARGET = 1.15, 0.95
BLOCK = 8
SLEEPER_CPUS = 0.05


def drain(pool: RolloutPool) -> float:
    """Collects everything; the seconds that the workers spent on it."""
    seconds = 0.0
    while pool.outstanding:
        seconds += sum(evaluation.duration_s for _, evaluation in pool.collect(timeout_s=60))
    return seconds


def until_ready(pool: RolloutPool, workers: int) -> None:
    deadline = time.monotonic() + 300
    while pool.ready_workers < workers:
        if time.monotonic() > deadline:
            raise SystemExit(f"only {pool.ready_workers} of {workers} workers started within 300 s")
        pool.collect(timeout_s=0.1)
        time.sleep(0.1)


def overhead(evaluations: int) -> tuple[list[float], list[float]]:
    """Seconds in the pool over seconds in the loop, one ratio per block; and over the worker's own seconds."""
    torch.set_num_threads(1)
    splits = load_dataset(DataSettings())
    space = make_space("mobilenetv3-s16", classes=10, channels=1, options={})
    preprocessing = Preprocessing.fit(splits.train, 16)
    validation = preprocessing.prepare(splits.val)
    calibration = preprocessing.prepare(calibration_images(splits.train, 512, 0))
    weights = arrays(space.make_supernet())
    plain = SupernetEvaluatorFactory(space, validation, calibration)()
    plain.set_weights(1, weights)
    pool = RolloutPool(SupernetEvaluatorFactory(space, ray.put(validation), ray.put(calibration)), PoolSettings())
    until_ready(pool, 1)
    pool.set_weights(1, ray.put(weights))
    tokens_NT = space.sample_uniform(np.random.default_rng(0), evaluations + 1)
    through_pool(pool, tokens_NT[:1])  # the weights travel once
    ratios, own = [], []
    for start in range(1, len(tokens_NT), BLOCK):
        block = tokens_NT[start:start + BLOCK]
        begin = time.perf_counter()
        plain.evaluate(block)
        middle = time.perf_counter()
        worker_s = through_pool(pool, block)
        pool_s = time.perf_counter() - middle
        ratios.append(pool_s / (middle - begin))
        own.append(pool_s / worker_s)
    pool.close()
    return ratios, own


def through_pool(pool: RolloutPool, tokens_NT: Tokens) -> float:
    pool.submit(list(enumerate(tokens_NT)))
    return drain(pool)


def scaling(workers: int, sleep_s: float, per_worker: int) -> float:
    """Share of the ideal throughput, workers / sleep_s, between the first and the last result."""
    pool = RolloutPool(Workload(sleep_s), PoolSettings(workers=workers, num_cpus=SLEEPER_CPUS))
    until_ready(pool, workers)
    pool.submit(rows(2 * workers, start=-2 * workers))  # the pool learns how long a row takes
    drain(pool)
    count = workers * per_worker
    begin = time.perf_counter()
    pool.submit(rows(count))
    drain(pool)
    share = per_worker * sleep_s / (time.perf_counter() - begin)
    pool.close()
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=40)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--sleep-s", type=float, default=0.2)
    parser.add_argument("--per-worker", type=int, default=100)
    arguments = parser.parse_args()
    ray.init(address="local", num_cpus=3, include_dashboard=False)
    print("command: python -m tests.benchmarks.orchestration " + " ".join(
        f"--{name.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in vars(arguments).items()))
    if arguments.evaluations:
        ratios, own = overhead(arguments.evaluations)
        print(f"pool with one worker / plain loop: target at most {OVERHEAD_TARGET}, ours "
              f"{statistics.median(ratios):.3f} (median of {len(ratios)} blocks of {BLOCK}, "
              f"{min(ratios):.3f} to {max(ratios):.3f})")
        print(f"pool / the worker's own seconds, which other load on the machine does not disturb: target at most "
              f"{OVERHEAD_TARGET}, ours {statistics.median(own):.3f} (up to {max(own):.3f})")
    for workers in arguments.workers:
        share = scaling(workers, arguments.sleep_s, arguments.per_worker)
        goal = f"target at least {SCALING_TARGET}" if workers == 32 else "no target"
        print(f"{workers:3d} sleeping workers: {goal}, ours {share:.3f} of ideal "
              f"({share * workers / arguments.sleep_s:.1f} evaluations/s)", flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
