"""Searching the space before the networks (section `narrow`): the configuration of either search.

The search for spaces is a run like any other, with a controller that finds spaces, in the folder `narrow` of the run.
It ends before anything is delivered.
"""
from __future__ import annotations

from actors.objectpath import AnyPath, address_of
from orchestrator.config import Config, Plugin
from orchestrator.controllers.catalogue import check_controller_options, controller_class
from orchestrator.data.accuracy import SupernetAccuracy
from searchspaces.catalogue import ELITE
from searchspaces.errors import ConfigError


def check_narrowing(config: Config) -> None:
    """ConfigError where section `narrow` cannot find a space."""
    assert config.narrow is not None, "this run does not search its space"
    name, options = config.narrow.controller.name, config.narrow.controller.options
    check_controller_options(name, options)
    if not controller_class(name).finds_spaces:
        raise ConfigError(f"narrow.controller '{name}' finds no spaces; choose nss")


def narrowing(config: Config) -> Config:
    """Of the search for spaces: the same data, space, targets and budgets."""
    narrow = config.narrow
    assert narrow is not None, "this run does not search its space"
    return config.model_copy(update={
        "name": None, "narrow": None, "warm_start": [], "controller": narrow.controller,
        "accuracy": SupernetAccuracy(),
        "supernet": config.supernet.model_copy(update={"epochs": narrow.epochs}),
        "search": config.search.model_copy(update={"evaluations": narrow.evaluations})})


def narrowed(config: Config, found: AnyPath) -> Config:
    """Of the search for networks: inside what the run in folder `found` has found."""
    assert config.narrow is not None, "this run does not search its space"
    aim = {} if config.narrow.aim is None else {"aim": config.narrow.aim}
    return config.model_copy(update={"narrow": None, "space": Plugin(
        name=ELITE, run=address_of(found.resolve()), **aim)})
