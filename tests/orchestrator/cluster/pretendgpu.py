"""A Ray that pretends to have one GPU: what is reserved, who is told what, and a whole search that measures on it.

    python -m tests.orchestrator.cluster.pretendgpu FOLDER [search]         # one JSON object on the last line

Ray only counts the GPU; torch cannot use it, so that training falls back to the CPU. `GpuTarget` measures the CPU and
claims the GPU, which it refuses to share.
"""
from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from rich.console import Console

from actors.data import Preprocessing
from actors.devices import training_device
from actors.targets.cuda.target import CudaTarget
from actors.targets.onnx_cpu import OnnxCpuTarget
from actors.targets.target import Claim
from orchestrator.config import parse_config
from orchestrator.data.accuracy import TrainingAccuracy
from orchestrator.record.store import RunStore
from orchestrator.run.search import Search
from orchestrator.services.context import data_and_space
from orchestrator.services.services import Services
from tests.actors.targets.cuda.fakegpu import FakeGpu

CONFIG: dict[str, Any] = {
    "seed": 3, "data": {"name": "digits", "limit": 600}, "space": "mobilenetv3-s16",
    "target": "tests.orchestrator.cluster.pretendgpu:GpuTarget", "budgets": {"count": 2},
    "latency": {"initial": 12, "maximum": 12, "visits": 1}, "supernet": {"epochs": 1}, "controller": "random",
    "search": {"evaluations": 6, "calibration_images": 64, "rollouts": 2},
    "delivery": {"alternatives": 2, "fine_tune_epochs": 1},
}
PATIENCE_S = 120.0


class GpuTarget(OnnxCpuTarget):
    @classmethod
    def claims(cls, options: Mapping[str, Any], offered: Mapping[str, float]) -> list[Claim]:
        return CudaTarget.claims({}, offered)


class Worker:
    def cuda_target(self) -> str:
        try:
            CudaTarget((3, 8, 8), 1.0, modules=FakeGpu().modules()).close()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "measures"

    def device(self, torch_sees_it: bool) -> str:
        torch.cuda.is_available = lambda: torch_sees_it     # type: ignore[method-assign]
        return training_device("auto").type


def told(gpus: float) -> dict[str, str]:
    worker = ray.remote(Worker).options(num_cpus=0, num_gpus=gpus).remote()
    calls = {"cuda_target": worker.cuda_target.remote(), "device_here": worker.device.remote(False),
             "device_with_cuda": worker.device.remote(True)}
    answers = {name: ray.get(call, timeout=PATIENCE_S) for name, call in calls.items()}
    ray.kill(worker)
    return answers


def free_gpus(expected: float) -> float:
    """Ray hears of ended workers a little later: waits for what is expected, up to a limit."""
    deadline = time.monotonic() + 30.0
    while abs((free := ray.available_resources().get("GPU", 0.0)) - expected) > 1e-3 and time.monotonic() < deadline:
        time.sleep(0.1)
    return round(free, 4)


def shares(folder: Path) -> dict[str, Any]:
    """The GPU as the services of a run take it, in the order of the stages."""
    facts: dict[str, Any] = {}
    config = parse_config(CONFIG, "test")
    splits, space = data_and_space(config)
    store = RunStore.create(folder, "shares", "", {})
    services = Services(config, space, splits, Preprocessing.fit(splits.train, 16), store, local=True)
    services.latency("GpuTarget").identity()
    facts["free_while_measuring"] = free_gpus(0.0)
    status = ray.get(services.supernet().status.remote(), timeout=PATIENCE_S)
    facts["supernet_device"], facts["free_while_training"] = status["device"], free_gpus(0.5)
    store.update_state(weights_version=status["version"])
    rollouts, row = services.rollouts(), space.extremes()[0]
    rollouts.submit([(0, row)])
    (_, evaluation), = rollouts.collect(timeout_s=PATIENCE_S)
    facts["evaluated"], facts["free_while_searching"] = evaluation.error == "", free_gpus(0.0)
    facts["measured"] = services.latency("GpuTarget").measure(np.stack([row]))[0].error == ""
    facts["free_while_measuring_again"] = free_gpus(0.0)
    trainers = TrainingAccuracy(workers=3)
    facts["trainers"] = [services.trainers(trainers), services.trainer_gpus(trainers)]
    services.close()
    facts["free_at_the_end"] = free_gpus(1.0)
    return facts


def main() -> None:
    folder = Path(sys.argv[1])
    ray.init(address="local", num_cpus=6, num_gpus=1, include_dashboard=False, log_to_driver=False)
    if sys.argv[2:] == ["search"]:
        output = Console(file=io.StringIO())
        entries = Search(parse_config(CONFIG, "test"), runs=folder, name="gpu", console=output).run()
        facts: dict[str, Any] = {"delivered": [bool(entry.onnx) for entry in entries], "free": free_gpus(1.0)}
    else:
        facts = {"told": {str(gpus): told(gpus) for gpus in (1, 0.5, 0)}, "shares": shares(folder)}
    ray.shutdown()
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
