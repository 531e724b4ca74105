"""The latency pool with real Ray workers: cache, order, deaths, time-outs, quarantine, and the real CPU target."""
from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from actors.latency import device
from actors.latency import pool as pool_module
from actors.latency.pool import LatencyPool, LatencyPoolSettings, LatencyRequest
from actors.targets.target import Claim
from searchspaces.catalogue import make_space
from searchspaces.errors import ClusterError, ConfigError, SpaceError, TargetError
from searchspaces.onnxgraph import to_onnx
from searchspaces.space import Tokens

SPACE = make_space("nasbench201", classes=10, channels=3, options={})
MOBILE = make_space("mobilenetv3-s16", classes=10, channels=1, options={})
SCRIPTED = "tests.actors.latency.scripted:ScriptedTarget"
SHARED = Claim({"num_cpus": 0.1})      # devices of these tests need no core of their own
QUICK = LatencyPoolSettings(per_call=2, time_out_s=60.0, start_time_out_s=60.0, retry_wait_s=0.1)


@pytest.fixture
def make_pool(ray_local: None, tmp_path: Path) -> Iterator[Callable[..., LatencyPool]]:
    pools: list[LatencyPool] = []

    def make(settings: LatencyPoolSettings = QUICK, devices: int = 1, reference_ms: float | None = None,
             **options: Any) -> LatencyPool:
        pools.append(LatencyPool(SPACE, SCRIPTED, {"log": str(tmp_path / "log"), **options},
                                 devices=(SHARED,) * devices, settings=settings, reference_ms=reference_ms))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def visits(tmp_path: Path) -> list[int]:
    log = tmp_path / "log"
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def row(*totals: int) -> Tokens:
    """Architectures whose tokens sum to the given totals; all edges are on a path, so all tokens live."""
    rows = []
    for total in totals:
        tokens = np.ones(6, dtype=np.int8)
        for _ in range(total - 6):
            tokens[np.argmin(tokens)] += 1
        rows.append(tokens)
    return np.stack(rows)


def test_identical_requests_are_measured_once(make_pool: Callable[..., LatencyPool], tmp_path: Path) -> None:
    pool = make_pool(pause_s=0.05)
    first = pool.measure(np.concatenate([row(7, 8), row(7)]))
    assert [result.source for result in first] == ["measured", "measured", "cached"]
    pool.submit([LatencyRequest(row(9)[0]), LatencyRequest(row(9)[0], client="other")])
    pool.submit([LatencyRequest(row(9)[0], client="third")])
    results = []
    while pool.outstanding:
        results += pool.collect(timeout_s=5.0)
    assert Counter(result.source for result in results) == {"measured": 1, "cached": 2}
    assert [result.source for result in pool.measure(row(7, 9))] == ["cached", "cached"]
    assert sorted(visits(tmp_path)) == [7, 8, 9]
    reference_ms = pool.reference_ms()
    assert [result.latency_ms / reference_ms for result in first] == pytest.approx([8.0, 9.0, 8.0])


def test_more_visits_than_known_are_measured(make_pool: Callable[..., LatencyPool], tmp_path: Path) -> None:
    pool = make_pool()
    pool.measure(row(7))
    again = pool.measure(row(7), visits=3)[0]
    assert again.source == "measured" and again.sample is not None and again.sample.rounds == 3
    assert pool.measure(row(7), visits=2)[0].source == "cached"
    assert visits(tmp_path) == [7] * 4


def test_only_dead_tokens_share_a_measurement(make_pool: Callable[..., LatencyPool]) -> None:
    tokens_T = SPACE.canonical(np.array([[1, 0, 0, 1, 0, 1]], dtype=np.int8))[0]
    rows = []
    for position, choice in enumerate(SPACE.choices):
        for value in range(len(choice.values)):
            changed = tokens_T.copy()
            changed[position] = value
            rows.append(changed)
    results = make_pool().measure(np.stack(rows))
    for result, changed in zip(results, rows):
        same = (SPACE.canonical(changed[None])[0] == tokens_T).all()
        assert (result.arch_id == SPACE.arch_id(tokens_T)) == same
    assert sum(result.source == "measured" for result in results) == len({result.arch_id for result in results})


def test_clients_are_served_in_rounds(make_pool: Callable[..., LatencyPool], tmp_path: Path) -> None:
    pool = make_pool(LatencyPoolSettings(per_call=1))
    pool.submit([LatencyRequest(tokens_T, client="greedy") for tokens_T in row(*range(7, 17))])
    pool.submit([LatencyRequest(tokens_T, client="late") for tokens_T in row(17, 18)])
    while pool.outstanding:
        pool.collect(timeout_s=5.0)
    order = visits(tmp_path)
    assert order.index(18) <= 5 and len(order) == 12


def test_killed_worker_is_replaced_and_its_request_repeated(make_pool: Callable[..., LatencyPool],
                                                            tmp_path: Path) -> None:
    pool = make_pool(pause_s=0.2)
    reference_ms, pid = pool.reference_ms(), pool.health()[0].pid
    pool.submit([LatencyRequest(tokens_T) for tokens_T in row(*range(7, 15))])
    results = pool.collect(timeout_s=10.0)
    os.kill(pid, signal.SIGKILL)
    while pool.outstanding:
        results += pool.collect(timeout_s=10.0)
    assert sorted(round(result.latency_ms / reference_ms) for result in results) == list(range(8, 16))
    assert not any(result.error for result in results)
    # the new process would find another quiet value by itself; a run has one
    assert {result.sample.reference_ms for result in results if result.sample} == {reference_ms}
    assert len({result.sample.details["pid"] for result in results if result.sample}) == 2
    assert pool.health()[0].state == "ready" and pool.health()[0].pid != pid


def test_network_that_kills_its_worker_fails_alone(make_pool: Callable[..., LatencyPool], tmp_path: Path) -> None:
    results = make_pool(kill=8).measure(row(7, 8, 9))
    assert [bool(result.error) for result in results] == [False, True, False]
    assert "failed 3 times" in results[1].error and "died" in results[1].error and np.isnan(results[1].latency_ms)
    assert visits(tmp_path).count(8) == 3


def test_network_that_does_not_run_fails_with_the_targets_reason(make_pool: Callable[..., LatencyPool],
                                                                 tmp_path: Path) -> None:
    results = make_pool(fail=8).measure(row(7, 8, 9))
    assert [result.error for result in results] == ["", "failed 3 times, last: total 8 does not run here", ""]
    assert make_pool(fail=8).measure(row(8), visits=2)[0].error


def test_network_that_hangs_times_out(make_pool: Callable[..., LatencyPool]) -> None:
    settings = LatencyPoolSettings(per_call=1, time_out_s=1.0, max_failures=2, retry_wait_s=0.1)
    results = make_pool(settings, stall=8).measure(row(7, 8, 9))
    assert [bool(result.error) for result in results] == [False, True, False]
    assert "no answer within 1 s" in results[1].error


@pytest.mark.parametrize("how", ["unhealthy", "odd"])
def test_spoilt_device_is_quarantined_and_others_take_its_work(make_pool: Callable[..., LatencyPool], tmp_path: Path,
                                                               how: str) -> None:
    pool = make_pool(devices=2, spoilt=str(tmp_path / "claim"), how=how, pause_s=0.02)
    results = pool.measure(row(*range(7, 15)))
    assert not any(result.error for result in results)
    assert len({result.sample.target_id for result in results if result.sample}) == 1
    while any(device.state == "starting" for device in pool.health()):
        pool.collect(timeout_s=0.1)
    quarantined = [device for device in pool.health() if device.state == "quarantined"]
    assert len(quarantined) == 1
    assert ("the script says so" if how == "unhealthy" else "never mixed") in quarantined[0].reason
    assert not any(result.error for result in pool.measure(row(15, 16)))


def test_no_healthy_device_is_said_at_once(make_pool: Callable[..., LatencyPool], tmp_path: Path) -> None:
    pool = make_pool(spoilt=str(tmp_path / "claim"))
    with pytest.raises(TargetError, match="the script says so"):
        pool.submit([LatencyRequest(row(7)[0])])
    assert pool.outstanding == 0


def test_preloaded_samples_answer_for_their_target_only(make_pool: Callable[..., LatencyPool], tmp_path: Path) -> None:
    results = make_pool().measure(row(7, 8))
    pool = make_pool(reference_ms=results[0].sample.reference_ms)      # type: ignore[union-attr]
    pool.preload(results[:1])
    assert [result.source for result in pool.measure(row(7, 8))] == ["cached", "measured"]
    other = make_pool(spoilt=str(tmp_path / "claim"), how="odd")
    other.preload(results)
    assert [result.source for result in other.measure(row(7))] == ["measured"]


def test_bad_requests_are_refused(make_pool: Callable[..., LatencyPool], ray_local: None) -> None:
    with pytest.raises(SpaceError, match="token 9 at position 2"):
        make_pool().submit([LatencyRequest(np.array([0, 1, 9, 0, 0, 0], dtype=np.int8))])
    with pytest.raises(ClusterError, match="no node of the cluster offers the resource 'latency_toaster'"):
        LatencyPool(SPACE, "onnx_cpu", {}, devices=(Claim({"resources": {"latency_toaster": 1}}),))
    with pytest.raises(ConfigError, match="no latency target 'onyx_cpu'; choose one of onnx_cpu, cuda, android, table"):
        LatencyPool(SPACE, "onyx_cpu", {})
    with pytest.raises(ConfigError, match="has no option 'thread'; did you mean 'threads'. allowed: batch"):
        LatencyPool(SPACE, "onnx_cpu", {"thread": 1})
    with pytest.raises(ConfigError, match="needs the option 'path'"):
        LatencyPool(SPACE, "table", {})
    pool = LatencyPool(SPACE, "onnx_cpu", {"core": 4096}, devices=(SHARED,), settings=QUICK)
    with pytest.raises(TargetError, match="core 4096 cannot be used"):
        pool.identity()
    pool.close()


@pytest.mark.slow
def test_cpu_target_survives_a_kill_and_keeps_its_core_and_reference(ray_local: None) -> None:
    core = max(os.sched_getaffinity(0))
    pool = LatencyPool(MOBILE, "onnx_cpu", {"core": core}, settings=QUICK)
    rows = MOBILE.extremes()
    before = pool.measure(rows)
    reference_ms, pid = pool.reference_ms(), pool.health()[0].pid
    os.kill(pid, signal.SIGKILL)
    after = pool.measure(rows, visits=2)
    assert pool.health()[0].pid != pid
    cores = [psutil.Process(thread.id).cpu_affinity() for thread in psutil.Process(pool.health()[0].pid).threads()]
    assert cores.count([core]) == 1 and len(cores) > 1      # the thread that measures, and it alone
    for results in (before, after):
        assert [result.source for result in results] == ["measured", "measured"]
        assert results[0].latency_ms < results[1].latency_ms
        assert {result.sample.reference_ms for result in results if result.sample} == {reference_ms}
    slowest = to_onnx(MOBILE.graph(rows[1]), batch=None).SerializeToString()
    sample = pool.measure_onnx(slowest, visits=2)
    assert sample.details["visits"] == 2 and sample.latency_ms > after[0].latency_ms
    with pytest.raises(TargetError, match="cannot load the network"):
        pool.measure_onnx(b"not a model")
    assert pool.measure_onnx(slowest).ratio > 0
    pool.close()
    pool.close()


def test_a_device_that_rests_is_waited_for_and_nobody_is_blamed(make_pool: Callable[..., LatencyPool],
                                                                tmp_path: Path) -> None:
    hot = tmp_path / "hot"
    pool = make_pool(hot=str(hot), settings=replace(QUICK, retry_wait_s=0.02))
    pool.identity()
    hot.touch()
    pool.submit([LatencyRequest(tokens_T) for tokens_T in row(*range(6, 12))])
    deadline = time.monotonic() + 60
    while pool.health()[0].reason != "it is hot" and time.monotonic() < deadline:
        assert pool.collect(0.1) == []
    for _ in range(20):     # many more refusals than a failing device is allowed
        assert pool.collect(0.05) == []
    assert "it is hot" in pool.health()[0].reason and pool.health()[0].state == "starting"
    hot.unlink()
    results = []
    while pool.outstanding and time.monotonic() < deadline:
        results += pool.collect(0.5)
    assert len(results) == 6 and not any(result.error for result in results)


def test_a_device_that_rests_too_long_is_given_up(make_pool: Callable[..., LatencyPool], tmp_path: Path) -> None:
    hot = tmp_path / "hot"
    hot.touch()
    pool = make_pool(hot=str(hot), settings=replace(QUICK, retry_wait_s=0.02, rest_s=0.5))
    with pytest.raises(TargetError, match="it is hot; it has rested for 0.5 s"):
        pool.identity()


def test_searches_that_share_a_device_measure_in_turn(ray_local: None, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gives way after its share, and when it has nothing to measure, and comes again."""
    for module in (device, pool_module):
        monkeypatch.setattr(module, "LOOK_S", 0.2)
    said: list[str] = []
    only = Claim({"num_cpus": 0.1, "resources": {"latency_cpu": 1}})
    options = {"log": str(tmp_path / "log"), "pause_s": 0.2}
    first, second = (LatencyPool(SPACE, SCRIPTED, options, devices=(only,), search=search, say=said.append,
                                 settings=replace(QUICK, per_call=1, share_s=0.5)) for search in ("first", "second"))
    results: list[Any] = []
    over = threading.Event()

    def search(pool: LatencyPool, totals: range) -> None:
        """What a driver does: it measures, and gives way while it waits for something else."""
        results.extend(pool.measure(row(*totals)))
        while not over.wait(0.1):
            pool.give_way()

    try:
        first.identity()        # it has the device
        searches = [threading.Thread(target=search, args=(first, range(7, 17)), daemon=True),
                    threading.Thread(target=search, args=(second, range(18, 23)), daemon=True)]
        for thread in searches:
            thread.start()
        deadline = time.monotonic() + 120
        while len(results) < 15 and time.monotonic() < deadline:
            time.sleep(0.1)
        over.set()
        for thread in searches:
            thread.join(30)
        assert len(results) == 15 and not any(result.error for result in results)
        order = ["second" if total >= 18 else "first" for total in visits(tmp_path)]
        assert len(list(itertools.groupby(order))) >= 3 and len(order) == 15, order
        assert {pool.health()[0].state for pool in (first, second)} <= {"waiting", "ready"}
        assert said[0] == (f"target {SCRIPTED} waits for its turn: first measures on latency_cpu; searches that share "
                           "a device get it in turn")
        assert second.waiting == 0
        impatient = replace(QUICK, start_time_out_s=1.0, turn_time_out_s=2.0, max_failures=1)
        third = LatencyPool(SPACE, SCRIPTED, options, devices=(only,), search="third", settings=impatient)
        with pytest.raises(TargetError, match="cannot measure: the latency worker did not start within 1 s"):
            third.identity()        # nobody gives way any more
        assert third.activities() == {"quarantined": 1}
        third.close()
    finally:
        first.close()
        second.close()
