"""The driver of a search whose evaluations sleep: what tests/benchmarks/cluster.py starts and measures.

    python -m tests.benchmarks.sleepers RUNS NAME ADDRESS SLEEP_S

The run has been measured already, and its section `accuracy` says how many trainers there are. All is real but the
workers' processes: they hold no torch, so that hundreds fit on one machine, and sleep where others would train. Prints
one line of JSON per look at the driver, and one at the end.
"""
from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

BEGUN_S = time.time()
LOOK_S = 2.0


class SleepingActor:
    """As actors/rollout/worker.py; this module is pickled by value, so it must not need what it imports below."""

    def __init__(self, name: str = "sleeper", num_cpus: float = 1) -> None:
        self._sleep_s = 0.0

    def pid(self) -> int:
        return os.getpid()

    def prepare(self, sleep_s: float) -> str:
        self._sleep_s = sleep_s
        return "sleeper"

    def evaluate(self, tokens_NT: Any, version: int | None = None) -> tuple[float, list[Any]]:
        begun, outcomes = time.perf_counter(), []
        for row in tokens_NT:
            seconds = self._sleep_s * random.uniform(0.8, 1.2)
            time.sleep(seconds)
            outcomes.append((0.3 + 0.6 * (zlib.crc32(row.tobytes()) % 10_000) / 10_000, "proxy", 0, seconds, "sleeper",
                             "", {}))
        return time.perf_counter() - begun, outcomes


def drive(runs: Path, name: str, sleep_s: float) -> None:
    import psutil
    from rich.console import Console

    import actors.rollout.pool
    from orchestrator.record.store import RunStore
    from orchestrator.run.search import Search, Stage
    from orchestrator.services.services import Services

    actors.rollout.pool.RolloutActor = SleepingActor  # type: ignore[assignment, misc]
    Services._evaluator_factory = lambda self: sleep_s  # type: ignore[assignment, method-assign, return-value]
    search = Search.resume(name, runs=runs, console=Console(file=sys.stderr, width=200))
    folders: list[RunStore] = []
    opened = search._opened
    search._opened = lambda: (folders.append(opened()), folders[-1])[1]  # type: ignore[method-assign]
    driver = psutil.Process()

    def look() -> None:
        first, before = 0.0, -1
        while True:
            rows = folders[0].trials.rows if folders else 0
            before = before if before >= 0 or not folders else rows
            first = first or (time.time() - BEGUN_S if rows > before >= 0 else 0.0)
            print(json.dumps({"s": time.time() - BEGUN_S, "trials": rows, "cpu_s": sum(driver.cpu_times()[:2]),
                              "rss_mb": driver.memory_info().rss / 1e6, "first_s": first}), flush=True)
            time.sleep(LOOK_S if first and time.time() - BEGUN_S > first + LOOK_S else 0.1)

    threading.Thread(target=look, daemon=True).start()
    search.run(until=Stage.DELIVER)
    print(json.dumps({"done": True, "s": time.time() - BEGUN_S, "trials": folders[0].trials.rows,
                      "cpu_s": sum(driver.cpu_times()[:2])}), flush=True)


if __name__ == "__main__":
    import ray

    if sys.argv[3] != "local":
        ray.init(address=sys.argv[3], log_to_driver=False)
    drive(Path(sys.argv[1]), sys.argv[2], float(sys.argv[4]))
