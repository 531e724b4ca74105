"""Distributions over spaces: relaxed draws of bins, members of bins, and the mean cost of a space (NSS, section 3;
specification nss 3 to 6).

A space A of a base space is one bin of each group (searchspaces/bins.py). The distribution is independent over groups
with logits theta_k; a relaxed draw g_k = softmax((theta_k + Gumbel) / tau) weighs its bins. Members are drawn uniformly
inside every bin; together they weigh the values of every token position, which is what a supernet mixes.

Legend: K groups, B_k bins of one, T token positions, V_t values of one, M members drawn, N architectures.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from searchspaces.bins import BinGroup, checked_groups, possible_tokens
from searchspaces.space import SearchSpace, Tokens

Cost = Callable[[Tokens], NDArray[np.float64]]      # multiply-adds or ms, [N] for int8[N, T]
Members = list[list[list[int]]]                     # [group][bin][i]: token of the group's i-th position
Weights = Sequence[Tensor]                          # [B_k] per group, each on the simplex
MEMBERS = 256       # of a space whose mean cost has no closed form
SWEEPS = 2          # over the groups, for the cheapest and the dearest space


def temperature(epoch: int, epochs: int, first: float, last: float) -> float:
    """Linear over all epochs ([S3 6.4.1]: 5 to 0.001 over 50)."""
    return first + (last - first) * epoch / max(epochs - 1, 1)


def full_probability(step: int, steps: int) -> float:
    """Chance that warm-up trains a group at its largest value: 1 at first, 0 at its end (specification 5)."""
    return max(0.0, 1 - step / steps) if steps else 0.0


def relaxed(theta: Sequence[Tensor], tau: float, generator: torch.Generator) -> list[Tensor]:
    """One Gumbel-softmax draw of every group. The maximum is subtracted first, so no temperature overflows."""
    drawn = []
    for logits in theta:
        u = torch.rand(logits.shape, generator=generator, dtype=logits.dtype).clamp(1e-12, 1 - 1e-12)
        y = (logits - (-u.log()).log()) / tau
        drawn.append((y - y.max().detach()).softmax(-1))
    return drawn


def straight_through(weights: Weights) -> list[Tensor]:
    """One-hot in value, the relaxed draw in gradient."""
    return [torch.nn.functional.one_hot(g.argmax(), len(g)).to(g) + g - g.detach() for g in weights]


@dataclass(frozen=True)
class SpaceOfSpaces:
    """What can be narrowed in a space, and how members of its subspaces are drawn."""

    space: SearchSpace

    @cached_property
    def groups(self) -> tuple[BinGroup, ...]:
        return checked_groups(self.space)

    @cached_property
    def _possible(self) -> list[NDArray[np.int64]]:
        return [np.flatnonzero(allowed) for allowed in possible_tokens(self.space)]

    @cached_property
    def _free(self) -> list[int]:
        """Positions that no group narrows."""
        narrowed = {position for group in self.groups for position in group.positions}
        return [position for position in range(len(self._possible)) if position not in narrowed]

    def members(self, rng: np.random.Generator) -> Members:
        """One member of every bin, uniform. A position that all bins of a group leave the same tokens gets one token
        for all of them, so that a mixture of its bins is a mixture of their members and of nothing else."""
        found = []
        for group in self.groups:
            common = [len({of_bin[i] for of_bin in group.bins}) == 1 for i in range(len(group.positions))]
            first = [int(rng.choice(tokens)) for tokens in group.bins[0]]
            found.append([[first[i] if b == 0 or common[i] else int(rng.choice(tokens))
                           for i, tokens in enumerate(of_bin)] for b, of_bin in enumerate(group.bins)])
        return found

    def free_tokens(self, rng: np.random.Generator) -> dict[int, int]:
        return {position: int(rng.choice(self._possible[position])) for position in self._free}

    def mixture(self, weights: Weights, members: Members, free: dict[int, int]) -> list[Tensor]:
        """[V_t] per position: each bin's weight on its member's token (specification 4)."""
        sizes, like = self.space.vocabulary_sizes, weights[0]
        found = [torch.zeros(int(size), dtype=like.dtype) for size in sizes]
        for position, token in free.items():
            found[position][token] = 1.0
        for group, g, of_bins in zip(self.groups, weights, members):
            for i, position in enumerate(group.positions):
                index = torch.tensor([of_bin[i] for of_bin in of_bins])
                found[position] = found[position].index_add(0, index, g)
        return found

    def row(self, bins: Sequence[int], members: Members, free: dict[int, int]) -> Tokens:
        """int8[T]: the architecture of one bin's member per group."""
        row = np.zeros(len(self._possible), dtype=np.int8)
        for position, token in free.items():
            row[position] = token
        for group, b, of_bins in zip(self.groups, bins, members):
            row[list(group.positions)] = of_bins[b]
        return row

    def sample(self, rng: np.random.Generator, bins_MK: NDArray[np.int64]) -> Tokens:
        """int8[M, T]: one member for each row of bins, not canonical."""
        rows = np.zeros((len(bins_MK), len(self._possible)), dtype=np.int8)
        for position in self._free:
            rows[:, position] = rng.choice(self._possible[position], size=len(rows))
        for k, group in enumerate(self.groups):
            for b in range(len(group)):
                mine = np.flatnonzero(bins_MK[:, k] == b)
                rows[mine[:, None], list(group.positions)] = self.sample_bin(rng, k, b, len(mine))
        return rows

    def sample_bin(self, rng: np.random.Generator, k: int, b: int, n: int) -> Tokens:
        """int8[n, positions of group k]: tokens of members of its bin b."""
        return np.stack([rng.choice(tokens, size=n) for tokens in self.groups[k].bins[b]], axis=1).astype(np.int8)

    def probabilities(self, weights: Weights) -> list[Tensor]:
        """[V_t] per position: chance of every value in a member of a space drawn with these weights."""
        found = [torch.zeros(int(size), dtype=weights[0].dtype) for size in self.space.vocabulary_sizes]
        for position in self._free:
            found[position][torch.from_numpy(self._possible[position])] = 1 / len(self._possible[position])
        for group, g in zip(self.groups, weights):
            for i, position in enumerate(group.positions):
                for b, of_bin in enumerate(group.bins):
                    share = torch.zeros_like(found[position])
                    share[list(of_bin[i])] = 1 / len(of_bin[i])
                    found[position] = found[position] + g[b] * share
        return found

    @cached_property
    def independent(self) -> bool:
        """Are a member's tokens independent, given the weights? At most one position of a group depends on its bin."""
        return all(sum(len({of_bin[i] for of_bin in group.bins}) > 1 for i in range(len(group.positions))) <= 1
                   for group in self.groups)


def exact_madds(spaces: SpaceOfSpaces, weights: Weights) -> Tensor | None:
    """F(A) = E_{a ~ U(A)}[F(a)] of a relaxed space, in closed form (specification 6); None where there is none."""
    return spaces.space.mean_madds(spaces.probabilities(weights)) if spaces.independent else None


def sampled_mean(spaces: SpaceOfSpaces, weights: Weights, cost: Cost, samples: int, rng: np.random.Generator) -> Tensor:
    """E_{a ~ U(A)}[cost(a)] of a relaxed space for any cost, estimated without bias, as is its gradient (ours).

    The mean is linear in the weights of each group, so its derivative to g_kb is the mean over the others' bins with
    group k in bin b. It is estimated with the same `samples` architectures for all k and b, of which group k alone is
    exchanged; the value is the mean of what the groups say.
    """
    bins_MK = np.stack([rng.choice(len(g), size=samples, p=_simplex(g)) for g in weights], axis=1)
    rows_MT = spaces.sample(rng, bins_MK)
    exchanged = []
    for k, group in enumerate(spaces.groups):
        for b in range(len(group)):
            rows = rows_MT.copy()
            rows[:, list(group.positions)] = spaces.sample_bin(rng, k, b, samples)
            exchanged.append(rows)
    costs = cost(spaces.space.canonical(np.concatenate(exchanged))).reshape(len(exchanged), samples).mean(axis=1)
    slopes = torch.from_numpy(costs).split([len(group) for group in spaces.groups])
    parts = [(slope.to(g) * g).sum() for slope, g in zip(slopes, weights)]
    value = torch.stack(parts).mean().detach()
    return value + sum((part - part.detach() for part in parts), start=torch.zeros_like(value))


def _simplex(g: Tensor) -> NDArray[np.float64]:
    p = g.detach().double().numpy()
    return np.asarray(p / p.sum())


class SpaceCosts:
    """Mean costs of spaces, one bin per group: multiply-adds (`cost` None) in closed form where there is one, else of
    members that are always the same."""

    def __init__(self, spaces: SpaceOfSpaces, cost: Cost | None, seed: int) -> None:
        self.spaces, self._cost, self._seed = spaces, cost, seed

    def mean(self, bins: Sequence[int]) -> float:
        if self._cost is None:
            one_hot = [torch.nn.functional.one_hot(torch.tensor(b), len(group)).double()
                       for b, group in zip(bins, self.spaces.groups)]
            exact = exact_madds(self.spaces, one_hot)
            if exact is not None:
                return float(exact)
        rng = np.random.default_rng([self._seed, *bins])
        rows = self.spaces.sample(rng, np.tile(np.array(bins), (MEMBERS, 1)))
        cost = self._cost or madds_of(self.spaces.space)
        return float(cost(self.spaces.space.canonical(rows)).mean())

    def reachable(self) -> tuple[float, float]:
        """Mean costs of the cheapest and the dearest space, each found group by group."""
        return self._ends

    @cached_property
    def _ends(self) -> tuple[float, float]:
        return self._end(1), self._end(-1)

    def nearest(self, target: float) -> float:
        """The target, or the end of the reachable range that is nearest to it."""
        low, high = self.reachable()
        return min(max(target, low), high)

    def _end(self, sign: int) -> float:
        bins = [0] * len(self.spaces.groups)
        best = sign * self.mean(bins)
        for _ in range(SWEEPS):
            before = list(bins)
            for k, group in enumerate(self.spaces.groups):
                for b in range(len(group)):
                    other = [*bins[:k], b, *bins[k + 1:]]
                    if (found := sign * self.mean(other)) < best:
                        best, bins = found, other
            if bins == before:
                break
        return sign * best


def madds_of(space: SearchSpace) -> Cost:
    """Multiply-adds as a cost."""
    return lambda tokens_NT: space.cost(tokens_NT)[0].astype(np.float64)


def deviation(mean: Tensor, target: float, hinge: bool) -> Tensor:
    """|F(A) / F_t - 1| ([S3 Eq. 4]), or only what exceeds the target (ours)."""
    excess = mean / target - 1
    return excess.clamp(min=0) if hinge else excess.abs()
