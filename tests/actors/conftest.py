"""The adb chain: one server for the session, a fresh phone for every test that asks for one."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def adb_port() -> Iterator[int]:
    pytest.importorskip("adbutils", reason="adbutils is not installed (pip install 'paretoray[android]')")
    from tests.actors.targets.android.adbchain import adb_server

    with adb_server() as port:
        yield port


@pytest.fixture
def phone(adb_port: int, tmp_path: Path) -> Iterator:  # type: ignore[type-arg]
    from tests.actors.targets.android.adbchain import attached_phone

    with attached_phone(adb_port, tmp_path / "phone") as made:
        yield made
