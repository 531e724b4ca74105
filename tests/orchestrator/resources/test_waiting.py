"""Devices of nodes that join later, on a real cluster in a process of its own."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.resources.waiting import wanted_resource

ROOT = Path(__file__).parents[3]
SCRIPT = """
import json, time
from concurrent.futures import ThreadPoolExecutor
import ray
from ray.cluster_utils import Cluster
from orchestrator.resources import waiting
from orchestrator.config import ClusterSettings
from searchspaces.errors import ParetorayError

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
ray.init(address=cluster.address)
said, out = [], {"autoscales": waiting.autoscales()}

def devices(**settings):
    said.clear()
    try:
        found = waiting.devices_when_there("onnx_cpu", {}, ClusterSettings(**settings), said.append)
        return {"resources": [claim.actor.get("resources") for claim in found], "said": list(said)}
    except ParetorayError as error:
        return {"error": str(error), "said": list(said)}

out["static"] = devices()
waiting.autoscales = lambda: True       # no autoscaler runs here: what it would do is done below
out["never"] = devices(device_wait_s=2, local_fallback=False)
with ThreadPoolExecutor() as threads:
    waits = threads.submit(devices, device_wait_s=60)
    time.sleep(3)
    assert not waits.done()
    cluster.add_node(num_cpus=1, resources={"latency_cpu": 1})
    out["later"] = waits.result()
time.sleep(1)
out["left"] = ray.available_resources().get("latency_cpu")
print("RESULT" + json.dumps(out))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_waits_for_a_node_with_the_device_and_says_so() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout.rpartition("RESULT")[2].splitlines()[0])
    assert out["autoscales"] is False
    assert out["static"]["resources"] == [None]         # nobody adds nodes here: the driver's processor at once
    assert len(out["static"]["said"]) == 1 and "measuring on the driver's node" in out["static"]["said"][0]
    assert "cluster.local_fallback is false" in out["never"]["error"]
    assert out["never"]["said"] == ["target onnx_cpu: no node has the resource 'latency_cpu' yet; the cluster was "
                                    "asked for one, waiting up to 2 s"]
    assert out["later"]["resources"] == [{"latency_cpu": 1}] and len(out["later"]["said"]) == 1
    assert out["left"] == 1.0                           # what asked for the node does not hold its device


def test_the_resource_that_a_target_wants() -> None:
    assert wanted_resource("onnx_cpu", {}) == "latency_cpu"
    assert wanted_resource("cuda", {}) == "GPU"
    assert wanted_resource("android", {"serial": "9A231"}) == "android:9A231"
    assert wanted_resource("tests.orchestrator.cluster.nodetargets:ToyTarget", {}) == ""
