"""Paths in an object store behave as paths on a disk do, and say in one sentence why they cannot."""
from __future__ import annotations

import contextlib
import os
import pickle
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest

from actors import objectstore
from actors.knowledge.entry import Entry, NewEntry
from actors.knowledge.store import KnowledgeStore
from actors.objectpath import AnyPath, ObjectPath, address_of, as_path, matching
from actors.objectstore import ObjectStoreError
from actors.supernet.checkpoints import read_newest, remove_checkpoints, write_checkpoint
from actors.wholefile import remove_tree, set_aside, write_whole
from searchspaces.errors import StoreError
from tests.objectstore import Server, free_port


@pytest.fixture(params=["disk", "object store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> AnyPath:
    """Empty, of either kind."""
    if request.param == "disk":
        return tmp_path / "a"
    running: Server = request.getfixturevalue("s3")
    return as_path(running.address(f"test/{request.node.name}"))


def test_both_kinds_behave_alike(folder: AnyPath) -> None:
    assert not folder.exists() and not list(folder.glob("*")) and folder.name == as_path(str(folder)).name
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    for name in ("b.json", "a.json", "c.txt"):
        write_whole(folder / "runs" / name, name.encode())
    assert folder.is_dir() and (folder / "runs").is_dir() and (folder / "runs" / "a.json").is_file()
    assert [path.name for path in matching(folder / "runs", "*.json")] == ["a.json", "b.json"]
    assert [path.parent.name for path in matching(folder, "*/c.txt")] == ["runs"] and not matching(folder, "*/d.txt")
    assert {path.name for path in (folder / "runs").iterdir()} == {"a.json", "b.json", "c.txt"}
    assert (folder / "runs" / "c.txt").read_text() == "c.txt" and (folder / "runs" / "c.txt").stat().st_size == 5
    write_whole(folder / "runs" / "c.txt", b"again")
    assert (folder / "runs" / "c.txt").read_bytes() == b"again"
    set_aside(folder / "runs" / "a.json")
    assert (folder / "runs" / "a.json.damaged").read_text() == "a.json" and not (folder / "runs" / "a.json").exists()
    with pytest.raises(FileNotFoundError):
        (folder / "runs" / "a.json").read_bytes()
    with pytest.raises(FileNotFoundError):
        (folder / "runs" / "a.json").unlink()
    (folder / "runs" / "a.json").unlink(missing_ok=True)
    (folder / "runs" / "b.json").unlink()
    again: AnyPath = pickle.loads(pickle.dumps(folder))
    assert again == folder and as_path(address_of(folder)) == folder.resolve()
    assert {path.name for path in (again / "runs").iterdir()} == {"a.json.damaged", "c.txt"}
    remove_tree(folder)
    assert not folder.exists()


def test_an_object_of_several_uploads_is_whole(s3: Server) -> None:
    content, path = os.urandom(11_000_000), as_path(s3.address("large"))
    write_whole(path, content)
    assert path.read_bytes() == content


def test_checkpoints_and_trained_blocks(folder: AnyPath) -> None:
    import numpy as np
    import torch

    for number in range(4):
        write_checkpoint(folder, "supernet", number, {"w": torch.full((3,), float(number))}, {"epoch": number})
    assert len(matching(folder, "*.safetensors")) == 2
    write_whole(folder / "supernet-000003.safetensors", b"rubbish")
    found = read_newest(folder, "supernet")
    assert found is not None and found.about["epoch"] == 2 and found.damaged == ("supernet-000003",)
    assert float(found.tensors["w"][0]) == 2.0
    remove_checkpoints(folder, "supernet")
    assert read_newest(folder, "supernet") is None

    blocks = [NewEntry((stage, "", (1, stage)), {"w": np.full(100, stage, np.float32)}, 4, 4) for stage in range(3)]
    store = KnowledgeStore(folder / "pool", 1e6)
    assert store.write(blocks[:2]) and store.write(blocks[2:])
    matching(folder / "pool" / "index", "*.parquet")[0].unlink()    # its rows are made again from the entries
    entries = KnowledgeStore(folder / "pool", 1e6).entries()
    assert set(entries) == {block.block for block in blocks}
    assert len(matching(folder / "pool" / "index", "*.parquet")) == 1
    weights = store.read(entries[(2, "", (1, 2))])
    assert weights is not None and float(weights["w"][0]) == 2.0
    one = matching(folder / "pool" / "entries", "2-*")[0]
    assert Entry.of_file(one) == entries[(2, "", (1, 2))]


@pytest.mark.parametrize(("address", "reason"), [
    ("ftp://lab/runs", "'ftp://' is no kind of store"), ("s3:///runs", "names no bucket"),
    ("s3://lab-runs/runs?colour=red", "'colour' is no option of s3://lab-runs/runs; there are region"),
    ("s3://mykey:mysecret@lab-runs/runs", "has credentials in it"), ("file://there/runs", "with three slashes")])
def test_an_address_that_is_none(address: str, reason: str) -> None:
    with pytest.raises(StoreError) as error:
        as_path(address)
    assert reason in str(error.value) and "mykey" not in str(error.value) and "mysecret" not in str(error.value)


def test_addresses_of_a_disk(tmp_path: Path) -> None:
    assert as_path("runs") == Path("runs") and as_path(f"file://{tmp_path}/a%20b") == tmp_path / "a b"
    assert as_path(tmp_path) is tmp_path and as_path("file:///runs") == Path("/runs")


def refusal(path: AnyPath) -> str:
    with pytest.raises(ObjectStoreError) as error:
        path.exists()
    assert str(error.value).count("\n") == 0 and len(str(error.value)) < 450
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
    return str(error.value)


def test_a_store_that_cannot_be_used(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there is no bucket 'other-runs' there; create it" in refusal(as_path(s3.address("runs", "other-runs")))
    with s3.checks_keys():
        denied = refusal(as_path(s3.address("runs") + "&region=us-east-1"))
        assert "access is denied" in denied and "AWS_ACCESS_KEY_ID" in denied and "secret-of-the-lab" not in denied
    nobody = as_path(s3.address("runs").replace(str(s3.port), str(free_port())))
    monkeypatch.setattr(objectstore, "ATTEMPTS", 1)
    assert "the store does not answer (Failed to connect to 127.0.0.1" in refusal(nobody)


@contextlib.contextmanager
def silent_server() -> Iterator[int]:
    """Takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(50)
        yield int(listener.getsockname()[1])


def test_a_store_that_is_silent_is_not_waited_for(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectstore, "ATTEMPTS", 1)
    monkeypatch.setattr(objectstore, "SILENT_S", 1.0)
    with silent_server() as port:
        silent = as_path(s3.address("runs").replace(str(s3.port), str(port)))
        assert "the store does not answer (" in refusal(silent)

    held = threading.Event()    # whatever the native library waits for
    monkeypatch.setattr(objectstore, "OPENING_S", 0.2)
    monkeypatch.setattr(objectstore, "_looked_at", lambda *_: held.wait(60))
    assert "does not answer within 0.2 s" in refusal(as_path(s3.address("runs", "third-runs")))
    held.set()


def test_google_cloud_storage_is_opened_with_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectstore, "OPENING_S", 2.0)
    path = as_path(f"gs://lab-runs/runs?anonymous=true&scheme=http&endpoint_override=127.0.0.1:{free_port()}")
    assert isinstance(path, ObjectPath) and "does not answer" in refusal(path)
    assert hasattr(pyarrow.fs, "GcsFileSystem")


@pytest.mark.parametrize("sizes", [(1, 3000), (3000, 1)])
def test_an_object_that_is_written_meanwhile_is_read_whole(s3: Server, monkeypatch: pytest.MonkeyPatch,
                                                           sizes: tuple[int, int]) -> None:
    path = as_path(s3.address("busy/state.json"))
    write_whole(path, b"a" * sizes[0])
    opened, written = ObjectPath._open, list[bytes]()

    def then_written(self: ObjectPath) -> Any:
        found = opened(self)
        if not written:     # between the request for the size and the one for the content
            written.append(b"b" * sizes[1])
            write_whole(path, written[0])
        return found

    monkeypatch.setattr(ObjectPath, "_open", then_written)
    assert path.read_bytes() == b"b" * sizes[1]
