"""What a phone can do to a measurement, played by the stand-in behind a real adb server: every fault of latency.md."""
from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import adbutils
import psutil
import pytest

from actors.targets.android import target as android
from actors.targets.android.adb import Server
from actors.targets.android.files import FOLDER
from actors.targets.android.target import AndroidTarget, PushedModel
from actors.targets.reference import reference_graph
from actors.targets.target import Health, LatencySample, Workload
from searchspaces.errors import DeviceRestingError, TargetError
from searchspaces.onnxgraph import to_onnx
from tests.actors.targets.android.adbchain import adb_server, answers, attached_phone, free_port, quick_target, state
from tests.actors.targets.android.adbdevice import AdbDevice, RunFault, wait_until

NETWORK = Workload(graph=reference_graph(3, 16))
BREAKS: tuple[RunFault, ...] = ("drop", "reboot", "silent", "short", "garbage")


@pytest.fixture
def target(adb_port: int, phone: AdbDevice) -> AndroidTarget:
    return quick_target(adb_port, phone)


def measure(target: AndroidTarget) -> LatencySample:
    return target.measure(target.prepare([NETWORK]))[0]


@contextmanager
def later(seconds: float, action: object) -> Iterator[None]:
    timer = threading.Timer(seconds, action)  # type: ignore[arg-type]
    timer.start()
    yield
    timer.join(timeout=10.0)


def files(phone: AdbDevice) -> dict[str, str]:
    """Models on the phone and their checksums."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            for path in (phone.root / FOLDER[1:] / "models").iterdir()}


# --- pushes -----------------------------------------------------------------------------------------------------------

def test_link_cut_during_a_push(target: AndroidTarget, phone: AdbDevice) -> None:
    phone.faults.push_drops = 2
    network = to_onnx(reference_graph(3, 32)).SerializeToString()
    handle = target.prepare([Workload(onnx=network)])[0]
    assert phone.faults.push_drops == 0 and target._phone.recoveries == 2
    assert all(name == f"{digest}.onnx" for name, digest in files(phone).items()) and len(files(phone)) == 2
    assert target.measure([handle])[0].details["recoveries"] == 2


def test_link_cut_during_every_push(target: AndroidTarget, phone: AdbDevice) -> None:
    phone.faults.push_drops, phone.faults.away_s = 3, 0.1
    with pytest.raises(TargetError, match="given up after 3 attempts"):
        target.prepare([Workload(graph=reference_graph(3, 32))])
    wait_until(lambda: target.health().ok, "the phone's return")
    assert target.measure(target.prepare([Workload(graph=reference_graph(3, 32))]))[0].ratio >= 1.0


def test_disk_full_on_the_phone(target: AndroidTarget, phone: AdbDevice) -> None:
    before, phone.faults.full = files(phone), True
    with pytest.raises(TargetError, match="refused .*: write failed: No space left on device; free space on it"):
        target.prepare([Workload(graph=reference_graph(3, 32))])
    assert files(phone) == before and target._phone.recoveries == 0       # nothing half there, and no link to blame
    assert measure(target).ratio == 1.0                                   # what is there can be measured
    phone.faults.full = False
    assert target.prepare([Workload(graph=reference_graph(3, 32))])


# --- runs -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fault", BREAKS)
def test_broken_run_is_repeated(target: AndroidTarget, phone: AdbDevice, fault: RunFault) -> None:
    phone.faults.runs = [fault]
    sample = measure(target)
    assert not phone.faults.runs
    assert sample.details["recoveries"] == 1 and sample.rounds == 6 and sample.ratio == 1.0


@pytest.mark.parametrize(("fault", "said"), [("silent", "but with nothing"), ("garbage", r"but with '\[\]'")])
def test_run_that_stays_broken(target: AndroidTarget, phone: AdbDevice, fault: RunFault, said: str) -> None:
    """Exit code 0 each time, so only the missing end tells."""
    phone.faults.runs = [fault] * 3
    with pytest.raises(TargetError, match=f"does not end with .*{said}.* .given up after 3 attempts"):
        measure(target)
    assert measure(target).ratio == 1.0


def test_stalled_run(target: AndroidTarget, phone: AdbDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(android, "START_S", 0.5)
    monkeypatch.setattr(android, "GRACE_S", 0.5)
    target._time_out_s = 0.5
    handle = target.prepare([NETWORK])
    phone.faults.runs = ["stall"] * 3
    with pytest.raises(TargetError, match="did not finish a command within 2 s .given up after 3 attempts"):
        target.measure(handle)
    phone.faults.runs = ["stall"]
    target._time_out_s = 20.0
    with later(0.3, phone.drop_links):      # and a stall that ends with the link
        assert target.measure(handle)[0].ratio == 1.0


def test_runner_that_takes_too_long_is_ended_on_the_phone(target: AndroidTarget, phone: AdbDevice,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(android, "START_S", 0.5)
    target._time_out_s = 0.5
    (phone.root / "slow").write_text("60")
    with pytest.raises(TargetError, match="ended with exit code 137, the time-out is 1 s"):
        measure(target)
    process = int((phone.root / "pid").read_text())
    wait_until(lambda: not psutil.pid_exists(process), "the runner's end")


def test_runner_of_a_lost_call_is_ended_before_the_next(target: AndroidTarget, phone: AdbDevice) -> None:
    """A phone whose cable is out goes on; its runner would disturb what comes after."""
    (phone.root / "slow").write_text("60")
    phone.faults.runs = ["drop"]
    assert measure(target).details["recoveries"] == 1
    process = int((phone.root / "pid").read_text())
    wait_until(lambda: not psutil.pid_exists(process), "the lost runner's end")


def test_runner_that_fails(adb_port: int, phone: AdbDevice, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho half a line\necho 'CANNOT LINK EXECUTABLE: libc++' >&2\nexit 3\n")
    with pytest.raises(TargetError, match=r"ended with exit code 3: CANNOT LINK EXECUTABLE: libc\+\+"):
        quick_target(adb_port, phone, runner=str(broken))
    assert not any("connect" in command for command in phone.commands)


def test_model_that_the_runtime_cannot_load(target: AndroidTarget) -> None:
    content = to_onnx(reference_graph(3, 16), metadata={"operator": "Unheard"}).SerializeToString()
    handles = target.prepare([NETWORK, Workload(onnx=content)])
    with pytest.raises(TargetError, match="cannot run the network: cannot run .*: no such operator"):
        target.measure(handles)
    assert target.measure(handles[:1])[0].ratio == 1.0 and target.health().ok


# --- states -----------------------------------------------------------------------------------------------------------

def test_offline_and_back(target: AndroidTarget, phone: AdbDevice, adb_port: int) -> None:
    target._phone._reconnect_s = 0.5
    handles = target.prepare([NETWORK])
    phone.leave()
    wait_until(lambda: state(adb_port, phone.serial) == "offline", "the state offline")
    health = target.health()
    assert not health.ok and health.reason.startswith(f"phone {phone.serial} is offline; check its cable or network")
    with pytest.raises(TargetError, match=f"phone {phone.serial} is (offline; check|not attached).*after 3 attempts"):
        target.measure(handles)
    phone.come_back()
    target._phone._reconnect_s = 10.0
    assert target.health().ok and target.measure(handles)[0].ratio == 1.0


def test_comes_back_after_seconds(target: AndroidTarget, phone: AdbDevice) -> None:
    handles = target.prepare([NETWORK])
    phone.leave()
    with later(2.0, phone.come_back):
        assert target.measure(handles)[0].details["recoveries"] >= 1


def test_unauthorized(target: AndroidTarget, phone: AdbDevice, adb_port: int) -> None:
    handles = target.prepare([NETWORK])
    phone.faults.unauthorized = True
    phone.drop_links()
    wait_until(lambda: state(adb_port, phone.serial) == "unauthorized", "the state unauthorized")
    reason = f"phone {phone.serial} has not authorised this computer; unlock it and confirm the prompt on its screen"
    assert target.health().reason == reason
    before = target._phone.recoveries
    with pytest.raises(TargetError, match="^" + reason.replace(".", r"\.") + "$"):
        target.measure(handles)
    assert target._phone.recoveries <= before + 1       # a person has to act: it is not tried again and again
    with pytest.raises(TargetError, match="has not authorised this computer"):
        quick_target(adb_port, phone)
    phone.faults.unauthorized = False
    assert target.health().ok


def test_disconnected_by_somebody_else(target: AndroidTarget, phone: AdbDevice, adb_port: int) -> None:
    adbutils.AdbClient(port=adb_port).disconnect(phone.serial)
    assert state(adb_port, phone.serial) == ""
    assert measure(target).ratio == 1.0 and target.health().ok


def test_server_that_ends_is_not_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """adbutils itself would start one on the default port, here a port of our own."""
    default = free_port()
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(default))
    with adb_server() as port, attached_phone(port, tmp_path) as phone:
        target = quick_target(port, phone)
        handles = target.prepare([NETWORK])
        client = Server.of(None, port).client(5.0)
        assert [known.serial for known in client.list()] == [phone.serial]
        adbutils.AdbClient(port=port).server_kill()
        wait_until(lambda: not answers(port), "the server's end")
        with pytest.raises(TargetError, match="no adb server answers"):
            client.list()
        assert f"no adb server answers at 127.0.0.1:{port}" in target.health().reason
        with pytest.raises(TargetError, match="no adb server answers"):
            target.measure(handles)
        target.close()
    assert not answers(default)


# --- heat and drift ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("status", "battery_c", "reason"), [
    (2, 30.0, "its thermal status is 2, so it slows its cores down"),
    (0, 44.5, "its battery has 44.5 C, above max_battery_c 40"),
])
def test_hot_phone(target: AndroidTarget, phone: AdbDevice, status: int, battery_c: float, reason: str) -> None:
    handles = target.prepare([NETWORK])
    phone.heat(status, battery_c)
    calls = len(phone.commands)
    assert target.health() == Health(False, f"phone {phone.serial} is too hot to measure: {reason}", passing=True)
    with pytest.raises(DeviceRestingError) as refused:
        target.measure(handles)
    assert str(refused.value) == f"phone {phone.serial} is too hot to measure after waiting 0.3 s (cooling_s): {reason}"
    assert not any("taskset" in command for command in phone.commands[calls:])
    target._cooling_s = 20.0
    with later(0.2, lambda: phone.heat(0, 31.0)):
        sample = target.measure(handles)[0]
    assert sample.details["battery_c"] == 31.0 and target.health().ok


def test_phone_that_says_nothing_of_its_heat(adb_port: int, phone: AdbDevice) -> None:
    for name in ("thermal", "battery"):
        (phone.root / name).write_text("Can't find service: thermalservice\n")
    details = measure(quick_target(adb_port, phone)).details
    assert details["thermal_status"] is None and details["battery_c"] is None


def test_rounds_with_a_drifting_reference_are_discarded(target: AndroidTarget, phone: AdbDevice) -> None:
    handles = target.prepare([NETWORK, Workload(graph=reference_graph(3, 32))])
    (phone.root / "drift").write_text("0.08 0.2 0.0")
    samples = target.measure(handles)
    assert [sample.details["discarded"] for sample in samples] == [2, 2]
    assert [sample.drift for sample in samples] == [0.0, 0.0] and {sample.rounds for sample in samples} == {6}
    (phone.root / "drift").write_text("0.04")
    assert measure(target).drift == pytest.approx(0.04)
    (phone.root / "drift").write_text(" 0.2" * 4)
    with pytest.raises(TargetError, match=f"drifted by 20% on phone {phone.serial} in 4 calls, above max_drift 5%"):
        measure(target)


def _refusal(target: AndroidTarget, handles: list[PushedModel]) -> str:
    with pytest.raises(TargetError) as refusal:
        target.measure(handles)
    return str(refusal.value)
