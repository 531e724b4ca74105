"""Shared fixtures: one Ray for the whole session, shared data where it is present."""
from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.leftovers import pytest_sessionfinish, pytest_sessionstart, pytest_terminal_summary  # noqa: F401 - hooks
from tests.objectstore import Server, s3_server

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Here and in all processes started here: networks are small, and threads of several tests wait for each other's cores.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def cores_are_given_back() -> Iterator[None]:
    """A test that leaves this process on one core would starve every process started after it."""
    before = psutil.Process().cpu_affinity() if hasattr(psutil.Process, "cpu_affinity") else None
    yield
    if before is not None:
        assert psutil.Process().cpu_affinity() == before


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the workers: sums depend on the number of threads, and on a busy machine threads wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    import ray

    with pytest.MonkeyPatch.context() as patch:     # metrics arrive within a second, gauges go after two
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        ray.init(address="local", num_cpus=4, include_dashboard=False, resources={"latency_cpu": 1})
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3() -> Iterator[Server]:
    """An object store."""
    with s3_server() as server:
        yield server


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with cifar10/ and nasbench201.parquet; tests that use it skip where it is absent."""
    default = Path(__file__).parents[2] / "shared" / "data"
    path = Path(os.environ.get("PARETORAY_SHARED", default))
    if not path.exists():
        pytest.skip(f"shared data not found at {path}; set PARETORAY_SHARED to its folder")
    return path
