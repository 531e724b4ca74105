"""One driver of a run at a time: a lock of the system on a disk, a lease in an object store."""
from __future__ import annotations

import fcntl
import weakref
from typing import IO, Any

from actors.lease import Lease
from actors.objectpath import AnyPath, ObjectPath
from searchspaces.errors import StoreError

FILE = "lock"


class RunLock:
    """Given back by `release`, when nobody refers to this object any more, and when the process ends: at once by the
    system or by the process itself; in an object store, where the process was killed, by its silence."""

    def __init__(self) -> None:
        self._held: Any = None      # an open file, or a lease

    @property
    def held(self) -> bool:
        return self._held is not None

    def take(self, run_dir: AnyPath, what: str = "run") -> None:
        """StoreError where another process has it. `what` it is the folder of."""
        if isinstance(run_dir, ObjectPath):
            self._held = Lease.claim(run_dir)
            weakref.finalize(self, self._held.release)
            return
        handle = (run_dir / FILE).open("w")
        if not claimed(handle):
            handle.close()
            raise StoreError(f"{what} '{run_dir.name}' is being driven by another process; wait for it or stop it")
        self._held = handle

    def check(self) -> None:
        """Before something is written. StoreError where another process has taken a lease over."""
        if isinstance(self._held, Lease):
            self._held.check()

    def release(self) -> None:
        if isinstance(self._held, Lease):
            self._held.release()
        elif self._held is not None:
            self._held.close()
        self._held = None


def claimed(handle: IO[Any]) -> bool:
    """Is the lock of this open file free, and from now on its own?"""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
