"""The cluster files, offline: against Ray's own schema, and the Kubernetes ones against kuberay.schema.yaml.

What Ray's autoscaler would read out of a RayCluster is asked of Ray.
"""
from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from orchestrator.config import load_config
from orchestrator.resources.waiting import wanted_resource

ROOT = Path(__file__).parents[3]
KUBERAY = ROOT / "cluster" / "kuberay"
SCHEMA = yaml.safe_load((Path(__file__).parent / "kuberay.schema.yaml").read_text())
PHONE = "android:10.0.0.7:5555"
CLOUDS = ("cluster.yaml", "cluster/gcp.yaml")


def read(file: Path | str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / file).read_text())
    return loaded


def autoscaling(file: str) -> dict[str, Any]:
    """What Ray's autoscaler makes of a file; raises where Ray refuses it."""
    if file.startswith("cluster/kuberay"):
        found: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(read(file))
        return found
    found = prepare_config(read(file))
    validate_config(found)
    return found


def check(manifest: dict[str, Any]) -> None:
    jsonschema.Draft7Validator(SCHEMA).validate(manifest)


@pytest.mark.parametrize("file", [*CLOUDS, "cluster/kuberay/raycluster.yaml"])
def test_every_kind_of_node_comes_up_from_zero(file: str) -> None:
    found = autoscaling(file)
    types = dict(found["available_node_types"])
    head = types.pop(found["head_node_type"])
    own = {name: {key: amount for key, amount in kind["resources"].items() if key not in ("CPU", "memory")}
           for name, kind in types.items()}
    assert own == {"rollout": {}, "trainer": {"GPU": 1}, "latency": {wanted_resource("onnx_cpu", {}): 1},
                   "phones": {wanted_resource("android", {"serial": PHONE.partition(":")[2]}): 1}}
    assert own["phones"] == {PHONE: 1}
    assert all(kind["min_workers"] == 0 and kind["max_workers"] > 0 for kind in types.values())
    assert all(kind["resources"]["CPU"] >= 2 for kind in (head, *types.values()))   # a worker that measures takes one
    assert sum(kind["max_workers"] for kind in types.values()) == found["max_workers"]


@pytest.mark.parametrize("file", [*CLOUDS, "cluster/local.yaml"])
def test_ray_refuses_what_it_does_not_know(file: str) -> None:
    autoscaling(file)
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
        validate_config(prepare_config(read(file) | {"idle_timeout_minute": 5}))
    if file in CLOUDS:
        with pytest.raises(ValueError, match="head_node_type"):
            validate_config(prepare_config(read(file) | {"head_node_type": "no-such-type"}))


@pytest.mark.parametrize("file", [*CLOUDS, "cluster/local.yaml"])
def test_every_node_asks_for_the_one_token(file: str) -> None:
    found = read(file)
    starts = [line for line in found["head_start_ray_commands"] + found["worker_start_ray_commands"]
              if "ray start" in line]
    assert starts and all("RAY_AUTH_MODE=token ray start" in line for line in starts)
    assert found["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token", "or the nodes have no token, or another"


def test_only_rollouts_are_on_nodes_that_may_be_taken_back() -> None:
    def market(node: dict[str, Any]) -> bool:
        return (node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
                or any(rule.get("preemptible") for rule in node.get("scheduling", [])))

    for file in CLOUDS:
        types = autoscaling(file)["available_node_types"]
        assert [name for name, kind in types.items() if market(kind["node_config"])] == ["rollout"]
    groups = read("cluster/kuberay/raycluster.yaml")["spec"]["workerGroupSpecs"]
    selectors = {group["groupName"]: group["template"]["spec"].get("nodeSelector", {}) for group in groups}
    assert [name for name, selector in selectors.items() if any("spot" in key for key in selector)] == ["rollout"]


def test_machines_of_your_own_announce_what_they_have() -> None:
    found = autoscaling("cluster/local.yaml")
    (kind,) = found["available_node_types"].values()
    assert kind["min_workers"] == kind["max_workers"] == len(found["provider"]["worker_ips"])
    assert any("paretoray worker --address $RAY_HEAD_IP:6379" in line for line in found["worker_start_ray_commands"])


@pytest.mark.parametrize("file", sorted(path.name for path in KUBERAY.glob("*.yaml")))
def test_kubernetes_takes_the_file(file: str) -> None:
    manifest = read(KUBERAY / file)
    check(manifest)
    with pytest.raises(jsonschema.ValidationError):
        check(manifest | {"spec": manifest["spec"] | {"replica": 1}})
    with pytest.raises(jsonschema.ValidationError):
        check(manifest | {"apiVersion": "ray.io/v1alpha1"})


def test_a_misspelt_field_of_a_pod_is_found() -> None:
    manifest = read(KUBERAY / "raycluster.yaml")
    container = manifest["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    container["volumeMount"] = container.pop("volumeMounts")
    with pytest.raises(jsonschema.ValidationError):
        check(manifest)


def test_runs_are_on_the_same_volume_everywhere_and_the_job_writes_there() -> None:
    cluster, job, claim = (read(KUBERAY / f"{name}.yaml") for name in ("raycluster", "rayjob", "runs"))
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    spec = cluster["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (volume,) = pod["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert pod["containers"][0]["volumeMounts"] == [{"name": volume["name"], "mountPath": "/runs"}]
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:2] == ["paretoray", "search"] and words[words.index("--runs") + 1] == "/runs"
    load_config(ROOT / Path(words[2]).relative_to("/home/ray/paretoray"))


def test_the_image_has_our_versions_and_all_of_the_code() -> None:
    recipe = (ROOT / "cluster" / "Dockerfile").read_text()
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    bases = re.findall(r"rayproject/ray:(\S+?)-py(\d)(\d+)-", recipe)
    assert len(bases) == 2 and {ray for ray, *_ in bases} == {pinned["ray"]}
    assert {f">={major}.{minor}" for _, major, minor in bases} == {project["project"]["requires-python"]}
    assert read("cluster/kuberay/raycluster.yaml")["spec"]["rayVersion"] == pinned["ray"]
    images = set(re.findall(r"REGISTRY/paretoray:(\S+)", recipe + (KUBERAY / "raycluster.yaml").read_text()))
    assert images == {project["project"]["version"], f"{project['project']['version']}-gpu"}
    copied = {word for line in re.findall(r"^COPY --chown=ray (.*) \S+$", recipe, re.M) for word in line.split()}
    packages = {pattern.removesuffix("*") for pattern in
                project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages | {"pyproject.toml", "constraints.txt", project["project"]["readme"], "configs"} <= copied
    assert {f"{module}.py" for module in project["tool"]["setuptools"]["py-modules"]} <= copied
    assert all((ROOT / word).exists() for word in copied)
    (extras,) = re.findall(r"^ARG EXTRAS=(\S+)$", recipe, re.M)
    asked = {extra for line in (extras, *re.findall(r"EXTRAS=([\w,]+)", recipe)) for extra in line.split(",")}
    assert asked <= set(project["project"]["optional-dependencies"])
