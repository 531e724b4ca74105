"""The shipped search spaces by name, and how options of a configuration become a space.

A name with a colon is a user's own class, `module:Class`. Options are the keyword arguments of the constructor; names
and types are checked against its signature, so that a misspelt option is an error and never a different experiment.
"""
from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from searchspaces.darts.space import Darts, DartsS16
from searchspaces.efficientnet_lite.space import EfficientNetLite, EfficientNetLiteS
from searchspaces.elite.space import EliteSpace, tokens_of_ranges
from searchspaces.errors import ConfigError, SpaceError
from searchspaces.expanded.space import Expanded, ExpandedS16
from searchspaces.graph import Graph
from searchspaces.mnas.space import Mnas, MnasS16, MnasS32
from searchspaces.mobilenetv3.space import MobileNetV3, MobileNetV3S16, MobileNetV3S32
from searchspaces.nasbench201.space import NasBench201
from searchspaces.plugins import check_options, load_object, user_code, where
from searchspaces.proxylessnas.space import ProxylessNas, ProxylessNasS16, ProxylessNasS32
from searchspaces.space import Choice, SearchSpace

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


# --- does a user's own space work at all? ---------------------------------------------------------------------------


def probe_space(name: str, space: SearchSpace) -> None:
    """SpaceError, in one sentence with the user's file and line, where a user's own space cannot describe its extremes.

    A few graphs, in milliseconds, before anything is started; `paretoray check` asks far more (conformance.py).
    """
    what, kind = f"search space {name}", type(space)
    with user_code(what, kind, SpaceError):
        _check_identity(what, kind, space)
        _check_choices(what, kind, space)
        rows = space.check_tokens(space.extremes())
        for row in rows:
            graph = space.graph(row)
            _check_graph(what, kind, space, graph)
        if not isinstance(space.arch_id(rows[0]), str) or not isinstance(space.text(rows[0]), str):
            raise SpaceError(f"{what}: arch_id() and text() must return a text{_of(kind, 'text')}")


def _check_identity(what: str, kind: type, space: SearchSpace) -> None:
    for name in ("classes", "channels"):
        if not isinstance(getattr(space, name, None), int):
            raise SpaceError(f"{what} has no '{name}'; its __init__ must call super().__init__(classes, channels)"
                             f"{_of(kind, '__init__')}")
    if not isinstance(space.space_id, str) or not space.space_id:
        raise SpaceError(f"{what}: space_id is {space.space_id!r}; it must be a text that names the space and its "
                         f"options{_of(kind, 'space_id')}")


def _check_choices(what: str, kind: type, space: SearchSpace) -> None:
    choices, place = space.choices, _of(kind, "choices")
    if not isinstance(choices, tuple) or not choices or not all(isinstance(c, Choice) for c in choices):
        raise SpaceError(f"{what}: choices is {_told(choices)}; it must be a tuple of one or more Choice{place}")
    for choice in choices:
        if not isinstance(choice.values, tuple) or not 1 <= len(choice.values) <= 127:
            raise SpaceError(f"{what}: the values of choice '{choice.name}' are {_told(choice.values)}; they must be a "
                             f"tuple of 1 to 127 values{place}")


def _check_graph(what: str, kind: type, space: SearchSpace, graph: Any) -> None:
    place = _of(kind, "graph")
    if not isinstance(graph, Graph):
        raise SpaceError(f"{what}: graph() returned {_told(graph)}; it must return a Graph, which builder.build() "
                         f"makes{place}")
    if graph.input_shape[0] != space.channels:
        raise SpaceError(f"{what}: graph() starts from {graph.input_shape[0]} channels, the data has {space.channels}; "
                         f"write GraphBuilder(self.channels, resolution){place}")
    if graph.nodes[-1].shape != (space.classes,):
        raise SpaceError(f"{what}: graph() ends with node '{graph.nodes[-1].name}' of shape {graph.nodes[-1].shape}; "
                         f"it must end with a linear layer of {space.classes} classes, self.classes{place}")


def _of(kind: type, name: str) -> str:
    """The place of a method or property of the class."""
    found = getattr(kind, name, None)
    return where(getattr(found, "fget", None) or getattr(found, "func", None) or found)


def _told(value: Any) -> str:
    text = "an array" if isinstance(value, np.ndarray) else repr(value)
    return f"{text[:60]}{'...' if len(text) > 60 else ''} ({type(value).__name__})"
