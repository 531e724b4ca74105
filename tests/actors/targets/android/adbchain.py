"""The rest of the chain: a real adb server of one's own on a free port, and stand-in phones connected to it."""
from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import adbutils

from actors.targets.android.target import AndroidTarget
from tests.actors.targets.android.adbdevice import FEATURES, AdbDevice, wait_until

ROOT = Path(__file__).parents[4]
PYTHON_RUNNER = str(ROOT / "actors/targets/pyrunner.py")
QUICK_RUNNER = str(ROOT / "tests/actors/targets/android/quickrunner.py")
SHAPE = (3, 16, 16)


@contextmanager
def adb_server() -> Iterator[int]:
    """Its port. It keeps its keys in a folder of its own and looks for no other phones; only this server is ended."""
    port = free_port()
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "HOME": home, "ADB_MDNS": "0", "ADB_LOCAL_TRANSPORT_MAX_PORT": "0"}
        server = subprocess.Popen([adbutils.adb_path(), "-P", str(port), "server", "nodaemon"], env=environment,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: answers(port), "an answer of the adb server")
            yield port
        finally:
            subprocess.run([adbutils.adb_path(), "-P", str(port), "kill-server"], check=False, timeout=20.0,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            server.wait(timeout=20.0)


@contextmanager
def attached_phone(port: int, root: Path, features: str = FEATURES) -> Iterator[AdbDevice]:
    """A phone in state `device`."""
    client = adbutils.AdbClient(host="127.0.0.1", port=port, socket_timeout=30.0)
    phone = AdbDevice(root, features).start()
    try:
        client.connect(phone.serial)
        wait_until(lambda: state(port, phone.serial) == "device", "the phone's connection")
        yield phone
    finally:
        phone.stop()
        if answers(port):      # or adbutils would start another server, which nobody ends
            client.disconnect(phone.serial)


def state(port: int, serial: str) -> str:
    phones = adbutils.AdbClient(host="127.0.0.1", port=port, socket_timeout=10.0).list()
    return {phone.serial: phone.state for phone in phones}.get(serial, "")


def quick_target(port: int, phone: AdbDevice, **options: object) -> AndroidTarget:
    """Times nothing, waits little."""
    arguments: dict[str, object] = {"runner": QUICK_RUNNER, "serial": phone.serial, "adb_port": port,
                                    "reconnect_s": 5.0, "cooling_s": 0.3, **options}
    return AndroidTarget(SHAPE, **arguments)  # type: ignore[arg-type]


def free_port() -> int:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1.0).close()
    except OSError:
        return False
    return True
