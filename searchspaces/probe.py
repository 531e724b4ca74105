"""Does a user's own space work at all? A few graphs, in milliseconds, before anything is started.

`paretoray check` asks far more (conformance.py); this is what every use of an own space goes through first.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from searchspaces.errors import SpaceError
from searchspaces.graph import Graph
from searchspaces.plugins import user_code, where
from searchspaces.space import Choice, SearchSpace


def probe_space(name: str, space: SearchSpace) -> None:
    """SpaceError, in one sentence with the user's file and line, where the space cannot describe its extremes."""
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
