"""L_gen against L_val as the objective of a cell search: the gap while searching, and the derived cell's accuracy.

    python -m tests.benchmarks.unas_gap [--seeds 4] [--images 2500] [--epochs 15] [--final-epochs 15] [--folder DIR]

DARTS' factorised cell on CIFAR-10 at 16 px (three cells of width 4), weights on 80 % of the images, L_val on the rest.
The gap is validation minus training loss, mean of the last third of the epochs; the derived cell is trained from
scratch on all images and tested. Every finished search is a line in DIR/results.jsonl, and is not done again: an
interrupted benchmark goes on with the same command. Some eight minutes a search on one idle core.
"""
from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.data import Augmentation, Preprocessing, Splits
from actors.rollout.trainer import ArchitectureTrainer, ProxySettings
from actors.supernet.actor import SupernetSettings
from actors.supernet.training import Trainer
from orchestrator.controllers.unas.derived import softmax
from orchestrator.data.datasets import DataSettings, load_dataset
from searchspaces.darts.space import DartsS16
from searchspaces.training.latencyterm import Aim, LatencySettings
from searchspaces.training.unas import Objective, UnasSettings

OBJECTIVES: tuple[Objective, ...] = ("validation", "generalisation")
PAPER = ("paper, CIFAR-10 test error with Gumbel-softmax: L_val 2.79 +- 0.10, L_gen 2.81; ImageNet 26.06 +- 0.51, "
         "24.64 +- 0.13")
AUGMENTATION = Augmentation(padding=2, flip=True)


def one_search(splits: Splits, objective: Objective, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    space = DartsS16(classes=10, channels=3, width=4, cells=3)
    preprocessing = Preprocessing.fit(splits.train, space.resolution)
    method = UnasSettings(aims=(Aim("none", 1.0),), latency=LatencySettings(weight=0.0), objective=objective,
                          learning_rate=0.1)      # few steps: three times the default
    trainer = Trainer(space, splits.train, preprocessing, SupernetSettings(
        training=method, epochs=options.epochs, batch_size=64, seed=seed, augmentation=AUGMENTATION))
    epochs = [trainer.train_epoch() for _ in range(options.epochs)]
    late = epochs[-options.epochs // 3:]
    logits = trainer.training.distribution()
    tokens_T = space.most_probable([softmax(logits[f"0.{e}"]) for e in range(len(space.choices))])
    recipe = ProxySettings(epochs=options.final_epochs, seed=seed, augmentation=AUGMENTATION)
    with tempfile.TemporaryDirectory() as folder:
        trained = ArchitectureTrainer(space, splits.train, preprocessing, recipe, Path(folder)).train(tokens_T)
    with torch.inference_mode():
        found = np.concatenate([trained.network(preprocessing.tensor(images)).argmax(1).numpy()
                                for images in np.array_split(splits.test.images, 20)])
    return {"objective": objective, "seed": seed, "gap": float(np.mean([epoch["gap"] for epoch in late])),
            "entropy": epochs[-1]["entropy"], "accuracy": float((found == splits.test.labels).mean()),
            "cell": space.text(tokens_T), "images": options.images, "epochs": [options.epochs, options.final_epochs]}


def results(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Those that were done before, then the others as they come."""
    file = options.folder / "results.jsonl"
    sizes = {"images": options.images, "epochs": [options.epochs, options.final_epochs]}
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    known = [row for row in known if all(row[name] == size for name, size in sizes.items())]
    yield from known
    done, splits = {(row["objective"], row["seed"]) for row in known}, None
    for seed in range(options.seeds):
        for objective in OBJECTIVES:
            if (objective, seed) in done:
                continue
            splits = splits or load_dataset(DataSettings(
                name="parquet", train=options.data / "train.parquet", test=options.data / "test.parquet", size=16,
                limit=options.images, val_fraction=0.02))
            row = one_search(splits, objective, seed, options)
            with file.open("a") as out:
                out.write(json.dumps(row) + "\n")
            yield row


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--seeds", 4), ("--images", 2500), ("--epochs", 15), ("--final-epochs", 15)):
        parser.add_argument(name, type=int, default=default)
    shared = Path(os.environ.get("PARETORAY_SHARED", "../shared/data"))
    parser.add_argument("--data", type=Path, default=shared / "cifar10")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/unas_gap"))
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows = []
    for row in results(options):
        rows.append(row)
        print(f"{row['objective']:15s} seed {row['seed']}  gap {row['gap']:.3f}  test accuracy {row['accuracy']:.2%}  "
              f"entropy {row['entropy']:.2f}", flush=True)
    print(f"{PAPER}\nours, {options.images} images at 16 px, mean and standard deviation over searches:")
    for objective in OBJECTIVES:
        mine = [row for row in rows if row["objective"] == objective]
        gaps, accuracies = (np.array([row[name] for row in mine]) for name in ("gap", "accuracy"))
        print(f"{objective:15s} {len(mine)} searches  gap {gaps.mean():.3f} +- {gaps.std(ddof=1):.3f}  test error "
              f"{100 * (1 - accuracies.mean()):.1f} +- {100 * accuracies.std(ddof=1):.1f} %")


if __name__ == "__main__":
    main()
