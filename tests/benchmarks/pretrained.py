"""What a search from ImageNet weights gives beside what a user would fine-tune instead, on CIFAR-10.

    python -m tests.benchmarks.pretrained [--images 5000] [--seeds 1] [--first-seed 0] [--epochs 2]
        [--fine-tune-epochs 6] [--resolutions 32 48 64 80 96 112 128 144] [--parts search scratch ranks] [--folder DIR]

Six budgets lie in equal ratios between the measured latencies of EfficientNet-Lite0 at 32 and at 128 px (onnx_cpu).

search   the search from efficientnet_lite0 with `compare: [fixed]`: for every budget the hand-over beside Lite0 as it
         is, at the largest resolution (any multiple of 16) under the budget, fine-tuned on as many images.
scratch  the same budgets from scratch, in the space of configs/cifar10_cpu.yaml at 32 px, with as many epochs as pass
         in the time that the supernet of `search` trained.
ranks    ten subnets: accuracy with the supernet's weights against fine-tuning each alone from the same start, with as
         many passes; rank correlation and mean gap.

`--held-out` of all images are beside the training images, to choose by. Test accuracy is on as many test images. The
same command goes on with what was interrupted; a longer list of parts or more seeds adds to what is there.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from scipy.stats import spearmanr

from actors.data import Batches, Images, Preprocessing
from actors.evaluator import share_correct
from actors.supernet.actor import load_weights
from actors.supernet.finetune import fine_tuned_weights, recalibrate
from actors.targets.onnx_cpu import OnnxCpuTarget
from actors.targets.target import Workload
from orchestrator.comparison.compared import Comparison
from orchestrator.config import load_config
from orchestrator.handover.delivered import Delivered
from orchestrator.handover.generated import delivered_entries
from orchestrator.record.files import read_json, write_json
from orchestrator.record.store import RunStore
from orchestrator.run.search import Search
from orchestrator.services.context import data_and_space
from orchestrator.services.pretrained import preprocessing_for, started
from orchestrator.services.recipes import supernet_settings
from searchspaces.efficientnet_lite.space import EfficientNetLite
from searchspaces.mobilenetv3.space import MobileNetV3S32
from searchspaces.onnxgraph import to_onnx
from searchspaces.supernet import Supernet
from searchspaces.training.sandwich import SandwichSettings
from searchspaces.training.training import Schedule

BUDGETS, SUBNETS, VISITS = 6, 10, 15


# --- what is asked -------------------------------------------------------------------------------------------------


def budgets(options: argparse.Namespace) -> list[float]:
    """Measured once per folder, so that all seeds and parts have the same."""
    path = options.folder / "budgets.json"
    if not path.exists():
        spaces = [EfficientNetLite(classes=10, channels=3, resolution=resolution) for resolution in (32, 128)]
        files = [to_onnx(space.graph(space.extremes()[1])).SerializeToString() for space in spaces]
        with contextlib.closing(OnnxCpuTarget((3, 32, 32))) as target:
            handles = target.prepare([Workload(onnx=file) for file in files])
            visits = [[sample.latency_ms for sample in target.measure(handles)] for _ in range(VISITS)]
        fastest_ms, slowest_ms = np.min(visits, axis=0)     # what other work cost is not the network's
        values = np.geomspace(fastest_ms, slowest_ms, BUDGETS)
        write_json(path, [round(float(value), 4) for value in values])
    found: list[float] = read_json(path)
    return found


def configuration(options: argparse.Namespace, part: str, seed: int, epochs: int) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "seed": seed, "target": "onnx_cpu", "controller": "pnag", "budgets": {"values_ms": budgets(options)},
        "data": {"name": "parquet", "train": str(options.data / "train.parquet"),
                 "test": str(options.data / "test.parquet"), "limit": round(options.images / (1 - options.held_out)),
                 "val_fraction": options.held_out, "seed": seed},
        "latency": {"initial": 40, "maximum": 80},
        "search": {"evaluations": options.evaluations, "calibration_images": 512},
        "delivery": {"alternatives": 4, "fine_tune_epochs": options.fine_tune_epochs}}
    supernet = {"epochs": epochs, "flip": True, "crop_padding": 4}
    if part == "search":
        return raw | {"training": "standard", "compare": ["fixed"],
                      "space": {"name": "efficientnet_lite", "resolution": options.resolutions},
                      "supernet": supernet | {"start": "efficientnet_lite0"}}
    return raw | {"space": "mobilenetv3-s32", "supernet": supernet | {"learning_rate": 0.1}}


def one_run(options: argparse.Namespace, part: str, seed: int, epochs: int) -> RunStore:
    """A finished run; what is there of it is not done again."""
    runs, name = options.folder / "runs", f"{part}-{seed}"
    if (runs / name).exists():
        search = Search.resume(name, runs=runs)
    else:
        file = options.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(configuration(options, part, seed, epochs)))
        search = Search(load_config(file), runs=runs, name=name)
    search.run()
    return RunStore.open(runs, name)


# --- parts ---------------------------------------------------------------------------------------------------------


def search(options: argparse.Namespace, seed: int) -> None:
    store = one_run(options, "search", seed, options.epochs)
    ours = delivered_entries(store, load_config(store.path / "config.yaml"))
    fixed = {entry.model.budget_ms: entry for entry in Comparison(store).entries}
    gains = []
    print(f"seed {seed}: {_trained_s(store) / 60:.0f} minutes of supernet training")
    for model in ours:
        other = fixed[model.budget_ms]
        gains.append((model.test_accuracy or np.nan) - (other.model.test_accuracy or np.nan))
        print(f"  {model.budget_ms:.3f} ms: ours {_said(model)}   Lite0 at {other.resolution} px "
              f"{_said(other.model)}   {100 * gains[-1]:+.1f} points   {model.text}")
    print(f"seed {seed}: {100 * np.nanmean(gains):+.2f} points on average, least {100 * np.nanmin(gains):+.2f} (goal: "
          "+1 on average, ahead everywhere)", flush=True)


def scratch(options: argparse.Namespace, seed: int) -> None:
    epochs = max(1, round(options.epochs * _ratio(options)))
    store = one_run(options, "scratch", seed, epochs)
    for model in delivered_entries(store, load_config(store.path / "config.yaml")):
        print(f"  {model.budget_ms:.3f} ms: from scratch, {epochs} epochs, {_said(model)}")


def ranks(options: argparse.Namespace, seed: int) -> None:
    store = one_run(options, "search", seed, options.epochs)
    config = load_config(store.path / "config.yaml")
    splits, space = data_and_space(config)
    largest = int(space.graph(space.extremes()[1]).input_shape[-1])
    preprocessing, settings = preprocessing_for(config, space, splits.train, largest), supernet_settings(config, [])
    rows = space.sample_uniform(np.random.default_rng([seed, SUBNETS]), SUBNETS)
    path = options.folder / f"ranks-{seed}.json"
    known: dict[str, list[float]] = read_json(path) if path.exists() else {}
    shared = space.make_supernet()
    shared.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in load_weights(
        store.path / "checkpoints", store.state()["weights_version"])[1].items()})
    alone = started("efficientnet_lite0", seed, space)
    for row in rows:
        if space.arch_id(row) not in known:
            batches = Batches(splits.train, preprocessing, settings.augmentation, settings.batch_size, seed)
            network = alone.extract(row)
            fine_tuned_weights(network, batches, options.epochs + options.fine_tune_epochs,
                               config.supernet.learning_rate)
            known[space.arch_id(row)] = [_judged(shared, row, batches, splits.val),
                                         _accuracy(network, preprocessing, splits.val)]
            write_json(path, known)
        print(f"  {space.text(row)}: supernet {known[space.arch_id(row)][0]:.2%}, alone "
              f"{known[space.arch_id(row)][1]:.2%}", flush=True)
    pairs = np.array([known[space.arch_id(row)] for row in rows])
    print(f"seed {seed}: Spearman {spearmanr(*pairs.T).statistic:.2f}, alone better by "
          f"{100 * np.mean(pairs[:, 1] - pairs[:, 0]):.1f} points on average ({len(rows)} subnets, validation)")


def _judged(shared: Supernet, row: Any, batches: Batches, val: Images) -> float:
    network = shared.extract(row)
    recalibrate(network, batches.data, batches, 512)
    return _accuracy(network, batches.preprocessing, val)


def _accuracy(network: torch.nn.Module, preprocessing: Preprocessing, images: Images) -> float:
    prepared = preprocessing.prepare(images)
    return share_correct(network.eval(), torch.from_numpy(prepared.images), torch.from_numpy(prepared.labels))


def _trained_s(store: RunStore) -> float:
    """Seconds that the supernet trained."""
    events = [json.loads(line) for line in (store.path / "events.jsonl").read_text().splitlines()]
    return float(sum(event["duration_s"] for event in events if event["kind"] == "epoch"))


def _ratio(options: argparse.Namespace) -> float:
    """How many epochs from scratch pass in the time of one from ImageNet, by steps of both in turns."""
    spaces = (EfficientNetLite(classes=10, channels=3, resolution=options.resolutions),
              MobileNetV3S32(classes=10, channels=3))
    seconds: tuple[list[float], list[float]] = ([], [])
    trainings = [SandwichSettings().start(space.make_supernet(), Schedule(1, 100, 0)) for space in spaces]
    for _ in range(4):
        for space, training, times in zip(spaces, trainings, seconds):
            size = int(space.graph(space.extremes()[1]).input_shape[-1])
            batch = torch.randn(64, 3, size, size), torch.arange(64) % 10
            start = time.perf_counter()
            training.step(batch)
            times.append(time.perf_counter() - start)
    return float(np.median(seconds[0]) / np.median(seconds[1]))


def _said(model: Delivered) -> str:
    if not model.feasible:
        return "nothing fits"
    return f"{100 * (model.test_accuracy or np.nan):.1f} % at {model.latency_ms:.3f} ms"


PARTS: dict[str, Callable[[argparse.Namespace, int], None]] = {"search": search, "scratch": scratch, "ranks": ranks}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--images", 5000), ("--seeds", 1), ("--first-seed", 0), ("--epochs", 2),
                          ("--fine-tune-epochs", 6), ("--evaluations", 100)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--held-out", type=float, default=0.15, help="share of the images to choose by")
    parser.add_argument("--resolutions", nargs="+", type=int, default=[32, 48, 64, 80, 96, 112, 128, 144])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=["search"])
    data = Path(os.environ.get("PARETORAY_SHARED", "../shared/data"))
    parser.add_argument("--data", type=Path, default=data / "cifar10")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/pretrained"))
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for part in options.parts:
            PARTS[part](options, seed)


if __name__ == "__main__":
    main()
