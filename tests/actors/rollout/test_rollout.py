"""The rollout pool on a real Ray: every row exactly once, whatever happens to the workers."""
from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest
import ray

from actors.evaluator import Evaluation
from actors.rollout.pool import PoolSettings, RolloutPool, rows_per_call
from actors.rollout.worker import RolloutActor
from searchspaces.errors import ClusterError, EvaluationError
from tests.actors.workload import DIE, HANG, RAISE, Broken, Workload, rows

PATIENCE_S = 90


def collect_all(pool: RolloutPool) -> dict[int, Evaluation]:
    """Everything outstanding; fails on a row that comes back twice."""
    found: dict[int, Evaluation] = {}
    deadline = time.monotonic() + PATIENCE_S
    while pool.outstanding:
        assert time.monotonic() < deadline, f"{pool.outstanding} rows are missing"
        for row_id, evaluation in pool.collect(timeout_s=1):
            assert row_id not in found
            found[row_id] = evaluation
    return found


@pytest.fixture
def pools(ray_local: None) -> Iterator[list[RolloutPool]]:
    opened: list[RolloutPool] = []
    yield opened
    for pool in opened:
        pool.close()


def open_pool(pools: list[RolloutPool], factory: object = None, **settings: object) -> RolloutPool:
    defaults: dict[str, object] = {"workers": 2, "num_cpus": 0.5}
    pool = RolloutPool(factory or Workload(), PoolSettings(**(defaults | settings)))  # type: ignore[arg-type]
    pools.append(pool)
    return pool


def test_rows_come_back_once_with_their_own_accuracy(pools: list[RolloutPool]) -> None:
    pool = open_pool(pools)
    pool.submit(rows(300))
    found = collect_all(pool)
    assert sorted(found) == list(range(300))
    assert all(found[i].accuracy == (i % 100) / 1000 and found[i].tokens[0] == i % 100 for i in found)
    assert {e.source for e in found.values()} == {"supernet"} and all(e.node for e in found.values())
    assert all(found[i].details == ({"number": i % 100} if i % 2 else {}) for i in found)
    assert pool.collect(timeout_s=5) == []  # nothing outstanding: returns at once


@pytest.mark.parametrize(("row_s", "workers", "rows_together"), [
    (0.05, 2, 2), (0.05, 12, 2), (0.05, 256, 41), (1e-6, 2, 256), (10.0, 2, 1), (10.0, 256, 1), (1.0, 4096, 33)])
def test_many_workers_together_make_no_more_calls_than_a_driver_can_serve(row_s: float, workers: int,
                                                                          rows_together: int) -> None:
    """125 per second; of a few workers a call of cheap rows lasts a tenth of a second."""
    assert rows_per_call(row_s, workers) == rows_together


def test_cheap_rows_travel_together(pools: list[RolloutPool]) -> None:
    pool = open_pool(pools, workers=1)
    assert pool.capacity == 2  # nothing known yet: one row per call
    pool.submit(rows(50))
    collect_all(pool)
    assert pool.capacity > 100


def test_failure_of_one_row_is_returned_not_raised(pools: list[RolloutPool]) -> None:
    pool = open_pool(pools, rows_per_call=4)
    pool.submit(rows(7) + rows(1, RAISE, start=7))
    found = collect_all(pool)
    assert np.isnan(found[7].accuracy) and "number 0 is not wanted" in found[7].error
    assert all(not found[i].error for i in range(7))
    assert pool.restarts == 0


def test_new_weights_reach_every_worker(pools: list[RolloutPool]) -> None:
    pool = open_pool(pools, rows_per_call=1)
    for version in (1, 2):
        pool.set_weights(version, ray.put({"offset": np.array([100 * version])}))
        pool.submit(rows(12))
        found = collect_all(pool)
        assert {e.weights_version for e in found.values()} == {version}
        assert all(found[i].accuracy == (i + 100 * version) / 1000 for i in found)


@pytest.mark.slow
def test_killed_worker_loses_nothing_and_gets_the_weights_again(pools: list[RolloutPool]) -> None:
    pool = open_pool(pools, Workload(sleep_s=0.05), rows_per_call=2)
    pool.set_weights(3, ray.put({"offset": np.array([500])}))
    pool.submit(rows(80))
    found = dict(pool.collect(timeout_s=30))
    victim = pool.pids()[0]
    os.kill(victim, signal.SIGKILL)
    found |= collect_all(pool)
    assert pool.restarts == 1
    assert sorted(found) == list(range(80))
    assert all(e.accuracy == (i + 500) / 1000 and e.weights_version == 3 and not e.error for i, e in found.items())
    # the replacement works, with the same weights
    deadline = time.monotonic() + PATIENCE_S
    while pool.ready_workers < 2:
        assert time.monotonic() < deadline
        pool.collect(timeout_s=0.2)
    assert pool.pids()[0] != victim
    pool.submit(rows(20))
    assert all(e.accuracy == (i + 500) / 1000 for i, e in collect_all(pool).items())


@pytest.mark.slow
def test_worker_killed_while_idle_is_noticed(pools: list[RolloutPool]) -> None:
    pool = open_pool(pools, workers=1)
    pool.set_weights(1, ray.put({"offset": np.array([7])}))
    pool.submit(rows(2))
    collect_all(pool)
    os.kill(pool.pids()[0], signal.SIGKILL)
    pool.submit(rows(4))
    assert all(e.accuracy == (i + 7) / 1000 for i, e in collect_all(pool).items())


@pytest.mark.slow
def test_a_row_that_kills_its_workers_becomes_an_error_and_spares_the_others(pools: list[RolloutPool]) -> None:
    pool = open_pool(pools, rows_per_call=3, max_failures=2)
    pool.submit(rows(5) + rows(1, DIE, start=5) + rows(5, start=6))
    found = collect_all(pool)
    assert "failed 2 times" in found[5].error and "died" in found[5].error and np.isnan(found[5].accuracy)
    assert all(not found[i].error for i in range(11) if i != 5)


def test_a_hanging_row_is_ended_by_its_time_out(pools: list[RolloutPool]) -> None:
    pool = open_pool(pools, rows_per_call=1, call_time_out_s=1.0, max_failures=1)
    pool.submit(rows(3) + rows(1, HANG, start=3) + rows(3, start=4))
    found = collect_all(pool)
    assert "longer than 1 s" in found[3].error
    assert all(not found[i].error for i in range(7) if i != 3)


def test_resize_grows_and_shrinks_without_losing_rows(pools: list[RolloutPool]) -> None:
    pool = open_pool(pools, Workload(sleep_s=0.02), workers=1)
    pool.submit(rows(60))
    pool.resize(3)
    found = dict(pool.collect(timeout_s=30))
    while pool.ready_workers < 3:
        found |= dict(pool.collect(timeout_s=0.2))
        pool.submit(rows(0 if pool.outstanding else 10, start=1000 + len(found)))
    pool.resize(1)
    collect_all(pool)
    assert len(pool._workers) == 1


def test_factory_that_fails_ends_with_its_reason(pools: list[RolloutPool]) -> None:
    pool = open_pool(pools, Broken(), workers=1)
    pool.submit(rows(1))
    with pytest.raises(EvaluationError, match="no weights file on this node"):
        collect_all(pool)


def test_pool_without_resources_says_what_it_needs(pools: list[RolloutPool]) -> None:
    pool = open_pool(pools, workers=2, num_cpus=1000, start_time_out_s=0.5)
    pool.submit(rows(1))
    with pytest.raises(ClusterError, match="each needs 1000 CPU"):
        collect_all(pool)


def test_actor_refuses_weights_it_does_not_hold() -> None:
    actor = RolloutActor("rollout-7")
    with pytest.raises(EvaluationError, match="prepare it again"):
        actor.evaluate(np.zeros((1, 2), dtype=np.int8))
    actor.prepare(Workload())
    actor.set_weights(2, {"offset": np.array([1])})
    with pytest.raises(EvaluationError, match="holds weights version 2, not 3"):
        actor.evaluate(np.zeros((1, 2), dtype=np.int8), version=3)
    with pytest.raises(KeyError):
        actor.set_weights(3, {"wrong": np.array([1])})
    with pytest.raises(EvaluationError, match="not 3 .*'offset'"):
        actor.evaluate(np.zeros((1, 2), dtype=np.int8), version=3)
    assert repr(actor) == "RolloutActor(rollout-7)"
