"""Finds the best neural network under any latency budget, measured on your hardware.

    from paretoray import Search, load_config, open_run

    config = load_config("configs/quickstart.yaml", ["search.evaluations=100"])
    models = Search(config, name="mine").run()      # a list of Delivered: budget, latency, accuracy, ONNX file
    run = open_run("mine")                          # also while it runs, from another notebook
    run.models(), run.trials()                      # pandas tables
    run.figure()                                    # the Pareto front, as a plotly figure

To bring something of your own, subclass SearchSpace, LatencyTarget or Controller, or return Splits from a function;
name it `module:Class` in the configuration and try it with `paretoray check module:Class`. Everything a user can mend
is a ParetorayError of one sentence. `paretoray keys` prints every key of a configuration.
"""
from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING

import orchestrator  # noqa: F401  (sets what torch reads when it is loaded)

if TYPE_CHECKING:
    from actors.data import Images, Splits
    from actors.targets.target import Health, LatencySample, LatencyTarget, TargetIdentity, Workload
    from orchestrator.config import Config, load_config
    from orchestrator.controllers.controller import Controller, NoSettings, Proposal, Task
    from orchestrator.handover.delivered import Delivered
    from orchestrator.openedrun import OpenedRun, open_run
    from orchestrator.run.search import Search
    from searchspaces.errors import ParetorayError
    from searchspaces.graph import INPUT, Graph, GraphBuilder
    from searchspaces.network import GraphNetwork
    from searchspaces.space import Choice, SearchSpace, Tokens
    from searchspaces.supernet import Supernet

    __version__: str

__all__ = [
    "Choice", "Config", "Controller", "Delivered", "Graph", "GraphBuilder", "GraphNetwork", "Health", "INPUT", "Images",
    "LatencySample", "LatencyTarget", "NoSettings", "OpenedRun", "ParetorayError", "Proposal", "Search", "SearchSpace",
    "Splits", "Supernet", "TargetIdentity", "Task", "Tokens", "Workload", "load_config", "open_run",
]
# Loaded when first asked for: Ray and torch take seconds.
HOMES = {
    "actors.data": ("Images", "Splits"),
    "actors.targets.target": ("Health", "LatencySample", "LatencyTarget", "TargetIdentity", "Workload"),
    "orchestrator.config": ("Config", "load_config"),
    "orchestrator.controllers.controller": ("Controller", "NoSettings", "Proposal", "Task"),
    "orchestrator.handover.delivered": ("Delivered",),
    "orchestrator.openedrun": ("OpenedRun", "open_run"),
    "orchestrator.run.search": ("Search",),
    "searchspaces.errors": ("ParetorayError",),
    "searchspaces.graph": ("INPUT", "Graph", "GraphBuilder"),
    "searchspaces.network": ("GraphNetwork",),
    "searchspaces.space": ("Choice", "SearchSpace", "Tokens"),
    "searchspaces.supernet": ("Supernet",),
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        return importlib.metadata.version("paretoray")
    for module, names in HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'paretoray' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, "__doc__", "__name__", "__version__", "__file__", "__all__"])
