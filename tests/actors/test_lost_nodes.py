"""A node that vanishes with all that works on it: the supernet and the rollout workers go on on another one."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from actors.rollout.pool import PoolSettings, RolloutPool
from actors.supernet.actor import SupernetService
from tests.actors.rollout.test_rollout import collect_all
from tests.actors.supernet.test_supernet_ray import DATA, PREPROCESSING, alone, assert_close, get, settings
from tests.actors.tinyspace import TinySpace
from tests.actors.workload import Workload, rows


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head for the driver alone."""
    started = Cluster(initialize_head=True, head_node_args={
        "num_cpus": 0, "include_dashboard": False, "object_store_memory": 150 * 2**20,
        "_system_config": {"health_check_period_ms": 1000, "health_check_failure_threshold": 8}})
    try:
        ray.init(address=started.address, log_to_driver=False)
        yield started
    finally:
        ray.shutdown()
        started.shutdown()


@pytest.mark.alone      # its process is connected to no other Ray
@pytest.mark.slow
def test_what_a_lost_node_held_goes_on_on_another_one(cluster: Cluster, tmp_path: Path) -> None:
    """The weights come back with their last checkpoint and end as if nothing had happened, every row comes once."""
    spot = cluster.add_node(num_cpus=2, object_store_memory=100 * 2**20)
    service = SupernetService(TinySpace(), DATA.train, PREPROCESSING, settings(), tmp_path / "ray")
    before = get(service.actor.train_epoch.remote())
    pool = RolloutPool(Workload(0.05), PoolSettings(workers=2, num_cpus=0.5, rows_per_call=4))
    pool.submit(rows(40))
    found = dict(pool.collect(timeout_s=60))
    assert before["epoch"] == 1 and 0 < len(found) < 40
    epoch = service.actor.train_epoch.remote()
    cluster.remove_node(spot, allow_graceful=False)
    cluster.add_node(num_cpus=2, object_store_memory=100 * 2**20)
    late = collect_all(pool)
    assert sorted([*found, *late]) == list(range(40)) and not any(e.error for e in late.values())
    status = get(epoch)         # where it was quick, from before the node went
    assert status["epoch"] >= 2
    while status["epoch"] < 3:
        status = get(service.actor.train_epoch.remote())
    assert status["pid"] != before["pid"]
    assert_close(get(service.actor.weights.remote())[1], alone(tmp_path / "alone", TinySpace(), 3), atol=1e-6)
    pool.close()
    service.close()
