"""Stopping cleanly: Ctrl-C and SIGTERM set a flag that every waiting loop polls."""
from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interrupted(Exception):  # noqa: N818 - not an error: the user asked for it
    """The run was asked to stop; everything recorded is on disk. `signal_number` decides the exit code."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


class StopFlag:
    """Set by a signal, read by loops through `check`. A second signal takes the default action: ends at once."""

    def __init__(self) -> None:
        self._signal: int | None = None

    def set(self, signal_number: int) -> None:
        self._signal = signal_number

    def check(self) -> None:
        if self._signal is not None:
            raise Interrupted(self._signal)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handlers for SIGINT and SIGTERM. Install after `ray.init`, which replaces earlier ones."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, _frame: FrameType | None) -> None:
            self.set(number)
            signal.signal(number, signal.SIG_DFL)

        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
