"""The adb server of this machine and the phones it knows: which there are, in which state, and which one is meant.

adbutils talks to the server; it is imported late, because only machines with phones have it. Left alone it would start
a server on its default port when none answers, whatever port was asked for: so every connection looks first.
"""
from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from searchspaces.errors import ConfigError, TargetError

if TYPE_CHECKING:
    import adbutils

PREFIX = "android:"             # of the Ray resource of a phone; its serial follows
DEFAULT_PORT = 5037
CONNECT_S = 3.0
SERIAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")
Serials = str | Sequence[str] | None

NO_PHONE = ("adb knows no phone; switch on USB debugging and plug one in, or run `adb connect HOST:PORT` until `adb "
            "devices` shows it")
OFFLINE = ("phone {serial} is offline; check its cable or network, and that it is on, or run `adb reconnect offline`")
STATES = {
    "offline": OFFLINE, "connecting": OFFLINE, "authorizing": OFFLINE,
    "unauthorized": "phone {serial} has not authorised this computer; unlock it and confirm the prompt on its screen",
    "bootloader": "phone {serial} is in its boot loader; start Android on it",
    "recovery": "phone {serial} is in recovery mode; start Android on it",
}


@dataclass(frozen=True)
class Server:
    """Where the adb server listens; by default what adb's own environment variables say."""

    host: str
    port: int

    @classmethod
    def of(cls, host: object, port: object) -> Server:
        return cls(str(host or os.environ.get("ANDROID_ADB_SERVER_HOST", "127.0.0.1")),
                   int(str(port or os.environ.get("ANDROID_ADB_SERVER_PORT", DEFAULT_PORT))))

    def client(self, time_out_s: float) -> adbutils.AdbClient:
        """TargetError where adbutils is missing, and from its calls where no server answers. Sockets give up after
        `time_out_s`."""
        base: Any = _adbutils().AdbClient
        look = self._look

        class Client(base):
            def make_connection(self, timeout: float | None = None) -> adbutils.AdbConnection:
                look()
                return super().make_connection(timeout)

        return Client(host=self.host, port=self.port, socket_timeout=time_out_s)

    def phones(self) -> dict[str, str]:
        """serial -> state of every phone that the server knows, in any state."""
        try:
            return {phone.serial: phone.state for phone in self.client(CONNECT_S).list()}
        except (_adbutils().AdbError, OSError, ValueError) as error:
            raise TargetError(f"the adb server at {self.host}:{self.port} does not answer ({error}); restart it with "
                              "`adb kill-server` and `adb start-server`") from error

    def trouble(self, serial: str) -> str:
        """Why the phone cannot be used, one sentence; "" where it can."""
        try:
            phones = self.phones()
        except TargetError as error:
            return str(error)
        if serial not in phones:
            known = ', '.join(sorted(phones)) or 'no phone'
            return (f"phone {serial} is not attached; adb knows {known}; plug it in with USB debugging on, or run `adb "
                    "connect HOST:PORT`, until `adb devices` shows it")
        state = phones[serial]
        if state == "device":
            return ""
        return STATES.get(state, "phone {serial} is in state '{state}' and cannot run programs").format(
            serial=serial, state=state)

    def _look(self) -> None:
        try:
            socket.create_connection((self.host, self.port), CONNECT_S).close()
        except OSError as error:
            raise TargetError(self._no_server()) from error

    def _no_server(self) -> str:
        library = _adbutils()
        try:
            library.adb_path()
        except library.AdbError:
            return ("there is no adb program on this machine and no adb server at "
                    f"{self.host}:{self.port}; install Android's platform-tools (apt install adb)")
        return (f"no adb server answers at {self.host}:{self.port}; start one with `adb start-server`, or set adb_host "
                "and adb_port")


def check_serial(serial: object) -> str:
    """The serial, if it is one; ConfigError for anything that a shell could read as more than a word."""
    if not isinstance(serial, str) or not SERIAL.fullmatch(serial):
        raise ConfigError(f"phone serial {serial!r} is not usable; a serial has letters, digits, '.', '_', ':' and '-' "
                          "only, as `adb devices` prints it")
    return serial


def allowed(serial: Serials, present: Sequence[str]) -> list[str]:
    """The phones of `present` that a configuration means.

    ConfigError where it names none and there are several: never the first one found.
    """
    if serial is None:
        if len(present) > 1:
            raise ConfigError(f"there are {len(present)} phones, {', '.join(sorted(present))}, and no serial is given; "
                              "set the target's option serial to one of them, a list of them, or all")
        return list(present)
    if serial == "all":
        return sorted(present)
    wanted = [serial] if isinstance(serial, str) else list(serial)
    if not wanted:
        raise ConfigError("the target's option serial is an empty list; name phones, or write all")
    return [name for name in map(check_serial, wanted) if name in present]


def only(serial: Serials, server: Server) -> str:
    """The one phone of this process. TargetError or ConfigError where that is not exactly one."""
    if isinstance(serial, str) and serial != "all":
        return check_serial(serial)
    if serial is not None and serial != "all" and len(serial) == 1:
        return check_serial(serial[0])
    phones = server.phones()
    found = allowed(serial, [name for name, state in phones.items() if state == "device"] or list(phones))
    if not found and serial is not None and serial != "all":
        raise TargetError(server.trouble(serial[0]))
    if not found:
        raise TargetError(NO_PHONE)
    if len(found) > 1:
        raise ConfigError(f"one process measures one phone and {', '.join(found)} are meant; set the target's option "
                          "serial to one of them")
    return check_serial(found[0])


def offered_serials(offered: Mapping[str, float]) -> list[str]:
    return [name.removeprefix(PREFIX) for name, amount in offered.items() if name.startswith(PREFIX) and amount >= 1]


def _adbutils() -> Any:
    try:
        import adbutils
    except ImportError as error:
        raise TargetError("phones are measured through adbutils, which is not installed; run "
                          "pip install 'paretoray[android]'") from error
    return adbutils
