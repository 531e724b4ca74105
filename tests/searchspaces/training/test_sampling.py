"""Strict fairness (specification 8) and the sandwich (2.5)."""
from __future__ import annotations

import numpy as np

from searchspaces.mobilenetv3.space import MobileNetV3S16
from searchspaces.nasbench201.space import NasBench201
from searchspaces.training.sampling import sandwich, strict_fair


def test_strict_fair_counts_are_equal_after_any_number_of_steps() -> None:
    for space in (MobileNetV3S16(), NasBench201()):
        rng = np.random.default_rng(0)
        rows = np.concatenate([strict_fair(space, rng) for _ in range(7)])
        for position, size in enumerate(space.vocabulary_sizes):
            assert np.bincount(rows[:, position], minlength=size).tolist() == [7] * size
        assert len(np.unique(rows, axis=0)) > 7  # permutations, not the same path again


def test_positions_with_fewer_choices_differ_by_one_per_step() -> None:
    space = MobileNetV3S16(resolution=[12, 16])
    rows = strict_fair(space, np.random.default_rng(0))
    assert sorted(np.bincount(rows[:, -1], minlength=2).tolist()) == [1, 2]


def test_sandwich_is_largest_smallest_and_random() -> None:
    space = MobileNetV3S16()
    rows = sandwich(space, np.random.default_rng(0), 2)
    smallest, largest = space.extremes()
    assert len(rows) == 4 and (rows[0] == largest).all() and (rows[1] == smallest).all()
    assert (rows[2] != rows[3]).any()
