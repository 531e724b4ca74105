"""What UNAS claims of its gradients, re-measured: bias, variance, where a search ends, and what a step costs.

    python -m tests.benchmarks.unas_claims [--parts estimators relax step] [--seeds 10] [--table T]

estimators: the toy of specification unas 12, mean against the closed form and total variance of one sample.
relax: NAS-Bench-201, L_n = the table's latency, and its 12-epoch error with the latency over a budget, which no linear
    g explains. g is a ridge regression on 50 rows. Where do the distributions end with RELAX, with the surrogate alone
    (term iii of the estimator), and with REINFORCE?
step: processor time of a UNAS step over two plain training steps of the same supernet (batch 32, one thread).
"""
from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from searchspaces.catalogue import make_space
from searchspaces.training.estimators import Draw, Point, draw, gumbel_softmax, one_pass, reinforce, relax, uniform
from searchspaces.training.latencyterm import Aim, LatencySettings
from searchspaces.training.training import Batch, Schedule
from searchspaces.training.unas import UnasSettings
from tests.benchmarks.nasbench201 import Table

COMMAND = "python -m tests.benchmarks.unas_claims --parts"
SAMPLES = 1_000_000
PHI, TARGET = torch.tensor([0.2, -0.1, 0.4]).double(), torch.tensor([0.1, 0.2, 0.7]).double()
CLOSED = torch.tensor([0.18392, 0.08623, -0.27015]).double()
VARIANCES = {("REINFORCE", 0.5): 0.572, ("Gumbel-softmax", 0.5): 0.207, ("Gumbel-softmax", 1.0): 0.054,
             ("REBAR, coupled", 0.2): 0.979, ("REBAR, coupled", 0.4): 0.566, ("REBAR, coupled", 0.5): 0.495,
             ("REBAR, coupled", 1.0): 0.384, ("REBAR, coupled", 2.0): 0.360, ("REBAR, independent", 0.2): 0.869,
             ("REBAR, independent", 0.4): 0.495, ("REBAR, independent", 0.5): 0.441,
             ("REBAR, independent", 1.0): 0.376, ("REBAR, independent", 2.0): 0.362}    # specification 12
BUDGET_PERCENTILE, ROWS, STEPS, DRAWS, RATE = 50, 50, 2000, 8, 0.05


# --- estimators ------------------------------------------------------------------------------------------------------


def loss(point: Point) -> Tensor:
    return ((point[0] - TARGET) ** 2).sum(-1)


def estimates(name: str, tau: float) -> Tensor:
    """float64[SAMPLES, 3]: gradients of single samples."""
    generator = torch.Generator().manual_seed(0)
    phi = PHI.expand(SAMPLES, 3).clone().requires_grad_()
    u, other = (uniform([PHI], generator, (SAMPLES,)) for _ in range(2))
    drawn = draw([phi], tau, u, other if name == "REBAR, independent" else None)
    surrogate = {"REINFORCE": lambda: reinforce(loss(drawn.z), drawn), "Gumbel-softmax": lambda: gumbel_softmax(
        loss, drawn)}.get(name, lambda: relax(loss(drawn.z), loss, drawn))()
    return torch.autograd.grad(surrogate.sum(), phi)[0]


def estimators() -> None:
    print(f"estimator            tau   bias in standard errors   variance   specification     ({COMMAND} estimators)")
    for (name, tau), expected in VARIANCES.items():
        found = estimates(name, tau)
        bias = ((found.mean(0) - CLOSED) / (found.std(0) / SAMPLES ** 0.5)).abs().max()
        print(f"{name:20s} {tau:3.1f}   {bias:23.1f}   {found.var(0).sum():8.3f}   {expected:13.3f}", flush=True)


# --- where a search ends ---------------------------------------------------------------------------------------------

Estimate = Callable[[Tensor, Callable[[Point], Tensor], Draw], Tensor]
WAYS: dict[str, Estimate] = {
    "RELAX": lambda at_z, g, drawn: one_pass(at_z, g(drawn.zeta_hat), drawn),
    "surrogate alone": lambda at_z, g, drawn: g(drawn.zeta),
    "REINFORCE, mean as baseline": lambda at_z, g, drawn: reinforce(at_z, drawn, at_z.mean(0, keepdim=True)),
}


def relax_ends(table: Table, seeds: int) -> None:
    order = np.argsort(_index(torch.from_numpy(table.tokens_NT.astype(np.int64))).numpy())
    tokens_NT, latency_N, error_N = table.tokens_NT[order], table.latency_ms[order], 1 - table.accuracy[order] / 100
    over_N = np.maximum(latency_N / np.percentile(latency_N, BUDGET_PERCENTILE) - 1, 0)
    for title, loss_N in (("latency over its median", latency_N / np.median(latency_N)),
                          ("error, and latency over a budget", error_N + 0.5 * over_N)):
        print(f"L_n: {title}   ({seeds} seeds; {COMMAND} relax)\n"
              "estimator                     at the minimum   cells better, median (worst)   above the minimum, mean")
        for name, estimate in WAYS.items():
            ends = _ends(loss_N, tokens_NT, estimate, seeds)
            better = [int((loss_N < loss_N[end]).sum()) for end in ends]
            print(f"{name:29s} {sum(b == 0 for b in better):8d} of {seeds:2d} {np.median(better):17.0f} "
                  f"({max(better)}) {loss_N[ends].mean() - loss_N.min():30.4f}", flush=True)


def _ends(loss_N: np.ndarray, tokens_NT: np.ndarray, estimate: Estimate, seeds: int) -> np.ndarray:
    """int64[seeds]: index of the most probable cell after STEPS; every seed has its own 50 rows for g."""
    generator = torch.Generator().manual_seed(0)
    fits = [_ridge(loss_N, tokens_NT, np.random.default_rng(seed)) for seed in range(seeds)]
    weights = [torch.from_numpy(np.stack(part)) for part in zip(*(np.split(w, 6) for w, _ in fits))]
    offset, losses = torch.tensor([offset for _, offset in fits]), torch.from_numpy(loss_N)

    def g(point: Point) -> Tensor:
        return torch.stack([(x * part).sum(-1) for x, part in zip(point, weights)]).sum(0) + offset

    phi = [torch.zeros(seeds, 5, dtype=torch.float64, requires_grad=True) for _ in range(6)]
    adam = torch.optim.Adam(phi, lr=RATE)
    for _ in range(STEPS):
        wide = [p.expand(DRAWS, seeds, 5) for p in phi]
        drawn = draw(wide, 0.4, uniform(wide, generator))
        at_z = losses[_index(torch.stack([z.argmax(-1) for z in drawn.z], -1))]
        adam.zero_grad()
        estimate(at_z, g, drawn).mean(0).sum().backward()
        adam.step()
    return _index(torch.stack([p.argmax(-1) for p in phi], -1)).numpy()


def _index(tokens: Tensor) -> Tensor:
    return (tokens * 5 ** torch.arange(5, -1, -1)).sum(-1)


def _ridge(loss_N: np.ndarray, tokens_NT: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    rows = rng.choice(len(loss_N), ROWS, replace=False)
    onehot = np.concatenate([np.eye(5)[tokens_NT[rows, e]] for e in range(6)], axis=1)
    offset = float(loss_N[rows].mean())
    return np.linalg.solve(onehot.T @ onehot + 1e-3 * ROWS * np.eye(30), onehot.T @ (loss_N[rows] - offset)), offset


# --- cost of a step --------------------------------------------------------------------------------------------------


def steps() -> None:
    torch.set_num_threads(1)
    print(f"space                    UNAS step over two plain steps, median of pairs (goal 1.3; {COMMAND} step)")
    for name, options in (("mobilenetv3-s16", {"width": 0.25}), ("nasbench201", {"cells": 1, "width": 8}),
                          ("darts-s16", {})):
        ratios = list(_ratios(name, options))
        print(f"{name:24s} {np.median(ratios):.2f}  ({min(ratios):.2f}-{max(ratios):.2f}, {len(ratios)} pairs)",
              flush=True)


def _ratios(name: str, options: dict[str, object], pairs: int = 7) -> Iterator[float]:
    space = make_space(name, classes=10, channels=1, options=options)
    shape = space.graph(space.extremes()[1]).input_shape
    settings = UnasSettings(aims=(Aim("any", 1.0),), latency=LatencySettings(weight=0.0), warm_up=0.0)
    training = settings.start(space.make_supernet(), Schedule(1000, 10, 0))
    batch: Batch = (torch.randn(32, *shape), torch.arange(32) % 10)
    mixture = [torch.full((int(k),), 1.0 / int(k)) for k in space.vocabulary_sizes]
    weights = [p for p in training.supernet.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(weights, lr=1e-4, momentum=0.9)

    def plain() -> None:
        sgd.zero_grad()
        F.cross_entropy(training.supernet.forward_mixture(batch[0], mixture), batch[1]).backward()
        sgd.step()

    for _ in range(pairs + 1):
        ours = _seconds(lambda: training.step(batch, batch))
        both = _seconds(plain) + _seconds(plain)
        yield ours / both


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["estimators", "relax", "step"],
                        choices=["estimators", "relax", "step"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--table", default="../shared/data/nasbench201.parquet")
    parser.add_argument("--accuracy", default="acc12_val_cifar100")
    parser.add_argument("--latency", default="latency_pixel3")
    options = parser.parse_args(arguments)
    if "estimators" in options.parts:
        estimators()
    if "relax" in options.parts:
        relax_ends(Table.read(options.table, options.accuracy, options.latency), options.seeds)
    if "step" in options.parts:
        steps()


if __name__ == "__main__":
    main()
