"""Spaces inside a space: certified like any other, the same networks as the base's, counted by enumeration."""
from __future__ import annotations

import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from searchspaces.bins import checked_groups
from searchspaces.catalogue import make_space
from searchspaces.conformance import check_space
from searchspaces.darts.space import DartsS16
from searchspaces.elite.space import EliteSpace, restricted
from searchspaces.elite.supernet import EliteSupernet
from searchspaces.errors import SpaceError
from searchspaces.expanded.space import ExpandedS16
from searchspaces.mnas.space import MnasS16
from searchspaces.mobilenetv3.space import MobileNetV3S16
from searchspaces.nasbench201.space import NasBench201
from searchspaces.space import SearchSpace, Tokens
from tests.actors.tinyspace import TinySpace

CELLS = NasBench201(classes=7, channels=2, width=4, cells=1, resolution=8)
# The same code in less time
SMALL: dict[str, dict[str, Any]] = {"nasbench201": {"width": 4, "cells": 1, "resolution": 8},
                                    "darts-s16": {"cells": 3, "width": 4, "resolution": 8}}


def elite_of(base: SearchSpace, seed: int = 0, bins: int = 1) -> EliteSpace:
    """Of `bins` random bins per group."""
    rng = np.random.default_rng(seed)
    groups = checked_groups(base)
    return EliteSpace(base, restricted(base, groups, [rng.choice(len(group), bins, replace=False) for group in groups]))


def product_of(tokens: Any) -> Tokens:
    return np.array(list(itertools.product(*tokens)), dtype=np.int8)


def rows_of(space: SearchSpace) -> Tokens:
    """Every row of a space without excluded values."""
    return product_of([range(size) for size in space.vocabulary_sizes])


def pinned(base: SearchSpace, row: Any, free: dict[int, tuple[int, ...]]) -> EliteSpace:
    """The base with nothing to choose but at a few positions."""
    return EliteSpace(base, [free.get(position, (int(token),)) for position, token in enumerate(row)])


@pytest.mark.parametrize("name", [
    "nasbench201", "mnas-s16", "darts-s16",
    pytest.param("mobilenetv3-s16", marks=pytest.mark.slow), pytest.param("proxylessnas-s16", marks=pytest.mark.slow)])
def test_elite_spaces_are_certified(name: str) -> None:
    assert check_space(elite_of(make_space(name, classes=7, channels=2, options=SMALL.get(name, {})))) == []


# --- the networks of the base -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("elite", [
    EliteSpace(CELLS, [(0, 3), (1,), (0, 1, 2, 3, 4), (2, 4), (1, 3), (0,)]),
    pinned(DartsS16(), DartsS16().extremes()[0], {4: (1, 2), 5: (0, 3), 6: (1, 2), 7: (0, 3)}),
    pinned(DartsS16(), DartsS16().extremes()[0], {20: (1, 2), 21: (0, 3), 22: (0, 1), 23: (0, 3, 6)}),
    pinned(MnasS16(), MnasS16().extremes()[0], {3: (1, 2), 4: (0, 1), 9: (1, 2), 10: (0, 1), 11: (0, 1)}),
    pinned(MobileNetV3S16(), MobileNetV3S16().extremes()[1], {0: (0, 1), 5: (0, 2), 6: (0, 1), 7: (1, 2)})],
    ids=["nasbench201", "darts", "darts of two ranges", "mnas", "mobilenetv3"])
def test_rows_are_the_networks_of_the_base_inside_the_ranges(elite: EliteSpace) -> None:
    """By brute force: equal networks have one canonical row, `size` counts them, extremes are the cheapest and dearest,
    and every row leads to the base and back."""
    base, own_NT = elite.base, rows_of(elite)
    base_NT = product_of(elite.tokens)
    canonical, base_canonical = elite.canonical(own_NT), base.canonical(base_NT)
    assert np.array_equal(elite.widened(own_NT), base_NT)
    networks = [row.tobytes() for row in base_canonical]
    of_network: dict[bytes, set[bytes]] = {}
    for network, row in zip(networks, canonical):
        of_network.setdefault(network, set()).add(row.tobytes())
    assert {len(rows) for rows in of_network.values()} == {1}
    assert elite.size() == len(of_network) == len(np.unique(canonical, axis=0))
    assert np.array_equal(base.canonical(elite.widened(canonical)), base_canonical)
    assert elite.contains(base_NT).all() and elite.contains(elite.widened(canonical)).all()
    assert np.array_equal(elite.canonical(elite.narrowed(base_NT)), canonical)
    madds, params = elite.cost(own_NT)
    assert np.array_equal([madds, params], base.cost(base_NT))
    assert elite.cost(elite.extremes())[0].tolist() == [madds.min(), madds.max()]
    for name in (elite.text, elite.arch_id):
        assert len({name(row) for row in own_NT}) == len(of_network)
    assert elite.arch_id(own_NT[0]) != base.arch_id(base_NT[0])


def test_a_row_outside_the_ranges_is_named() -> None:
    elite = pinned(MobileNetV3S16(), MobileNetV3S16().extremes()[1], {0: (0, 1), 7: (0, 2)})
    inside = MobileNetV3S16().extremes()[1]
    inside[0] = 1
    outside, dead = inside.copy(), inside.copy()
    outside[5], dead[8] = 0, 0        # the third layer's expand, which lives at depth 3, and the fourth's kernel
    assert elite.contains(np.stack([inside, outside, dead])).tolist() == [True, False, True]
    assert elite.narrowed(dead[None]).tolist() == elite.narrowed(inside[None]).tolist() == [[1, 1]]
    with pytest.raises(SpaceError, match=f"{elite.base.choices[5].name} outside the ranges of elite"):
        elite.narrowed(np.stack([inside, outside]))


def test_sampling_and_features_are_those_of_the_base() -> None:
    elite = elite_of(MobileNetV3S16())
    rows = elite.sample_uniform(np.random.default_rng(0), 200)
    wide = elite.widened(rows)
    assert elite.contains(wide).all() and elite.contains(elite.base.canonical(wide)).all()
    other = elite.base.sample_uniform(np.random.default_rng(1), 200)
    assert not elite.contains(other).any()      # two bins in each of 15 groups: a chance of about 1 in 10^4
    for name in ("features", "latency_features", "blind"):
        assert np.array_equal(getattr(elite, name)(rows), getattr(elite.base, name)(wide))
    for row, base_row in zip(rows[:3], wide):
        assert elite.graph(row) == elite.base.graph(base_row) and elite.text(row) == elite.base.text(base_row)


def test_restricted_keeps_what_several_bins_leave_together() -> None:
    base = MnasS16()
    groups = checked_groups(base)
    left = restricted(base, groups, [[0]] + [[0, 1]] * (len(groups) - 1))
    assert left[0] == (0, 1) and left[5] == (1, 2) and left[11] == (0, 1, 2)    # layers0 cannot be -1
    assert EliteSpace(base, left).tokens == tuple(left)
    darts = DartsS16()
    narrow = restricted(darts, checked_groups(darts), [[0]] * len(checked_groups(darts)))
    assert narrow[0] == (0, 1) and narrow[1] == (0, 1, 2, 3) == narrow[3]       # in_a of node 0 is in no group


def test_most_probable_is_what_the_base_says_of_its_positions_together() -> None:
    """In darts the second pair of a node is another than the first."""
    base = DartsS16()
    elite = elite_of(base, bins=1)
    rng = np.random.default_rng(3)
    wide = [rng.dirichlet(np.ones(size)) for size in base.vocabulary_sizes]
    wide = [p * np.isin(np.arange(len(p)), tokens) + 1e-9 * np.isin(np.arange(len(p)), tokens)
            for p, tokens in zip(wide, elite.tokens)]
    for start in range(0, len(wide), 4):
        wide[start + 2:start + 4] = wide[start:start + 2]       # both pairs would be the same
    own = [p[list(tokens)] for p, tokens in zip(wide, elite.tokens) if len(tokens) > 1]
    assert np.array_equal(base.canonical(elite.widened(elite.most_probable(own)[None]))[0], base.most_probable(wide))
    cells = EliteSpace(CELLS, [(0, 3), (1,), (0, 1, 2), (2, 4), (1, 3), (0,)])
    own = [np.array(p) for p in ([.4, .6], [.3, .2, .5], [.9, .1], [.5, .5])]
    assert cells.most_probable(own).tolist() == [1, 2, 0, 0]


@pytest.mark.parametrize(("tokens", "words"), [
    ([(0,), (1,)], "leave one architecture of tiny"), ([(0, 1)], "for 1 positions, tiny.* has 2"),
    ([(0, 1), ()], r"range of kernel is \[\].*allows tokens \[0, 1\].*at least one"),
    ([(0, 3), (0,)], r"range of width is \[0, 3\].*\[0, 1, 2\]"), ([(-1, 0), (0,)], r"range of width is \[-1, 0\]")])
def test_ranges_that_make_no_space_are_named(tokens: Any, words: str) -> None:
    with pytest.raises(SpaceError, match=words):
        EliteSpace(TinySpace(), tokens)


def test_a_value_that_the_base_excludes_is_no_range() -> None:
    base = MnasS16()
    tokens = restricted(base, checked_groups(base), [[0]] * len(checked_groups(base)))
    with pytest.raises(SpaceError, match=r"range of layers0 is \[0\].*\[1, 2\]"):
        EliteSpace(base, [*tokens[:5], (0,), *tokens[6:]])


def test_identity_follows_base_and_ranges_and_pickles() -> None:
    one, other = EliteSpace(CELLS, [(0, 1)] * 6), EliteSpace(CELLS, [(0, 1)] * 5 + [(0, 2)])
    assert one.space_id != other.space_id != CELLS.space_id and one.space_id.endswith(f"{CELLS.space_id})")
    assert one.space_id == EliteSpace(CELLS, [[1, 0, 1]] * 6).space_id
    assert [choice.kind for choice in other.choices][:2] == [other.choices[0].kind] * 2 != [other.choices[5].kind] * 2
    one.extremes(), one.choices         # what is remembered stays here
    copy = pickle.loads(pickle.dumps(one))
    row = np.array([1, 0, 1, 1, 0, 1], dtype=np.int8)
    assert copy.space_id == one.space_id and copy.arch_id(row) == one.arch_id(row)
    assert np.array_equal(copy.extremes(), one.extremes()) and copy.size() == 64


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elite", [
    EliteSpace(CELLS, [(0, 3), (1,), (1, 2, 3), (2, 4), (1, 3), (3,)]), EliteSpace(TinySpace(), [(0, 2), (1,)])],
    ids=["nasbench201", "tiny"])
def test_supernet_is_the_base_s(elite: EliteSpace) -> None:
    torch.manual_seed(0)
    shape = elite.base.graph(elite.base.extremes()[1]).input_shape
    images, trained = torch.randn(4, *shape), elite.base.make_supernet()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    supernet = elite.make_supernet()
    assert isinstance(supernet, EliteSupernet)
    supernet.base.load_state_dict(trained.state_dict())
    supernet.train(), trained.train()
    for row in elite.sample_uniform(np.random.default_rng(0), 4):
        wide = elite.widened(row[None])[0]
        trained.set_active(wide)
        supernet.set_active(row)
        with torch.no_grad():
            logits = trained(images)
            assert torch.equal(supernet(images), logits)
            onehot = [torch.eye(size)[token] for size, token in zip(elite.vocabulary_sizes, row)]
            assert torch.allclose(supernet.forward_mixture(images, onehot), logits, atol=1e-4)
            assert torch.allclose(supernet.extract(row).train()(images), logits, atol=1e-4)
    soft = [torch.rand(int(size)).softmax(0).requires_grad_() for size in elite.vocabulary_sizes]
    wide_soft, own = [], iter(soft)
    for tokens, size in zip(elite.tokens, elite.base.vocabulary_sizes):
        weights = next(own) if len(tokens) > 1 else torch.ones(1)
        wide_soft.append(torch.zeros(int(size)))
        for token, weight in zip(tokens, weights.detach()):
            wide_soft[-1][token] = weight
    logits = supernet.forward_mixture(images, soft)
    assert torch.equal(logits.detach(), trained.forward_mixture(images, wide_soft).detach())
    penalty = supernet.mixture_penalty(soft)
    assert torch.equal(penalty.detach(), trained.mixture_penalty(wide_soft))
    logits.square().sum().backward()
    assert all(weights.grad is not None and bool(weights.grad.abs().sum() > 0) for weights in soft)


def test_supernet_starts_at_the_dearest_and_refuses_rows_of_the_base() -> None:
    elite = EliteSpace(CELLS, [(0, 3), (1,), (1, 2), (2, 4), (1, 3), (3,)])
    torch.manual_seed(1)
    supernet = elite.make_supernet().eval()
    images = torch.randn(2, 2, 8, 8)
    first = supernet(images)
    supernet.set_active(elite.extremes()[1])
    assert torch.equal(first, supernet(images))
    with pytest.raises(SpaceError, match=r"\(N, 4\), got \(1, 6\)"):
        supernet.set_active(CELLS.extremes()[1])
    with pytest.raises(SpaceError, match="outside 0..1"):
        supernet.set_active(np.array([2, 0, 0, 0], dtype=np.int8))


def test_a_base_without_supernet_says_so() -> None:
    with pytest.raises(SpaceError, match="mnas.*no supernet"):
        elite_of(MnasS16()).make_supernet()


def test_mean_multiply_adds_are_those_of_all_members() -> None:
    base = ExpandedS16(classes=10, channels=1, width=16, width_bin=4)
    elite = EliteSpace(base, restricted(base, checked_groups(base), [[0], [1], [0, 1], [2], [1], [3]]))
    uniform = [torch.full((len(choice.values),), 1 / len(choice.values), dtype=torch.float64)
               for choice in elite.choices]
    mean = elite.mean_madds(uniform)
    assert mean is not None
    assert float(mean) == pytest.approx(elite.cost(rows_of(elite))[0].mean())
    assert elite_of(CELLS).mean_madds([torch.ones(len(c.values)) for c in elite_of(CELLS).choices]) is None
