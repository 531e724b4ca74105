"""NSS' warm-up with its overrides (largest values trained more often) and without: how well do shared weights rank?

    python -m tests.benchmarks.nss_warmup [--seeds 2] [--images 1500] [--epochs 12] [--final-epochs 10] [--folder DIR]

The shrunk space expanded-s16 on CIFAR-10 at 16 px. Neither loss acts on the distribution over spaces, which stays
uniform: all that differs is `NssSettings.full`. 20 networks spread over the cost are evaluated on the test images with
the supernet's weights (batch norm re-estimated) and after training alone; so are members of the widest and deepest
space, with the supernet's weights only. Every finished network and supernet is a line in DIR/results.jsonl and is not
done again.
"""
from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau, spearmanr

from actors.data import Augmentation, Preprocessing, Splits
from actors.rollout.trainer import ArchitectureTrainer, ProxySettings
from actors.supernet.actor import SupernetSettings
from actors.supernet.finetune import recalibrate
from actors.supernet.training import Trainer
from orchestrator.data.datasets import DataSettings, load_dataset
from searchspaces.expanded.space import ExpandedS16
from searchspaces.space import Tokens
from searchspaces.training.nss import NssSettings, SpaceAim
from searchspaces.training.sandwich import evaluate
from searchspaces.training.spaces import SpaceOfSpaces

EXPECTED = "expected (specification 15): with the overrides, large members are more accurate and the ranks agree better"
NETWORKS, LARGE, CALIBRATION = 20, 12, 500
SPACE = ExpandedS16(classes=10, channels=3)
SPACES = SpaceOfSpaces(SPACE)
AUGMENTATION = Augmentation(padding=2, flip=True)
OVERRIDES = {"with": True, "without": False}


def spread() -> Tokens:
    """int8[NETWORKS, T]: at equal steps of the multiply-adds' quantiles."""
    rows = SPACE.sample_uniform(np.random.default_rng(0), 2000)
    order = np.argsort(SPACE.cost(rows)[0], kind="stable")
    return rows[order[((np.arange(NETWORKS) + 0.5) / NETWORKS * len(rows)).astype(int)]]


def large() -> Tokens:
    """int8[LARGE, T]: members of the space of the last bins, the widest and deepest."""
    last = [len(group) - 1 for group in SPACES.groups]
    return SPACES.sample(np.random.default_rng(0), np.tile(np.array(last), (LARGE, 1)))


class Benchmark:
    """The data, and the two ways to an accuracy on its test images."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.splits: Splits = load_dataset(DataSettings(
            name="parquet", train=options.data / "train.parquet", test=options.data / "test.parquet", size=16,
            limit=options.images, val_fraction=0.02))
        self.preprocessing = Preprocessing.fit(self.splits.train, SPACE.resolution)
        self.images = self.preprocessing.tensor(self.splits.test.images)
        self.labels = torch.from_numpy(self.splits.test.labels)

    def alone(self, tokens_T: Tokens) -> dict[str, Any]:
        recipe = ProxySettings(epochs=self.options.final_epochs, augmentation=AUGMENTATION,
                               calibration_images=CALIBRATION)
        with tempfile.TemporaryDirectory() as folder:
            trained = ArchitectureTrainer(SPACE, self.splits.train, self.preprocessing, recipe,
                                          Path(folder)).train(tokens_T)
        return {"accuracy": evaluate(trained.network, self.images, self.labels)}

    def shared(self, full: bool, seed: int) -> dict[str, Any]:
        method = NssSettings(aims=(SpaceAim(3.7e6),), cost_weight=0.0, task_weight=0.0, held_out_share=0.02, full=full)
        trainer = Trainer(SPACE, self.splits.train, self.preprocessing, SupernetSettings(
            training=method, epochs=self.options.epochs, batch_size=64, seed=seed, augmentation=AUGMENTATION))
        for _ in range(self.options.epochs):
            trainer.train_epoch()
        assert not any(logits.any() for logits in trainer.training.distribution().values()), "no longer uniform"

        def accuracy(tokens_T: Tokens) -> float:
            network = trainer.training.supernet.extract(tokens_T)
            recalibrate(network, self.splits.train, trainer.batches, CALIBRATION)
            return evaluate(network, self.images, self.labels)

        return {"spread": [accuracy(row) for row in spread()], "large": [accuracy(row) for row in large()]}


class Results:
    """DIR/results.jsonl: pieces of this size that were done before, and new ones."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._file = options.folder / "results.jsonl"
        self._sizes = {name: getattr(options, name) for name in ("images", "epochs", "final_epochs")}
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        self._rows = [row for line in lines if (row := json.loads(line))["sizes"] == self._sizes]

    def piece(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        for row in self._rows:
            if row["piece"] == name:
                return row
        row = {"piece": name, **work(), "sizes": self._sizes}
        with self._file.open("a") as out:
            out.write(json.dumps(row) + "\n")
        return row


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--seeds", 2), ("--images", 1500), ("--epochs", 12), ("--final-epochs", 10)):
        parser.add_argument(name, type=int, default=default)
    shared = Path(os.environ.get("PARETORAY_SHARED", "../shared/data"))
    parser.add_argument("--data", type=Path, default=shared / "cifar10")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/nss_warmup"))
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    benchmark, results = Benchmark(options), Results(options)
    found = {}
    alone = []
    for row in spread():
        alone.append(results.piece(SPACE.text(row), partial(benchmark.alone, row))["accuracy"])
        print(f"alone {SPACE.text(row)}: {alone[-1]:.2%}", flush=True)
    for seed, name in product(range(options.seeds), OVERRIDES):
        found[name, seed] = results.piece(f"{name} overrides, seed {seed}",
                                          partial(benchmark.shared, OVERRIDES[name], seed))
        print(f"{name} overrides, seed {seed}: mean test accuracy {np.mean(found[name, seed]['spread']):.2%}, large "
              f"members {np.mean(found[name, seed]['large']):.2%}", flush=True)
    print(f"\n{EXPECTED}\nours, {options.images} images at 16 px, {NETWORKS} networks:")
    for name, seed in product(OVERRIDES, range(options.seeds)):
        shared_accuracies = found[name, seed]["spread"]
        print(f"{name:8s} overrides, seed {seed}  Spearman {spearmanr(shared_accuracies, alone)[0]:+.2f}  Kendall "
              f"{kendalltau(shared_accuracies, alone)[0]:+.2f}  mean accuracy {np.mean(shared_accuracies):.2%} (alone "
              f"{np.mean(alone):.2%})  widest and deepest space {np.mean(found[name, seed]['large']):.2%}")


if __name__ == "__main__":
    main()
