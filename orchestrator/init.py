"""`paretoray init PATH`: looks at a folder or Parquet file of images and at this machine, and writes a configuration.

What is chosen, and why, stands beside each key of the file that is written. Nothing is trained or measured here.
"""
from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from actors.data import Splits
from actors.targets.catalogue import announced
from orchestrator.config import SearchSettings, SupernetSettings, parse_config
from orchestrator.data.datasets import DataSettings, load_dataset
from orchestrator.data.filecheck import check_files
from orchestrator.data.imagefiles import labels_of
from orchestrator.record.progress import roughly
from orchestrator.resources.devices import bounded, gpu_resources
from orchestrator.resources.gpus import GpuOffer
from orchestrator.resources.team import supernet_team
from searchspaces.catalogue import make_space
from searchspaces.errors import ConfigError, DataError

LOOKED_AT = 2000            # images decoded to learn shape and colours
COMMON_SIDE = 224           # of images of different sizes, which are photographs as a rule
SECONDS = 3.0               # for GPUs and phones to answer
STEPS = 12_000              # of supernet training that is aimed at, within the bounds on epochs
EPOCHS = (10, 150)
MADDS_PER_S = 4e9           # of training on one core, forward and backward, small convolutions: a rough figure


@dataclass(frozen=True)
class Machine:
    """What this machine offers: cores for this process, GPUs that Ray would find, phones that adb knows."""

    cores: int
    gpus: int
    phones: tuple[str, ...]


@dataclass(frozen=True)
class Seen:
    """The data: `settings` that read it, how many images it has, a sample of them, and what to say of it."""

    settings: DataSettings
    images: int
    sample: Splits
    notes: Sequence[str]

    @property
    def side(self) -> int:
        return int(self.sample.train.shape[0])

    @property
    def photographs(self) -> bool:
        """Colour, or more than 32 pixels a side: small grey pictures are digits, letters or drawings."""
        return self.sample.channels == 3


def look_at_machine() -> Machine:
    gpus, phones = bounded([functools.partial(gpu_resources, SECONDS), functools.partial(announced, "android", {})],
                           SECONDS)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = {} if isinstance(gpus, Exception) else gpus
    serials = [] if isinstance(phones, Exception) else [name.partition(":")[2] for name in phones]
    return Machine(cores, int(found.get("GPU", 0)), tuple(sorted(filter(None, serials))))


def look_at_data(path: Path) -> Seen:
    """DataError, in one sentence, where no classifier can be trained on it."""
    if not path.exists():
        raise DataError(f"there is nothing at {path.absolute()}; give a folder with a sub-folder of images per class, "
                        "or a Parquet file with the columns 'image' and 'label'")
    train, test = _parts(path)
    kind = "folder" if train.is_dir() else "parquet"
    raw: dict[str, object] = {"name": kind, "train": str(train)}
    raw |= {"test": str(test)} if test else {}
    notes = check_files(kind, train, test)
    images = len(labels_of(train, kind == "folder")[0])
    for extra in ({}, {"size": COMMON_SIDE}, {"channels": 3}, {"size": COMMON_SIDE, "channels": 3}):
        settings = DataSettings.model_validate(raw | extra)
        try:
            sample = load_dataset(settings.model_copy(update={"limit": LOOKED_AT}))
        except DataError as error:
            if "set data.size" in str(error) or "set data.channels" in str(error):
                continue
            raise
        if sample.train.shape[0] != sample.train.shape[1]:
            settings = settings.model_copy(update={"size": min(224, max(sample.train.shape[:2]))})
            sample = load_dataset(settings.model_copy(update={"limit": LOOKED_AT}))
        return Seen(settings, images, sample, notes)
    raise DataError(f"the images of {train} have different sizes and colours that no setting brings together; convert "
                    "them first")


def _parts(path: Path) -> tuple[Path, Path | None]:
    """Training and test data: `train` and `test` inside a folder (or beside a train.parquet) where they are."""
    if path.is_dir():
        for suffix in ("", ".parquet"):
            if (path / f"train{suffix}").exists():
                test = path / f"test{suffix}"
                return path / f"train{suffix}", test if test.exists() else None
        return path, None
    test = path.with_name(path.name.replace("train", "test"))
    return path, test if test != path and test.exists() else None


def write_config(path: Path, out: Path, force: bool = False) -> list[str]:
    """Writes the configuration; returns sentences for the user. ConfigError where the file is there already."""
    if out.exists() and not force:
        raise ConfigError(f"{out} exists already; choose another file with --out, or overwrite it with --force")
    seen, machine = look_at_data(path), look_at_machine()
    text, hours = compose(seen, machine, out)
    parse_config(yaml.safe_load(text), str(out))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
    except OSError as error:
        raise ConfigError(f"cannot write {out} ({error.strerror}); choose another file with --out") from error
    sample = seen.sample
    return [f"{seen.images} images of {len(sample.classes)} classes, {sample.channels} channel(s), {seen.side} x "
            f"{seen.side} pixels; {machine.cores} cores, {machine.gpus} GPUs, {len(machine.phones)} phones",
            *seen.notes,
            f"{out} is written; training takes {hours} here, a rough estimate",
            f"start with: paretoray search {out}"]


def compose(seen: Seen, machine: Machine, out: Path) -> tuple[str, str]:
    """The file's text, and how long the supernet trains, in words."""
    sample, data = seen.sample, seen.settings
    space, why, resolution = _space(seen.side)
    batch = 64 if seen.images < 20_000 else 128
    kept = 1.0 - data.val_fraction - (0.0 if data.test else data.test_fraction)
    steps = max(1, round(kept * seen.images / batch))
    epochs = int(np.clip(round(STEPS / steps), *EPOCHS))
    section = SupernetSettings(batch_size=batch)
    workers = supernet_team(section, SearchSettings(), machine.cores, GpuOffer(machine.gpus, machine.gpus)).workers
    hours = _duration(space, resolution, sample, epochs, steps * batch, workers, machine)
    paths = [f"  name: {data.name}", f"  train: {_quoted(data.train)}"]
    paths += [f"  test: {_quoted(data.test)}"] if data.test else []
    if data.size is not None:
        paths.append(f"  size: {data.size}                      # the images differ in size or are not square")
    if data.channels is not None:
        paths.append(f"  channels: {data.channels}                    # some images are grey, some are colour")
    paths.append(f"  val_fraction: {data.val_fraction}              # the search chooses by these images")
    paths += [] if data.test else [f"  test_fraction: {data.test_fraction}             # never seen by the search; the "
                                   "report shows their accuracy"]
    target = ["target: onnx_cpu                # ONNX Runtime on this processor, one thread, one image at a time"]
    if machine.gpus:
        target.append("# target: cuda                  # this machine's GPU; see docs/cuda.md")
    if machine.phones:
        target.append(f"# a phone answers to adb ({', '.join(machine.phones)}): see configs/android.yaml and "
                      "docs/android.md")
    least = 32 if seen.images < 4000 else 512
    return "\n".join([
        f"# {seen.images} images of {len(sample.classes)} classes, {sample.channels} channel(s), {seen.side} x "
        f"{seen.side} pixels. Written by paretoray init.",
        f"#   paretoray search {out}",
        "data:", *paths, "",
        f"# {why}", "space:", f"  name: {space}", f"  resolution: {resolution}", "",
        *target, "",
        "budgets:", "  count: 6                      # spread over what the device reaches; or a list: [2ms, 5ms]", "",
        "latency:", "  initial: 40                   # networks measured before latency is predicted",
        "  maximum: 120", "",
        f"# Supernet training takes {hours} on this machine, a rough estimate. Fewer epochs: sooner, less accurate.",
        "supernet:", f"  epochs: {epochs}", f"  batch_size: {batch}",
        f"  flip: {str(seen.photographs).lower()}                  # mirrored images are "
        + ("still of their class" if seen.photographs else "of no class: letters and digits do not mirror"),
        f"  crop_padding: {max(1, resolution // 8)}", "",
        "controller: pnag                # the generator: trained once, answers any budget", "",
        "search:", "  evaluations: 300",
        f"  calibration_images: {least}       # training images that settle batch norm for each architecture",
        *(["  validation_images: 2000"] if data.val_fraction * seen.images > 2000 else []), "",
        "delivery:", "  fine_tune_epochs: 10          # of its own training, before a model is handed over", ""]), hours


def _space(side: int) -> tuple[str, str, int]:
    """Space, the reason, and its resolution: the images' own size where it fits, in steps of the last stride."""
    if side <= 24:
        return "mobilenetv3-s16", "Small images: the variant that shrinks the map least.", 16
    if side <= 64:
        return "mobilenetv3-s32", "Images like CIFAR's: width 0.5, few strides.", 32 if side <= 40 else 64
    return ("mobilenetv3", "Large images: the space of the paper, for a GPU or much patience.",
            int(np.clip(side // 32 * 32, 96, 224)))


def _duration(space: str, resolution: int, sample: Splits, epochs: int, images: int, workers: int,
              machine: Machine) -> str:
    made = make_space(space, classes=len(sample.classes), channels=sample.channels, options={"resolution": resolution})
    per_image = 3.0 * 3.0 * float(np.mean(made.cost(made.extremes())[0]))    # forward and backward, of about 3 subnets
    speed = (50 if machine.gpus else 1) * MADDS_PER_S * workers
    return roughly(epochs * images * per_image / speed)


def _quoted(path: Path | None) -> str:
    """A path as a YAML text that nothing in it can break."""
    return json.dumps(str(path), ensure_ascii=False)
