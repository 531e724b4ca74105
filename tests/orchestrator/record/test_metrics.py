"""Scalars read back from the event file; Ray's metrics read from the node's metrics port."""
from __future__ import annotations

import math
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.objectpath import AnyPath, as_path, matching
from orchestrator.frontier import hypervolume
from orchestrator.record import raymetrics
from orchestrator.record.metrics import RunMetrics
from tests.objectstore import Server

ROOT = Path(__file__).parents[3]
OURS = ("controller", "stage", "target", "state", "le")
ROWS = [
    {"sequence": 0, "latency_ms": 2.0, "accuracy": 0.5, "reward": 0.1, "duration_s": 0.2, "controller": "pnag"},
    {"sequence": 1, "latency_ms": 4.0, "accuracy": None, "reward": None, "duration_s": 1.5, "controller": "pnag",
     "error": "out of memory"},
    {"sequence": 2, "latency_ms": 3.0, "accuracy": 0.75, "reward": None, "duration_s": 0.5, "controller": "random"},
    {"sequence": 3, "latency_ms": 4.0, "accuracy": 0.6, "reward": 0.2, "duration_s": 2.0, "controller": "pnag",
     "error": None},
]


def read_scalars(folder: AnyPath) -> dict[str, list[tuple[int, float]]]:
    """Event files hold records: length (8 bytes), crc (4), an Event message, crc (4)."""
    from tensorboardX.proto.event_pb2 import Event

    scalars = defaultdict(list)
    for path in matching(folder, "events.out.*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at:at + 8], "little")
            event = Event.FromString(data[at + 12:at + 12 + size])
            at += 16 + size
            for value in event.summary.value:
                scalars[value.tag].append((event.step, pytest.approx(value.simple_value)))
    return scalars


def test_tensorboard_file_has_every_trial_and_the_front(tmp_path: Path) -> None:
    metrics = RunMetrics(tmp_path, "tb", reference_latency_ms=5.0)
    for row in ROWS:
        metrics.trial(row)
    metrics.scalar("supernet/loss", 0.25, step=7)
    metrics.close()
    scalars = read_scalars(tmp_path / "tensorboard")
    assert scalars["trial/accuracy"] == [(0, 0.5), (2, 0.75), (3, 0.6)], "a failed trial has no accuracy"
    assert scalars["trial/latency_ms"] == [(0, 2.0), (1, 4.0), (2, 3.0), (3, 4.0)]
    assert scalars["trial/reward"] == [(0, 0.1), (3, 0.2)]
    assert scalars["front/best_accuracy"] == [(0, 0.5), (1, 0.5), (2, 0.75), (3, 0.75)]
    # (5-2)*0.5, then (5-3)*(0.75-0.5) more
    assert scalars["front/hypervolume"] == [(0, 1.5), (1, 1.5), (2, 2.0), (3, 2.0)]
    assert scalars["supernet/loss"] == [(7, 0.25)]


def test_tensorboard_file_in_an_object_store(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    run = as_path(s3.address("metrics/run"))
    metrics = RunMetrics(run, "tb", reference_latency_ms=5.0)
    monkeypatch.setattr("orchestrator.record.metrics.FLUSH_S", -1.0)
    monkeypatch.setattr("orchestrator.record.metrics.UPLOAD_S", -1.0)
    metrics.scalar("supernet/loss", 0.5, step=7)
    assert read_scalars(run / "tensorboard")["supernet/loss"] == [(7, 0.5)], "whoever is killed leaves what it had"
    metrics.scalar("supernet/loss", 0.25, step=8)
    metrics.close()
    assert read_scalars(run / "tensorboard")["supernet/loss"] == [(7, 0.5), (8, 0.25)]


def test_hypervolume_from_when_its_reference_is_known(tmp_path: Path) -> None:
    metrics = RunMetrics(tmp_path, "tb")
    metrics.trial(ROWS[0])
    assert math.isnan(metrics.hypervolume)
    metrics.set_reference(5.0)
    assert metrics.hypervolume == 1.5, "the trial before counts"
    metrics.trial(ROWS[2])
    metrics.close()
    assert read_scalars(tmp_path / "tensorboard")["front/hypervolume"] == [(2, 2.0)]


def test_replay_restores_the_front_and_writes_nothing(tmp_path: Path) -> None:
    metrics = RunMetrics(tmp_path, "tb", reference_latency_ms=5.0)
    for row in ROWS[:3]:
        metrics.replay(row["latency_ms"], float("nan") if row["accuracy"] is None else row["accuracy"])
    assert metrics.hypervolume == hypervolume([2, 3], [0.5, 0.75], 5) and metrics.best_accuracy == 0.75
    metrics.trial(ROWS[3])
    metrics.close()
    scalars = read_scalars(tmp_path / "tensorboard")
    assert scalars["front/hypervolume"] == [(3, 2.0)] and scalars["trial/accuracy"] == [(3, 0.6)]


FULL = """
import logging, resource, sys
from pathlib import Path
from orchestrator.record.metrics import RunMetrics
from tests.objectstore import Server
logging.basicConfig(level=logging.WARNING)
metrics = RunMetrics(Path(sys.argv[1]), "full", reference_latency_ms=5.0)
metrics.scalar("before", 1.0, 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # SIGXFSZ is ignored by Python: writing fails with EFBIG
for step in range(5000):
    metrics.scalar("after", float(step), step)
    if step == 2500:
        metrics.trial({"sequence": 0, "latency_ms": 2.0, "accuracy": 0.5})
print(metrics.hypervolume)
metrics.close()
print("closed")
"""


@pytest.mark.parametrize("later", [False, True])
def test_full_disk_costs_the_curves_and_nothing_else(tmp_path: Path, later: bool) -> None:
    """`later`: the error comes from flushing at the end."""
    few = FULL.replace("range(5000)", "range(1)").replace("step == 2500", "step == 0").replace("2000, 2000", "70, 70")
    done = subprocess.run([sys.executable, "-c", few if later else FULL, str(tmp_path)], cwd=ROOT, timeout=120,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1.5", "closed"]
    assert done.stderr.count("no more TensorBoard scalars") == 1 and "Traceback" not in done.stderr
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


@pytest.fixture
def exported(ray_local: None) -> Iterator[str]:
    """Address of this node's metrics port."""
    import ray

    node = next(node for node in ray.nodes() if node["Alive"])
    yield f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def scrape(url: str, run: str) -> dict[str, float]:
    """"name{labels that are ours}" to value, for one run."""
    found = {}
    for line in urllib.request.urlopen(url, timeout=10).read().decode().splitlines():
        if line.startswith("ray_paretoray_") and f'run="{run}"' in line:
            name, rest = line.split("{", 1)
            labels, value = rest.rsplit("}", 1)
            pairs = dict(part.split("=", 1) for part in labels.split(",") if "=" in part)
            ours = ",".join(f"{key}={pairs[key]}" for key in OURS if key in pairs)
            found[f"{name.removeprefix('ray_paretoray_')}{{{ours}}}".replace('"', "")] = float(value.split()[0])
    return found


def test_ray_exports_the_run_with_its_labels(exported: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raymetrics, "REFRESH_S", 0.5)
    metrics = RunMetrics(tmp_path, "ray-test", reference_latency_ms=5.0)
    metrics.stage("train")
    metrics.stage("collect")
    metrics.in_flight(3, left=9)
    metrics.latency_measurements(20)
    metrics.latency_measurements(0)
    metrics.devices("cpu", {"measuring": 1, "idle": 2}, waiting=4)
    metrics.devices("cpu", {"measuring": 3}, waiting=0)
    metrics.rollouts(5, restarts=2)
    metrics.epoch(7, math.nan)
    for row in ROWS:
        metrics.trial(row)
    wanted = {
        "trials_total{controller=pnag}": 3, "trials_total{controller=random}": 1,
        "trials_failed_total{controller=pnag}": 1, "latency_measurements_total{}": 20,
        "hypervolume{}": 2.0, "best_accuracy{}": 0.75, "in_flight{}": 3, "trials_left{}": 9, "store_errors{}": 0,
        "devices{target=cpu,state=measuring}": 3, "devices{target=cpu,state=idle}": 0, "latency_queue{target=cpu}": 0,
        "rollout_workers{}": 5, "rollout_restarts{}": 2, "supernet_epoch{}": 7,
        "stage{stage=train}": 0, "stage{stage=collect}": 1,
        "evaluation_seconds_count{controller=pnag}": 3, "evaluation_seconds_bucket{controller=pnag,le=1.0}": 1,
    }
    deadline = time.monotonic() + 40  # the worker reports every few seconds
    seen: dict[str, float] = {}
    while time.monotonic() < deadline and not wanted.items() <= seen.items():
        time.sleep(0.5)
        seen = scrape(exported, "ray-test")
    assert {key: seen.get(key) for key in wanted} == wanted, seen
    assert "supernet_images_per_second{}" not in seen, "nan is not known yet"
    time.sleep(6)       # a gauge that is not set again is gone after 2 s here, after 20 s with Ray's usual interval
    assert wanted.items() <= scrape(exported, "ray-test").items()
    metrics.close()
