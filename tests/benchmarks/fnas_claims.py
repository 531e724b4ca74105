"""The claims of FNAS re-measured on the table of all NAS-Bench-201 cells; every part prints paper or pilot, and ours.

    python -m tests.benchmarks.fnas_claims --parts trainings transfer critic buffer [--seeds 10]

trainings  how many architectures are trained until the best so far reaches 99 % of the table's best reward; the rows
           PPO and +AEB take every sample as it is drawn, "known redrawn" replaces known ones as the critic's rows do;
           with transfer the CIFAR-10 trainings are not counted, "critic only" does not train their best ones first
transfer   error of the critic's V against samples, pretrained on CIFAR-10 or not (the paper's figure 3a)
critic     trainings until 99 % with a critic that learned from a search on the other dataset, and without: the best
           5 % of the other dataset's cells are removed from what it learned, and none is trained first
buffer     trainings for buffer sizes 10, 50, 200 and shares of a batch of 25, 50, 75 %

The reward is the 12-epoch validation accuracy on CIFAR-100, or its soft product with pixel3's latency (target: the
table's median). A search that does not get there within the cap counts as the cap. The table is read from
PARETORAY_SHARED or ../shared/data (see README for where the public table comes from).
"""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from numpy.typing import NDArray

from orchestrator.controllers.catalogue import make_controller
from orchestrator.controllers.controller import EarlierRun, Observation, Task
from orchestrator.controllers.fnas.controller import Fnas
from orchestrator.controllers.fnas.critic import Critic
from searchspaces.nasbench201.space import NasBench201
from tests.benchmarks.nasbench201 import OP_COLUMNS

CAP = 1000
SHARE_OF_BEST = 0.99
EARLIER_TRAININGS = 200  # of the CIFAR-10 search that is transferred from
BEST_REMOVED = 0.05      # of the other dataset's cells, in part critic: what only a transfer of cells would profit from
STEP = 8
ALONE: dict[str, Any] = {"in_flight": 0}
NO_BUFFER: dict[str, Any] = {"buffer": {"size": 0}}
# Every sample counts as it is drawn: none is replaced because it is known, up to all but one of a batch.
NO_CRITIC: dict[str, Any] = {"critic": {"use": False, "extra_draws": 0, "trusted_share": 0.999}}
REDRAWN: dict[str, Any] = {"critic": {"use": False}}
PILOT: dict[str, Any] = {"batch": 20, "policy": {"entropy_start": 1e-3, "entropy_end": 1e-3}}
PRINTED = {"critic": {"form": "printed", "decision": "uncertainty", "quantile": 0.5, "extra_draws": 50, "hidden": 200,
                      "least_trained": 100, "steps": 10}}
V_OF_ACCURACY: dict[str, Any] = {"critic": {"predicts": "accuracy"}}     # latency reward only
VARIANTS: dict[str, tuple[Mapping[str, Any], str]] = {
    "PPO": (NO_CRITIC | NO_BUFFER, "296"), "+AEB": (NO_CRITIC, "154"), "+UAC": (NO_BUFFER, "222"), "all": ({}, "140"),
    "all, transfer": ({}, "paper: a tenth"), "critic only, transfer": ({}, ""), "all, printed critic": (PRINTED, ""),
    "+UAC, V of accuracy": (V_OF_ACCURACY | NO_BUFFER, ""), "all, V of accuracy": (V_OF_ACCURACY, ""),
    "PPO, known redrawn": (REDRAWN | NO_BUFFER, ""), "PPO, pilot's settings": (PILOT | NO_CRITIC | NO_BUFFER, "296"),
}


@dataclass(frozen=True)
class Table:
    """Accuracies in 0..1 and latencies in ms by row; rows by token bytes."""

    tokens_NT: NDArray[np.int8]
    accuracy: Mapping[str, NDArray[np.float64]]
    latency_ms: NDArray[np.float64]
    row_of: Mapping[bytes, int]

    @classmethod
    def read(cls) -> Table:
        default = Path(__file__).parents[3] / "shared" / "data"
        columns = pyarrow.parquet.read_table(Path(os.environ.get("PARETORAY_SHARED", default)) / "nasbench201.parquet")
        tokens_NT = np.stack([columns[name].to_numpy() for name in OP_COLUMNS], axis=1).astype(np.int8)
        accuracy = {task: columns[f"acc12_val_{task}"].to_numpy().astype(np.float64) / 100
                    for task in ("cifar10", "cifar100")}
        return cls(tokens_NT, accuracy, columns["latency_pixel3"].to_numpy().astype(np.float64),
                   {row.tobytes(): i for i, row in enumerate(tokens_NT)})


def options_of(table: Table, reward: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    target = float(np.median(table.latency_ms))
    kind = {"form": "accuracy"} if reward == "accuracy" else {"form": "soft", "target": target}
    return ALONE | {"reward": kind} | dict(changes)


def search(table: Table, task_name: str, options: Mapping[str, Any], seed: int, cap: int,
           earlier: tuple[EarlierRun, ...] = (), stop_at: float | None = None,
           recommending: bool = True) -> tuple[list[int], float]:
    """(rows trained in order, best reward of the table). Ends early once the best so far reaches `stop_at` of it. Not
    `recommending`: the best architectures of earlier runs are not trained first."""
    task = Task((float(table.latency_ms.max()),), cap, seed, None, earlier)
    controller = make_controller("fnas", NasBench201(), task, options)
    assert isinstance(controller, Fnas)
    if not recommending:
        controller._recommended.clear()
    accuracy = table.accuracy[task_name]
    rewards = controller.reward(table.tokens_NT, accuracy, table.latency_ms)
    assert rewards is not None
    trained: list[int] = []
    while len(trained) < cap and (proposals := controller.propose(min(STEP, cap - len(trained)))):
        rows = [table.row_of[proposal.tokens.tobytes()] for proposal in proposals]
        trained += rows
        if stop_at is not None and rewards[trained].max() >= stop_at * rewards.max():
            break
        controller.observe([Observation(table.tokens_NT[row], float(accuracy[row]), float(table.latency_ms[row]))
                            for row in rows])
    first = np.flatnonzero(rewards[trained] >= SHARE_OF_BEST * rewards.max())
    return trained[:int(first[0]) + 1] if stop_at and len(first) else trained, float(rewards.max())


def earlier_run(table: Table, options: Mapping[str, Any], seed: int) -> EarlierRun:
    """What a search on CIFAR-10 with the same settings trained."""
    rows, _ = search(table, "cifar10", options, seed + 10_000, EARLIER_TRAININGS)
    return EarlierRun("cifar10", False, table.tokens_NT[rows], table.accuracy["cifar10"][rows], table.latency_ms[rows])


def trainings_of(table: Table, options: Mapping[str, Any], seeds: Sequence[int], transfer: bool = False,
                 recommending: bool = True) -> list[int]:
    counts = []
    for seed in seeds:
        earlier = (earlier_run(table, options, seed),) if transfer else ()
        counts.append(len(search(table, "cifar100", options, seed, CAP, earlier, SHARE_OF_BEST, recommending)[0]))
    return counts


def row(name: str, counts: Sequence[int], reference: float, pilot: str = "") -> str:
    low, median, high = np.percentile(counts, [25, 50, 75])
    return (f"{name:24s} {median:7.0f} {low:6.0f} - {high:4.0f} {min(counts):6d} - {max(counts):4d}"
            f" {sum(c >= CAP for c in counts):7d} {median / reference:9.2f}   {pilot:14s} "
            + " ".join(str(count) for count in sorted(counts)))


HEAD = f"{'':24s} {'median':>7s} {'quartiles':>13s} {'range':>13s} {'misses':>7s} {'of PPO':>9s}   {'pilot':14s} all"


def trainings(table: Table, rewards: Sequence[str], variants: Sequence[str], seeds: Sequence[int]) -> None:
    for reward in rewards:
        print(f"\ntrainings to {SHARE_OF_BEST:.0%} of the best {reward} reward, {len(seeds)} seeds, cap {CAP} "
              "(target: all at most 0.33, with transfer at most 0.17 of PPO)\n" + HEAD)
        reference = float("nan")
        for name in variants:
            if reward == "accuracy" and name.endswith("V of accuracy"):
                continue
            changes, pilot = VARIANTS[name]
            counts = trainings_of(table, options_of(table, reward, changes), seeds, name.endswith("transfer"),
                                  not name.startswith("critic only"))
            reference = float(np.median(counts)) if name == "PPO" else reference
            print(row(name, counts, reference, pilot if reward == "accuracy" else ""), flush=True)


def buffer(table: Table, seeds: Sequence[int]) -> None:
    """The paper: a large buffer slows convergence."""
    print(f"\nexperience buffer alone (no critic), {len(seeds)} seeds\n" + HEAD)
    reference = float(np.median(trainings_of(table, options_of(table, "accuracy", NO_CRITIC | NO_BUFFER), seeds)))
    settings: list[dict[str, Any]] = [{"size": size, "eviction": eviction} for eviction in ("top", "quantiles")
                                      for size in (10, 50, 200)]
    for changes in [*settings, {"share": 0.25}, {"share": 0.75}]:
        counts = trainings_of(table, options_of(table, "accuracy", NO_CRITIC | {"buffer": changes}), seeds)
        print(row(" ".join(str(value) for value in changes.values()), counts, reference), flush=True)


def transfer(table: Table, seeds: Sequence[int]) -> None:
    """Mean |V - R| on unseen cells in standard deviations of R, after so many CIFAR-100 samples."""
    space = NasBench201()
    sizes = (10, 20, 40, 80, 160)
    print(f"\nerror of V on CIFAR-100 in standard deviations of the reward, {len(seeds)} seeds, mean (standard error); "
          "the paper: pretrained V converges faster\nsamples" + "".join(f"{n:>15d}" for n in sizes))
    features_ND = space.features(table.tokens_NT)
    truth, other = table.accuracy["cifar100"], table.accuracy["cifar10"]
    for pretrained in (False, True):
        errors = np.array([[_critic_error(features_ND, truth, other, n, seed, pretrained) for n in sizes]
                           for seed in seeds])
        means, deviations = errors.mean(0), errors.std(0) / np.sqrt(len(seeds))
        print(f"{'pretrained' if pretrained else 'from scratch':12s}"
              + "".join(f"   {m:5.3f} ({d:5.3f})" for m, d in zip(means, deviations)))


def _critic_error(features_ND: NDArray[np.float32], truth: NDArray[np.float64], other: NDArray[np.float64], n: int,
                  seed: int, pretrained: bool) -> float:
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(truth))
    critic = Critic(features_ND.shape[1], seed, hidden=64)
    if pretrained:
        earlier = rows[-EARLIER_TRAININGS:]
        critic.add_earlier(features_ND[earlier], other[earlier])
        critic.fit(1000)
    for index in rows[:n]:
        critic.add(features_ND[index], float(truth[index]), None)
    critic.fit(300)
    unseen = rows[1000:2000]
    return float(np.abs(critic.predict(features_ND[unseen])[0] - truth[unseen]).mean() / truth.std())


def critic(table: Table, seeds: Sequence[int]) -> None:
    """Paired by seed: a ratio below 1 is a gain of the critic alone."""
    options = options_of(table, "accuracy", {})
    for task, other in (("cifar100", "cifar10"), ("cifar10", "cifar100")):
        least = np.quantile(table.accuracy[other], 1 - BEST_REMOVED)
        print(f"\ntrainings to {SHARE_OF_BEST:.0%} on {task}, critic from scratch or pretrained on {other} without its "
              f"best {BEST_REMOVED:.0%}, {len(seeds)} seeds\n  seed   scratch   pretrained   earlier trials")
        logs = []
        for seed in seeds:
            rows = np.array(search(table, other, options, seed + 10_000, EARLIER_TRAININGS)[0])
            rows = rows[table.accuracy[other][rows] < least]
            earlier = EarlierRun(other, False, table.tokens_NT[rows], table.accuracy[other][rows],
                                 table.latency_ms[rows])
            counts = [len(search(table, task, options, seed, CAP, runs, SHARE_OF_BEST, recommending=False)[0])
                      for runs in ((), (earlier,))]
            logs.append(np.log(counts[1] / counts[0]))
            print(f"{seed:6d} {counts[0]:9d} {counts[1]:12d} {len(rows):16d}", flush=True)
        error = np.std(logs, ddof=1) / np.sqrt(len(logs)) if len(logs) > 1 else float("nan")
        mean, low, high = np.exp(np.mean(logs) + error * np.array([0, -2, 2]))
        print(f"pretrained / scratch: {mean:.2f}, 95 % interval {low:.2f} to {high:.2f}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["trainings", "transfer", "critic", "buffer"],
                        default=["trainings", "transfer", "critic", "buffer"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=200)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="ROW",
                        help="of part trainings, in this order; the share of PPO needs PPO first")
    parser.add_argument("--reward", nargs="+", choices=["accuracy", "latency"], default=["accuracy", "latency"])
    options = parser.parse_args(arguments)
    table, seeds = Table.read(), range(options.first_seed, options.first_seed + options.seeds)
    print("command: python -m tests.benchmarks.fnas_claims " + " ".join(arguments or sys.argv[1:]))
    if "trainings" in options.parts:
        trainings(table, options.reward, options.variants, seeds)
    if "transfer" in options.parts:
        transfer(table, seeds)
    if "critic" in options.parts:
        critic(table, seeds)
    if "buffer" in options.parts:
        buffer(table, seeds)


if __name__ == "__main__":
    main()
