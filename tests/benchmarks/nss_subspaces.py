"""Does it pay to search the space first? NSS then PNAG against PNAG on NAS-Bench-201, at equal numbers of look-ups.

    python -m tests.benchmarks.nss_subspaces [--evaluations 100] [--seeds 3] [--setups one all]
        [--controllers pnag random] [--folder DIR]

There is no supernet here, so the task loss of a space is a black box: `sampled_mean` of the tabulated validation
error, plus |mean latency / budget - 1|, both of the same cells. Every distinct cell that NSS asks for is an evaluation;
it gets half of them (it takes no step that might need more), Adam on theta, tau from 5 to 0.001, five draws. One member
per bin makes twelve cells a step. The controller inside the Elite Space gets the rest, and knows the cells inside that
NSS has seen.

setups      one: a budget at a time and a space for it, what NSS is meant for; the 5th, 10th and 15th of the budgets of
            nasbench201_regret. all: its twenty budgets at once; spaces for these three, searched in their union
ways        nss: as above; predicted: half of the evaluations at random, NSS on a ridge regression of their error and
            latency; latency: NSS without the error, a control; free: NSS with the table itself at no cost, and all
            evaluations inside: what its objective is worth; none: the controller alone, with all evaluations
bins        default: {none, skip} and {convolutions, pool}; single: an operation each, where spaces are joined
Regret as in nasbench201_regret. Every finished run is a line in DIR/results.jsonl and is not done again.
"""
from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from numpy.typing import NDArray

from orchestrator.controllers.nss.choice import choose
from searchspaces.bins import BinGroup, group_of
from searchspaces.elite.space import EliteSpace, restricted
from searchspaces.nasbench201.space import NasBench201
from searchspaces.space import Tokens
from searchspaces.training.spaces import (
    Cost,
    SpaceCosts,
    SpaceOfSpaces,
    deviation,
    relaxed,
    sampled_mean,
    temperature,
)
from tests.benchmarks.nasbench201 import Table, search
from tests.benchmarks.nasbench201_regret import CHANCE, default_budgets_ms, regret

DATASET, DEVICES = "cifar100", ("pixel3", "gold_6226")
AIMS = (4, 9, 14)       # of the twenty budgets
LEARNING_RATE = 0.5     # of theta; the look-ups allow few steps
STEPS, RATE, SAMPLES = 200, 0.05, 16       # where no look-up is needed
DRAWS = 5
WAYS = (("none", "pnag", "default"), ("nss", "pnag", "default"), ("predicted", "pnag", "default"),
        ("latency", "pnag", "default"), ("nss", "pnag", "single"), ("none", "random", "default"),
        ("nss", "random", "default"), ("free", "random", "default"))        # search for spaces, for networks, bins


class SingleOperations(NasBench201):
    """A bin is one operation, so a space is one cell unless several spaces are joined."""

    def bin_groups(self) -> tuple[BinGroup, ...]:
        return tuple(group_of(choice.name, (position,), self.choices, [[token] for token in range(5)])
                     for position, choice in enumerate(self.choices))


@dataclass
class Asked:
    """Error and latency of cells; the distinct rows asked for, in order."""

    space: NasBench201
    row_of: NDArray[np.int64]       # of the table, by index of the cell
    table: Table

    def __post_init__(self) -> None:
        self.seen: dict[int, None] = {}

    def rows(self, tokens_NT: Tokens) -> NDArray[np.int64]:
        rows = self.row_of[self.space.row_index(tokens_NT)]
        self.seen |= dict.fromkeys(rows.tolist())
        return np.asarray(rows)

    def error(self, tokens_NT: Tokens) -> NDArray[np.float64]:
        return np.asarray(1 - self.table.accuracy[self.rows(tokens_NT)] / 100)

    def latency_ms(self, tokens_NT: Tokens) -> NDArray[np.float64]:
        return self.table.latency_ms[self.rows(tokens_NT)]


class Nss:
    """One distribution over spaces for a budget; `step` is one of Adam."""

    def __init__(self, spaces: SpaceOfSpaces, target_ms: float, rate: float) -> None:
        self.spaces, self.target_ms = spaces, target_ms
        self.theta = [torch.zeros(len(group), dtype=torch.float64, requires_grad=True) for group in spaces.groups]
        self._adam = torch.optim.Adam(self.theta, lr=rate, betas=(0.5, 0.999))

    def step(self, tau: float, error: Cost | None, latency: Cost, samples: int, seed: Sequence[int]) -> None:
        g = relaxed(self.theta, tau, torch.Generator().manual_seed(int(np.random.default_rng(seed).integers(2**62))))

        def mean(cost: Cost) -> torch.Tensor:   # always of the same cells
            return sampled_mean(self.spaces, g, cost, samples, np.random.default_rng(seed))

        loss = deviation(mean(latency), self.target_ms, hinge=False)
        if error is not None:
            loss = loss + mean(error)
        self._adam.zero_grad()
        loss.backward()
        self._adam.step()

    def logits(self) -> list[NDArray[np.float64]]:
        return [row.detach().numpy() for row in self.theta]


def ridge(x: NDArray[np.float64], y: NDArray[np.float64], strength: float = 1.0) -> Callable[..., NDArray[np.float64]]:
    """Of y on the features x and a constant."""
    centre, mean = x.mean(axis=0), y.mean()
    x = x - centre
    weights = np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ (y - mean))
    return lambda features: np.asarray((features - centre) @ weights + mean)


def predicted(asked: Asked, count: int, seed: int) -> tuple[Cost, Cost]:
    """(error, latency) of any cell, from `count` random ones."""
    rng, known = np.random.default_rng([seed, 77]), np.zeros((0, 6), dtype=np.int8)
    while len(known) < count:
        known = np.unique(np.concatenate([known, asked.space.sample_uniform(rng, count - len(known))]), axis=0)
    space = asked.space
    error = ridge(_onehot(space, known), asked.error(known))
    latency = ridge(space.latency_features(known).astype(np.float64), asked.latency_ms(known), 0.1)
    return (lambda tokens_NT: error(_onehot(space, tokens_NT)),
            lambda tokens_NT: latency(space.latency_features(tokens_NT).astype(np.float64)))


def _onehot(space: NasBench201, tokens_NT: Tokens) -> NDArray[np.float64]:
    return space.onehot(tokens_NT).reshape(len(tokens_NT), -1).astype(np.float64)


def trained(spaces: SpaceOfSpaces, asked: Asked, targets_ms: Sequence[float], way: str, cap: int, seed: int
            ) -> tuple[list[Nss], Cost]:
    """A distribution for each target, of at most `cap` look-ups in all, and the latency that their spaces are judged
    by: that of a regression on what was looked up, for the mean of a space has to be known without looking up more."""
    if way in ("predicted", "free"):
        free = replace(asked)       # counts for itself
        error, latency = (free.error, free.latency_ms) if way == "free" else predicted(asked, cap, seed)
        found = [Nss(spaces, target, RATE) for target in targets_ms]
        for step in range(STEPS):
            tau = temperature(step, STEPS, 5.0, 0.001)
            for a, nss in enumerate(found):
                nss.step(tau, error, latency, SAMPLES, [seed, step, a])
        return found, latency
    found, per_step = [Nss(spaces, target, LEARNING_RATE) for target in targets_ms], sum(map(len, spaces.groups))
    step = 0
    while (used := len(asked.seen)) + per_step <= cap:
        nss = found[step % len(found)]      # budgets take turns
        nss.step(temperature(used, cap - per_step + 1, 5.0, 0.001), None if way == "latency" else asked.error,
                 asked.latency_ms, 1, [seed, step])
        step += 1
    cells = asked.space.all_tokens()[[int(np.flatnonzero(asked.row_of == row)[0]) for row in asked.seen]]
    latency = ridge(asked.space.latency_features(cells).astype(np.float64), asked.table.latency_ms[list(asked.seen)],
                    0.1)
    return found, lambda tokens_NT: latency(asked.space.latency_features(tokens_NT).astype(np.float64))


def narrowed(spaces: SpaceOfSpaces, found: Sequence[Nss], latency: Cost, seed: int) -> EliteSpace:
    """The Elite Spaces of all targets in one."""
    costs = SpaceCosts(spaces, latency, seed)
    bins = [choose(costs, nss.logits(), nss.target_ms, "ms", DRAWS, seed + a).bins for a, nss in enumerate(found)]
    return EliteSpace(spaces.space, restricted(spaces.space, spaces.groups, [set(of) for of in zip(*bins)]))


def one_run(table: Table, test: NDArray[np.float64], budgets_ms: Sequence[float], targets_ms: Sequence[float],
            way: tuple[str, str, str], evaluations: int, seed: int) -> dict[str, Any]:
    first, second, bins = way
    if first == "none":
        run = search(table, budgets_ms, evaluations, seed, second)
        return {"regret": regret(run.chosen, budgets_ms, table.latency_ms, test, CHANCE[DATASET])}
    space = SingleOperations() if bins == "single" else NasBench201()
    row_of = np.argsort(space.row_index(table.tokens_NT))
    asked, spaces = Asked(space, row_of, table), SpaceOfSpaces(space)
    found, latency = trained(spaces, asked, targets_ms, first, evaluations // 2, seed)
    elite = narrowed(spaces, found, latency, seed)
    inside = np.flatnonzero(elite.contains(table.tokens_NT))
    own = replace(table, arch_index=table.arch_index[inside], tokens_NT=elite.narrowed(table.tokens_NT[inside]),
                  accuracy=table.accuracy[inside], latency_ms=table.latency_ms[inside])
    known = [int(np.flatnonzero(inside == row)[0]) for row in asked.seen if row in set(inside.tolist())]
    run = search(own, budgets_ms, evaluations - len(asked.seen), seed, second, elite, known)
    chosen = [best(table, list(asked.seen), budget) if row is None else int(inside[row])
              for row, budget in zip(run.chosen, budgets_ms)]
    possible = [best(table, inside.tolist(), budget) for budget in budgets_ms]
    return {"regret": regret(chosen, budgets_ms, table.latency_ms, test, CHANCE[DATASET]), "cells": len(inside),
            "of_space": regret(possible, budgets_ms, table.latency_ms, test, CHANCE[DATASET]),
            "mean_over_target": float(table.latency_ms[inside].mean() / np.mean(targets_ms)),
            "looked_up": [len(asked.seen), len(run.looked_up)]}


def best(table: Table, rows: Sequence[int], budget_ms: float) -> int | None:
    met = [row for row in rows if table.latency_ms[row] <= budget_ms]
    return max(met, key=lambda row: table.accuracy[row]) if met else None


def ways(options: argparse.Namespace, setup: str) -> list[tuple[str, str, str]]:
    """One space of single operations is one cell: nothing to search."""
    return [way for way in WAYS if way[1] in options.controllers and (setup == "all" or way[2] != "single")]


def pieces(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for evaluations in options.evaluations:
        for seed in range(options.seeds):
            for setup in options.setups:
                for device in DEVICES:
                    for way in ways(options, setup):
                        for aim in AIMS if setup == "one" else (-1,):
                            yield {"evaluations": evaluations, "setup": setup, "seed": seed, "device": device,
                                   "way": list(way), "aim": aim}


def results(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Those that were done before, then the others as they come."""
    file = options.folder / "results.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    known = {json.dumps({name: row[name] for name in ("evaluations", "setup", "seed", "device", "way", "aim")}): row
             for row in lines}
    for piece in pieces(options):
        if (row := known.get(json.dumps(piece))) is None:
            device, start = piece["device"], time.perf_counter()
            table = Table.read(options.table, f"acc12_val_{DATASET}", f"latency_{device}")
            test = pyarrow.parquet.read_table(options.table, columns=[f"acc200_test_{DATASET}"])[0].to_numpy()
            every = default_budgets_ms(table.latency_ms)
            targets = [every[aim] for aim in AIMS] if piece["aim"] < 0 else [every[piece["aim"]]]
            row = piece | one_run(table, test.astype(np.float64), every if piece["aim"] < 0 else targets, targets,
                                  tuple(piece["way"]), piece["evaluations"], piece["seed"])
            row["seconds"] = time.perf_counter() - start
            with file.open("a") as out:
                out.write(json.dumps(row) + "\n")
        yield row


def report(rows: Sequence[dict[str, Any]]) -> None:
    print("N    setup  space search  networks  bins     runs  regret          best inside  cells   mean/target")
    for evaluations, setup, way in sorted({(row["evaluations"], row["setup"], tuple(row["way"])) for row in rows},
                                          key=lambda key: (*key[:2], WAYS.index(key[2]))):
        mine = [row for row in rows if (row["evaluations"], row["setup"], tuple(row["way"])) ==
                (evaluations, setup, way)]
        by_seed = [np.mean([row["regret"] for row in mine if row["seed"] == seed]) for seed in
                   sorted({row["seed"] for row in mine})]
        error = np.std(by_seed, ddof=1) / np.sqrt(len(by_seed)) if len(by_seed) > 1 else np.nan
        inside = "" if way[0] == "none" else (f"{np.mean([row['of_space'] for row in mine]):11.2f}  "
                                              f"{np.median([row['cells'] for row in mine]):6.0f}  "
                                              f"{np.mean([row['mean_over_target'] for row in mine]):6.2f}")
        print(f"{evaluations:<4d} {setup:5s}  {way[0]:12s}  {way[1]:8s}  {way[2]:7s}  {len(mine):4d}  "
              f"{np.mean(by_seed):5.2f} ({error:.2f})  {inside}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(os.environ.get("PARETORAY_SHARED", "../shared/data"))
    parser.add_argument("--table", default=str(shared / "nasbench201.parquet"))
    parser.add_argument("--evaluations", nargs="+", type=int, default=[100])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--setups", nargs="+", choices=("one", "all"), default=["one", "all"])
    parser.add_argument("--controllers", nargs="+", choices=("pnag", "random"), default=["pnag", "random"])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/nss_subspaces"))
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows = []
    for row in results(options):
        rows.append(row)
        print(f"N {row['evaluations']} {row['setup']} seed {row['seed']} {row['device']} {'+'.join(row['way'])} aim "
              f"{row['aim']}: regret {row['regret']:.2f}", flush=True)
    report(rows)


if __name__ == "__main__":
    main()
