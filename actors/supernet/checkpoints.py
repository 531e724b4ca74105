"""Checkpoints on disk: tensors as safetensors, the rest as JSON, either whole or not there.

The tensors are written first, the JSON beside them last; a checkpoint counts from the moment its JSON has its name. The
JSON holds the digest of the tensors, so that damage is noticed, and the damaged files are set aside for inspection.
"""
from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from actors.objectpath import AnyPath, matching
from actors.objectstore import ObjectStoreError
from actors.wholefile import set_aside, write_whole
from searchspaces.errors import StoreError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """`tensors` and what was written `about` them; `damaged` names newer files that had to be set aside."""

    tensors: dict[str, Tensor]
    about: dict[str, Any]
    damaged: tuple[str, ...] = ()


def write_checkpoint(folder: AnyPath, name: str, number: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any],
                     keep: int = 2) -> AnyPath:
    """Writes `name-number` and removes all but the newest `keep`. StoreError if the disk does not take it; what was
    there before stays."""
    stem = f"{name}-{number:06d}"
    content = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
    facts = {**about, "sha256": hashlib.sha256(content).hexdigest()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"{stem}.safetensors", content)
        write_whole(folder / f"{stem}.json", json.dumps(facts, indent=1).encode())
        for path in _newest_first(folder, name)[keep:]:
            path.unlink(missing_ok=True)
            path.with_suffix(".safetensors").unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"cannot write the checkpoint {folder / stem} ({error.strerror}); free the disk or correct "
                         "its permissions, then resume the run") from error
    return folder / f"{stem}.json"


def read_newest(folder: AnyPath, name: str) -> Checkpoint | None:
    """The newest checkpoint that is whole, None if there is none. Damaged newer ones become `*.damaged`."""
    damaged: list[str] = []
    for path in _newest_first(folder, name):
        try:
            return Checkpoint(*_read(path), tuple(damaged))
        except ObjectStoreError:
            raise       # says nothing about the checkpoint
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            log.warning("checkpoint %s is damaged (%s); set aside, the one before it is used", path.stem, error)
            damaged.append(path.stem)
            for file in (path, path.with_suffix(".safetensors")):
                if file.exists():
                    set_aside(file)
    return None


def remove_checkpoints(folder: AnyPath, name: str) -> None:
    """Removes all that `write_checkpoint` wrote under this name; the JSON first, so that none is left half."""
    for path in _newest_first(folder, name):
        path.unlink(missing_ok=True)
    for path in folder.glob(f"{name}-*.safetensors"):
        path.unlink(missing_ok=True)


def _read(path: AnyPath) -> tuple[dict[str, Tensor], dict[str, Any]]:
    about = json.loads(path.read_bytes())
    content = path.with_suffix(".safetensors").read_bytes()
    if hashlib.sha256(content).hexdigest() != about["sha256"]:
        raise ValueError("its tensors do not have the digest that was written")
    return load(content), about


def _newest_first(folder: AnyPath, name: str) -> list[AnyPath]:
    return matching(folder, f"{name}-*.json")[::-1]
