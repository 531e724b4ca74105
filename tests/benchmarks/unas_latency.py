"""Measured latency against a table of layers in one and the same UNAS search: what each derives, what it really takes.

    python -m tests.benchmarks.unas_latency [--epochs 40] [--seeds 3]

One NAS-Bench-201 cell on handwritten digits and this processor (ONNX Runtime), a budget at a third of the latencies
that uniform cells take. "measured" hands the search the latency of every sampled cell; "table" the sum that users of
ProxylessNAS and once-for-all work with: the cell of 3x3 convolutions alone, and for every edge and operation what it
changes there. A runtime leaves out what leads nowhere, which no such sum knows. Two minutes a search on two idle cores.
"""
from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence

import numpy as np
import torch

from actors.data import Augmentation, Preprocessing
from actors.latency.worker import input_shape
from actors.supernet.actor import SupernetSettings
from actors.supernet.training import Trainer
from actors.targets.catalogue import make_target
from actors.targets.target import Workload
from orchestrator.controllers.unas.derived import softmax
from orchestrator.data.datasets import DataSettings, load_dataset
from searchspaces.nasbench201.space import NasBench201
from searchspaces.space import Tokens
from searchspaces.training.latencyterm import Aim, LatencySettings
from searchspaces.training.training import Wishes
from searchspaces.training.unas import UnasSettings

CONV3 = 3       # index of the 3x3 convolution in the vocabulary
Latency = Callable[[Tokens], np.ndarray]


class Processor:
    """Latency of cells on this machine, measured once each."""

    def __init__(self, space: NasBench201) -> None:
        self.space, self.known = space, dict[bytes, float]()

    def __call__(self, tokens_NT: Tokens) -> np.ndarray:
        """float64[N] in ms."""
        rows_NT = self.space.canonical(tokens_NT)
        new = {row.tobytes(): row for row in rows_NT if row.tobytes() not in self.known}
        if new:
            with contextlib.closing(make_target("onnx_cpu", {}, input_shape(self.space))) as target:
                for key, row in new.items():
                    handles = target.prepare([Workload(tokens_T=row, graph=self.space.graph(row))])
                    self.known[key] = target.measure(handles)[0].latency_ms
        return np.array([self.known[row.tobytes()] for row in rows_NT])


def layer_table(space: NasBench201, processor: Processor) -> Latency:
    base = np.full(len(space.choices), CONV3, dtype=np.int8)
    swapped = np.array([[_with(base, e, op) for op in range(int(k))] for e, k in enumerate(space.vocabulary_sizes)])
    whole_ms = float(processor(base[None])[0])
    change_EK = processor(swapped.reshape(-1, len(base))).reshape(swapped.shape[:2]) - whole_ms
    return lambda tokens_NT: whole_ms + change_EK[np.arange(len(base)), np.asarray(tokens_NT)].sum(axis=1)


def _with(row: Tokens, position: int, value: int) -> Tokens:
    changed = row.copy()
    changed[position] = value
    return changed


def derived(space: NasBench201, latency: Latency, budget_ms: float, epochs: int, seed: int) -> Tokens:
    splits = load_dataset(DataSettings(name="digits"))
    method = UnasSettings(aims=(Aim("cpu", budget_ms),), latency=LatencySettings(samples=24), learning_rate=0.1)
    trainer = Trainer(space, splits.train, Preprocessing.fit(splits.train, space.resolution), SupernetSettings(
        training=method, epochs=epochs, batch_size=32, seed=seed, augmentation=Augmentation(padding=1)))

    def told(wishes: Wishes) -> dict[str, np.ndarray]:
        return {label: latency(rows_NT) for label, rows_NT in wishes.items()}

    for _ in range(epochs):
        trainer.train_epoch(told(trainer.begin_epoch()))
    logits = trainer.training.distribution()
    return space.most_probable([softmax(logits[f"0.{e}"]) for e in range(len(space.choices))])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    space = NasBench201(classes=10, channels=1, width=8, cells=1, resolution=8)
    processor = Processor(space)
    sample_NT = space.sample_uniform(np.random.default_rng(0), 60)
    table, real_N = layer_table(space, processor), processor(sample_NT)
    budget_ms = float(np.percentile(real_N, 33))
    print(f"60 uniform cells: the table of layers is wrong by {np.mean(np.abs(table(sample_NT) / real_N - 1)):.1%} on "
          f"average; budget {budget_ms:.4f} ms")
    ways: dict[str, Latency] = {"measured": processor, "table of layers": table}
    for seed in range(options.seeds):
        for name, latency in ways.items():
            tokens_T = derived(space, latency, budget_ms, options.epochs, seed)
            believed, real = float(latency(tokens_T[None])[0]), float(processor(tokens_T[None])[0])
            print(f"seed {seed}  {name:16s} believed {believed:.4f} ms, really {real:.4f} ms, "
                  f"{real / budget_ms:.2f} of the budget   {space.text(tokens_T)}", flush=True)


if __name__ == "__main__":
    main()
