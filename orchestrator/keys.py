"""`paretoray keys [SECTION]`: every key of a configuration, told by the classes that check it."""
from __future__ import annotations

import difflib
import inspect
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.table import Table

from actors.targets.catalogue import GIVEN, INTERNAL, TARGETS, target_class
from orchestrator.config import Config, Plugin
from orchestrator.controllers.catalogue import CONTROLLERS, controller_class
from searchspaces.catalogue import ELITE, FROM_DATA, SPACES, EliteOptions, space_class
from searchspaces.errors import ConfigError
from searchspaces.plugins import option_types, type_name

SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
PLUGINS = ("space", "targets", "controller")


@dataclass(frozen=True)
class Key:
    """One line: the key with its sections, what it takes, what it is without being set, its bounds and its meaning."""

    name: str
    kind: str
    default: str
    bounds: str
    meaning: str


def keys_of(section: str | None = None) -> list[Key]:
    """Of the whole configuration, of a section ("supernet", "accuracy.training", "controller.pnag.generator"), or of
    one key. ConfigError names the closest for an unknown one."""
    if section is None:
        return list(_walk("", Config))
    head, _, rest = section.partition(".")
    head = {"target": "targets"}.get(head, head)
    if head in PLUGINS and rest:
        return _of_plugin(head, section, rest)
    found = [key for key in _walk("", Config) if _within(key.name, f"{head}.{rest}" if rest else head)]
    if head in PLUGINS:
        names = {"space": [*SPACES, ELITE], "targets": list(TARGETS), "controller": list(CONTROLLERS)}[head]
        found = [replace(key, meaning=f"{key.meaning}; options of one: paretoray keys {section}.NAME, where NAME is "
                                      f"{', '.join(sorted(names))} or your module:Class") for key in found]
    return found or _unknown(section, _sections())


def keys_table(keys: list[Key]) -> Table:
    table = Table("key", "type", "default", "bounds", "meaning")
    for column in table.columns[:1]:
        column.overflow = "fold"
    for key in keys:
        table.add_row(*(text.replace("[", r"\[") for text in
                        (key.name, key.kind, key.default, key.bounds, key.meaning)))
    return table


def _within(name: str, section: str) -> bool:
    return name == section or name.startswith(f"{section}.")


def _sections() -> list[str]:
    names = [key.name for key in _walk("", Config)]
    parents = {name.rpartition(".")[0] for name in names} - {""}
    shipped = [f"{kind}.{name}" for kind, known in
               (("space", [*SPACES, ELITE]), ("target", TARGETS), ("controller", CONTROLLERS)) for name in known]
    return sorted({*Config.model_fields, *names, *parents, *shipped})


def _unknown(section: str, known: list[str]) -> list[Key]:
    close = difflib.get_close_matches(section, known, n=1, cutoff=0.3)
    raise ConfigError(f"there is no section or key '{section}'; "
                      + (f"did you mean '{close[0]}'?" if close else f"choose one of {', '.join(Config.model_fields)}"))


# --- pydantic models --------------------------------------------------------------------------------------------------


def _walk(prefix: str, model: type[BaseModel]) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        yield from _of_field(f"{prefix}{name}", field)


def _of_field(name: str, field: FieldInfo) -> Iterator[Key]:
    models = _models(field.annotation)
    sources = [model for model in models if "source" in model.model_fields]
    for model in sources:       # the accuracy: its keys depend on its source
        yield from _walk(f"{name}.{model.model_fields['source'].default}.", model)
    inner = [model for model in models if model not in sources and not issubclass(model, Plugin)]
    if inner and get_origin(field.annotation) is not dict and not sources:
        for model in inner:
            yield from _walk(f"{name}.", model)
    elif not sources:
        yield Key(name, _kind(field.annotation), _default(field), _bounds(field), field.description or "")


def _models(annotation: Any) -> list[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _default(field: FieldInfo) -> str:
    value = field.default
    if value is PydanticUndefined:
        return "(needed)"
    values = value if isinstance(value, list) else [value]
    if values and all(isinstance(item, Plugin) for item in values):
        return ", ".join(item.name for item in values)
    return _text(value)


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value) if value != "" else "''"


def _bounds(field: FieldInfo) -> str:
    """Its own, or those of the number among its types."""
    constraints = list(field.metadata)
    for argument in get_args(field.annotation):
        for constraint in getattr(argument, "__metadata__", ()):
            constraints += getattr(constraint, "metadata", [constraint])
    found = [f"{sign} {_text(getattr(constraint, name))}" for constraint in constraints for name, sign in SIGNS.items()
             if getattr(constraint, name, None) is not None]
    lengths = [f"{word} {getattr(constraint, name)} items" for constraint in constraints
               for name, word in (("min_length", "at least"), ("max_length", "at most"))
               if getattr(constraint, name, None) is not None and get_origin(field.annotation) is list]
    return ", ".join(found + lengths)


def _kind(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_kind(argument) for argument in arguments))
    if origin in (list, tuple):
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return f"section of {_kind(arguments[1])} by {_kind(arguments[0])}"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "name, or section with name" if issubclass(annotation, Plugin) else "section"
    if annotation is Path:
        return "path"
    return " or ".join(map(str, arguments)) if origin is Literal else type_name(annotation)


# --- plug-ins ---------------------------------------------------------------------------------------------------------


def _of_plugin(head: str, section: str, rest: str) -> list[Key]:
    """`rest` begins with a name of ours or "module:Class"."""
    name, _, below = rest.partition(".") if ":" not in rest else (rest, "", "")
    if head == "controller":
        if ":" not in name and name not in CONTROLLERS:
            return _unknown(section, _sections())
        keys = list(_walk("controller.", controller_class(name).settings_model()))
        found = [key for key in keys if not below or _within(key.name, f"controller.{below}")]
        return found if found or not below else _unknown(section, [
            f"controller.{name}.{key.name.removeprefix('controller.')}" for key in keys])
    if head == "space" and name == ELITE:
        return list(_of_signature("space", EliteOptions, ()))
    if ":" not in name and name not in (SPACES if head == "space" else TARGETS):
        return _unknown(section, _sections())
    if head == "space":
        return list(_of_signature("space", space_class(name), FROM_DATA))
    return list(_of_signature("target", target_class(name), (*GIVEN, *INTERNAL)))


def _of_signature(prefix: str, kind: type, hidden: tuple[str, ...]) -> Iterator[Key]:
    """Options of a constructor. Their meaning is what the docstrings of the class and its bases say of them."""
    told = [base.__doc__ for base in kind.__mro__ if base.__doc__ and base.__module__ not in ("builtins", "abc")]
    meaning = " ".join(" ".join(told).split())
    parameters = inspect.signature(kind).parameters
    for name, hint in option_types(kind, hidden).items():
        default = parameters[name].default
        said = dict.fromkeys(text for text in re.split(r"(?<=[.;])\s", meaning) if f"`{name}`" in text)
        yield Key(f"{prefix}.{name}", type_name(hint), "(needed)" if default is inspect.Parameter.empty
                  else _text(default), "", " ".join(said))
