"""How sure a hand-over is of its choice: the chance that it is the best of those considered, and what it gains.

A belief is a set of joint draws of the candidates' true accuracies, those on infinitely many images. Everything asked
of it is a share or a mean of draws, so a belief may have any shape, and candidates may go together in it:

    belief = belief_of_models(...)                       # or belief_of_search(...), both in beliefs.py
    belief.certainty(chosen, considered, trained)        # one budget: what it excludes is not considered

Shape legend: S draws, N candidates.
"""
from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 20_000      # a share of them is off by 0.004 at most (standard error)
SEED = 0            # the same run says the same again

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Certainty:
    """Of the choice for one budget; the fields of an entry of generated.json, which docs/uncertainty.md explains.

    `expected_gain` is accuracy (0..1) over the runner-up, the one with the highest expected accuracy of the others;
    None and "" where there is no other. `considered` counts the chosen one too, `considered_trained` those of them
    whose final weights exist.
    """

    probability_best: float
    expected_gain: float | None
    runner_up: str
    considered: int
    considered_trained: int


@dataclass(frozen=True)
class Belief:
    arch_ids: tuple[str, ...]
    accuracy_SN: Array

    def certainty(self, chosen: str, considered: Collection[str], trained: Collection[str]) -> Certainty:
        """`considered` may name the chosen one; whoever the belief does not know is left out."""
        kept = [n for n, arch_id in enumerate(self.arch_ids) if arch_id in considered or arch_id == chosen]
        names = [self.arch_ids[n] for n in kept]
        accuracy_SN, at = self.accuracy_SN[:, kept], names.index(chosen)
        best = float((accuracy_SN.argmax(axis=1) == at).mean())
        count = sum(name in trained for name in names)
        if len(names) == 1:
            return Certainty(best, None, "", 1, count)
        mean_N = accuracy_SN.mean(axis=0)
        second = max((n for n in range(len(names)) if n != at), key=lambda n: float(mean_N[n]))
        return Certainty(best, float(mean_N[at] - mean_N[second]), names[second], len(names), count)


def normal_draws(mean_N: Array, covariance_NN: Array, count: int, rng: np.random.Generator) -> Array:
    """float64[count, N] of a joint normal; the covariance may be singular."""
    variances_N, vectors_NN = np.linalg.eigh(covariance_NN)
    root_NN = vectors_NN * np.sqrt(np.maximum(variances_N, 0))
    draws: Array = mean_N + rng.standard_normal((count, len(mean_N))) @ root_NN.T
    return draws
