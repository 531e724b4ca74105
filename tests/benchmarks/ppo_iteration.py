"""Time of one PPO iteration (sampling and update): the RLlib learner against plain torch.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.ppo_iteration [--iterations 40]

The target is for the sequences that FNAS meets, 20 to 42 tokens and more; the six of nasbench201 are for completeness.
Both do the same arithmetic from the same state; they alternate in one run, and their order alternates too, so that
other load on the machine meets both alike. Printed is the median of the ratios of neighbouring iterations, in time by
the clock and in processor time, which other load hardly changes (all work is in this process).
"""
from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from orchestrator.controllers.fnas.learner import PpoLearner
from orchestrator.controllers.fnas.ppo import PpoSettings
from searchspaces.catalogue import make_space
from searchspaces.space import SearchSpace
from tests.benchmarks.plain_ppo import PlainPpo
from tests.orchestrator.controllers.test_fnas_policy import difference

TARGET = 1.3
CASES = (("nasbench201", 64), ("nasbench201", 20), ("mobilenetv3-s16", 64), ("mobilenetv3-s16", 20), ("mnas-s16", 64),
         ("mnas-s16", 20))


def iteration_s(learner: PpoLearner | PlainPpo, sequences: int, step: int) -> tuple[float, float]:
    """By the clock, and of the processor."""
    rng = np.random.default_rng(step)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    batch = learner.policy.sample(sequences, rng)
    learner.update(batch.tokens_NT, rng.normal(size=sequences), np.ones(sequences), 1e-3, batch.log_probs_NT)
    return time.perf_counter() - begin, time.process_time() - begin_cpu


def measure(space: SearchSpace, sequences: int, iterations: int) -> str:
    ours, plain = PpoLearner(space, PpoSettings(), seed=0), PlainPpo(space, PpoSettings(), seed=0)
    times = np.zeros((iterations + 3, 2, 2))
    for step in range(len(times)):
        for which in (0, 1) if step % 2 else (1, 0):
            times[step, which] = iteration_s((ours, plain)[which], sequences, step)
    assert difference(ours.policy, plain.policy) < 1e-5, "they no longer learn the same"
    ours.close()
    ratio_I2 = times[3:, 0] / times[3:, 1]
    wall, cpu = (" {1:.2f} (quartiles {0:.2f} to {2:.2f})".format(*np.quantile(ratio_I, (0.25, 0.5, 0.75)))
                 for ratio_I in ratio_I2.T)
    ours_ms, plain_ms = np.median(times[3:, :, 0], axis=0) * 1e3
    return (f"{sequences:4d} sequences of {len(space.choices):2d} tokens   ours {ours_ms:6.1f} ms   plain "
            f"{plain_ms:6.1f} ms   ratio{wall}   of processor time{cpu}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=40)
    iterations = parser.parse_args().iterations
    torch.set_num_threads(1)
    print(f"target: ratio at most {TARGET}")
    for name, sequences in CASES:
        space = make_space(name, classes=10, channels=1, options={})
        print(f"{name:16s} {measure(space, sequences, iterations)}", flush=True)


if __name__ == "__main__":
    main()
