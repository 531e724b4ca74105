"""Android phones through the whole chain: adbutils, a real adb server, a phone on loopback, real ONNX models."""
from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import adbutils
import numpy as np
import onnx
import pytest

from actors.latency.pool import LatencyPool, LatencyPoolSettings
from actors.latency.worker import LatencyWorker
from actors.targets.android.files import FOLDER
from actors.targets.catalogue import announced, claims, make_target
from actors.targets.conformance import check_target
from actors.targets.pairing import median_stderr, paired_ratios
from actors.targets.reference import reference_graph
from actors.targets.target import Claim, Workload
from searchspaces.catalogue import make_space
from searchspaces.errors import ConfigError, NoDeviceError, TargetError
from searchspaces.onnxgraph import to_onnx
from searchspaces.onnxpixels import Pixels
from tests.actors.targets.android.adbchain import PYTHON_RUNNER, QUICK_RUNNER, SHAPE, attached_phone, quick_target
from tests.actors.targets.android.adbdevice import AdbDevice, wait_until

SPACE = make_space("mobilenetv3-s16", classes=10, channels=3, options={})
NOISY = {"runner": PYTHON_RUNNER, "max_drift": 10.0}    # this host has other work


@pytest.fixture
def second(adb_port: int, tmp_path: Path) -> Iterator[AdbDevice]:
    with attached_phone(adb_port, tmp_path / "second") as made:
        yield made


def on_phone(phone: AdbDevice, folder: str) -> list[str]:
    return sorted(path.name for path in (phone.root / FOLDER[1:] / folder).glob("*"))


def test_real_models_through_the_worker(adb_port: int, phone: AdbDevice) -> None:
    worker = LatencyWorker(SPACE, "android", {**NOISY, "adb_port": adb_port})    # the only phone needs no serial
    probe = worker.probe(None)
    assert probe.identity.kind == "android" and probe.identity.device.startswith("Loopback Stand In 1, X86, x86_64")
    assert probe.identity.runtime.startswith("onnxruntime 1.") and probe.reference_ms > 0
    small, large = SPACE.extremes()
    samples = worker.measure([small, large], 1, probe.reference_ms)
    assert not isinstance(samples[0], str) and not isinstance(samples[1], str)
    assert samples[0].latency_ms < samples[1].latency_ms
    for sample in samples:
        ratios = paired_ratios(sample.reference_ms_rounds, sample.candidate_ms)
        assert sample.ratio == pytest.approx(np.median(ratios))
        assert sample.stderr == pytest.approx(median_stderr(ratios))
        assert sample.rounds == len(ratios) >= 6 and sample.target_id == probe.identity.target_id
        assert sample.latency_ms == pytest.approx(sample.ratio * probe.reference_ms)
        assert sample.details["serial"] == phone.serial and sample.details["clock"] == "thread_cpu"
        assert sample.details["affinity"] == sample.details["cores"]          # a real taskset, a real process
        assert sample.details["thermal_status"] == 0 and sample.details["battery_c"] == 28.5
        assert sample.details["clocks_khz"][str(sample.details["cores"][0])][2] == "2800000"
    exported = to_onnx(SPACE.graph(large), batch=None).SerializeToString()
    unknown = onnx.load_model_from_string(exported)
    unknown.graph.node[0].op_type = "Unheard"
    refused = worker.measure_file(unknown.SerializeToString(), 1, probe.reference_ms)
    assert isinstance(refused, str) and "cannot run the network" in refused and "Unheard" in refused
    again = worker.measure_file(exported, 1, probe.reference_ms)
    assert not isinstance(again, str) and again.latency_ms > samples[0].latency_ms
    pixels = to_onnx(SPACE.graph(small), pixels=Pixels.neutral((20, 30), 3)).SerializeToString()
    pictures = worker.measure_file(pixels, 1, probe.reference_ms)       # uint8, at the size that the file names
    assert not isinstance(pictures, str) and pictures.latency_ms > 0, pictures
    worker.close()
    assert not on_phone(phone, "models")


@pytest.mark.slow
def test_two_phones_serve_one_pool_and_one_dies(ray_local: None, adb_port: int, phone: AdbDevice,
                                                second: AdbDevice) -> None:
    options = {"runner": QUICK_RUNNER, "adb_port": adb_port, "serial": "all", "reconnect_s": 1.0}
    devices = [replace(claim, actor={"num_cpus": 0.1})
               for claim in claims("android", options, announced("android", options))]
    assert {device.options["serial"] for device in devices} == {phone.serial, second.serial}
    settings = LatencyPoolSettings(per_call=2, retry_wait_s=0.1)
    pool = LatencyPool(SPACE, "android", options, devices=devices, settings=settings)
    rows = SPACE.sample_uniform(np.random.default_rng(0), 12)
    pool.measure(rows[:4])
    while any(device.state != "ready" for device in pool.health()):
        pool.collect(timeout_s=0.1)
    second.leave()
    results = pool.measure(rows)
    assert not any(result.error for result in results)
    assert len({result.sample.target_id for result in results if result.sample}) == 1
    assert {result.sample.details["serial"] for result in results[4:] if result.sample} == {phone.serial}

    def quarantined() -> list[str]:
        return [device.reason for device in pool.health() if device.state == "quarantined"]

    wait_until(quarantined, "the dead phone's quarantine", 60.0)
    assert len(quarantined()) == 1 and f"phone {second.serial} is not attached" in quarantined()[0]
    pool.close()


def test_conformance(adb_port: int, phone: AdbDevice) -> None:
    """With a runner whose timings have no noise every rule holds exactly, whatever else this host does."""
    assert check_target(quick_target(adb_port, phone)) == []


def test_batches_pushes_and_calls(adb_port: int, phone: AdbDevice) -> None:
    target = quick_target(adb_port, phone, per_call=2)
    assert on_phone(phone, "models") == [target._reference.path.rpartition("/")[2]]
    graphs = [SPACE.graph(row) for row in SPACE.sample_uniform(np.random.default_rng(2), 5)]
    before = len(phone.pushes)
    handles = target.prepare([Workload(graph=graph) for graph in graphs])
    assert len(phone.pushes) - before == 5 and all(path.endswith(".part") for path in phone.pushes)
    calls = [command for command in phone.commands if "taskset" in command]
    samples = target.measure(handles)
    assert len([c for c in phone.commands if "taskset" in c]) - len(calls) == 3       # 2 + 2 + 1 networks
    assert [sample.ratio for sample in samples] == pytest.approx(
        [len(handle.content) / len(target._reference.content) for handle in handles])
    target.prepare([Workload(graph=graph) for graph in graphs])
    assert len(phone.pushes) - before == 5                     # their checksums are right already
    (phone.root / handles[0].path[1:]).write_bytes(b"damaged")
    target._phone.recoveries += 1                              # as after a reconnection
    target.measure(handles[:2])
    assert phone.pushes[before + 5:] == [f"{handles[0].path}.part"]
    again = quick_target(adb_port, phone)                      # a restarted worker
    assert phone.pushes[before + 6:] == [] and again.identity() == target.identity()
    target.close()
    target.close()
    assert not on_phone(phone, "models")


def test_old_models_leave_the_phone(adb_port: int, phone: AdbDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.targets.android.target.KEPT_FILES", 3)
    target = quick_target(adb_port, phone)
    handles = [target.prepare([Workload(graph=SPACE.graph(row))])[0]
               for row in SPACE.sample_uniform(np.random.default_rng(3), 6)]
    assert len(on_phone(phone, "models")) == 3
    assert len(target.measure(handles)) == 6                   # those that are gone are pushed again
    target.close()


def test_identity_is_the_model_of_the_phone_not_its_serial(adb_port: int, phone: AdbDevice, second: AdbDevice) -> None:
    (second.root / "props/ro.serialno").write_text("other\n")
    same = [quick_target(adb_port, made).identity() for made in (phone, second)]
    assert same[0] == same[1]
    (second.root / "props/ro.product.model").write_text("Stand In 2\n")
    others = [quick_target(adb_port, second).identity(), quick_target(adb_port, phone, threads=2).identity(),
              quick_target(adb_port, phone, batch=2).identity(), quick_target(adb_port, phone, cores="all").identity()]
    assert len({identity.target_id for identity in [same[0], *others]}) == 5


def test_phone_without_the_new_shell_protocol(adb_port: int, tmp_path: Path) -> None:
    with attached_phone(adb_port, tmp_path / "old", features="cmd") as old:
        target = quick_target(adb_port, old)
        assert target.measure(target.prepare([Workload(graph=reference_graph(3, 16))]))[0].ratio == 1.0
        assert not any("shell_v2" in command for command in old.commands)
        old.faults.runs = ["short"]
        assert target.measure(target.prepare([Workload(graph=reference_graph(3, 16))]))[0].ratio == 1.0


def test_which_phones_are_announced_and_claimed(adb_port: int, phone: AdbDevice, second: AdbDevice) -> None:
    found = announced("android", {"adb_port": adb_port})
    assert found == {f"android:{phone.serial}": 1.0, f"android:{second.serial}": 1.0}
    second.faults.unauthorized = True
    second.drop_links()
    wait_until(lambda: f"android:{second.serial}" not in announced("android", {"adb_port": adb_port}),
               "the end of an announcement")
    offered = {**found, "CPU": 4.0, "android:busy": 0.0}
    names = [phone.serial, second.serial]
    with pytest.raises(ConfigError, match=f"2 phones, {', '.join(sorted(names))}, and no serial is given"):
        claims("android", {}, offered)
    for serial, expected in (("all", names), (names, names), (names[:1], names[:1]), (names[1], names[1:]),
                             ("absent", [])):
        made = claims("android", {"serial": serial}, offered)
        assert sorted(claim.options["serial"] for claim in made) == sorted(expected)
        assert all(claim.actor["resources"] == {f"android:{claim.options['serial']}": 1} and claim.actor["num_cpus"] < 1
                   for claim in made)
    assert claims("android", {}, {f"android:{names[0]}": 1.0}) == [
        Claim({"resources": {f"android:{names[0]}": 1}, "num_cpus": 0.2}, {"serial": names[0]})]
    assert claims("android", {}, {"CPU": 4.0}) == []


# --- bad input --------------------------------------------------------------------------------------------------------

def test_no_adb(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TargetError, match="no adb server answers at 127.0.0.1:1; start one with `adb start-server`"):
        make_target("android", {"runner": QUICK_RUNNER, "serial": "x", "adb_port": 1}, SHAPE)
    with pytest.raises(NoDeviceError, match="no adb server answers"):
        announced("android", {"adb_port": 1})

    def none() -> str:
        raise adbutils.AdbError("no adb")

    monkeypatch.setattr(adbutils, "adb_path", none)
    with pytest.raises(TargetError, match="there is no adb program on this machine"):
        make_target("android", {"runner": QUICK_RUNNER, "adb_port": 1}, SHAPE)
    monkeypatch.setitem(sys.modules, "adbutils", None)
    with pytest.raises(TargetError, match=r"pip install 'paretoray\[android\]'"):
        make_target("android", {"runner": QUICK_RUNNER, "adb_port": 1}, SHAPE)
    with pytest.raises(NoDeviceError, match="adbutils, which is not installed"):
        announced("android", {})


def test_no_phone(adb_port: int) -> None:
    with pytest.raises(TargetError, match="adb knows no phone; switch on USB debugging"):
        make_target("android", {"runner": QUICK_RUNNER, "adb_port": adb_port}, SHAPE)


def test_two_phones_and_no_serial(adb_port: int, phone: AdbDevice, second: AdbDevice) -> None:
    options = {"runner": QUICK_RUNNER, "adb_port": adb_port}
    with pytest.raises(ConfigError, match="there are 2 phones, .* set the target's option serial"):
        make_target("android", options, SHAPE)
    with pytest.raises(ConfigError, match="one process measures one phone"):
        make_target("android", {**options, "serial": "all"}, SHAPE)
    with pytest.raises(TargetError, match="phone absent is not attached; adb knows 127"):
        make_target("android", {**options, "serial": "absent", "reconnect_s": 0.2}, SHAPE)


@pytest.mark.parametrize("serial", ["a;reboot", "$(id)", "a b", "-s", "", "a'b", "a\nb", "`id`", "a|b", "a/b"])
def test_serial_with_shell_characters(serial: str, adb_port: int) -> None:
    with pytest.raises(ConfigError, match="is not usable; a serial has letters, digits"):
        make_target("android", {"runner": QUICK_RUNNER, "serial": serial, "adb_port": adb_port}, SHAPE)
    with pytest.raises(ConfigError, match="is not usable"):
        claims("android", {"serial": [serial]}, {"android:a": 1.0})


@pytest.mark.parametrize(("options", "message"), [
    ({"threads": 0}, "threads is 0"), ({"max_drift": 0.0}, "max_drift is 0"), ({"cooling_s": -1.0}, "cooling_s -1"),
    ({"runner": "absent"}, "absent is not a file"), ({"libraries": ["lib.so"]}, "lib.so is not a file"),
    ({"adapter": "benchmark_model"}, "reads .tflite files; name a function"),
    ({"adapter": "benchncnn", "batch": 2}, "measures batch 1 only and batch is 2"),
    ({"cores": "little"}, "must be 'big' or 'all' or a list of int"), ({"serials": "x"}, "did you mean 'serial'"),
    ({"cores": [77]}, r"cores is \[77\]; this phone has \["),
])
def test_bad_options(options: dict[str, object], message: str, adb_port: int, phone: AdbDevice) -> None:
    with pytest.raises(ConfigError, match=message):
        make_target("android", {"runner": QUICK_RUNNER, "serial": phone.serial, "adb_port": adb_port, **options}, SHAPE)


def test_files_that_are_no_network_of_this_batch(adb_port: int, phone: AdbDevice) -> None:
    target = quick_target(adb_port, phone, batch=2)
    for content, message in ((b"junk", "is not an ONNX file"), (
            to_onnx(reference_graph(3, 16), batch=3).SerializeToString(), "made for batch 3, this target measures")):
        with pytest.raises(TargetError, match=message):
            target.prepare([Workload(onnx=content)])
    with pytest.raises(TargetError, match="needs a graph or the bytes"):
        target.prepare([Workload()])
    free = target.prepare([Workload(onnx=to_onnx(reference_graph(3, 16), batch=None).SerializeToString())])[0]
    assert onnx.load_model_from_string(free.content).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    target.close()


def test_needs_no_adbutils_to_be_imported() -> None:
    text = "import sys; sys.modules['adbutils'] = None; from actors.targets import catalogue; print(catalogue.TARGETS)"
    run = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120.0)
    assert "AndroidTarget" in run.stdout, run.stderr
