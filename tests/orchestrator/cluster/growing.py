"""What a driver asks of a cluster that grows, all at once, and what is left on it afterwards.

    python -m tests.orchestrator.cluster.growing HOST:PORT FOLDER       # one JSON object on the last line
    python -m tests.orchestrator.cluster.growing HOST:PORT              # only waits until the head is alone
"""
from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

PATIENCE_S = 150.0
PHONE = "A1"
# CPUs: of a rollout node, of workers that need one beside all other nodes, and of one worker that fits on none.
LARGEST, TOGETHER, FAR_TOO_MUCH = 4, 5, 16


class Sleeper:
    def ready(self) -> None:
        pass


def until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return met


def refusal(wish: Callable[[], Any]) -> str:
    from searchspaces.errors import ClusterError

    try:
        wish()
    except ClusterError as error:
        return str(error)
    return ""


def join(address: str) -> None:
    from orchestrator.cluster.joining import prepare_environment

    prepare_environment(address)
    import ray

    ray.init(address=address, log_to_driver=False)


def wait_for_head_alone() -> bool:
    import ray

    begun = time.monotonic()
    alone = until(lambda: sum(node["Alive"] for node in ray.nodes()) == 1)
    print("shrunk in", round(time.monotonic() - begun, 1), "s", file=sys.stderr)
    return alone


def drive(address: str, folder: Path) -> dict[str, Any]:
    join(address)
    import ray

    from orchestrator.config import ClusterSettings
    from orchestrator.record.store import RunStore
    from orchestrator.resources import room as rooms
    from orchestrator.resources.autoscaler import autoscales
    from orchestrator.resources.room import Need, Waits, room_when_there
    from orchestrator.resources.waiting import devices_when_there

    rooms.SAY_AFTER_S, rooms.LOOK_S, rooms.POLL_S = 0.0, 0.0, 0.2  # nodes of this machine may be there in no time
    store = RunStore.create(folder, "grown", "", {})
    said: list[str] = []
    during: list[dict[str, str]] = []
    waits = Waits(store, PATIENCE_S, False, lambda: during.append(store.state().get("waiting", {})))
    out: dict[str, Any] = {"autoscales": until(autoscales), "before": sorted(ray.cluster_resources())}

    def devices(name: str, **options: str) -> list[Any]:
        settings = ClusterSettings(device_wait_s=PATIENCE_S, local_fallback=False)
        return [claim.actor for claim in devices_when_there(name, options, settings, said.append)]

    def room(need: Need) -> None:
        room_when_there(need, PATIENCE_S, said.append, lambda: None)

    too_large = Need.of_workers("rollout workers", FAR_TOO_MUCH, setting="accuracy.cpus")
    begun = time.monotonic()
    with ThreadPoolExecutor(7) as threads:
        wishes = {"processor": threads.submit(devices, "onnx_cpu"),
                  "phone": threads.submit(devices, "android", serial=PHONE),
                  "trainer": threads.submit(room, Need.of_workers("trainers", 1, 1)),
                  "ranks": threads.submit(waits.room, Need.of_workers("the supernet", 1, count=TOGETHER), said.append),
                  "too_many": threads.submit(room, Need.of_workers("twenty", 1, count=20)),
                  "no_such_phone": threads.submit(refusal, lambda: devices("android", serial="B2")),
                  "too_large": threads.submit(refusal, lambda: room(too_large))}
        out |= {name: wish.result() for name, wish in wishes.items()}
    print("grown in", round(time.monotonic() - begun, 1), "s", file=sys.stderr)
    out |= {"said": said, "during": [seen for seen in during if seen][-1:], "waiting": store.state().get("waiting")}
    return out | _stays(folder) | _shrunk(waits, too_large)


def _stays(folder: Path) -> dict[str, Any]:
    """Starts what a run keeps beside its driver; the services must outlive the nodes."""
    import ray

    from actors.knowledge.pool import KnowledgeService
    from actors.latency.pool import LatencyPool
    from actors.targets.catalogue import claims
    from searchspaces.catalogue import make_space

    holder: Any = ray.remote(Sleeper).options(num_cpus=LARGEST).remote()      # keeps a node here meanwhile
    ray.get(holder.ready.remote(), timeout=PATIENCE_S)
    nodes = sum(node["Alive"] for node in ray.nodes())
    space = make_space("nasbench201", classes=10, channels=3, options={})
    columns = [f"op_{position}" for position in range(space.extremes().shape[1])]
    rows = space.sample_uniform(np.random.default_rng(0), 3)
    pq.write_table(pa.table({name: rows[:, i] for i, name in enumerate(columns)} | {"ms": [1.0, 2.0, 3.0]}),
                   folder / "table.parquet")
    options = {"path": str(folder / "table.parquet"), "column": "ms", "token_columns": columns}
    KEPT.append(pool := LatencyPool(space, "table", options, devices=3 * claims("table", options, {})))
    KEPT.append(KnowledgeService(folder / "knowledge", space, 1))
    until(lambda: all(device.state == "ready" for device in pool.health()))
    measured = [result.sample.latency_ms for result in pool.measure(rows) if result.sample is not None]
    ray.kill(holder)
    return {"from_table": measured, "nodes": nodes}


KEPT: list[Any] = []


def _shrunk(waits: Any, too_large: Any) -> dict[str, Any]:
    """Waits for the nodes to leave, while one actor asks for more than any may have."""
    import ray

    from orchestrator.resources.autoscaler import outlook

    actor: Any = ray.remote(Sleeper).options(num_cpus=FAR_TOO_MUCH).remote()
    before, missing = _alive_actors(), list[str]()

    def told() -> bool:
        waits.workers(too_large, 0, 1, missing.append)
        return bool(missing)

    told()
    shrunk = wait_for_head_alone() and until(told)
    ray.kill(actor)
    waits.workers(too_large, 1, 1, missing.append)
    head = ray.get_runtime_context().get_node_id()
    after, seen = _alive_actors(), outlook()
    return {"shrunk": shrunk, "missing": missing, "kept": [after.get(name) == place for name, place in before.items()],
            "on_head": [node == head for node, _ in before.values()], "no_more_starting": not (seen and seen.nodes())}


def _alive_actors() -> dict[str, tuple[str, int]]:
    """Node and process by id."""
    from ray._private import state

    return {name: (actor["Address"]["NodeID"], actor["Pid"]) for name, actor in state.actors().items()
            if actor["State"] == "ALIVE" and actor["ActorClassName"] != Sleeper.__name__}


if __name__ == "__main__":
    if len(sys.argv) > 2:
        print("RESULT" + json.dumps(drive(sys.argv[1], Path(sys.argv[2]))))
    else:
        join(sys.argv[1])
        sys.exit(not wait_for_head_alone())
