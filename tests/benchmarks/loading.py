"""Is decoding while training the bottleneck, and how much memory does it take? On synthetic JPEGs, on this machine.

    python -m tests.benchmarks.loading [--images 5000] [--kind folder] [--size 224] [--resolution 224] [--batch 32]
                                       [--steps 12] [--threads 2] [--space efficientnet_lite] [--memory-mb 2048]

Images per second of decoding and augmenting alone, of training steps alone (one batch again and again), and of both
together: the loader is no bottleneck where both together are as fast as the training alone. Memory is what the process
and those that decode for it have of their own (PSS, so that shared pages count once), less what the training of one
batch had taken before: that is what 'beside the model' means. The pictures are written once, to --folder.
"""
from __future__ import annotations

import argparse
import io
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from actors.data import Augmentation, Batches, Preprocessing
from actors.loading import crew
from actors.streamed import StreamedImages
from actors.supernet.training import SupernetSettings, Trainer
from orchestrator.data.datasets import DataSettings, load_dataset
from searchspaces.catalogue import make_space
from searchspaces.training.training import Batch

DISTINCT = 500          # pictures; every file has a number of its own behind the last byte that counts
CLASSES, DETAIL = 10, 28
SPEED_TARGET, MEMORY_TARGET_MB = 0.95, 2048.0


def pictures(size: int) -> list[bytes]:
    """Smooth colours with as much detail as gives photographs' compression."""
    rng, found = np.random.default_rng(0), []
    for _ in range(DISTINCT):
        small = Image.fromarray(rng.integers(0, 256, (DETAIL, DETAIL, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((size, size), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def written(root: Path, kind: str, images: int, size: int) -> Path:
    """The data set, made where it is not there yet."""
    path = root / f"{kind}-{images}-{size}{'.parquet' if kind == 'parquet' else ''}"
    if path.exists():
        return path
    made = pictures(size)
    files = (made[i % DISTINCT] + i.to_bytes(4, "little") for i in range(images))
    begun = path.with_name(f".{path.name}")
    if kind == "parquet":
        schema = pa.schema({"image": pa.struct({"bytes": pa.binary()}), "label": pa.int64()})
        with pq.ParquetWriter(begun, schema) as writer:
            for start in range(0, images, 1000):
                rows = range(start, min(start + 1000, images))
                writer.write_table(pa.table({"image": [{"bytes": next(files)} for _ in rows],
                                             "label": [row % CLASSES for row in rows]}, schema))
    else:
        for label in range(CLASSES):
            (begun / str(label)).mkdir(parents=True, exist_ok=True)
        for i, content in enumerate(files):
            (begun / str(i % CLASSES) / f"{i}.jpg").write_bytes(content)
    return begun.rename(path)


class Memory:
    """The largest memory in MB of this process and its children between `reset` and `peak_mb`, looked at often."""

    def __init__(self) -> None:
        self._process, self._peak = psutil.Process(), 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def reset(self) -> None:
        self._peak = 0.0

    @property
    def peak_mb(self) -> float:
        return max(self._peak, self.now_mb())

    def _watch(self) -> None:
        while True:
            self._peak = max(self._peak, self.now_mb())
            time.sleep(0.2)

    def now_mb(self) -> float:
        total = 0
        for process in (self._process, *self._process.children(recursive=True)):
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue    # it has just ended
        return total / 1e6


def rate(steps: Iterable[int], images: int) -> float:
    """Images per second; the first step warms up."""
    times = []
    for _ in steps:
        times.append(time.perf_counter())
    return images * (len(times) - 1) / (times[-1] - times[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--kind", choices=["folder", "parquet"], default="folder")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--space", default="efficientnet_lite")
    parser.add_argument("--memory-mb", type=float, default=2048.0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "paretoray-loading")
    options = parser.parse_args()
    print("command: python -m tests.benchmarks.loading " + " ".join(
        f"--{name.replace('_', '-')} {value}" for name, value in vars(options).items() if name != "folder"))
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    path = written(options.folder, options.kind, options.images, options.size)

    memory, start = Memory(), time.perf_counter()
    # One byte of memory, so that it is streamed however small it is; then as the configuration would say.
    found = load_dataset(DataSettings(name=options.kind, train=path, memory_mb=1e-6)).train
    assert isinstance(found, StreamedImages)
    train = replace(found, memory_mb=options.memory_mb)
    print(f"{options.images} images found, their headers read: {time.perf_counter() - start:.1f} s, "
          f"{memory.peak_mb:.0f} MB")
    preprocessing = Preprocessing((0.5,) * 3, (0.25,) * 3, options.resolution, 3)
    batches = Batches(train, preprocessing, Augmentation(8, flip=True), options.batch, 0)
    item_mb = preprocessing.input_mb(options.batch) + options.batch * options.size ** 2 * 3 / 1e6
    print(f"decoded by {crew(item_mb, options.memory_mb, options.threads, float('inf'))} at most")

    space = make_space(options.space, classes=CLASSES, channels=3, options={"resolution": options.resolution})
    trainer = Trainer(space, train, preprocessing, SupernetSettings(batch_size=options.batch))
    batch, steps = batches.get(0, 0), [(0, step) for step in range(options.steps)]

    def trained(some: Iterable[Batch]) -> Iterable[int]:
        for number, one in enumerate(some):
            trainer.training.step(one, None)
            yield number

    alone = rate(trained(batch for _ in steps), options.batch)
    beside = memory.now_mb()
    memory.reset()
    loading = rate((0 for _ in batches.of([(1, step) for step in range(min(batches.steps, 4 * options.steps))])),
                   options.batch)
    together = rate(trained(batches.of(steps)), options.batch)
    taken = memory.peak_mb - beside
    print(f"decoding and augmenting alone: {loading:.1f} images/s\ntraining step alone: {alone:.2f} images/s\n"
          f"both together: {together:.2f} images/s")
    print(f"both together / training alone: target at least {SPEED_TARGET}, ours {together / alone:.3f}")
    print(f"decoding alone / training alone: more than 1, ours {loading / alone:.1f}")
    whole_mb = options.images * options.size ** 2 * 3 / 1e6
    print(f"memory beside the model: target at most {MEMORY_TARGET_MB:.0f} MB, ours {taken:.0f} MB "
          f"({taken / whole_mb:.3f} of the {whole_mb:.0f} MB that all images take once decoded)")


if __name__ == "__main__":
    main()
