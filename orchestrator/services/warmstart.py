"""What earlier runs know, for a new one: their trials, and their latencies where the device is the same.

Everything is copied into the new run's folder before its first stage, so that a resumed run sees what the first process
saw, whatever happens to the earlier runs meanwhile:

    runs/NAME/earlier/RUN/  trials.parquet  latency.parquet  about.json (written last)
    runs/NAME/knowledge/    the trained blocks of its own knowledge pool, where the new run has one too

Compatible are runs whose token positions and vocabularies are equal: then their accuracies say something about this
space, also at another resolution or for another dataset. Latencies are taken only of the same device and the very same
networks (equal target_id and space_id).
"""
from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from actors.data import Splits
from actors.knowledge.entry import write_whole
from actors.knowledge.pool import KnowledgePool, check_folder
from actors.latency.result import LatencyResult
from actors.objectpath import AnyPath, as_path, matching, parquet_source
from orchestrator.config import Config, load_config
from orchestrator.controllers.controller import EarlierRun, LatencyModel
from orchestrator.data.accuracy import SupernetAccuracy, TableAccuracy, TrainingAccuracy
from orchestrator.prediction.predictor import LEAST_NETWORKS, LatencyPredictor
from orchestrator.record.files import read_json, write_atomically, write_json
from orchestrator.record.goals import Goal, target_state
from orchestrator.record.partfolder import read_parts
from orchestrator.record.records import latency_result
from orchestrator.record.store import LATENCY_SCHEMA, TRIAL_SCHEMA, RunStore, find_run
from searchspaces.catalogue import make_space
from searchspaces.errors import ConfigError, StoreError
from searchspaces.space import SearchSpace

FOLDER = "earlier"


@dataclass(frozen=True)
class Source:
    """A run to start from, found and compatible. `about` is what the copy remembers of it."""

    path: AnyPath
    about: dict[str, Any]


def check_earlier(config: Config, runs: AnyPath, space: SearchSpace, splits: Splits) -> list[Source]:
    """The runs of `warm_start`. StoreError for one that is not there, ConfigError naming both spaces where one is of
    another space."""
    sources: list[Source] = []
    for name in config.warm_start:
        path = find_run(runs, name)
        if path.name in {source.path.name for source in sources}:
            raise ConfigError(f"warm_start names two runs called '{path.name}'; give each run once")
        earlier = load_config(path / "config.yaml")
        state = read_json(path / "state.json") if (path / "state.json").exists() else {}
        # Classes and channels change neither positions nor vocabularies: those of this run do.
        theirs = make_space(earlier.space.name, classes=len(state.get("classes", splits.classes)),
                            channels=state.get("channels", splits.channels), options=earlier.space.options)
        if _tokens(theirs) != _tokens(space):
            raise ConfigError(f"run '{path.name}' cannot warm-start this one: its space {theirs.space_id} has other "
                              f"tokens than {space.space_id}; name runs of the same kind of space")
        sources.append(Source(path, {
            "name": path.name, "space_id": theirs.space_id, "same_task": _same_task(earlier, state, config, splits)}))
    return sources


def freeze_earlier(store: RunStore, sources: Sequence[Source], config: Config, space: SearchSpace) -> list[str]:
    """Copies what the earlier runs hold now into the run's folder. May be repeated where it was interrupted. Returns a
    sentence for each run whose trained blocks cannot be used, or how many are."""
    notes: list[str] = []
    for source in sources:
        if isinstance(config.accuracy, TrainingAccuracy) and config.accuracy.knowledge == "own":
            blocks = copy_knowledge(source.path / "knowledge", store.path / "knowledge", space, config.accuracy.epochs)
            notes.append(f"run {source.path.name} gives {blocks} trained blocks to start from" if blocks else
                         f"no trained blocks come from run {source.path.name}: "
                         + without_knowledge(source.path / "knowledge", space, config.accuracy.epochs))
        folder = store.path / FOLDER / source.path.name
        for name, schema in (("trials", TRIAL_SCHEMA), ("latency", LATENCY_SCHEMA)):
            with write_atomically(folder / f"{name}.parquet") as temporary:
                pq.write_table(read_parts(source.path / name, schema), temporary, compression="zstd")
        write_json(folder / "about.json", source.about)
    return notes


def copy_knowledge(source: AnyPath, destination: AnyPath, space: SearchSpace, epochs: int) -> int:
    """Entries of a pool of the same space and number of epochs; the new pool adopts the files when it opens. How many
    were copied."""
    KnowledgePool(destination, space, epochs)  # writes whose blocks it will hold
    about = source / "pool.json"
    if not about.exists() or about.read_bytes() != (destination / "pool.json").read_bytes():
        return 0
    entries = matching(source / f"epochs-{epochs}" / "entries", "*.safetensors")
    for entry in entries:
        with contextlib.suppress(FileNotFoundError):  # replaced meanwhile by a run that is still going on
            write_whole(destination / f"epochs-{epochs}" / "entries" / entry.name, entry.read_bytes())
    return len(entries)


def without_knowledge(source: AnyPath, space: SearchSpace, epochs: int) -> str:
    """Why a pool in this folder gives nothing."""
    try:
        check_folder(source, space)
    except StoreError as error:
        return str(error).split(";")[0]
    trained = sorted({int(path.parts[-3].removeprefix("epochs-")) for path in source.glob("epochs-*/entries/*")})
    if not trained:
        return "it kept none (accuracy.knowledge)"
    return f"its blocks were trained for {' or '.join(map(str, trained))} epochs, accuracy.epochs is {epochs} here"


def is_frozen(store: RunStore, config: Config) -> bool:
    return all((store.path / FOLDER / as_path(name).name / "about.json").exists() for name in config.warm_start)


def earlier_runs(store: RunStore, config: Config, space: SearchSpace, goal: Goal) -> tuple[EarlierRun, ...]:
    """The successful trials of every earlier run, in the order of `warm_start`, then of their logs. Their latencies are
    those of this goal's devices, nan where another device was measured."""
    target_ids = {label: target_state(store, label)["target_id"] for label in goal.targets}
    runs = []
    for about, folder in _copies(store, config):
        rows = [row for row in _rows(folder / "trials.parquet") if row["accuracy"] is not None]
        if not rows:
            continue
        comparable = about["space_id"] == space.space_id
        by_device = [_latency_by_device(row) if comparable else {} for row in rows]
        latency_ms_N = goal.latency_ms({label: np.array([row.get(target_id, np.nan) for row in by_device])
                                        for label, target_id in target_ids.items()})
        runs.append(EarlierRun(
            about["name"], about["same_task"], space.canonical(np.array([row["tokens"] for row in rows], np.int8)),
            np.array([row["accuracy"] for row in rows], dtype=np.float64), latency_ms_N))
    return tuple(runs)


def _latency_by_device(row: dict[str, Any]) -> dict[str, float]:
    """Of one trial, in ms by target_id."""
    known = {row["target_id"]: row["latency_ms"]} if row["latency_ms"] is not None else {}
    return known | {entry["target_id"]: entry["latency_ms"] for entry in row.get("latencies") or ()}


def with_latencies(run: EarlierRun, model: LatencyModel) -> EarlierRun:
    """Latencies of other devices and of other networks with these tokens are replaced by this run's predictions."""
    unknown_N = np.isnan(run.latency_ms_N)
    return replace(run, latency_ms_N=np.where(unknown_N, model.predict(run.tokens_NT), run.latency_ms_N))


def earlier_latencies(store: RunStore, config: Config, space: SearchSpace, target_id: str,
                      reference_ms: float) -> dict[str, list[LatencyResult]]:
    """By run, each network that was measured on this very device, in units of this run's reference."""
    found: dict[str, list[LatencyResult]] = {}
    for about, folder in _copies(store, config):
        rows = _rows(folder / "latency.parquet") if about["space_id"] == space.space_id else []
        results = [latency_result(row) for row in rows if row["latency_ms"] and row["target_id"] == target_id]
        found[about["name"]] = [_rebased(result, reference_ms) for result in results]
    return found


def earlier_devices(store: RunStore, config: Config, space: SearchSpace,
                    known_ids: Sequence[str]) -> dict[str, LatencyPredictor]:
    """Predictors of devices that earlier runs measured on this space, except those with `known_ids`; by run and device.
    """
    found: dict[str, LatencyPredictor] = {}
    for about, folder in _copies(store, config):
        rows = _rows(folder / "latency.parquet") if about["space_id"] == space.space_id else []
        for target_id in sorted({row["target_id"] for row in rows if row["latency_ms"]} - set(known_ids)):
            own = [row for row in rows if row["target_id"] == target_id and row["latency_ms"]]
            if len(own) >= LEAST_NETWORKS:
                found[f"{target_id} of run {about['name']}"] = LatencyPredictor.fit(
                    space, np.array([row["tokens"] for row in own], dtype=np.int8),
                    [row["latency_ms"] for row in own], [row["stderr_ms"] for row in own])
    return found


def _rebased(result: LatencyResult, reference_ms: float) -> LatencyResult:
    """What a visit measures is the ratio to the reference network; the reference's quiet value is the run's unit."""
    sample = result.sample
    assert sample is not None
    return replace(result, sample=replace(sample, latency_ms=sample.ratio * reference_ms, reference_ms=reference_ms))


def _copies(store: RunStore, config: Config) -> list[tuple[dict[str, Any], AnyPath]]:
    folders = [store.path / FOLDER / as_path(name).name for name in config.warm_start]
    return [(read_json(folder / "about.json"), folder) for folder in folders]


def _rows(file: AnyPath) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(parquet_source(file)).to_pylist()
    return rows


def _tokens(space: SearchSpace) -> list[tuple[str, tuple[int | float | str, ...]]]:
    return [(choice.kind, choice.values) for choice in space.choices]


def _same_task(earlier: Config, state: dict[str, Any], config: Config, splits: Splits) -> bool:
    """Accuracies on one scale: the same dataset and classes, and the same way to get an accuracy. Each supernet has a
    scale of its own."""
    if isinstance(config.accuracy, SupernetAccuracy):
        return False
    recorded = (state.get("dataset"), tuple(state.get("classes", ())))
    return recorded == (splits.name, splits.classes) and _recipe(earlier) == _recipe(config)


def _recipe(config: Config) -> tuple[Any, ...]:
    """What decides about an accuracy beside the images; of a table its column, as the images do not matter then."""
    accuracy = config.accuracy
    if isinstance(accuracy, TableAccuracy):
        return accuracy.source, str(accuracy.path), accuracy.accuracy_column
    return accuracy.source, getattr(accuracy, "epochs", None)
