"""The learning rate of NSS' logits follows from how many steps there are."""
from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from searchspaces.expanded.space import ExpandedS16
from searchspaces.training.nss import NssSettings, NssTraining, SpaceAim
from searchspaces.training.spaces import SpaceCosts
from searchspaces.training.training import Schedule


def start(schedule: Schedule, targets: tuple[float, ...] = (7.4e6,), rate: float | None = None) -> NssTraining:
    settings = NssSettings(aims=tuple(SpaceAim(target) for target in targets), task_weight=0.0, learning_rate=rate)
    return settings.start(ExpandedS16(channels=3).make_supernet(), schedule)


def test_rate_is_what_carries_a_logit_by_25_in_the_steps_of_one_aim() -> None:
    schedule = Schedule(epochs=10, steps_per_epoch=100, seed=0)     # 700 steps after warm-up
    assert start(schedule).learning_rate == pytest.approx(25 / 700)
    assert start(schedule, (3.7e6, 7.4e6)).learning_rate == pytest.approx(25 / 350)
    assert start(schedule, rate=0.03).learning_rate == 0.03
    assert start(Schedule(epochs=2, steps_per_epoch=5, seed=0)).learning_rate == 0.5


def test_few_steps_aim_well_and_a_small_rate_does_not() -> None:
    """Share of the spaces drawn whose mean is within 10 % of the target, by enumeration of all 512: 9 % before."""
    shares = {}
    for rate in (None, 0.03):
        training = start(Schedule(epochs=10, steps_per_epoch=12, seed=0), rate=rate)
        batch = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(2)
        for _ in range(120):
            training.step(batch, batch)
        costs = SpaceCosts(training.spaces, None, 0)
        p = [logits.detach().softmax(0).numpy() for logits in training.theta[0]]
        shares[rate] = sum(np.prod([row[b] for row, b in zip(p, bins)])
                           for bins in product(*(range(len(row)) for row in p))
                           if abs(costs.mean(bins) / 7.4e6 - 1) <= 0.1)
    assert shares[None] > 0.6, shares
    assert shares[0.03] < 0.45, shares
