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
from searchspaces.efficientnet_lite.space import EfficientNetLite, EfficientNetLiteS
from searchspaces.elite.space import EliteSpace, tokens_of_ranges
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
    "efficientnet_lite": EfficientNetLite,
    "efficientnet_lite-s": EfficientNetLiteS,
    "expanded": Expanded,
    "expanded-s16": ExpandedS16,
}
ELITE = "elite"     # a space inside another one
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
        known = ", ".join(sorted([*SPACES, ELITE]))
        raise ConfigError(f"there is no search space '{name}'; {hint}choose one of {known}, or your own as "
                          "module:Class")
    return SPACES[name]


def make_space(name: str, *, classes: int, channels: int, options: Mapping[str, Any]) -> SearchSpace:
    """The space `name` for a dataset's classes and channels. ConfigError on unknown or mistyped options; SpaceError
    where an own space cannot describe a network."""
    if name == ELITE:
        return _elite(classes, channels, options)
    space = space_class(name)
    check_options(f"search space {name}", space, options, hidden=FROM_DATA)
    if ":" not in name:
        return space(classes=classes, channels=channels, **options)
    with user_code(f"search space {name}", space):
        own = space(classes=classes, channels=channels, **options)
    probe_space(name, own)
    return own


class EliteOptions:
    """A space inside another one. `run` is a run with controller nss, by name or path, and the weights that it trained
    are where training goes on. `aim` says which of the spaces it found, from 0, without it all of them together. `base`
    is for ranges by hand, the whole space, by name or as {name: NAME, option: value}. `ranges` are the values left to
    some of its positions, {depth0: [2, 3]}."""

    def __init__(self, run: str | None = None, aim: int | None = None,
                 base: str | Mapping[str, Any] | None = None, ranges: Mapping[str, Any] | None = None) -> None:
        self.run, self.aim, self.base, self.ranges = run, aim, base, ranges


def _elite(classes: int, channels: int, options: Mapping[str, Any]) -> EliteSpace:
    check_options(f"search space {ELITE}", EliteOptions, options)
    asked = EliteOptions(**options)
    if asked.base is None:
        raise ConfigError(f"search space {ELITE} needs `run`, a run with controller nss, or `base` and `ranges`; see: "
                          f"paretoray keys space.{ELITE}")
    plugin = {"name": asked.base} if isinstance(asked.base, str) else dict(asked.base)
    name = plugin.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"base of search space {ELITE} is {asked.base!r}; give a name, or {{name: NAME, option: "
                          "value}")
    base = make_space(name, classes=classes, channels=channels, options=plugin)
    return EliteSpace(base, tokens_of_ranges(base, asked.ranges or {}))
