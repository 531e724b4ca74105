"""Files that are there whole or not at all, on a disk and in an object store."""
from __future__ import annotations

import os
import shutil
from pathlib import Path

from actors.objectpath import AnyPath


def write_whole(path: AnyPath, content: bytes) -> None:
    """Under a temporary name, on the disk, then renamed: a reader sees all of it or nothing. An object always is so."""
    if not isinstance(path, Path):
        return path.write_bytes(content)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def set_aside(path: AnyPath) -> None:
    """What is damaged becomes `*.damaged`, for inspection."""
    if isinstance(path, Path):
        os.replace(path, path.with_name(path.name + ".damaged"))
    else:
        path.replace(path.with_name(path.name + ".damaged"))


def remove_tree(path: AnyPath) -> None:
    """A folder with all that is in it. OSError, FileNotFoundError among them."""
    if isinstance(path, Path):
        shutil.rmtree(path)
    else:
        path.rmtree()
