"""The user's own modules that a configuration names: they travel to the nodes of a cluster with our packages."""
from __future__ import annotations

import importlib.util
import os
import site
import sys
import sysconfig
from pathlib import Path

from orchestrator.cluster.joining import PACKAGES
from orchestrator.config import Config


def own_modules(config: Config) -> list[str]:
    """Files and package folders behind every `module:Class`, absolute. Installed packages are left out: a cluster has
    them, or `ray job submit` and the cluster's image bring them. A single file travels without its neighbours."""
    names = [config.space.name, config.controller.name, config.data.name, *(target.name for target in config.targets)]
    modules = {name.partition(":")[0].partition(".")[0] for name in names if ":" in name} - {*PACKAGES, "paretoray"}
    return sorted(str(place) for module in modules for place in _places(module) if not _installed(place))


def _places(module: str) -> list[Path]:
    """Its file, or its folder; several for a package without __init__.py. None for a module that is not found: that is
    an error elsewhere."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as load_object does
    spec = importlib.util.find_spec(module)
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return [Path(folder).resolve() for folder in spec.submodule_search_locations]
    return [Path(spec.origin).resolve()] if spec.origin and spec.origin.endswith(".py") else []


def _installed(place: Path) -> bool:
    folders = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return any(place.is_relative_to(Path(folder).resolve()) for folder in {*folders, site.getusersitepackages()})
