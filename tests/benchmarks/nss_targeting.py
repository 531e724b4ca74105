"""How well NSS aims at a cost: spaces and networks within 10 % of a target, before and after the search.

    python -m tests.benchmarks.nss_targeting [--seeds 2] [--images 2000] [--epochs 12] [--members 12] [--folder DIR]

The shrunk space expanded-s16 on CIFAR-10 at 16 px: all 512 spaces and 2^21 networks are enumerated, so every share is
exact, given the logits. "before" is the uniform distribution. The control "cost alone" leaves out the task loss
(`NssSettings(task_weight=0)`); its distribution depends on no image, so its steps train weights on two images of noise.
"cost, slow" is that with a smaller learning rate of the logits, 0.03, which leaves them too little way to go.
What the task loss adds is then measured with weights of a sandwich supernet, which favours no space: mean accuracy of
members within 10 % of the target, of both Elite Spaces and of the whole space. Every finished search and every seed's
accuracies are a line in DIR/results.jsonl and are not done again.
"""
from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actors.data import Augmentation, Preprocessing, Splits
from actors.supernet.actor import SupernetSettings
from actors.supernet.finetune import recalibrate
from actors.supernet.training import Trainer
from orchestrator.controllers.nss.choice import choose
from orchestrator.data.datasets import DataSettings, load_dataset
from searchspaces.expanded.space import ExpandedS16
from searchspaces.space import Tokens
from searchspaces.training.nss import NssSettings, SpaceAim
from searchspaces.training.sandwich import SandwichSettings, evaluate
from searchspaces.training.spaces import SpaceCosts, SpaceOfSpaces

PAPER = ("paper, networks drawn: 5 from the Elite Space at every target, until one is within 10 % from the whole space "
         "14 to 1228 below 16 GF\n(CIFAR-10: 200 MF 1228, 400 MF 976, 600 MF 117, 1.6 GF 45, 12 GF 14); mean deviation "
         "of what was kept 2.1 % against 5.5 %")
TARGETS_M = (0.7, 1.9, 3.7, 7.4)    # about the 5, 25, 50 and 80 % quantiles of the 512 mean costs
WITHIN, DRAWS, TEST_IMAGES = 0.1, 5, 1000
AUGMENTATION = Augmentation(padding=2, flip=True)
SEARCHES: dict[str, dict[str, float]] = {"task and cost": {}, "cost alone": {"task_weight": 0.0},
                                         "cost, slow": {"task_weight": 0.0, "learning_rate": 0.03}}
COMPARED = ("task and cost", "cost alone")      # by the accuracy of their Elite Spaces
SPACE = ExpandedS16(classes=10, channels=3)
SPACES = SpaceOfSpaces(SPACE)


class Enumerated:
    """All 512 spaces in the order of the product of their bins: mean multiply-adds, and costs of all their members."""

    def __init__(self) -> None:
        self.bins = list(product(*(range(len(group)) for group in SPACES.groups)))
        costs = SpaceCosts(SPACES, None, 0)
        self.mean_S = np.array([costs.mean(bins) for bins in self.bins])
        self.madds_SM = np.stack([SPACE.cost(members(bins))[0] for bins in self.bins])

    def shares(self, logits: Sequence[NDArray[np.float64]], target: float) -> dict[str, float]:
        """Of spaces, and of members of spaces, drawn from the distribution: how many are within 10 % of the target?"""
        p_S = np.ones(1)
        for row in logits:
            p = np.exp(row - row.max())
            p_S = np.outer(p_S, p / p.sum()).ravel()
        return {"spaces": float(p_S @ near(self.mean_S, target)),
                "networks": float(p_S @ near(self.madds_SM, target).mean(axis=1))}


def near(madds: NDArray[Any], target: float) -> NDArray[np.bool_]:
    return np.asarray(np.abs(madds / target - 1) <= WITHIN)


def members(bins: Sequence[int]) -> Tokens:
    """int8[M, T]: every member of a space."""
    of_position: dict[int, tuple[int, ...]] = {position: tokens for group, b in zip(SPACES.groups, bins)
                                               for position, tokens in zip(group.positions, group.bins[b])}
    return np.array(list(product(*(of_position[t] for t in range(len(SPACE.choices))))), dtype=np.int8)


# --- a search --------------------------------------------------------------------------------------------------------


def one_search(splits: Splits, every: Enumerated, target_m: float, kind: str, seed: int,
               options: argparse.Namespace) -> dict[str, Any]:
    target = 1e6 * target_m
    method = NssSettings(aims=(SpaceAim(target),), **SEARCHES[kind])    # type: ignore[arg-type]
    trainer = Trainer(SPACE, splits.train, Preprocessing.fit(splits.train, SPACE.resolution), SupernetSettings(
        training=method, epochs=options.epochs, batch_size=64, seed=seed, augmentation=AUGMENTATION))
    noise = torch.randn(2, SPACE.channels, SPACE.resolution, SPACE.resolution), torch.arange(2)
    for _ in range(options.epochs if method.task_weight else 0):
        trainer.train_epoch()
    for _ in range(0 if method.task_weight else trainer.training.schedule.steps):
        trainer.training.step(noise, noise)
    distribution = trainer.training.distribution()
    logits = [distribution[f"0.{k}"] for k in range(len(SPACES.groups))]
    found = choose(SpaceCosts(SPACES, None, seed), logits, target, "madds", DRAWS, seed)
    elite = every.madds_SM[every.bins.index(found.bins)]
    return {"search": kind, "target_m": target_m, "seed": seed, **every.shares(logits, target),
            "deviation": found.kept.deviation, "elite_networks": float(near(elite, target).mean()), "bins": found.bins,
            "text": found.text(SPACES.groups), "logits": [row.round(3).tolist() for row in logits]}


# --- what the task loss adds -----------------------------------------------------------------------------------------


def accuracies(splits: Splits, every: Enumerated, seed: int, rows: Sequence[dict[str, Any]],
               options: argparse.Namespace) -> dict[str, Any]:
    """Test accuracies of members near each target, by whose space they are drawn from."""
    preprocessing = Preprocessing.fit(splits.train, SPACE.resolution)
    trainer = Trainer(SPACE, splits.train, preprocessing, SupernetSettings(
        training=SandwichSettings(subnets=1), epochs=options.epochs, batch_size=64, seed=seed,
        augmentation=AUGMENTATION))
    for _ in range(options.epochs):
        trainer.train_epoch()
    test = splits.test.take(np.arange(len(splits.test))[:TEST_IMAGES])
    images, labels = preprocessing.tensor(test.images), torch.from_numpy(test.labels)

    def accuracy(tokens_T: Tokens) -> float:
        network = trainer.training.supernet.extract(tokens_T)
        recalibrate(network, splits.train, trainer.batches, 500)
        return evaluate(network, images, labels)

    found: dict[str, Any] = {"search": "accuracies", "seed": seed, "members": options.members}
    for target_m in TARGETS_M:
        spaces = {row["search"]: [every.bins.index(tuple(row["bins"]))] for row in rows
                  if row["seed"] == seed and row["target_m"] == target_m and row["search"] in COMPARED}
        for kind, indices in (spaces | {"whole space": list(range(len(every.bins)))}).items():
            rng = np.random.default_rng([seed, round(10 * target_m), len(indices)])
            where = np.argwhere(near(every.madds_SM[indices], 1e6 * target_m))
            drawn = rng.permutation(where)[:options.members]
            found[f"{target_m} {kind}"] = [accuracy(members(every.bins[indices[s]])[m]) for s, m in drawn]
    return found


# --- pieces ----------------------------------------------------------------------------------------------------------


class Results:
    """DIR/results.jsonl: pieces of this size that were done before, and new ones."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._file = options.folder / "results.jsonl"
        self._sizes = {name: getattr(options, name) for name in ("images", "epochs")}
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        self.rows = [row for line in lines if (row := json.loads(line))["sizes"] == self._sizes]

    def piece(self, work: Callable[[], dict[str, Any]], **key: object) -> dict[str, Any]:
        for row in self.rows:
            if all(row.get(name) == value for name, value in key.items()):
                return row
        row = json.loads(json.dumps(work())) | {"sizes": self._sizes}
        with self._file.open("a") as out:
            out.write(json.dumps(row) + "\n")
        self.rows.append(row)
        return row


def report(every: Enumerated, searches: Sequence[dict[str, Any]], by_seed: Sequence[dict[str, Any]]) -> None:
    uniform = [np.zeros(len(group)) for group in SPACES.groups]
    print(f"\n{PAPER}\nours, means over seeds; draws: networks to be drawn for five within 10 % (5 / share)\n"
          "target    drawn from      spaces within 10 %   5 draws hit   networks within 10 %   Elite Space's   draws")
    for target_m in TARGETS_M:
        before = every.shares(uniform, 1e6 * target_m)
        hit = 1 - (1 - before["spaces"]) ** DRAWS
        print(f"{target_m:4.1f} M    {'uniform, exact':15s} {before['spaces']:18.1%} {hit:13.1%} "
              f"{before['networks']:22.1%} {'':15s} {5 / before['networks']:7.0f}")
        for kind in SEARCHES:
            mine = [row for row in searches if (row["search"], row["target_m"]) == (kind, target_m)]
            spaces, networks, elite = (np.array([row[name] for row in mine])
                                       for name in ("spaces", "networks", "elite_networks"))
            hits = sum(abs(row["deviation"]) <= WITHIN for row in mine)
            print(f"          {kind:15s} {spaces.mean():18.1%} {hits:7d} of {len(mine):2d} {networks.mean():22.1%} "
                  f"{elite.mean():15.1%} {5 / elite.mean():7.0f}")
    print("mean test accuracy of members within 10 % of the target, weights of a sandwich supernet, +- standard error "
          "over members")
    for target_m in TARGETS_M:
        parts = []
        for kind in [*COMPARED, "whole space"]:
            found = np.concatenate([row[f"{target_m} {kind}"] for row in by_seed])
            parts.append(f"{kind} {found.mean():.2%} +- {found.std(ddof=1) / len(found) ** 0.5:.2%}")
        print(f"{target_m:4.1f} M    " + "   ".join(parts))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--seeds", 2), ("--images", 2000), ("--epochs", 12), ("--members", 12)):
        parser.add_argument(name, type=int, default=default)
    shared = Path(os.environ.get("PARETORAY_SHARED", "../shared/data"))
    parser.add_argument("--data", type=Path, default=shared / "cifar10")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/nss_targeting"))
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    splits = load_dataset(DataSettings(name="parquet", train=options.data / "train.parquet",
                                       test=options.data / "test.parquet", size=16, limit=options.images,
                                       val_fraction=0.02))
    every, results = Enumerated(), Results(options)
    searches = []
    for kind, seed, target_m in product(reversed(SEARCHES), range(options.seeds), TARGETS_M):
        row = results.piece(partial(one_search, splits, every, target_m, kind, seed, options), search=kind, seed=seed,
                            target_m=target_m)
        searches.append(row)
        print(f"{kind:15s} seed {seed}  spaces within 10 % {row['spaces']:.1%}  {row['text']}", flush=True)
    by_seed = [results.piece(partial(accuracies, splits, every, seed, searches, options), search="accuracies",
                             seed=seed, members=options.members) for seed in range(options.seeds)]
    report(every, searches, by_seed)


if __name__ == "__main__":
    main()
