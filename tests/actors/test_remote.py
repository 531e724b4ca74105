"""Errors of ours cross any number of actors as themselves; errors of others keep the remote traceback."""
from __future__ import annotations

import pytest
import ray
from ray.exceptions import GetTimeoutError, RayTaskError

from actors.remote import fetch
from searchspaces.errors import StoreError

SENTENCE = "the disk is full; free some space"


@ray.remote(num_cpus=0)
class Failing:
    def own(self) -> None:
        raise StoreError(SENTENCE)

    def foreign(self) -> None:
        raise ZeroDivisionError("by zero")

    def through(self, other: ray.actor.ActorHandle) -> None:
        ray.get(other.own.remote())

    def fine(self) -> int:
        return 7


def test_own_errors_are_raised_as_they_were(ray_local: None) -> None:
    first, second = Failing.remote(), Failing.remote()
    assert fetch(first.fine.remote(), 30) == 7
    for reference in (first.own.remote(), first.through.remote(second)):
        with pytest.raises(StoreError) as caught:
            fetch(reference, 30)
        assert type(caught.value) is StoreError and str(caught.value) == SENTENCE
    with pytest.raises(RayTaskError, match="by zero") as other:
        fetch(first.foreign.remote(), 30)
    assert "test_remote.py" in str(other.value), "where it happened"
    with pytest.raises(GetTimeoutError):
        fetch(ray.ObjectRef.from_random(), 0.01)
