"""`module:Class` references and their options: how a user's own space, target, dataset or controller gets in.

Options of a configuration are keyword arguments of a constructor. Names and types are checked against its signature, so
that a misspelt option is an error and never a different experiment.
"""
from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import linecache
import os
import sys
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from math import inf
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from searchspaces.errors import ConfigError, ParetorayError

# Top modules that are not a user's.
OURS = ("searchspaces", "actors", "orchestrator", "paretoray")
LINE = 80               # characters shown of the user's line
MOST = 2**31 - 1        # of an int in the options of a plug-in, which may bound it further


def load_object(reference: str) -> Any:
    """The object named by "module:attribute"; modules of the working directory are found too."""
    module_name, separator, attribute = reference.partition(":")
    if not separator or not module_name or not attribute:
        raise ConfigError(f"'{reference}' is not of the form module:Class; write for example my_space:MySpace")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module = _imported(module_name, reference)
    if not hasattr(module, attribute):
        raise ConfigError(f"module '{module_name}' has no '{attribute}'; check the spelling in '{reference}'")
    return getattr(module, attribute)


def _imported(module_name: str, reference: str) -> types.ModuleType:
    what = f"cannot import module '{module_name}' of '{reference}': it"
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"cannot import module '{module_name}' of '{reference}' ({error}); run paretoray from the "
                          "folder that contains it or install it") from error
    except SyntaxError as error:
        raise ConfigError(f"{what} is not valid Python ({error.msg}, at {error.filename}, line {error.lineno})") \
            from error
    except Exception as error:  # whatever its first lines do
        frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)[1:]]
        file = next((file for file in frames if not file.startswith("<") and "importlib" not in file), "")
        with user_code(what, file):
            raise


def check_options(subject: str, constructor: type, options: Mapping[str, Any], hidden: Sequence[str] = ()) -> None:
    """ConfigError where an option is unknown, mistyped or missing. `hidden` parameters are given by the caller."""
    allowed = option_types(constructor, hidden)
    for option, value in options.items():
        if option not in allowed:
            close = difflib.get_close_matches(option, allowed, n=1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            raise ConfigError(f"{subject} has no option '{option}'; {hint}allowed: {_describe(allowed)}")
        if not _matches(value, allowed[option]):
            raise ConfigError(f"option '{option}' of {subject} is {value!r}; it must be {type_name(allowed[option])}"
                              + (f", at most {MOST}" if _huge(value) else ""))
    missing = [name for name, parameter in inspect.signature(constructor).parameters.items()
               if name in allowed and name not in options and parameter.default is parameter.empty]
    if missing:
        raise ConfigError(f"{subject} needs the option '{missing[0]}' ({type_name(allowed[missing[0]])}); add it to "
                          "its options")


def option_types(constructor: type, hidden: Sequence[str]) -> dict[str, Any]:
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
        return any(value == argument and type(value) is type(argument) for argument in arguments)
    if hint is None or hint is type(None):
        return value is None
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if origin is not None and issubclass(origin, Sequence):
        return isinstance(value, list | tuple) and all(_matches(item, arguments[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < inf
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MOST
    return isinstance(value, hint) if inspect.isclass(hint) else True


def _huge(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) > MOST


def type_name(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join(repr(argument) for argument in arguments)
    if origin is not None and inspect.isclass(origin) and issubclass(origin, Sequence):
        return f"a list of {type_name(arguments[0])}"
    if origin is not None and inspect.isclass(origin) and issubclass(origin, Mapping):
        return "a section"
    names = {int: "int", float: "float", str: "text", bool: "true or false", type(None): "none"}
    return names.get(hint, str(hint))


def _describe(allowed: Mapping[str, Any]) -> str:
    return ", ".join(f"{option} ({type_name(hint)})" for option, hint in allowed.items()) or "none"


@contextlib.contextmanager
def user_code(what: str, owner: Any, kind: type[ParetorayError] = ConfigError) -> Iterator[None]:
    """Mistakes in a user's own code, told in one sentence with the file and line that the user wrote.

    What our own code refuses inside (a ParetorayError) gets the place added; anything else that is raised becomes
    `kind`. `owner`: the user's class or function, or a file, which says what is the user's.
    """
    try:
        yield
    except ParetorayError as error:
        place = _place(error, owner)
        if place is None or " (at " in str(error):
            raise
        raise type(error)(f"{what}: {error}{place}") from error
    except Exception as error:  # a user's code may raise anything
        reason = " ".join(str(error).split())
        raise kind(f"{what} raised {type(error).__name__}{': ' if reason else ''}{reason}"
                   f"{_place(error, owner) or where(owner)}") from error


def where(owner: Any) -> str:
    """The place of a class or function itself, " (at FILE, line N)"; "" where it has no file."""
    try:
        return f" (at {_short(inspect.getsourcefile(owner) or '')}, line {inspect.getsourcelines(owner)[1]})"
    except (OSError, TypeError):
        return ""


def _place(error: BaseException, owner: Any) -> str | None:
    """The last line of the traceback that lies in one of the user's files."""
    files = _files(owner)
    lines = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename in files]
    if not lines:
        return None
    file, number = lines[-1]
    text = linecache.getline(file, number).strip()
    return f" (at {_short(file)}, line {number}: {text if len(text) <= LINE else text[:LINE - 3] + '...'})"


def _files(owner: Any) -> set[str]:
    """Where a class and those of its bases that are not ours are written, or a function, or a module's file by name."""
    if isinstance(owner, str):
        return {owner}
    kinds = owner.__mro__ if isinstance(owner, type) else (owner,)
    found = set()
    for kind in kinds:
        if getattr(kind, "__module__", "builtins").partition(".")[0] not in (*OURS, "abc", "builtins", "typing"):
            with contextlib.suppress(OSError, TypeError):
                found.add(inspect.getfile(kind))
    return found


def _short(file: str) -> str:
    """Relative to the working directory where it lies under it."""
    relative = os.path.relpath(file)
    return file if relative.startswith("..") else relative
