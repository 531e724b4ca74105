"""Are members of an Elite Space better than other networks of the same cost? Supernet errors, then trained alone.

    python -m tests.benchmarks.nss_elite [--targets 2 5] [--images 3000] [--epochs 12] [--members 200] [--alone 10]
        [--seed 0] [--folder DIR]

The shrunk space of NSS (expanded-s16, 2^21 networks) on CIFAR-10 at 16 px. One NSS search finds a space for every
target (millions of multiply-adds). Another supernet is trained for the comparison alone, as in NSS' warm-up: uniform
members, full widths and depths more often at first (specification nss 10; its cost is not counted). Three sides:
members of the Elite Space, of the whole space, and of those with ascending depths and widths (RegNet's rule), each
uniform among its networks within 10 % of the target. Errors on 1,000 test images, batch norm estimated anew; then
networks of every side trained from scratch. P values: Mann-Whitney, two-sided, against the Elite Space.

Every finished piece is a line in DIR/results.jsonl or the file of the supernet, and is not done again.
"""
from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from scipy.stats import mannwhitneyu

from actors.data import Augmentation, Preprocessing, Splits
from actors.evaluator import SupernetEvaluator, share_correct
from actors.rollout.trainer import ArchitectureTrainer, ProxySettings
from actors.supernet.training import SupernetSettings, Trainer
from orchestrator.controllers.nss.choice import choose
from orchestrator.data.datasets import DataSettings, load_dataset
from searchspaces.elite.space import EliteSpace, restricted
from searchspaces.expanded.space import ExpandedS16
from searchspaces.space import Tokens
from searchspaces.training.nss import NssSettings, SpaceAim
from searchspaces.training.spaces import SpaceCosts, SpaceOfSpaces

SIDES = ("elite", "whole", "monotone")
WINDOW, DRAWS, MILLION = 0.1, 5, 1e6
TEST_IMAGES, CALIBRATION_IMAGES = 1000, 1000
LEARNING_RATE = 0.1                 # of theta: some hundred steps
CHUNK, ATTEMPTS, BATCH = 25, 2000, 4096
AUGMENTATION = Augmentation(padding=2, flip=True)


class Study:
    """The pieces of one benchmark; `done` returns a piece, from the file where it is there."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.space = options, ExpandedS16(classes=10, channels=3)
        self.spaces = SpaceOfSpaces(self.space)
        self.splits: Splits = load_dataset(DataSettings(
            name="parquet", train=options.data / "train.parquet", test=options.data / "test.parquet", size=16,
            limit=options.images, val_fraction=0.02))
        self.preprocessing = Preprocessing.fit(self.splits.train, self.space.resolution)
        self._file = options.folder / "results.jsonl"
        self._sizes = {name: getattr(options, name) for name in ("images", "epochs", "seed", "targets", "alone_epochs")}
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        self._known = {row["piece"]: row for row in map(json.loads, lines)
                       if all(row[name] == size for name, size in self._sizes.items())}

    def done(self, piece: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if piece not in self._known:
            start = time.perf_counter()
            row = {"piece": piece} | self._sizes | work() | {"seconds": time.perf_counter() - start}
            with self._file.open("a") as out:
                out.write(json.dumps(row) + "\n")
            print(piece, {name: value for name, value in row.items() if name not in self._sizes and
                          not isinstance(value, list)}, flush=True)
            self._known[piece] = row
        return self._known[piece]

    # --- training --------------------------------------------------------------------------------------------------

    def trainer(self, settings: NssSettings, epochs: int, seed: int) -> Trainer:
        return Trainer(self.space, self.splits.train, self.preprocessing, SupernetSettings(
            training=settings, epochs=epochs, batch_size=64, seed=seed, augmentation=AUGMENTATION))

    def search(self) -> dict[str, Any]:
        """Bins of the Elite Space of every target."""
        options = self.options
        targets = [target * MILLION for target in options.targets]
        trainer = self.trainer(NssSettings(aims=tuple(map(SpaceAim, targets)), learning_rate=LEARNING_RATE),
                               options.epochs, options.seed)
        numbers = [trainer.train_epoch() for _ in range(options.epochs)][-1]
        logits, costs = trainer.training.distribution(), SpaceCosts(self.spaces, None, options.seed)
        found = [choose(costs, [logits[f"{a}.{k}"] for k in range(len(self.spaces.groups))], target, "madds", DRAWS,
                        options.seed + a) for a, target in enumerate(targets)]
        return {"bins": [list(one.bins) for one in found], "texts": [one.text(self.spaces.groups) for one in found],
                "deviations": [[draw.deviation for draw in one.draws] for one in found], "entropy": numbers["entropy"]}

    def supernet(self) -> dict[str, torch.Tensor]:
        """Warm-up all along; the last epoch, which NSS must have, draws uniform members too: theta stays at zero and
        its draws are one-hot by then."""
        options = self.options
        file = options.folder / f"supernet{options.seed}-{options.images}-{options.epochs}.safetensors"
        if not file.exists():
            epochs = 2 * options.epochs
            trainer = self.trainer(NssSettings(aims=(SpaceAim(3 * MILLION),), learning_rate=1e-9, held_out_share=0.02,
                                               warm_up=1 - 1 / epochs), epochs, options.seed + 1000)
            for epoch in range(epochs):
                numbers = trainer.train_epoch()
                print(f"supernet for the comparison, epoch {epoch + 1} of {epochs}: loss {numbers['loss']:.2f}",
                      flush=True)
            save_file({name: tensor.contiguous() for name, tensor in trainer.training.supernet.state_dict().items()},
                      file)
        return load_file(file)

    # --- members ---------------------------------------------------------------------------------------------------

    def members(self, side: str, target: float, bins: Sequence[int], count: int) -> Tokens:
        """Distinct networks within 10 % of the target, in random order."""
        low, high = (1 - WINDOW) * target * MILLION, (1 + WINDOW) * target * MILLION
        rng = np.random.default_rng([self.options.seed, SIDES.index(side), int(target * 1000)])
        if side == "monotone":
            return self.space.sample_monotone(rng, count, (int(low), int(high)))
        elite = EliteSpace(self.space, restricted(self.space, self.spaces.groups, [[b] for b in bins]))
        kept = np.zeros((0, len(self.space.choices)), dtype=np.int8)
        for _ in range(ATTEMPTS):
            rows = (elite.widened(elite.sample_uniform(rng, BATCH)) if side == "elite" else
                    self.space.sample_uniform(rng, BATCH))
            madds = self.space.cost(rows)[0]
            kept = np.concatenate([kept, rows[(low <= madds) & (madds <= high)]])
            first = np.sort(np.unique(kept, axis=0, return_index=True)[1])
            if len(first) >= count:
                break
        return kept[first][:count]

    def shared_errors(self, rows: Tokens) -> Callable[[], dict[str, Any]]:
        def work() -> dict[str, Any]:
            if not hasattr(self, "_evaluator"):
                train, test = (self.preprocessing.prepare(images.take(np.arange(min(count, len(images)))))
                               for images, count in ((self.splits.train, CALIBRATION_IMAGES),
                                                     (self.splits.test, TEST_IMAGES)))
                self._evaluator = SupernetEvaluator(self.space, test, train)
                self._evaluator.set_weights(1, {name: tensor.numpy() for name, tensor in self.supernet().items()})
            return {"errors": [1 - self._evaluator.accuracy(row) for row in rows]}

        return work

    def error_alone(self, row: Tokens) -> Callable[[], dict[str, Any]]:
        def work() -> dict[str, Any]:
            recipe = ProxySettings(epochs=self.options.alone_epochs, seed=self.options.seed, augmentation=AUGMENTATION)
            with tempfile.TemporaryDirectory() as folder:
                network = ArchitectureTrainer(self.space, self.splits.train, self.preprocessing, recipe,
                                              Path(folder)).train(row).network
            test = self.preprocessing.prepare(self.splits.test)
            return {"error": 1 - share_correct(network, torch.from_numpy(test.images), torch.from_numpy(test.labels)),
                    "network": self.space.text(row)}

        return work


def numbers(errors: NDArray[np.float64], elite: NDArray[np.float64]) -> str:
    """Mean, spread, median and best; against the Elite Space the chance that its member is the better one, and p."""
    spread = errors.std(ddof=1) if len(errors) > 1 else np.nan
    text = (f"{100 * errors.mean():5.1f} +- {100 * spread:4.1f} %, median {100 * np.median(errors):.1f}, best "
            f"{100 * errors.min():.1f}")
    if errors is elite:
        return text
    test = mannwhitneyu(errors, elite)      # its statistic counts the pairs in which the first is the larger
    return f"{text}; elite better {test.statistic / len(errors) / len(elite):.2f}, p {test.pvalue:.2g}"


def report(study: Study, errors: dict[tuple[float, str], NDArray[np.float64]], title: str) -> None:
    for target in study.options.targets:
        elite = errors[target, "elite"]
        together = np.concatenate([errors[target, side] for side in SIDES])
        marks = np.percentile(together, [10, 25, 50])
        for side in SIDES:
            mine = errors[target, side]
            shares = "  ".join(f"F({100 * mark:.1f} %) = {(mine < mark).mean():.2f}" for mark in marks)
            print(f"{title}, {target:g} M, {side:8s} {len(mine):3d} networks: {numbers(mine, elite):84s} {shares}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", type=float, default=[2.0, 5.0], help="millions of multiply-adds")
    for name, default in (("--images", 3000), ("--epochs", 12), ("--members", 200), ("--alone", 10),
                          ("--alone-epochs", 10), ("--seed", 0)):
        parser.add_argument(name, type=int, default=default)
    shared = Path(os.environ.get("PARETORAY_SHARED", "../shared/data"))
    parser.add_argument("--data", type=Path, default=shared / "cifar10")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/nss_elite"))
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    study = Study(options)
    search = study.done("search", study.search)
    print("\n".join(search["texts"]))
    rows: dict[tuple[float, str], Tokens] = {}
    shared_errors: dict[tuple[float, str], NDArray[np.float64]] = {}
    alone: dict[tuple[float, str], NDArray[np.float64]] = {}
    for target, bins in zip(options.targets, search["bins"]):
        for side in SIDES:
            rows[target, side] = study.members(side, target, bins, options.members)
            madds = study.space.cost(rows[target, side])[0] / MILLION
            print(f"{target:g} M, {side}: {len(madds)} networks, mean {madds.mean():.3f} M multiply-adds", flush=True)
    for key, mine in rows.items():
        shared_errors[key] = np.array([error for start in range(0, len(mine), CHUNK) for error in study.done(
            f"supernet {key[0]:g} {key[1]} {start}", study.shared_errors(mine[start:start + CHUNK]))["errors"]])
    report(study, shared_errors, "supernet error")
    for target in options.targets:
        for i in range(options.alone):      # sides in turn, so that an interrupted benchmark has compared them
            for side in SIDES:
                found = study.done(f"alone {target:g} {side} {i}", study.error_alone(rows[target, side][i]))["error"]
                alone[target, side] = np.append(alone.get((target, side), []), found)
    if alone:
        report(study, alone, "error alone")


if __name__ == "__main__":
    main()
