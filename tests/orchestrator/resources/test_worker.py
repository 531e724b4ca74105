"""What `paretoray worker` finds and prints. Joining with it is in test_nodes.py."""
from __future__ import annotations

import json
import shlex
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ray._private.accelerators import NvidiaGPUAcceleratorManager
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.cluster import admission
from orchestrator.cluster.embedded import usable_cores
from orchestrator.config import parse_config
from orchestrator.resources import devices
from orchestrator.resources.worker import NodeOffer, inspect
from searchspaces.errors import ClusterError, ConfigError, TargetError
from tests.orchestrator.cluster.nodetargets import SICK, WELL
from tests.orchestrator.run.test_search import PATIENCE_S, ROOT, TINY, command

MODULE = "tests.orchestrator.cluster.nodetargets"
TOY = f"{MODULE}:ToyTarget"


def offer(**changes: Any) -> NodeOffer:
    toys = devices.Announcement(devices.Kind(TOY), {WELL: 1.0, SICK: 1.0})
    return NodeOffer(**{"address": "10.0.0.1:6379", "cores": 8, "measure_cores": 1, "gpus": 0,
                        "announcements": (toys,)} | changes)


def test_line_survives_a_shell() -> None:
    words = subprocess.run(["bash", "-c", f"ray() {{ printf '%s\\0' \"$@\"; }}; {offer().line}"], text=True,
                           capture_output=True, timeout=30, check=True).stdout.split("\0")
    assert words[:3] == ["start", "--address=10.0.0.1:6379", "--num-cpus=7"]
    assert json.loads(words[3].removeprefix("--resources=")) == {WELL: 1, SICK: 1}
    assert shlex.split(offer().line) == ["ray", *offer().arguments]
    assert "1.0" not in offer().line


def test_line_without_devices_as_head_and_with_token() -> None:
    assert offer(address=None, announcements=()).line == "ray start --head --port=6379 --num-cpus=7"
    assert offer(authenticate=True).line.startswith("RAY_AUTH_MODE=token ray start --address=10.0.0.1:6379 ")
    assert offer(cores=1, measure_cores=0).slots == 1


def test_every_device_gets_a_sentence() -> None:
    hung = devices.Announcement(devices.Kind("android"), {}, "no adb server answers")
    said = offer(gpus=1, announcements=(*offer().announcements, hung)).sentences()
    assert [line.partition(":")[0] for line in said[:2]] == ["tests.orchestrator.cluster.nodetargets"] * 2
    assert said[2].startswith("GPU 0: ") and said[3] == "android: not announced, because no adb server answers"
    assert "1 of 8 cores reserved for measuring: 7 slots" in said[4]
    twice = offer(address=None, announcements=2 * offer().announcements)
    assert len(twice.sentences()) == 4 and len(twice.as_json()["devices"]) == 2
    assert "whoever reaches this machine can run anything" in twice.sentences()[-1]
    assert "no device to measure on" in offer(announcements=()).sentences()[0]


def test_a_new_cluster_gets_a_token_that_only_its_user_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    token = tmp_path / "home" / ".ray" / "auth_token"
    token.parent.parent.mkdir()
    monkeypatch.setattr(admission, "TOKEN_FILE", token)
    found = inspect(None, [TOY], None, None)
    assert found.authenticate and "ray get-auth-token --generate" in found.sentences()[-1]
    admission.make_token()
    assert len(token.read_text()) == 64 and token.stat().st_mode & 0o777 == 0o600
    first = token.read_text()
    admission.make_token()      # another process was first: there is one token
    assert token.read_text() == first and "token" not in inspect(None, [TOY], None, None).sentences()[-1]
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert inspect(None, [TOY], None, None).line.startswith("ray start --head ")


def test_what_hangs_or_fails_is_reported_and_the_rest_announced() -> None:
    kinds = devices.named_kinds([f"{MODULE}:Hangs", TOY, f"{MODULE}:NoDriver"])
    hangs, toys, failing = devices.ask(kinds, timeout_s=0.5)
    assert hangs.problem == "no answer within 0.5 s" and failing.problem == "no toy server answers; start one"
    assert toys.resources == {WELL: 1.0, SICK: 1.0} and not toys.problem
    with pytest.raises(TargetError, match="NoDriver cannot be used here: no toy server answers"):
        devices.announced_resources(kinds[1:])
    assert devices.announced_resources(kinds[1:2]) == {WELL: 1.0, SICK: 1.0}


def test_resources_that_are_no_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.orchestrator.cluster.nodetargets import ToyTarget

    for bad in ({"CPU": 4.0}, {"node:10.0.0.1": 1.0}, {"toy:A": 0.0}, {"": 1.0}):
        monkeypatch.setattr(ToyTarget, "announced", classmethod(lambda cls, options, bad=bad: bad))
        assert "a resource of its own" in devices.ask(devices.named_kinds([TOY]))[0].problem


def test_claims_without_a_device_are_none(tmp_path: Path) -> None:
    table = {"name": "table", "path": "t.parquet", "column": "c", "token_columns": ["a"]}
    config = parse_config({"data": {"name": "digits"}, "target": table}, "here")
    kinds = devices.known_kinds(config)
    assert [kind.name for kind in kinds][:2] == ["table", "onnx_cpu"] and kinds[0].options["column"] == "c"
    assert devices.device_claims_of(kinds[0], {"latency_cpu": 1.0}) == []
    assert [found.device for found in devices.device_claims_of(kinds[1], {"latency_cpu": 1.0})] == ["latency_cpu"]
    found = devices.device_claims_of(devices.Kind(TOY), {WELL: 1.0, "CPU": 4.0})
    assert [(each.device, each.options, each.needs) for each in found] == [
        (WELL, {"serial": "A [1]"}, {WELL: 1, "GPU": 0})]


def test_gpus_are_counted_as_ray_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's driver says there are two; Ray's own rules make one of them visible."""
    monkeypatch.setattr(NvidiaGPUAcceleratorManager, "get_current_node_num_accelerators", staticmethod(lambda: 2))
    monkeypatch.setattr(NvidiaGPUAcceleratorManager, "get_current_node_accelerator_type", staticmethod(lambda: "T4"))
    both = {"GPU": 2.0, "accelerator_type:T4": 1.0}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices.gpu_resources() == both
    kind = devices.Kind("cuda", {"gpu_type": "T4"})
    assert [(found.device, found.needs) for found in devices.device_claims_of(kind, both)] == 2 * [
        ("GPU", {"GPU": 1})]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert devices.gpu_resources()["GPU"] == 1.0
    known = inspect(None, ["cuda"], None, None)
    assert known.gpus == 1 and known.measure_cores == 0 and "--resources" not in known.line
    assert known.sentences()[0].startswith("GPU 0: Ray finds it")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.gpu_resources() == {}


def test_cores_reserved_by_default_only_where_the_processor_is_measured() -> None:
    cores = usable_cores()
    assert inspect(None, ["onnx_cpu"], None, None).measure_cores == min(1, cores - 1)
    assert inspect(None, [TOY], None, None).slots == cores
    with pytest.raises(ConfigError, match=f"leaves Ray none of this machine's {cores} usable cores"):
        inspect(None, [TOY], None, cores)


def test_command_prints_the_line_and_json(tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text(TINY.replace("onnx_cpu", f'"{TOY}"'))
    done = CliRunner().invoke(app, ["worker", "--config", str(tmp_path / "toy.yaml")])
    assert done.exit_code == 0, done.output
    assert done.stdout == offer(address=None, cores=usable_cores(), measure_cores=0, authenticate=True).line + "\n"
    assert done.stdout.startswith("RAY_AUTH_MODE=token ray start --head ")
    assert "it's" in done.stderr
    known = json.loads(CliRunner().invoke(app, ["worker", "--target", TOY, "--json"]).stdout)
    assert known["line"] + "\n" == done.stdout and known["environment"] == {"RAY_AUTH_MODE": "token"}
    assert ["RAY_AUTH_MODE=token", *known["command"]] == shlex.split(known["line"])
    assert known["resources"] == {WELL: 1, SICK: 1}
    assert [(device["kind"], device["resource"]) for device in known["devices"]] == [(TOY, WELL), (TOY, SICK)]


def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="there is no latency target 'toaster'"):
        inspect(None, ["toaster"], None, None)
    with pytest.raises(ConfigError, match="give one of them"):
        inspect(None, [TOY], Path("c.yaml"), None)
    with pytest.raises(ClusterError, match="'nowhere' is not a cluster address"):
        inspect("nowhere", [TOY], None, None)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nowhere = f"127.0.0.1:{probe.getsockname()[1]}"
    done = subprocess.run(command("worker", "--address", nowhere, "--target", TOY, "--start"), cwd=ROOT, text=True,
                          capture_output=True, timeout=PATIENCE_S)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: nothing answers at {nowhere}")
