"""Where NSS' distribution ends with the cost alone: learning rate, number of steps, temperatures, straight-through.

    python -m tests.benchmarks.nss_rates [--seeds 25]

No supernet and no images: the mean cost of a relaxed space of expanded-s16 is multilinear in its weights, so the 512
means are all there is to know. Shares are of spaces drawn after the search whose mean is within 10 % of the target.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from searchspaces.training.nss import REACH, NssSettings, SpaceAim, warm_up_epochs
from searchspaces.training.spaces import deviation, relaxed, temperature
from tests.benchmarks.nss_targeting import SPACES, TARGETS_M, WITHIN, Enumerated

EPOCHS = 50     # of the paper's temperatures; the steps are spread over those after warm-up
INDICES = "abcdef"
DEFAULTS = NssSettings(aims=(SpaceAim(1.0),))


@dataclass(frozen=True)
class Variant:
    steps: int
    rate: float
    first: float = DEFAULTS.first_temperature
    last: float = DEFAULTS.last_temperature
    hard: bool = False


VARIANTS = (*(Variant(steps, rate) for steps in (100, 300, 1000) for rate in (0.003, 0.03, 0.1, REACH / steps, 0.5)),
            *(Variant(300, REACH / 300, first, last) for first, last in ((5.0, 0.1), (2.0, 0.2), (1.0, 0.1))),
            Variant(300, REACH / 300, hard=True))


def mean(means: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """float[N]: of N relaxed spaces; `weights` [N, B_k] per group."""
    terms = ",".join(f"n{index}" for index in INDICES)
    return torch.einsum(f"{INDICES},{terms}->n", means, *weights)


def shares(means: Tensor, variant: Variant, seeds: int) -> Tensor:
    """float[targets, seeds]."""
    targets_N = torch.tensor(TARGETS_M).double().repeat_interleave(seeds) * 1e6
    theta = [nn.Parameter(torch.zeros(len(targets_N), size, dtype=torch.float64)) for size in means.shape]
    adam = torch.optim.Adam(theta, lr=variant.rate, betas=(0.5, 0.999), weight_decay=DEFAULTS.weight_decay)
    generator, begin = torch.Generator().manual_seed(0), warm_up_epochs(DEFAULTS.warm_up, EPOCHS)
    for step in range(variant.steps):
        epoch = begin + step * (EPOCHS - begin) // variant.steps
        drawn = relaxed(theta, temperature(epoch, EPOCHS, variant.first, variant.last), generator)
        if variant.hard:
            drawn = [F.one_hot(g.argmax(-1), g.shape[-1]) + g - g.detach() for g in drawn]
        adam.zero_grad()
        # Every search has its own logits, and Adam treats every number alone: the sum trains each by its own loss.
        deviation(mean(means, drawn) / targets_N, 1.0, False).sum().backward()
        adam.step()
    near = ((means[None] / targets_N.reshape(-1, *[1] * means.ndim) - 1).abs() <= WITHIN).double()
    p = [logits.detach().softmax(-1) for logits in theta]
    terms = ",".join(f"n{index}" for index in INDICES)
    return torch.einsum(f"n{INDICES},{terms}->n", near, *p).reshape(len(TARGETS_M), seeds)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=25)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    means = torch.from_numpy(Enumerated().mean_S).reshape([len(group) for group in SPACES.groups])
    print(f"spaces within 10 % of {', '.join(f'{t:g}' for t in TARGETS_M)} M; chance that 5 draws hold one; "
          f"{options.seeds} seeds (python -m tests.benchmarks.nss_rates)\n"
          "steps    rate   rate x steps   temperature   draws      share of spaces        5 draws")
    for variant in VARIANTS:
        found = shares(means, variant, options.seeds).numpy()
        hits = 1 - (1 - found) ** 5
        columns = ["  ".join(f"{100 * share:3.0f}" for share in part.mean(axis=1)) for part in (found, hits)]
        print(f"{variant.steps:5d}  {variant.rate:6.3f}   {variant.rate * variant.steps:12.0f}   {variant.first:g} to "
              f"{variant.last:<5g}    {'hard' if variant.hard else 'soft'}   {columns[0]} %   {columns[1]} %   mean "
              f"{found.mean():.0%}", flush=True)


if __name__ == "__main__":
    main()
