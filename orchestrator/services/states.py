"""What was learned, in the run's folder: flat states with a digest, and the predictors among them."""
from __future__ import annotations

import contextlib
import json
import logging
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from actors.objectstore import ObjectStoreError
from actors.wholefile import set_aside
from orchestrator.config import Config
from orchestrator.prediction.predictor import LatencyPredictor
from orchestrator.record.files import write_atomically, write_json
from orchestrator.record.store import RunStore
from searchspaces.errors import StoreError
from searchspaces.space import SearchSpace

DIGEST = "sha256"  # of the tensors, in the JSON beside them
log = logging.getLogger(__name__)


def state_name(kind: str, label: str, config: Config) -> str:
    """Of a checkpoint: a run with one target or goal needs no label in it."""
    return kind if len(config.targets) == 1 else f"{kind}-{label}"


def load_predictor(store: RunStore, config: Config, space: SearchSpace, label: str) -> LatencyPredictor | None:
    """The target's predictor; None before it is fitted."""
    name = state_name("predictor", label, config)
    return LatencyPredictor.from_state(space, load_state(store, name)) if has_state(store, name) else None


def save_state(store: RunStore, name: str, state: dict[str, Any]) -> None:
    """A flat dictionary: tensors and arrays to NAME.safetensors, everything else to NAME.json."""
    folder = store.path / "checkpoints"
    tensors = {key: torch.as_tensor(value).contiguous() for key, value in state.items()
               if isinstance(value, torch.Tensor | np.ndarray)}
    content = save(tensors)
    with write_atomically(folder / f"{name}.safetensors") as temporary:
        temporary.write_bytes(content)
    facts = {key: value for key, value in state.items() if key not in tensors}
    write_json(folder / f"{name}.json", facts | {DIGEST: sha256(content).hexdigest()})


def has_state(store: RunStore, name: str) -> bool:
    return (store.path / "checkpoints" / f"{name}.json").exists()  # written last


def load_state(store: RunStore, name: str) -> dict[str, Any]:
    """What `save_state` wrote. StoreError if it is missing or damaged."""
    folder = store.path / "checkpoints"
    try:
        facts = json.loads((folder / f"{name}.json").read_text())
        content = (folder / f"{name}.safetensors").read_bytes()
        digest = facts.pop(DIGEST, None)  # runs of earlier versions have none
        if digest not in (None, sha256(content).hexdigest()):
            raise ValueError("its tensors do not have the digest that was written")
        return facts | load(content)
    except ObjectStoreError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise StoreError(f"{folder / name}.* is missing or damaged ({error}); resume the run to make it "
                         "again") from error


def intact_state(store: RunStore, name: str) -> dict[str, Any] | None:
    """What `save_state` wrote, None where there is nothing whole: what is damaged is set aside, to be made again."""
    if not has_state(store, name):
        return None
    try:
        return load_state(store, name)
    except StoreError as error:
        log.warning("%s.* in %s is damaged and set aside as *.damaged (%s)", name, store.path / "checkpoints",
                    error.__cause__)
        for suffix in ("json", "safetensors"):
            file = store.path / "checkpoints" / f"{name}.{suffix}"
            with contextlib.suppress(FileNotFoundError):
                set_aside(file)
        return None
