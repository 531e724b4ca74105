"""Which subnets one supernet step trains. Pure functions of a random generator; rows need not be canonical."""
from __future__ import annotations

import numpy as np

from searchspaces.space import SearchSpace, Tokens


def sandwich(space: SearchSpace, rng: np.random.Generator, random_subnets: int) -> Tokens:
    """int8[2 + random_subnets, T]: the largest, the smallest, then uniform ones (specification 2.5)."""
    smallest, largest = space.extremes()
    return np.concatenate([np.stack([largest, smallest]), space.sample_uniform(rng, random_subnets)])


def strict_fair(space: SearchSpace, rng: np.random.Generator) -> Tokens:
    """int8[m, T] with m the largest vocabulary: row j takes the j-th entry of a permutation of every position's values
    (specification 8, after FairNAS). Each value of a position appears equally often per step; where a position has
    fewer than m values a second permutation follows, so its counts differ by at most one.

    Validity may exclude values of a position but must not depend on the tokens before it.
    """
    m = int(space.vocabulary_sizes.max())
    rows = np.zeros((m, len(space.choices)), dtype=np.int8)
    for position in range(rows.shape[1]):
        values = np.flatnonzero(space.valid(rows[0, :position]))
        repeats = -(-m // len(values))
        rows[:, position] = np.concatenate([rng.permutation(values) for _ in range(repeats)])[:m]
    return rows
