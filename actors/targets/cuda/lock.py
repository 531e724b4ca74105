"""One measuring process per GPU, programs outside Ray included: a file lock, which ends with its holder."""
from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
from pathlib import Path

from searchspaces.errors import TargetError


class GpuLock:
    """Held from construction to `release` or the death of the process. TargetError where another process holds it.

    The file stays behind: removing it would let two processes hold locks on two files of the same name.
    """

    def __init__(self, uuid: str, device: str) -> None:
        self.path = Path(tempfile.gettempdir()) / f"paretoray-{re.sub('[^A-Za-z0-9-]', '_', uuid)}.lock"
        self._descriptor: int | None = _open(self.path, device)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            raise TargetError(f"{device} ({uuid}) is being measured by another process; wait until it has ended or "
                              "measure on another GPU") from error

    def release(self) -> None:
        """May be called twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _open(path: Path, device: str) -> int:
    """Reading is enough for a lock, so every user of the machine can take one on a file that another user made."""
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, os.O_RDONLY | flags)
        return os.open(path, os.O_RDONLY | os.O_CREAT | flags, 0o644)
    except OSError as error:
        raise TargetError(f"cannot lock {device}: {path} is not usable ({error.strerror}); remove it or set TMPDIR to "
                          "a folder that all users of this GPU share") from error
