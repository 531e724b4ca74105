"""The shipped search spaces by name, and how options of a configuration become a space.

A name with a colon is a user's own class, `module:Class`. Options are the keyword arguments of the constructor; names
and types are checked against its signature, so that a misspelt option is an error and never a different experiment.
"""
from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from searchspaces.darts.space import Darts, DartsS16
from searchspaces.errors import ConfigError
from searchspaces.expanded.space import Expanded, ExpandedS16
from searchspaces.mnas.space import Mnas, MnasS16, MnasS32
from searchspaces.mobilenetv3.space import MobileNetV3, MobileNetV3S16, MobileNetV3S32
from searchspaces.nasbench201.space import NasBench201
from searchspaces.plugins import check_options, load_object, user_code
from searchspaces.probe import probe_space
from searchspaces.proxylessnas.space import ProxylessNas, ProxylessNasS16, ProxylessNasS32
from searchspaces.space import SearchSpace

SPACES: dict[str, type[SearchSpace]] = {
    "mobilenetv3": MobileNetV3,
    "mobilenetv3-s32": MobileNetV3S32,
    "mobilenetv3-s16": MobileNetV3S16,
    "mnas": Mnas,
    "mnas-s32": MnasS32,
    "mnas-s16": MnasS16,
    "nasbench201": NasBench201,
    "darts": Darts,
    "darts-s16": DartsS16,
    "proxylessnas": ProxylessNas,
    "proxylessnas-s32": ProxylessNasS32,
    "proxylessnas-s16": ProxylessNasS16,
    "expanded": Expanded,
    "expanded-s16": ExpandedS16,
}
FROM_DATA = ("classes", "channels")  # set by the dataset, never an option


def space_class(name: str) -> type[SearchSpace]:
    """The class of a shipped name or of "module:Class"."""
    if ":" in name:
        loaded = load_object(name)
        if not (inspect.isclass(loaded) and issubclass(loaded, SearchSpace)):
            raise ConfigError(f"'{name}' is not a search space; derive the class from searchspaces.space.SearchSpace")
        return loaded
    if name not in SPACES:
        close = difflib.get_close_matches(name, SPACES, n=1, cutoff=0.3)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise ConfigError(f"there is no search space '{name}'; {hint}choose one of {', '.join(sorted(SPACES))}, or "
                          "your own as module:Class")
    return SPACES[name]


def make_space(name: str, *, classes: int, channels: int, options: Mapping[str, Any]) -> SearchSpace:
    """The space `name` for a dataset's classes and channels. ConfigError on unknown or mistyped options; SpaceError
    where an own space cannot describe a network."""
    space = space_class(name)
    check_options(f"search space {name}", space, options, hidden=FROM_DATA)
    if ":" not in name:
        return space(classes=classes, channels=channels, **options)
    with user_code(f"search space {name}", space):
        own = space(classes=classes, channels=channels, **options)
    probe_space(name, own)
    return own
