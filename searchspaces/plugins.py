"""`module:Class` references and their options: how a user's own space, target, dataset or controller gets in.

Options of a configuration are keyword arguments of a constructor. Names and types are checked against its signature, so
that a misspelt option is an error and never a different experiment.
"""
from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from searchspaces.errors import ConfigError


def load_object(reference: str) -> Any:
    """The object named by "module:attribute"; modules of the working directory are found too."""
    module_name, separator, attribute = reference.partition(":")
    if not separator or not module_name or not attribute:
        raise ConfigError(f"'{reference}' is not of the form module:Class; write for example my_space:MySpace")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"cannot import module '{module_name}' of '{reference}' ({error}); run paretoray from the "
                          "folder that contains it or install it") from error
    if not hasattr(module, attribute):
        raise ConfigError(f"module '{module_name}' has no '{attribute}'; check the spelling in '{reference}'")
    return getattr(module, attribute)


def check_options(subject: str, constructor: type, options: Mapping[str, Any], hidden: Sequence[str] = ()) -> None:
    """ConfigError where an option is unknown, mistyped or missing. `hidden` parameters are given by the caller."""
    allowed = _option_types(constructor, hidden)
    for option, value in options.items():
        if option not in allowed:
            close = difflib.get_close_matches(option, allowed, n=1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            raise ConfigError(f"{subject} has no option '{option}'; {hint}allowed: {_describe(allowed)}")
        if not _matches(value, allowed[option]):
            raise ConfigError(f"option '{option}' of {subject} is {value!r}; it must be {_type_name(allowed[option])}")
    missing = [name for name, parameter in inspect.signature(constructor).parameters.items()
               if name in allowed and name not in options and parameter.default is parameter.empty]
    if missing:
        raise ConfigError(f"{subject} needs the option '{missing[0]}' ({_type_name(allowed[missing[0]])}); add it to "
                          "its options")


def _option_types(constructor: type, hidden: Sequence[str]) -> dict[str, Any]:
    hints = get_type_hints(constructor.__init__)  # type: ignore[misc]
    parameters = inspect.signature(constructor).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {option: hints.get(option, Any) for option in named if option not in hidden}


def _matches(value: Any, hint: Any) -> bool:
    """Is a value from YAML of the annotated type? An int is a float, a list is a sequence, a bool is no number."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_matches(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if hint is None or hint is type(None):
        return value is None
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if origin is not None and issubclass(origin, Sequence):
        return isinstance(value, list | tuple) and all(_matches(item, arguments[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if inspect.isclass(hint) else True


def _type_name(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join(repr(argument) for argument in arguments)
    if origin is not None and inspect.isclass(origin) and issubclass(origin, Sequence):
        return f"a list of {_type_name(arguments[0])}"
    names = {int: "int", float: "float", str: "text", bool: "true or false", type(None): "none"}
    return names.get(hint, str(hint))


def _describe(allowed: Mapping[str, Any]) -> str:
    return ", ".join(f"{option} ({_type_name(hint)})" for option, hint in allowed.items()) or "none"
