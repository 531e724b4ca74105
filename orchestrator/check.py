"""`paretoray check module:Class`: which contract a class claims, and whether it keeps it."""
from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from typing import Any

from actors.data import Splits
from actors.targets.catalogue import make_target
from actors.targets.conformance import check_target
from actors.targets.target import LatencyTarget
from orchestrator.config import parse_config
from orchestrator.controllers.conformance import check_controller
from orchestrator.controllers.controller import Controller
from orchestrator.data.datasets import check_dataset, is_dataset, load_dataset
from searchspaces.catalogue import make_space
from searchspaces.conformance import check_space
from searchspaces.errors import ConfigError
from searchspaces.plugins import load_object
from searchspaces.space import SearchSpace

EXAMPLE_SHAPE = (3, 32, 32)


def check_plugin(reference: str, options: Mapping[str, Any]) -> tuple[str, list[str]]:
    """(kind, problems) of "module:Class", or of "module:function" for a dataset; `options` as in its section of a
    configuration. No problems: certified."""
    loaded = load_object(reference)
    if inspect.isclass(loaded) and issubclass(loaded, SearchSpace):
        return "search space", check_space(make_space(reference, classes=10, channels=3, options=options))
    if inspect.isclass(loaded) and issubclass(loaded, LatencyTarget):
        return "latency target", check_target(make_target(reference, options, EXAMPLE_SHAPE))
    if inspect.isclass(loaded) and issubclass(loaded, Controller):
        return "controller", check_controller(reference, options)
    if is_dataset(loaded):
        settings = parse_config({"data": {"name": reference, **options}}, "--set").data
        return "dataset", check_dataset(load_dataset(settings))
    kinds = ", ".join(kind.__name__ for kind in typing.cast(list[type], [SearchSpace, LatencyTarget, Controller]))
    raise ConfigError(f"'{reference}' is none of {kinds}, nor a dataset, which is a function, or a class with "
                      f"__call__, that returns {Splits.__name__}; derive your class from one of them")
