"""Controllers by name, and how options of a configuration become one. `module:Class` names a user's own.

A shipped controller is imported when it is named: its libraries (torch, scikit-learn, pymoo, RLlib) take seconds.
"""
from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from orchestrator.controllers.controller import Controller, Task
from orchestrator.settings import NO_NUMBER, misplaced_bool
from searchspaces.errors import ConfigError
from searchspaces.plugins import load_object, user_code, where
from searchspaces.space import SearchSpace

CONTROLLERS = {
    "evolution": "orchestrator.controllers.baselines.evolution:RegularisedEvolution",
    "fnas": "orchestrator.controllers.fnas.controller:Fnas",
    "nss": "orchestrator.controllers.nss.controller:Nss",
    "nsga2": "orchestrator.controllers.baselines.nsga2:Nsga2",
    "pnag": "orchestrator.controllers.pnag.controller:Pnag",
    "unas": "orchestrator.controllers.unas.controller:Unas",
    "random": "orchestrator.controllers.baselines.random:RandomSearch",
}


def controller_class(name: str) -> type[Controller]:
    if name not in CONTROLLERS and ":" not in name:
        close = difflib.get_close_matches(name, CONTROLLERS, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise ConfigError(f"there is no controller '{name}'; {hint}choose one of {', '.join(sorted(CONTROLLERS))}, or "
                          "your own as module:Class")
    loaded = load_object(CONTROLLERS.get(name, name))
    if not (inspect.isclass(loaded) and issubclass(loaded, Controller)):
        raise ConfigError(f"'{name}' is not a controller; derive the class from "
                          "orchestrator.controllers.controller.Controller")
    return loaded


def check_controller_options(name: str, options: Mapping[str, Any]) -> BaseModel:
    """The checked settings; ConfigError names the option, the value and what is allowed."""
    kind = controller_class(name)
    with user_code(f"controller {name}", kind):
        model = kind.settings_model()
    abstract = sorted(getattr(kind, "__abstractmethods__", ()))
    if abstract:
        raise ConfigError(f"controller {name} lacks {', '.join(abstract)}; write what Controller says of each"
                          f"{where(kind)}")
    for option, value in options.items():
        field = model.model_fields.get(option)
        if field is not None and misplaced_bool(value, field.annotation):
            raise ConfigError(f"option '{option}' of controller {name} is {value!r}: {NO_NUMBER}")
    try:
        return model.model_validate(dict(options))
    except ValidationError as error:
        raise ConfigError("; ".join(_sentence(name, model, detail) for detail in error.errors())) from error


def make_controller(name: str, space: SearchSpace, task: Task, options: Mapping[str, Any]) -> Controller:
    kind, settings = controller_class(name), check_controller_options(name, options)
    if name in CONTROLLERS:
        return kind(space, settings, task)
    with user_code(f"controller {name}", kind):
        return kind(space, settings, task)


def _sentence(name: str, model: type[BaseModel], detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] != "extra_forbidden":
        return f"option '{where}' of controller {name} is {detail['input']!r}: {detail['msg']}"
    section: Any = model
    for part in detail["loc"][:-1]:
        section = section.model_fields[part].annotation
    known = list(section.model_fields)
    close = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"allowed: {', '.join(known) or 'none'}"
    return f"controller {name} has no option '{where}'; {hint}"
