"""Files that are written whole or not at all: under a temporary name, flushed to disk, renamed."""
from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from actors.objectpath import AnyPath, ObjectPath
from actors.objectstore import ObjectStoreError
from actors.wholefile import remove_tree
from searchspaces.errors import StoreError

log = logging.getLogger(__name__)
ROOM_MB = 1             # that must be free before a run begins; far less than it will need


@contextlib.contextmanager
def write_atomically(path: AnyPath) -> Iterator[Path | Upload]:
    """Yields a temporary path; on success it is flushed and renamed to `path`, on failure removed (StoreError). For an
    object store it yields what is uploaded on success."""
    if isinstance(path, ObjectPath):
        upload = Upload()
        yield upload
        path.write_bytes(upload.getvalue())
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise _unwritable(path, error, "everything recorded so far is kept; free some space first") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


class Upload(io.BytesIO):
    """In memory, written to as a path is."""

    def write_bytes(self, content: bytes) -> None:
        self.write(content)

    def write_text(self, text: str) -> None:
        self.write(text.encode())


def _unwritable(path: AnyPath, error: OSError, advice: str) -> StoreError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return StoreError(f"{'the disk is full' if full else 'cannot write'} while writing {path} ({error}); {advice}")


def check_writable(folder: AnyPath) -> None:
    """StoreError where a run could not be written to this folder, which need not exist yet. Leaves nothing behind."""
    try:
        if isinstance(folder, ObjectPath):
            probe = folder / f"probe-{uuid.uuid4().hex}"
            probe.write_bytes(b"")
            return probe.unlink()
        existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(ROOM_MB * 10**6))
            file.flush()
            os.fsync(file.fileno())
    except ObjectStoreError:
        raise
    except OSError as error:
        raise _unwritable(folder, error, "free some space, correct the folder's permissions or choose another --runs "
                                         "folder") from error


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: AnyPath, text: str) -> None:
    with write_atomically(path) as temporary:
        temporary.write_text(text)


def write_json(path: AnyPath, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: AnyPath) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise StoreError(f"{path} does not exist; is this a run folder?") from None
    except ObjectStoreError:
        raise
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is damaged ({error}); restore it or start a new run") from error


def remove_folder(path: AnyPath) -> None:
    """What cannot be removed stays, with a warning: an error is on its way already."""
    try:
        remove_tree(path)
    except OSError as error:
        log.warning("the run folder %s holds nothing and cannot be removed (%s)", path, error)
