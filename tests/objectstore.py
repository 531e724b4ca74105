"""A real S3 server of this machine, for tests of runs in an object store."""
from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

BUCKET = "lab-runs"
KEYS = {"AWS_ACCESS_KEY_ID": "lab", "AWS_SECRET_ACCESS_KEY": "secret-of-the-lab", "AWS_EC2_METADATA_DISABLED": "true"}
START_S = 120.0


@dataclass(frozen=True)
class Server:
    port: int

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def address(self, folder: str, bucket: str = BUCKET) -> str:
        return f"s3://{bucket}/{folder}?endpoint_override=127.0.0.1:{self.port}&scheme=http"

    def ask(self, method: str, path: str, body: bytes = b"") -> None:
        """A bare request; the server looks at no signatures until `checks_keys`."""
        request = urllib.request.Request(f"{self.endpoint}{path}", data=body or None, method=method,
                                         headers={"Content-Type": "text/plain"})
        urllib.request.urlopen(request, timeout=30).close()

    @contextlib.contextmanager
    def checks_keys(self) -> Iterator[None]:
        """Refuses everybody meanwhile: it knows no users."""
        self.ask("POST", "/moto-api/reset-auth", b"0")
        try:
            yield
        finally:
            self.ask("POST", "/moto-api/reset-auth", b"inf")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def s3_server() -> Iterator[Server]:
    """With one bucket; its keys are in the environment meanwhile."""
    pytest.importorskip("moto", reason="moto is not installed: pip install -e '.[dev]'")
    server = Server(free_port())
    process = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(server.port)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | KEYS)
    try:
        deadline_s = time.monotonic() + START_S
        while True:
            assert process.poll() is None and time.monotonic() < deadline_s, "the S3 server does not start"
            with contextlib.suppress(OSError):
                server.ask("PUT", f"/{BUCKET}")
                break
            time.sleep(0.1)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in KEYS.items():
                patch.setenv(name, value)
            yield server
    finally:
        process.kill()
        process.wait()
