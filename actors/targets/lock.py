"""One process of this machine at a time on a device: a file lock, which the system releases when its holder ends.

Ray's resources keep a device exclusive within one cluster; this does between clusters, and for programs without one.
The file stays behind: removing it would let two processes hold locks on two files of the same name.
"""
from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from searchspaces.errors import TargetError

POLL_S = 0.02
LOCKS = Path("/proc/locks")     # who holds which file; Linux only


class DeviceLock:
    """Held from construction to `release`, the end of a `with` or the death of the process.

    `name` is the file's, the same for everybody who means this device; `device` is what an error calls it. Those who
    wait up to `wait_s` get it in the order in which they came; TargetError for who does not get it, or cannot use the
    file.
    """

    def __init__(self, name: str, device: str, wait_s: float = 0.0) -> None:
        self._device, self._wait_s, self._deadline = device, wait_s, time.monotonic() + wait_s
        stem = f"paretoray-{re.sub('[^A-Za-z0-9-]', '_', name)}"
        with self._turn(f"{stem}.next.lock"):
            self._descriptor: int | None = self._locked(f"{stem}.lock")

    def release(self) -> None:
        """May be called twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> DeviceLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    @contextlib.contextmanager
    def _turn(self, file: str) -> Iterator[None]:
        """Whoever waits for the device holds a second lock meanwhile, so that nobody overtakes."""
        gate = self._locked(file) if self._wait_s else None
        try:
            yield
        finally:
            if gate is not None:
                os.close(gate)

    def _locked(self, file: str) -> int:
        """A file descriptor that holds the lock until it is closed."""
        descriptor = self._open(Path(tempfile.gettempdir()) / file)
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except OSError as error:
                if time.monotonic() >= self._deadline:
                    holder = _holder(descriptor)
                    os.close(descriptor)
                    waited = f" and did not become free within {self._wait_s:g} s" if self._wait_s else ""
                    raise TargetError(f"{self._device} is being measured by {holder}{waited}; wait until that has "
                                      "ended, stop it, or measure on another device") from error
            time.sleep(POLL_S)

    def _open(self, path: Path) -> int:
        """Reading is enough for a lock, so every user of the machine can take one on a file that another user made."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            with contextlib.suppress(FileNotFoundError):
                return os.open(path, flags)
            with contextlib.suppress(FileExistsError):      # another process was faster
                return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)
            return os.open(path, flags)
        except OSError as error:
            raise TargetError(f"cannot lock {self._device}: {path} is not usable ({error.strerror}); remove it or set "
                              "TMPDIR to a folder that all users of this device share") from error


def _holder(descriptor: int) -> str:
    """"process 4711" where the system tells, as in `1: FLOCK  ADVISORY  WRITE 4711 fe:00:131 0 EOF`."""
    file = os.fstat(descriptor)
    place = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}:{file.st_ino}"
    with contextlib.suppress(OSError):
        for line in LOCKS.read_text().splitlines():
            words = line.split()
            if len(words) >= 6 and words[1] == "FLOCK" and words[5] == place and int(words[4]) > 0:
                return f"process {words[4]}"
    return "another process"
