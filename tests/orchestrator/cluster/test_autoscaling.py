"""Devices of nodes that Ray's own autoscaler (v2) starts on demand and takes away again."""
from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.orchestrator.cluster.autoscaling import autoscaling_cluster

ROOT = Path(__file__).parents[3]
PATIENCE_S = 180
SCRIPT = """
import json, sys, time
from orchestrator.cluster.joining import prepare_environment
prepare_environment(sys.argv[1])
import ray
from orchestrator.cluster import waiting
from orchestrator.config import ClusterSettings
from searchspaces.errors import ParetorayError
ray.init(address=sys.argv[1], log_to_driver=False)
said, deadline = [], time.monotonic() + 30
while not waiting.autoscales() and time.monotonic() < deadline:
    time.sleep(0.5)
out = {"autoscales": waiting.autoscales(), "before": "latency_cpu" in ray.cluster_resources()}
found = waiting.devices_when_there("onnx_cpu", {}, ClusterSettings(device_wait_s=90, local_fallback=False), said.append)
out |= {"claims": [claim.actor for claim in found], "said": said}
try:        # no type of node has a phone
    waiting.devices_when_there("android", {"serial": "A1"}, ClusterSettings(device_wait_s=3), said.append)
except ParetorayError as error:
    out["impossible"] = str(error)
deadline = time.monotonic() + 90
while "latency_cpu" in ray.cluster_resources() and time.monotonic() < deadline:
    time.sleep(0.5)
out["after"] = "latency_cpu" in ray.cluster_resources()
print("RESULT" + json.dumps(out))
ray.shutdown()
"""


@pytest.mark.slow
def test_the_autoscaler_is_asked_for_the_device_and_its_node_leaves_when_idle() -> None:
    node_types = {"latency": {"CPU": 1, "latency_cpu": 1}, "rollouts": {"CPU": 2}}
    with (tempfile.TemporaryDirectory(prefix="auto-") as folder,
          autoscaling_cluster(Path(folder), node_types) as address):
        done = subprocess.run([sys.executable, "-c", SCRIPT, address], cwd=ROOT, capture_output=True, text=True,
                              timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout.rpartition("RESULT")[2].splitlines()[0])
    assert out["autoscales"] and not out["before"]
    assert out["claims"] == [{"resources": {"latency_cpu": 1}}]
    assert "the cluster was asked for one, waiting up to 90 s" in out["said"][0] and len(out["said"]) == 2
    assert "no node of the cluster announces a device for target android" in out["impossible"]
    assert not out["after"]
