"""A phone without the phone: the device side of the ADB wire protocol on a loopback port, with faults on request.

The real adb server connects to it and the real client talks through that. Its shell runs commands of this Linux host in
a folder of its own: /data and /sys of a command mean that folder's, `getprop` and `dumpsys` say what its files say.
A message is a header of six little-endian words (command, two arguments, length, checksum, ~command) and its data;
every stream answers each WRTE with OKAY before the next may come.
"""
from __future__ import annotations

import asyncio
import os
import re
import signal
import struct
import sys
import threading
import time
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.leftovers import mark

VERSION, MAX_DATA, CHUNK = 0x01000001, 256 * 1024, 16 * 1024
FEATURES = "shell_v2,cmd"
RunFault = Literal["", "drop", "reboot", "stall", "silent", "garbage", "short"]
THERMAL = "IsStatusOverride: false\nThermal Status: {status}\nCached temperatures:\n" \
          "\tTemperature{{mValue=31.5, mType=3, mName=SKIN, mStatus=0}}\n"
BATTERY = "Current Battery Service state:\n  AC powered: false\n  level: 87\n  voltage: 4123\n  temperature: {tenths}\n"
PROPS = {"ro.product.manufacturer": "Loopback", "ro.product.model": "Stand In 1", "ro.soc.model": "X86",
         "ro.product.cpu.abi": "x86_64", "ro.build.version.release": "14"}


@dataclass
class Faults:
    """What goes wrong next. `push_drops` and `runs` are consumed one by one; the rest holds until it is changed."""

    push_drops: int = 0                 # pushes whose link is cut in the middle
    runs: list[RunFault] = field(default_factory=list)      # of the next runner calls
    away_s: float = 0.5                 # after a drop or reboot
    full: bool = False                  # the disk
    unauthorized: bool = False
    mute: bool = False                  # takes connections and never answers


class AdbDevice:
    """`start()` listens, `serial` is what adb calls it; `commands` is every shell command that arrived."""

    def __init__(self, root: Path, features: str = FEATURES) -> None:
        self.root, self.faults, self.commands, self.pushes = root, Faults(), list[str](), list[str]()
        self.port, self._features = 0, features
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._links: set[asyncio.StreamWriter] = set()
        self._processes: set[asyncio.subprocess.Process] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        _furnish(root)

    @property
    def serial(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> AdbDevice:
        self._thread.start()
        self._do(self._listen())
        return self

    def heat(self, status: int, battery_c: float) -> None:
        (self.root / "thermal").write_text(THERMAL.format(status=status))
        (self.root / "battery").write_text(BATTERY.format(tenths=round(10 * battery_c)))

    def leave(self) -> None:
        """Cuts every link and takes no new ones, like a phone that is switched off."""
        self._do(self._leave())

    def come_back(self) -> None:
        self._do(self._listen())

    def drop_links(self) -> None:
        self._do(self._drop())

    def stop(self) -> None:
        if not self._thread.is_alive():
            return
        self._do(self._leave())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10.0)

    # --- the link ---------------------------------------------------------------------------------------------------

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=10.0)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        assert not 5555 <= self.port <= 5585, "adb scans these ports for emulators"

    async def _drop(self) -> None:
        for link in list(self._links):
            link.transport.abort()
        for process in list(self._processes):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    async def _leave(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._drop()

    async def _vanish(self, away_s: float) -> None:
        await self._leave()
        await asyncio.sleep(away_s)
        await self._listen()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._links.add(writer)
        streams: dict[int, _Stream] = {}
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                name, first, second, size, _, _ = struct.unpack("<4s5I", await reader.readexactly(24))
                data = await reader.readexactly(size)
                if self.faults.mute:
                    continue
                if name == b"CNXN" and not self.faults.unauthorized:
                    banner = f"device::ro.product.model=Stand_In_1;features={self._features}".encode()
                    _send(writer, b"CNXN", VERSION, MAX_DATA, banner)
                elif name in (b"CNXN", b"AUTH"):
                    if name == b"CNXN" or first != 3:       # 3: the host offers its key, and nobody confirms it
                        _send(writer, b"AUTH", 1, 0, os.urandom(20))
                elif name == b"OPEN":
                    stream = streams[first] = _Stream(writer, first)
                    stream.task = asyncio.ensure_future(self._service(stream, data.rstrip(b"\0").decode()))
                elif (known := streams.get(first)) is not None:
                    known.take(name, writer, data)
        for stream in streams.values():
            stream.close()
        self._links.discard(writer)
        writer.close()

    async def _service(self, stream: _Stream, service: str) -> None:
        _send(stream.writer, b"OKAY", stream.id, stream.id)
        with suppress(ConnectionError):
            if service == "sync:":
                await self._sync(stream)
            elif service.startswith("shell"):
                kind, _, command = service.partition(":")
                await self._shell(stream, command, ",v2" in kind)
        _send(stream.writer, b"CLSE", stream.id, stream.id)

    # --- services ---------------------------------------------------------------------------------------------------

    async def _shell(self, stream: _Stream, command: str, v2: bool) -> None:
        self.commands.append(command)
        fault = self.faults.runs.pop(0) if self.faults.runs and "taskset" in command else ""
        if fault == "stall":
            await asyncio.sleep(3600.0)
        text = {"silent": "true", "garbage": "printf 'Segmen\\377tation {\"model\": 1}\\n[]\\n'"}.get(fault, command)
        process = await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", _inside(text, self.root), cwd=self.root, start_new_session=True,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE if v2 else asyncio.subprocess.STDOUT, env=_environment(self.root))
        self._processes.add(process)
        stream.process = process
        if fault in ("drop", "reboot"):
            await asyncio.sleep(0.3)
            if fault == "drop":
                self._processes.discard(process)        # the phone goes on, only the cable is out
            asyncio.ensure_future(self._vanish(self.faults.away_s))
            return
        assert process.stdout is not None
        pipes = [(1, process.stdout)] + ([(2, process.stderr)] if process.stderr is not None else [])
        await asyncio.gather(*(self._pump(stream, pipe, number if v2 else 0, fault == "short")
                               for number, pipe in pipes))
        code = await process.wait()
        self._processes.discard(process)
        if v2:
            await stream.write(struct.pack("<BIB", 3, 1, code & 0xFF))

    async def _pump(self, stream: _Stream, pipe: asyncio.StreamReader, number: int, short: bool) -> None:
        while data := await pipe.read(CHUNK):
            data = data.replace(str(self.root).encode(), b"")
            if short:
                data = data[: len(data) // 2]
            await stream.write((struct.pack("<BI", number, len(data)) if number else b"") + data)

    async def _sync(self, stream: _Stream) -> None:
        while True:
            name, size = struct.unpack("<4sI", await stream.read(8))
            argument = (await stream.read(size)).decode()
            if name == b"QUIT":
                return
            path = self.root / argument.rpartition(",")[0 if name == b"SEND" else 2].lstrip("/")
            if name == b"STAT":
                status = path.stat() if path.exists() else None
                numbers = (status.st_mode, status.st_size, int(status.st_mtime)) if status else (0, 0, 0)
                await stream.write(b"STAT" + struct.pack("<3I", *numbers))
            elif name == b"RECV":
                content = path.read_bytes()
                for start in range(0, len(content), CHUNK):
                    part = content[start:start + CHUNK]
                    await stream.write(b"DATA" + struct.pack("<I", len(part)) + part)
                await stream.write(b"DONE" + struct.pack("<I", 0))
            elif name == b"SEND":
                await self._receive(stream, path, int(argument.rpartition(",")[2]))

    async def _receive(self, stream: _Stream, path: Path, mode: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            while True:
                name, size = struct.unpack("<4sI", await stream.read(8))
                if name == b"DONE":
                    break
                file.write(await stream.read(size))
                if self.faults.push_drops:
                    self.faults.push_drops -= 1
                    file.flush()
                    asyncio.ensure_future(self._vanish(self.faults.away_s))
                    await asyncio.sleep(3600.0)     # until the link's end cancels this
        path.chmod(mode & 0o777)
        self.pushes.append(f"/{path.relative_to(self.root)}")
        if self.faults.full:
            path.write_bytes(path.read_bytes()[:1000])
            reason = b"write failed: No space left on device"
            await stream.write(b"FAIL" + struct.pack("<I", len(reason)) + reason)
        else:
            await stream.write(b"OKAY" + struct.pack("<I", 0))


class _Stream:
    """One OPEN; both sides use the host's id."""

    def __init__(self, writer: asyncio.StreamWriter, number: int) -> None:
        self.writer, self.id = writer, number
        self.task: asyncio.Future[None] | None = None
        self.process: asyncio.subprocess.Process | None = None
        self._inbox = asyncio.StreamReader()
        self._ready = asyncio.Event()

    def take(self, name: bytes, writer: asyncio.StreamWriter, data: bytes) -> None:
        if name == b"OKAY":
            self._ready.set()
        elif name == b"WRTE":
            self._inbox.feed_data(data)
            _send(writer, b"OKAY", self.id, self.id)
        elif name == b"CLSE":
            self.close()

    def close(self) -> None:
        if self.task is not None:
            self.task.cancel()

    async def read(self, size: int) -> bytes:
        return await self._inbox.readexactly(size)

    async def write(self, data: bytes) -> None:
        self._ready.clear()
        _send(self.writer, b"WRTE", self.id, self.id, data)
        await self._ready.wait()


def _send(writer: asyncio.StreamWriter, name: bytes, first: int, second: int, data: bytes = b"") -> None:
    number = int.from_bytes(name, "little")
    writer.write(struct.pack("<6I", number, first, second, len(data), sum(data) & 0xFFFFFFFF, number ^ 0xFFFFFFFF)
                 + data)


def _inside(command: str, root: Path) -> str:
    return re.sub(r"(?<![\w/.])/(data|sys)/", rf"{root}/\1/", command)


def _environment(root: Path) -> dict[str, str]:
    return {"PATH": f"{root}/bin:{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(root), **mark()}


def _furnish(root: Path) -> None:
    """The upper half of this host's cores is big."""
    for folder in ("bin", "props", "data/local/tmp"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    scripts = {"getprop": f'cat "{root}/props/$1" 2>/dev/null || echo',
               "dumpsys": f'case $1 in thermalservice) cat "{root}/thermal";; battery) cat "{root}/battery";; esac'}
    for name, text in scripts.items():
        (root / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (root / "bin" / name).chmod(0o755)
    for name, value in PROPS.items():
        (root / "props" / name).write_text(value + "\n")
    (root / "thermal").write_text(THERMAL.format(status=0))
    (root / "battery").write_text(BATTERY.format(tenths=285))
    cores = sorted(os.sched_getaffinity(0))
    for core in cores:
        clocks = root / f"sys/devices/system/cpu/cpu{core}/cpufreq"
        clocks.mkdir(parents=True, exist_ok=True)
        highest = 2_800_000 if core >= cores[len(cores) // 2] else 1_800_000
        for name, value in (("cpuinfo_max_freq", highest), ("scaling_cur_freq", highest), ("scaling_max_freq", highest),
                            ("scaling_governor", "schedutil")):
            (clocks / name).write_text(f"{value}\n")


def wait_until(condition: Any, what: str, patience_s: float = 20.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {patience_s:g} s"
        time.sleep(0.05)
