"""Bins: ranges that leave nothing out, groups of the shipped spaces, and sentences about groups that are none."""
from __future__ import annotations

import numpy as np
import pytest

from searchspaces.bins import BinGroup, checked_groups, contiguous_bins, group_of, position_groups, possible_tokens
from searchspaces.catalogue import SPACES, make_space
from searchspaces.errors import SpaceError
from searchspaces.mnas.space import BLOCK_TOKENS, LAYER, MnasS16
from searchspaces.nasbench201.space import NasBench201
from searchspaces.space import Choice
from tests.actors.tinyspace import TinySpace


@pytest.mark.parametrize("count", range(2, 65))
def test_bins_cover_every_value_in_order(count: int) -> None:
    bins = contiguous_bins(count)
    assert len(bins) >= 2 and sorted({token for tokens in bins for token in tokens}) == list(range(count))
    if count != 3:      # disjoint
        assert [token for tokens in bins for token in tokens] == list(range(count))
    if count > 3:       # something is left to choose, about as much everywhere
        sizes = [len(tokens) for tokens in bins]
        assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 2 and max(sizes) <= 6
    if count >= 8:
        assert len(bins) == count // 4


def test_worked_examples_of_bins() -> None:
    assert [list(tokens) for tokens in contiguous_bins(2)] == [[0], [1]]
    assert [list(tokens) for tokens in contiguous_bins(3)] == [[0, 1], [1, 2]]
    assert [list(tokens) for tokens in contiguous_bins(5)] == [[0, 1], [2, 3, 4]]
    sixteen = contiguous_bins(16)       # the depths of the paper: {1..4}, {5..8}, ... (specification nss 1)
    assert [[1 + token for token in tokens] for tokens in sixteen][1] == [5, 6, 7, 8] and len(sixteen) == 4


@pytest.mark.parametrize("count", [0, 1])
def test_one_value_cannot_be_narrowed(count: int) -> None:
    with pytest.raises(SpaceError, match=f"{count} value cannot be narrowed"):
        contiguous_bins(count)


def test_labels_say_the_values() -> None:
    choices = (Choice("width", "width", (8, 16, 24, 32)), Choice("op", "op", ("conv", "pool", "skip")),
               Choice("on", "flag", (0, 1)), Choice("fixed", "fixed", (7,)))
    groups = position_groups(choices)
    assert [group.labels for group in groups] == [("8-16", "24-32"), ("conv, pool", "pool, skip"), ("0", "1")]
    assert [group.positions for group in groups] == [(0,), (1,), (2,)]
    own = group_of("pair", (0, 1), (choices[0], choices[0]), [[0, 3], [1, 2]])
    assert own.bins == (((0, 3), (0, 3)), ((1, 2), (1, 2))) and own.labels == ("8-32", "16-24")


@pytest.mark.parametrize("name", SPACES)
def test_shipped_spaces_can_be_narrowed(name: str) -> None:
    """Every position with something to choose is in a group, whose bins leave none of its possible values out."""
    space = make_space(name, classes=7, channels=2, options={})
    possible = possible_tokens(space)
    covered: dict[int, set[int]] = {}
    for group in checked_groups(space):
        assert len(set(group.labels)) == len(group) >= 2
        for i, position in enumerate(group.positions):
            covered[position] = {token for of_bin in group.bins for token in of_bin[i]}
    for position, tokens in covered.items():
        assert tokens == set(np.flatnonzero(possible[position])), space.choices[position].name
    free = {choice.name for position, choice in enumerate(space.choices)
            if possible[position].sum() > 1 and position not in covered}
    inputs = {"normal0.in_a", "normal0.in_b", "reduction0.in_a", "reduction0.in_b"}     # of two values, read alike
    assert free == (inputs if name.startswith("darts") else set())


def test_excluded_values_are_in_no_bin() -> None:
    """A block of mnas cannot lose its only layer."""
    space = MnasS16()
    groups = {group.name: group for group in checked_groups(space)}
    assert space.repeats[:2] == (1, 2)
    assert groups["layers0"].bins == (((1,),), ((1, 2),)) and groups["layers0"].labels == ("0", "0-1")
    assert groups["layers1"].bins == (((0, 1),), ((1, 2),)) and groups["layers1"].labels == ("-1 to 0", "0-1")
    assert not space.valid([0] * LAYER)[0] and space.valid([0] * (BLOCK_TOKENS + LAYER))[0]


def tiny_with(*groups: BinGroup) -> TinySpace:
    class Grouped(TinySpace):
        def bin_groups(self) -> tuple[BinGroup, ...]:
            return groups

    return Grouped()


def test_a_value_named_twice_counts_once() -> None:
    """Members are drawn uniformly over the values of a bin, in whatever order they are written."""
    (group,) = checked_groups(tiny_with(BinGroup("width", (0,), (((2, 0, 0),), ((1,),)), ("a", "b"))))
    assert group.bins == (((0, 2),), ((1,),)) and group.labels == ("a", "b")


WIDTH = BinGroup("width", (0,), (((0,),), ((1, 2),)), ("4", "8-16"))


@pytest.mark.parametrize(("groups", "words"), [
    ([], "no bins, so there is nothing to narrow"),
    ([BinGroup("width", (0,), (((0, 1, 2),),), ("all",))], "1 bins and 1 labels; give at least two"),
    ([BinGroup("width", (0,), (((0,),), ((1,),)), ("4",))], "2 bins and 1 labels"),
    ([WIDTH, BinGroup("again", (1, 0), (((0,), (0,)), ((1,), (1,))), ("a", "b"))], "'again'.*belongs to one group"),
    ([BinGroup("twice", (0, 0), (((0,), (0,)), ((1,), (1,))), ("a", "b"))], "'twice'.*belongs to one group"),
    ([BinGroup("none", (), ((), ()), ("a", "b"))], "'none'.*at least one"),
    ([BinGroup("far", (2,), (((0,),), ((1,),)), ("a", "b"))], r"'far'.*positions \[2\].*0\.\.1"),
    ([BinGroup("both", (0, 1), (((0,), (0,)), ((1,),)), ("a", "b"))], "bin 'b'.*for 1 positions, its group has 2"),
    ([BinGroup("width", (0,), (((0, 1),), ((3,),)), ("a", "b"))], "bin 'b'.*no valid value to width"),
    ([BinGroup("width", (0,), (((0, 1),), ((),)), ("a", "b"))], "bin 'b'.*no valid value to width")])
def test_groups_that_are_none_are_named(groups: list[BinGroup], words: str) -> None:
    with pytest.raises(SpaceError, match=words):
        checked_groups(tiny_with(*groups))


def test_a_bin_of_excluded_values_alone_holds_no_architecture() -> None:
    class NeverNone(NasBench201):
        def valid(self, prefix):  # type: ignore[no-untyped-def]
            return np.arange(5) > 1

    with pytest.raises(SpaceError, match="'none, skip_connect'.*holds no architecture"):
        checked_groups(NeverNone())
