"""Ray's own autoscaler (v2) starts nodes when a run asks for what they have, and takes them away again."""
from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from orchestrator.record.store import RunStore
from orchestrator.resources.autoscaler import Outlook, in_words, type_needed
from tests.orchestrator.cluster.autoscaling import autoscaling_cluster
from tests.orchestrator.run.test_search import TINY, check_finished_run, command

ROOT = Path(__file__).parents[3]
GROWING = "tests.orchestrator.cluster.growing"
PATIENCE_S = 400
NODE_TYPES = {"latency": {"CPU": 1, "latency_cpu": 1}, "phones": {"CPU": 1, "android:A1": 1},
              "trainer": {"CPU": 1, "GPU": 1}, "rollout": {"CPU": 4}}


def test_sentences_name_the_nodes_and_the_type_that_is_missing() -> None:
    assert in_words({"CPU": 1.0, "GPU": 0.0, "android:A1": 1}) == '{CPU: 1, "android:A1": 1}'
    assert "needs a type with resources {CPU: 1, latency_cpu: 1}," in type_needed({"CPU": 0.2, "latency_cpu": 1})
    assert Outlook().nodes() == ""
    seen = Outlook(starting={"rollout": 2, "latency": 1}, failed={"trainer": "no capacity"})
    assert seen.nodes() == ("the autoscaler is starting 1 of type latency and 2 of type rollout; a node of type "
                            "trainer did not start (no capacity)")


@pytest.mark.slow
def test_every_kind_of_node_comes_when_it_is_asked_for_and_leaves_when_idle() -> None:
    with (tempfile.TemporaryDirectory(prefix="auto-") as folder, tempfile.TemporaryDirectory() as runs,
          autoscaling_cluster(Path(folder), NODE_TYPES) as address):
        done = subprocess.run([sys.executable, "-m", GROWING, address, runs], cwd=ROOT, capture_output=True, text=True,
                              timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    print(done.stderr)
    out = json.loads(done.stdout.rpartition("RESULT")[2].splitlines()[0])
    assert out["autoscales"] and not {"latency_cpu", "android:A1", "GPU"} & set(out["before"])
    assert out["processor"] == [{"resources": {"latency_cpu": 1}}]      # from zero, as all others
    assert [phone["resources"] for phone in out["phone"]] == [{"android:A1": 1}]
    assert out["trainer"] is None and out["ranks"] is None              # a node's GPU; more CPUs than the others have
    assert any("target onnx_cpu: no node has the resource 'latency_cpu' yet" in sentence for sentence in out["said"])
    assert any("the autoscaler is starting 1 of type" in sentence for sentence in out["said"])
    assert "the supernet" in out["during"][0] and out["waiting"] == {}  # told in state.json as long as it lasts

    assert "no node of the cluster announces a device for target android" in out["no_such_phone"]
    assert 'needs a type with resources {CPU: 1, "android:B2": 1}' in out["no_such_phone"]
    assert out["too_large"].startswith("rollout workers: no node of the cluster has {CPU: 16}, and the autoscaler can")
    assert "a type with resources {CPU: 16}" in out["too_large"] and "lower accuracy.cpus" in out["too_large"]
    assert out["too_many"] is None      # some of them find room
    assert "twenty: the cluster has no room for 20 times {CPU: 1}; going on with as many as find it" in out["said"]
    assert out["missing"] == ["0 of 1 rollout workers are there; the cluster has no room for more"]

    assert out["from_table"] == [1.0, 2.0, 3.0]
    assert out["nodes"] > 1 and len(out["on_head"]) == 4
    assert all(out["on_head"])                                  # whatever takes no CPU is beside the driver,
    assert out["shrunk"] and all(out["kept"])                   # holds no node back, and loses none
    assert out["no_more_starting"]


@pytest.mark.soak
def test_a_search_grows_its_cluster_and_leaves_the_head_alone(tmp_path: Path) -> None:
    """The head has one CPU: the device, half a GPU for each of the supernet's two workers (torch has none and uses the
    CPU), and three rollout workers have to be asked for."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    types = {"latency": NODE_TYPES["latency"], "trainer": {"CPU": 2, "GPU": 1}, "rollout": {"CPU": 2}}
    with tempfile.TemporaryDirectory(prefix="auto-") as folder, autoscaling_cluster(Path(folder), types) as address:
        begun = time.monotonic()
        done = subprocess.run(
            command("search", str(tmp_path / "tiny.yaml"), "--name", "grown", "--runs", str(tmp_path), "--address",
                    address, *(word for key in ("search.rollouts=3", "search.gpus=0", "supernet.workers=2",
                                            "supernet.gpus=0.5") for word in ("--set", key))),
            cwd=ROOT, capture_output=True, text=True, timeout=2 * PATIENCE_S)
        print(done.stdout, "searched in", round(time.monotonic() - begun, 1), "s")
        assert done.returncode == 0, done.stdout + done.stderr
        left = subprocess.run([sys.executable, "-m", GROWING, address], cwd=ROOT, capture_output=True, text=True,
                              timeout=PATIENCE_S)
        print(left.stderr)
        assert left.returncode == 0, left.stderr
    check_finished_run(tmp_path / "grown")
    state = RunStore(tmp_path / "grown").state()
    assert "target onnx_cpu: no node has the resource 'latency_cpu' yet" in " ".join(done.stdout.split())
    assert state["devices"]["onnx_cpu"].startswith("target onnx_cpu: ") and not state.get("waiting")
    events = [json.loads(line) for line in (tmp_path / "grown" / "events.jsonl").read_text().splitlines()]
    assert [event["workers"] for event in events if event["kind"] == "epoch"] == [2, 2]
