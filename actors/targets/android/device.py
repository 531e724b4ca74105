"""One phone through the adb server: shell commands with a deadline, pushes that are whole or not there, reconnection.

A link can end at any byte and then looks like an empty answer with exit code 0 or like silence. So every call has a
deadline, a shell command is done only when its exit code arrived, a file is there only when its sha256 on the phone is
the right one, and whatever else happened is a `LinkError`, after which `persistently` takes the link down, up and tries
again. Words of a command are quoted; nothing that comes from outside is ever put into a command as it is.
"""
from __future__ import annotations

import hashlib
import logging
import shlex
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from actors.targets.android.adb import Server, _adbutils
from searchspaces.errors import TargetError

if TYPE_CHECKING:
    import adbutils

log = logging.getLogger(__name__)
ATTEMPTS = 3
SHELL_S = 15.0          # for commands that only look
PUSH_S = 20.0           # for one file, and 1 s more per megabyte
CHUNK = 32 * 1024       # a sync packet holds at most 64 KiB
MOST_OUTPUT = 64 << 20
END = "paretoray-exit:"     # of a command of the old shell protocol, which has no exit codes
T = TypeVar("T")


class LinkError(TargetError):
    """The phone did not answer, or not to the end; another attempt may work."""


@dataclass(frozen=True)
class Answer:
    """`out` is standard output, with standard error in it where the phone only has the old shell protocol."""

    code: int
    out: str
    err: str = ""


class Phone:
    """One phone. Not thread-safe, holds no connection between calls, may be made while the phone is away.

    `reconnect_s`: longest wait for state `device` after a reconnection; `recoveries` counts those since construction.
    """

    def __init__(self, server: Server, serial: str, reconnect_s: float = 15.0) -> None:
        self.serial, self.server, self._reconnect_s = serial, server, reconnect_s
        self.recoveries = 0
        self._v2: bool | None = None

    def shell(self, command: Sequence[str] | str, time_out_s: float = SHELL_S) -> Answer:
        """Runs words, or a text made of quoted words. LinkError where no exit code came within `time_out_s`."""
        text = command if isinstance(command, str) else shlex.join(command)
        deadline = _Deadline(time_out_s, f"phone {self.serial} did not finish a command")
        if self._v2 is None:
            with self._link("asking for its features"):
                self._v2 = "shell_v2" in self._device(deadline).get_features().split(",")
        with self._link("a shell command"), self._device(deadline).open_transport() as link:
            link.send_command(f"shell,v2:{text}" if self._v2 else f"shell:({text}); echo {END}$?")
            link.check_okay()
            return _read_v2(link.conn, deadline) if self._v2 else _read_v1(link.conn, deadline)

    def checked(self, command: Sequence[str] | str, purpose: str, time_out_s: float = SHELL_S) -> str:
        """Standard output; TargetError where the exit code is not 0."""
        answer = self.shell(command, time_out_s)
        if answer.code != 0:
            raise TargetError(f"phone {self.serial} cannot {purpose}: {_last_line(answer.err or answer.out)} (exit "
                              f"code {answer.code})")
        return answer.out

    def push(self, files: Mapping[str, bytes], mode: int = 0o644) -> int:
        """Makes every absolute path hold its bytes; the number of files sent, because right ones are not sent again.

        TargetError where the phone refuses (disk full), LinkError where the link ends or a file arrives damaged.
        """
        wanted = {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
        present = self._digests(list(wanted))
        missing = [path for path in wanted if present.get(path) != wanted[path]]
        if not missing:
            return 0
        folders = sorted({path.rpartition("/")[0] for path in missing})
        self.checked(["mkdir", "-p", *folders], "make folders")
        parts = {path: f"{path}.part" for path in missing}
        try:
            self._send({parts[path]: files[path] for path in missing}, mode)
            arrived = self._digests(list(parts.values()))
            damaged = [path for path in missing if arrived.get(parts[path]) != wanted[path]]
            if damaged:
                raise LinkError(f"{damaged[0]} arrived damaged on phone {self.serial}")
        except LinkError:
            raise
        except TargetError:
            self.shell(["rm", "-f", *parts.values()])       # they would keep a full disk full
            raise
        self.checked("; ".join(f"{shlex.join(['mv', '-f', part, path])} || exit 1" for path, part in parts.items()),
                     "rename a pushed file")
        return len(missing)

    def reconnect(self) -> None:
        """Down, up, and wait for state `device`. LinkError, with the state it was in, where it does not come back."""
        was = self.server.trouble(self.serial)
        self.recoveries += 1
        self._v2 = None
        deadline = time.monotonic() + self._reconnect_s
        while True:
            self._connect_again(max(1.0, min(5.0, deadline - time.monotonic())))
            for _ in range(10):
                trouble = self.server.trouble(self.serial)
                if not trouble:
                    return
                if "authorised" in trouble:
                    raise self._lost(trouble)
                if time.monotonic() > deadline:
                    raise LinkError(was or trouble)
                time.sleep(0.1)

    def persistently(self, step: Callable[[], T]) -> T:
        """The step's result; a lost link is taken up again, at most 3 attempts. TargetError with the last reason."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                if attempt > 1:
                    self.reconnect()
                return step()
            except LinkError as error:
                log.warning("phone %s, attempt %d of %d: %s", self.serial, attempt, ATTEMPTS, error)
                if attempt == ATTEMPTS:
                    raise TargetError(f"{error} (given up after {ATTEMPTS} attempts)") from error
        raise AssertionError("unreachable")

    def _connect_again(self, time_out_s: float) -> None:
        """A phone behind TCP stays "already connected" while it is offline, so the connection is ended first."""
        client = self.server.client(time_out_s)
        try:
            if ":" in self.serial:
                client.disconnect(self.serial)
                client.connect(self.serial, timeout=time_out_s)
            else:
                client.device(self.serial).open_transport("reconnect", timeout=time_out_s).close()
        except (_adbutils().AdbError, OSError, ValueError) as error:    # it is away; the caller looks again
            log.debug("phone %s does not connect: %s", self.serial, error)

    def _digests(self, paths: Sequence[str]) -> dict[str, str]:
        """path -> sha256 of those that exist."""
        lines = self.shell(["sha256sum", *paths], SHELL_S + PUSH_S).out.splitlines()
        pairs = [line.split(maxsplit=1) for line in lines]
        return {pair[1].lstrip("*"): pair[0] for pair in pairs if len(pair) == 2 and len(pair[0]) == 64}

    def _send(self, files: Mapping[str, bytes], mode: int) -> None:
        """Over one connection. adbutils' own push forgets unsent bytes when a socket has a time-out, and the reason
        of a refusal, so the packets are written here."""
        size = sum(map(len, files.values()))
        deadline = _Deadline(PUSH_S * len(files) + size / 1e6, f"a push of {size / 1e6:.1f} MB to phone {self.serial} "
                                                               "did not finish")
        with self._link("a push"), self._device(deadline).open_transport() as link:
            link.send_command("sync:")
            link.check_okay()
            for path, content in files.items():
                name = f"{path},{stat.S_IFREG | mode}".encode()
                _write(link.conn, b"SEND", name, deadline)
                for start in range(0, len(content), CHUNK):
                    _write(link.conn, b"DATA", content[start:start + CHUNK], deadline)
                deadline.hold(link.conn).sendall(b"DONE" + struct.pack("<I", int(time.time())))
                answer, length = struct.unpack("<4sI", _exactly(link.conn, 8, deadline))
                if answer != b"OKAY":
                    reason = _exactly(link.conn, min(length, 4096), deadline).decode(errors="replace")
                    raise TargetError(f"phone {self.serial} refused {path}: {reason}; free space on it, or check that "
                                      "the folder is writable")

    def _device(self, deadline: _Deadline) -> adbutils.AdbDevice:
        return self.server.client(deadline.left_s()).device(self.serial)

    @contextmanager
    def _link(self, what: str) -> Iterator[None]:
        """Everything that a broken link can raise becomes LinkError, with the phone's state where that says why."""
        try:
            yield
        except TargetError:
            raise
        except (_adbutils().AdbError, OSError, EOFError, ValueError, struct.error) as error:
            why = self.server.trouble(self.serial) or f"the link broke during {what} ({_last_line(str(error))})"
            raise self._lost(why if self.serial in why else f"phone {self.serial}: {why}") from error

    @staticmethod
    def _lost(why: str) -> TargetError:
        """A phone that waits for somebody to confirm a prompt is not tried again."""
        return TargetError(why) if why.startswith("phone") and "authorised" in why else LinkError(why)


class _Deadline:
    """One moment for a whole call, whatever number of reads it takes."""

    def __init__(self, seconds: float, what: str) -> None:
        self._end, self._what = time.monotonic() + seconds, f"{what} within {seconds:.0f} s"

    def left_s(self) -> float:
        left_s = self._end - time.monotonic()
        if left_s <= 0:
            raise LinkError(self._what)
        return left_s

    def hold(self, connection: socket.socket) -> socket.socket:
        connection.settimeout(self.left_s())
        return connection

    def read(self, connection: socket.socket, size: int) -> bytes:
        try:
            return self.hold(connection).recv(size)
        except TimeoutError as error:
            raise LinkError(self._what) from error


def _exactly(connection: socket.socket, size: int, deadline: _Deadline) -> bytes:
    content = bytearray()
    while len(content) < size:
        chunk = deadline.read(connection, size - len(content))
        if not chunk:
            raise EOFError("it ended in the middle of an answer")
        content += chunk
    return bytes(content)


def _write(connection: socket.socket, name: bytes, data: bytes, deadline: _Deadline) -> None:
    deadline.hold(connection).sendall(name + struct.pack("<I", len(data)) + data)


def _read_v2(connection: socket.socket, deadline: _Deadline) -> Answer:
    """Packets of kind (1: output, 2: errors, 3: exit code), length and content."""
    outputs: dict[int, bytearray] = {1: bytearray(), 2: bytearray()}
    while True:
        kind, length = struct.unpack("<BI", _exactly(connection, 5, deadline))
        content = _exactly(connection, length, deadline)
        if kind == 3:
            out, err = (bytes(outputs[number]).decode(errors="replace") for number in (1, 2))
            return Answer(content[0], out, err)
        if kind in outputs:
            outputs[kind] += content
        _check_size(outputs[1])


def _read_v1(connection: socket.socket, deadline: _Deadline) -> Answer:
    content = bytearray()
    while chunk := deadline.read(connection, CHUNK):
        content += chunk
        _check_size(content)
    text, found, code = bytes(content).decode(errors="replace").replace("\r\n", "\n").rpartition(END)
    if not found or not code.strip().isdigit():
        raise EOFError("it ended before the exit code")
    return Answer(int(code), text)


def _check_size(content: bytearray) -> None:
    if len(content) > MOST_OUTPUT:
        raise TargetError(f"a command on the phone printed more than {MOST_OUTPUT >> 20} MB; it is no runner")


def _last_line(text: Any) -> str:
    return (str(text).strip().splitlines() or ["no reason given"])[-1]
