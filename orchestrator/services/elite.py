"""Spaces that a search for spaces found, on their way to other runs: `elite.json`, and the weights trained with them.

A run with `space: {name: elite, run: RUN}` takes over both when it begins, and needs RUN no more: its configuration
says the ranges in full, and the weights are copied.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from actors.objectpath import AnyPath, address_of, as_path
from actors.supernet.actor import NAME, load_weights
from actors.supernet.checkpoints import read_newest, write_checkpoint
from orchestrator.config import Config, Plugin, load_config
from orchestrator.record.files import read_json, write_json
from orchestrator.record.store import RunStore, find_run
from orchestrator.services.context import RunContext
from orchestrator.services.panel import Panel
from orchestrator.services.pretrained import absolute_start, started
from orchestrator.services.recipes import supernet_settings
from orchestrator.services.states import intact_state, save_state
from searchspaces.catalogue import ELITE, make_space
from searchspaces.elite.found import FoundSpace
from searchspaces.elite.space import ranges_of_tokens, restricted
from searchspaces.elite.supernet import EliteSupernet
from searchspaces.errors import ConfigError, StoreError
from searchspaces.supernet import Supernet
from searchspaces.training.spaces import SpaceOfSpaces
from searchspaces.training.training import Schedule
from searchspaces.training.weights import fitting

FILE, FORMAT = "elite.json", 1
FAR = 0.1       # of the aim; [S3] calls what is nearer a hit
INHERITED = "inherited"     # the checkpoint of weights that another run trained


# --- what a run found -------------------------------------------------------------------------------------------------


def save_spaces(run: RunContext, panel: Panel) -> None:
    """Writes what the controllers found, and says it; does nothing for controllers that search for networks."""
    found = [(goal.label, space) for goal, controller in zip(panel.goals, panel.controllers)
             for space in controller.spaces_found()]
    if not found:
        return
    groups = SpaceOfSpaces(run.space).groups
    write_json(run.store.path / FILE, {
        "format": FORMAT, "space": run.config.space.model_dump(mode="json"), "space_id": run.space.space_id,
        "classes": run.space.classes, "channels": run.space.channels,
        "groups": [{"name": group.name, "labels": list(group.labels)} for group in groups],
        "spaces": [{"goal": label, **space.as_json()} for label, space in found]})
    for _, space in found:
        run.progress.note(space.text(groups) + advice(space))
    if len(found) > 1:
        kept = restricted(run.space, groups, [set(bins) for bins in zip(*(space.bins for _, space in found))])
        share = math.prod(len(tokens) / size for tokens, size in zip(kept, run.space.vocabulary_sizes))
        run.progress.note(f"all {len(found)} together leave {100 * share:.2g} % of the space's rows of tokens; one of "
                          "them alone is chosen by aim, counted from 0")


def advice(space: FoundSpace) -> str:
    """What to change where the Elite Space is far from what it aimed at."""
    if abs(space.kept.mean / space.aim - 1) <= FAR:
        return ""
    return (f"; more than {FAR:.0%} off its aim: raise the draws of the controller, now {len(space.draws)}, or the "
            "epochs, for the distribution to settle")


def read_spaces(folder: AnyPath) -> dict[str, Any]:
    """What `save_spaces` wrote. StoreError where there is none, or that of another version."""
    if not (folder / FILE).exists():
        raise StoreError(f"run '{folder.name}' has found no spaces yet; name a run with controller nss that has "
                         f"trained its supernet, or go on with it: paretoray resume {folder.name}")
    found = read_json(folder / FILE)
    if found.get("format") != FORMAT:
        raise StoreError(f"{folder / FILE} is of format {found.get('format')!r}, this version reads {FORMAT}; search "
                         "the spaces again with this version")
    return dict(found)


# --- what another run takes over --------------------------------------------------------------------------------------


def with_ranges(config: Config, runs: AnyPath) -> Config:
    """The configuration with the ranges of the run that `space.run` names, in full; as it is where it has them or names
    none."""
    options = config.space.options
    if config.space.name != ELITE or options.get("run") is None or "base" in options:
        return config
    folder = find_run(runs, str(options["run"]))
    found = read_spaces(folder)
    base = load_config(folder / "config.yaml").space
    space = make_space(base.name, classes=found["classes"], channels=found["channels"], options=base.options)
    if space.space_id != found["space_id"]:
        raise StoreError(f"run '{folder.name}' searched {found['space_id']}, which this version builds as "
                         f"{space.space_id}; search the spaces again with this version")
    ranges = ranges_of_tokens(space, _tokens(space, found["spaces"], options.get("aim"), folder.name))
    resolved = {"run": address_of(folder.resolve()), "base": base.model_dump(mode="json"), "ranges": ranges}
    return config.model_copy(update={"space": Plugin(name=ELITE, **resolved)})


def _tokens(space: Any, found: Sequence[dict[str, Any]], aim: int | None, name: str) -> list[tuple[int, ...]]:
    """Tokens left to each position: by one of the spaces, or by all of them together."""
    if aim is not None and not 0 <= aim < len(found):
        raise ConfigError(f"space.aim is {aim}; run '{name}' found {len(found)} spaces, so it must lie in "
                          f"0..{len(found) - 1}")
    chosen = [FoundSpace.from_json({key: value for key, value in one.items() if key != "goal"})
              for i, one in enumerate(found) if aim in (None, i)]
    return restricted(space, SpaceOfSpaces(space).groups, [set(bins) for bins in zip(*(one.bins for one in chosen))])


def check_inheritance(config: Config, classes: int, channels: int) -> None:
    """ConfigError where the weights of `space.run` are of another dataset's shape, or see pixels scaled otherwise."""
    folder = inherited_from(config)
    if folder is None or not (folder / FILE).exists():
        return
    found = read_spaces(folder)
    if (found["classes"], found["channels"]) != (classes, channels):
        raise ConfigError(f"run '{folder.name}' trained for {found['classes']} classes and {found['channels']} "
                          f"channels, the dataset has {classes} and {channels}; use the same dataset, or leave out "
                          "space.run and give base and ranges, as the config.yaml of a run that used it has them")
    start = load_config(folder / "config.yaml").supernet.start
    if absolute_start(start) != absolute_start(config.supernet.start):
        raise ConfigError(f"run '{folder.name}' has supernet.start {start!r}, this one {config.supernet.start!r}; give "
                          "both the same, because it says how pixels are scaled")


def inherited_from(config: Config) -> AnyPath | None:
    run = config.space.options.get("run") if config.space.name == ELITE else None
    return None if run is None else as_path(str(run))


def freeze_weights(store: RunStore, config: Config) -> None:
    """Copies the weights of `space.run` into this run's folder, once."""
    folder = inherited_from(config)
    if folder is not None and config.accuracy.source == "supernet" and intact_state(store, INHERITED) is None:
        save_state(store, INHERITED, dict(load_weights(folder / "checkpoints")[1]))


def begin_with_given(run: RunContext) -> None:
    """Makes weights that are given the supernet's first checkpoint, of epoch 0: those inherited, else those of
    `supernet.start`. Does nothing where there is a checkpoint, or none are given."""
    folder, start = run.store.path / "checkpoints", run.config.supernet.start
    inherits = inherited_from(run.config) is not None
    if (start is None and not inherits) or read_newest(folder, NAME) is not None:
        return
    supernet = _inheriting(run) if inherits or start is None else started(start, run.config.seed, run.space)
    if supernet is None:
        return
    method = supernet_settings(run.config, *run.services.trained_for()).training
    training = method.start(supernet, Schedule(run.config.supernet.epochs, 1, run.config.seed))
    write_checkpoint(folder, NAME, 0, training.state_dict(), {
        "space_id": run.space.space_id, "epoch": 0, "version": 0, "step": 0, "progress": {}})


def _inheriting(run: RunContext) -> Supernet | None:
    weights = intact_state(run.store, INHERITED)
    if weights is None:
        run.progress.note("the inherited weights are missing or damaged: the supernet starts afresh")
        return None
    supernet = run.space.make_supernet()
    assert isinstance(supernet, EliteSupernet)
    with fitting(supernet):
        supernet.base.load_state_dict({name: torch.as_tensor(value) for name, value in weights.items()})
    return supernet
