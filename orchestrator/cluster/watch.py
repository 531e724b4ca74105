"""The driver's side of its own death and of Ray's.

Where the Ray that was started here loses its raylet or its GCS, Ray itself ends the driver: after 3 to 60 s, from C++,
with its own lines last. A thread looks after both and ends the driver first, with a sentence. What no thread can see
(the driver is killed, Ray ends it elsewhere) the guard sees, a process of its own: orchestrator/cluster/guard.py.
"""
from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
PARTS = ("raylet", "gcs_server")    # without either no Ray goes on
LOOK_S = 0.5
FAREWELL_S = 5.0        # for what is said at the end; then the guard says it
GUARD_END_S = 10.0
EXIT_CODE = 2           # of every error that a user reads as one sentence


def one_error(reason: str) -> tuple[int, list[str]]:
    return EXIT_CODE, [f"error: {reason}"]


class Watch:
    """Does nothing until `guarded`. `farewell` is called from another thread with the reason, when Ray has died and
    just before this process ends: with the exit code that it returns, and its lines as the last that a user reads. It
    must not need Ray."""

    def __init__(self) -> None:
        self.farewell: Callable[[str], tuple[int, list[str]]] = one_error
        self._guard: subprocess.Popen[bytes] | None = None
        self._over = threading.Event()
        self._stderr = -1   # our own: the process's may be silenced for a moment, and Ray may hang in that moment

    def at_death(self, sentence: str) -> None:
        """What the guard says if this process dies from now on; "" for nothing."""
        self._tell(say=sentence)

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Ray may be started inside; outside it has ended."""
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        with contextlib.suppress(OSError):      # there may be none
            self._stderr = os.dup(2)
        try:
            # A session of its own: Ctrl-C and a closed terminal do not reach it.
            self._guard = subprocess.Popen([sys.executable, "-m", "orchestrator.cluster.guard", str(os.getpid())],
                                           stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True,
                                           env=os.environ | {"PYTHONPATH": path})
        except OSError as error:
            log.warning("no guard could be started (%s): if this process is killed, parts of Ray stay a while", error)
        try:
            yield
        finally:
            self._tell(done=True)
            if self._guard is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._guard.wait(GUARD_END_S)
            with contextlib.suppress(OSError):
                os.close(self._stderr)

    def begin(self) -> None:
        """Ray has been started here."""
        self._tell(up=True)
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def end(self) -> None:
        """From now on Ray may end."""
        self._over.set()

    def lost(self) -> str:
        """Which part of the Ray that was started here has ended, one sentence; "" while all live."""
        from ray._private import worker

        node: Any = worker._global_node
        for part in PARTS:
            for info in node.all_processes.get(part, []) if node is not None else []:
                code = info.process.poll()
                if code is not None:
                    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                    return (f"Ray's {part} on this machine {how}, and without it Ray cannot go on; if nobody ended it, "
                            f"look for a lack of memory (dmesg) and into {node.get_logs_dir_path()}")
        return ""

    def _look(self) -> None:
        while not self._over.wait(LOOK_S):
            reason = self.lost()
            if reason and not self._over.is_set():
                hurry = threading.Timer(FAREWELL_S, os._exit, [EXIT_CODE])
                hurry.daemon = True
                hurry.start()
                code, lines = self.farewell(reason)
                with contextlib.suppress(OSError):
                    os.write(self._stderr, "".join(f"{line}\n" for line in lines).encode())
                self.at_death("")
                os._exit(code)

    def _tell(self, **message: Any) -> None:
        if self._guard is not None and self._guard.stdin is not None:
            with contextlib.suppress(OSError):
                self._guard.stdin.write(json.dumps(message).encode() + b"\n")
                self._guard.stdin.flush()
