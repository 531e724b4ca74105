"""How many searches find room, from configurations and resources alone."""
from __future__ import annotations

from typing import Any

import pytest

from orchestrator.cluster.gpus import GpuOffer
from orchestrator.config import Config, parse_config
from orchestrator.services.recipes import slots_needed
from orchestrator.sweep.capacity import least_cpus, least_gpus, room, slots
from searchspaces.errors import ClusterError

TABLE = {"path": "t.parquet", "token_columns": ["a"]}
ON_TABLES = {"space": "nasbench201", "target": {"name": "table", "column": "ms", **TABLE},
             "accuracy": {"source": "table", "accuracy_column": "val", **TABLE}, "controller": "random"}
PHONE = {"target": {"name": "android", "runner": "r", "serial": "all"}}


def config(**sections: Any) -> Config:
    return parse_config({"data": "digits", "controller": "random"} | sections, "test")


@pytest.mark.parametrize(("sections", "cpus"), [
    (ON_TABLES, 1),                                                                     # looking up is one worker
    (ON_TABLES | {"search": {"rollouts": 3}}, 3),
    ({}, 3),                                                                            # measuring, supernet, rollout
    ({"supernet": {"workers": 4, "cpus": 2}, "search": {"rollouts": 5}}, 14),           # 1 + 8 + 5
    ({"space": "nasbench201", "accuracy": {"source": "training", "workers": 3, "cpus": 2}}, 7),     # 1 + 6
])
def test_cpus_without_which_a_search_cannot_go_on(sections: dict[str, Any], cpus: int) -> None:
    assert least_cpus(config(**sections), {"latency_cpu": 1}) == cpus


def test_gpus_left_to_the_search_are_one_where_there_are_any() -> None:
    assert [least_gpus(config(), {"GPU": gpus}) for gpus in (0, 1, 8)] == [0, 1, 1]
    fixed = config(supernet={"gpus": 1, "workers": 2}, search={"gpus": 0.5, "rollouts": 2})
    assert least_gpus(fixed, {"GPU": 8}) == 3
    assert least_gpus(config(supernet={"gpus": 0}, search={"gpus": 0}), {"GPU": 8}) == 0


def test_searches_share_what_a_cluster_has() -> None:
    two = [config(**ON_TABLES), config(**ON_TABLES, search={"rollouts": 2})]
    assert room(3, two, {"CPU": 6}, local=False).searches == 3
    fewer = room(3, two, {"CPU": 5}, local=False)
    assert (fewer.searches, fewer.why) == (2, "each needs 2 CPUs, of 5")
    assert room(9, [config(**ON_TABLES, supernet={"gpus": 0}, search={"gpus": 0})], {"CPU": 90, "GPU": 1},
                local=False).searches == 1      # the recipe's trainers are left one


def test_a_search_that_never_finds_room_is_refused() -> None:
    with pytest.raises(ClusterError, match="needs 8 CPUs and the cluster has 6; lower what its configuration asks"):
        room(1, [config(**ON_TABLES), config(**ON_TABLES, search={"rollouts": 8})], {"CPU": 6}, local=False)
    with pytest.raises(ClusterError, match="needs 4 GPUs and the cluster has 2"):
        room(1, [config(supernet={"gpus": 4, "workers": 1}, search={"gpus": 0})], {"CPU": 90, "GPU": 2}, local=False)


def test_a_device_is_one_searchs() -> None:
    one = room(4, [config()], {"CPU": 90, "latency_cpu": 1}, local=False)
    assert (one.searches, one.why) == (1, "each keeps a device of target onnx_cpu to itself, and there is 1 to share")
    assert room(4, [config()], {"CPU": slots(1, [config()]), "latency_cpu": 1}, local=True) == one  # not CPUs
    assert room(4, [config()], {"CPU": 90, "latency_cpu": 3}, local=False).searches == 3
    assert room(4, [config()], {"CPU": 90}, local=False).searches == 1      # the driver's own processor
    phones = {"CPU": 90, "android:A": 1, "android:B": 1}
    assert room(4, [config(**PHONE)], phones, local=False).searches == 1    # a search takes both


def test_here_there_are_slots_for_as_many_as_were_asked_for() -> None:
    configs = [config(**ON_TABLES), config(**ON_TABLES, search={"rollouts": 7})]
    assert slots(3, configs) == 3 * slots_needed(configs[1])
    assert room(3, configs, {"CPU": slots(3, configs)}, local=True).searches == 3


def test_a_part_of_the_gpus() -> None:
    assert GpuOffer(8, 4).shared(1) == GpuOffer(8, 4)
    assert GpuOffer(8, 4).shared(3) == GpuOffer(2, 2)
    assert GpuOffer(2, 1).shared(4) == GpuOffer(0.5, 0.5)
