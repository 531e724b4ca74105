"""The architecture knowledge pool: new networks start from trained blocks (FNAS 4.3; specification fnas.md section 5).

    pool = KnowledgePool("~/knowledge", space, epochs=4, gate_file=run / "knowledge.json")
    warm = pool.begin_batch(7, rows_NT)             # the same answer for every network of the batch, whenever asked
    start = pool.start(tokens_T)                    # the best stored block for each block of the network
    inherit(network, start.sources)                 # searchspaces/trained/adaptation.py; then train for `epochs`
    pool.insert(tokens_T, weights, iterations, [before + iterations for before in start.lineage])

The best block is of the same stage and has most equal tokens; it is a hit if at most one differs (rules.py).
The files are in entry.py and store.py.

Fairness. All entries of a pool were trained for the same number of epochs: another number is another pool, beside it in
the same folder. A search starts cold until 99 % of its last 200 queries were hits (GateSettings); with the next batch
the pool is switched on, for good. Among equally similar entries the one whose lineage (iterations along its chain of
warm starts) is nearest to the pool's median is taken, so that networks of a batch have had equal training, and among
those the most recent.

The pool outlives the run: the next search, and the next task with the same space, start from it (`epochs` equal; image
channels and classes may differ). What belongs to one search is the window of recent queries, in `gate_file`.
"""
from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.knowledge.entry import NewEntry
from actors.knowledge.rules import USUAL_GATE, Entries, Gate, GateSettings, best_match, block_id, similarity
from actors.knowledge.store import KnowledgeStore
from actors.objectpath import AnyPath, absolute, as_path
from actors.wholefile import write_whole
from searchspaces.errors import ClusterError, StoreError
from searchspaces.graph import Block, Graph, tensor_shapes
from searchspaces.space import SearchSpace, Tokens
from searchspaces.trained.blockweights import SourceBlock, sort_channels, split_blocks

log = logging.getLogger(__name__)
MAXIMUM_MB = 2000.0
START_TIME_OUT_S = 60.0
READ_ATTEMPTS = 10


@dataclass(frozen=True, eq=False)
class Start:
    """Where a network starts: one source per block of its graph; all None while the pool is not `active`.

    `hits` of `queries` searched blocks have a close enough match, counted whether or not the pool is active. `batch` is
    the one that `begin_batch` named for this architecture.
    """

    active: bool
    hits: int
    queries: int
    sources: tuple[SourceBlock | None, ...]
    batch: int | None = None

    @property
    def lineage(self) -> tuple[int, ...]:
        """Iterations behind the initial weights of each block, 0 for fresh ones."""
        return tuple(source.lineage if source is not None else 0 for source in self.sources)


class KnowledgePool:
    """See the module docstring. One thread at a time; any number of processes may open the same folder.

    A plain class: `KnowledgeService` makes it an actor for trainers that do not share a disk. Everything that survives
    its process is in the folder and the gate file. All methods may be called again after a lost answer.
    """

    def __init__(self, folder: str | AnyPath, space: SearchSpace, epochs: int, maximum_mb: float = MAXIMUM_MB,
                 gate_file: str | AnyPath | None = None, gate: GateSettings = USUAL_GATE) -> None:
        """StoreError if `folder` cannot be used or belongs to another space."""
        folder = absolute(folder)
        self._space, self._epochs = space, epochs
        try:
            _claim(folder, space)
            self._folder, self._maximum_bytes = folder / f"epochs-{epochs}", maximum_mb * 1e6
            self._store = KnowledgeStore(self._folder, self._maximum_bytes)
            self._make_room()
        except OSError as error:
            raise StoreError(f"the knowledge pool {folder} cannot be opened ({error.strerror or error}); correct its "
                             "permissions or name another folder") from error
        self._gate = Gate(None if gate_file is None else as_path(gate_file), gate)
        self._skipped = 0

    # --- the gate ----------------------------------------------------------------------------------------------------

    def ready(self) -> bool:
        """Have enough recent queries been hits? Once True, True for the rest of the search."""
        return self._gate.on

    def begin_batch(self, batch: int, tokens_NT: Tokens) -> bool:
        """These architectures (or these more of them) are batch number `batch`: whether they start warm is decided
        when the number is first heard, for good, so that no batch mixes warm and cold starts. An architecture that
        belongs to no batch goes warm as soon as the pool is ready."""
        return self._gate.begin(batch, [self._space.arch_id(row) for row in tokens_NT])

    # --- queries -----------------------------------------------------------------------------------------------------

    def start(self, tokens_T: Tokens, active: bool | None = None) -> Start:
        """The best stored block for each block of an architecture. `active` overrides the gate's decision."""
        decided, batch = self._gate.decision(self._space.arch_id(tokens_T))
        active = decided if active is None else active
        blocks, entries = self._space.graph(tokens_T).blocks, self._store.entries()
        sources = tuple(self._source(block, entries) if active else None for block in blocks)
        hits = [source is not None if active else best_match(block, entries) is not None
                for block, source in zip(blocks, sources, strict=True) if block.key]
        self._gate.record(hits)
        return Start(active, sum(hits), len(hits), sources, batch)

    def _source(self, block: Block, entries: Entries) -> SourceBlock | None:
        for _ in range(READ_ATTEMPTS):
            entry = best_match(block, entries)
            if entry is None:
                return None
            weights = self._store.read(entry)
            if weights is not None:
                return SourceBlock(entry.stage, entry.key, similarity(block.key, entry.key), entry.lineage, weights)
            entries = self._store.entries()     # the file was replaced, evicted or damaged
        return None

    # --- entries -----------------------------------------------------------------------------------------------------

    def insert(self, tokens_T: Tokens, weights: Mapping[str, NDArray[np.generic]], iterations: int,
               lineage_per_block: Sequence[int]) -> bool:
        """Stores all blocks of a network that was trained for `iterations` (the pool's number of epochs). The lineages
        include them. False, with a warning, if the disk is full or the weights are not finite.

        StoreError if the weights are not those of this architecture.
        """
        graph = self._space.graph(tokens_T)
        _check_weights(graph, weights, self._space.text(tokens_T))
        if not all(np.isfinite(array).all() for array in weights.values()):
            log.warning("the weights of %s are not finite; they are not stored", self._space.text(tokens_T))
            return False
        blocks = split_blocks(graph, sort_channels(graph, weights))
        new = [NewEntry(block_id(block), tensors, lineage, iterations)
               for block, tensors, lineage in zip(graph.blocks, blocks, lineage_per_block, strict=True)]
        stored = self._store.write(new)
        self._skipped += not stored
        self._make_room()
        return stored

    def _make_room(self) -> None:
        """The size limit is that of the whole folder: the oldest networks go, of whichever number of epochs."""
        others = [path for path in self._folder.parent.glob("epochs-*") if path != self._folder]
        if not others or _bytes(self._folder, *others) <= self._maximum_bytes:
            return
        stores = [self._store, *(KnowledgeStore(path, self._maximum_bytes) for path in others)]
        rows = sorted((entry for store in stores for entry in store.entries().values()),
                      key=lambda entry: entry.written_ns, reverse=True)
        fitting = int((np.cumsum([entry.size_bytes for entry in rows]) <= self._maximum_bytes).sum())
        if fitting < len(rows):
            oldest_ns = min(rows[fitting].written_ns + 1, rows[0].written_ns)   # the newest network always stays
            for store in stores:
                store.compact(oldest_ns)

    def statistics(self) -> dict[str, float]:
        """Entries and megabytes on disk, the gate, the lineages of all entries (iterations), and what was lost:
        `damaged` entries, `skipped` networks that the disk did not take."""
        entries = self._store.entries().values()
        lineages = [entry.lineage for entry in entries] or [0]
        return {
            "entries": len(entries), "megabytes": sum(entry.size_bytes for entry in entries) / 1e6,
            "hit_ratio": self._gate.hit_ratio, "queries": len(self._gate.recent), "active": float(self._gate.on),
            "lineage_smallest": min(lineages), "lineage_median": float(np.median(lineages)),
            "lineage_largest": max(lineages), "damaged": self._store.lost, "skipped": self._skipped,
        }

    def pid(self) -> int:
        return os.getpid()

    def __repr__(self) -> str:
        return f"KnowledgePool({self._space.space_id}, {self._epochs} epochs)"


def _bytes(*folders: AnyPath) -> int:
    sizes = 0
    for path in (path for folder in folders for path in (folder / "entries").glob("*.safetensors")):
        with contextlib.suppress(FileNotFoundError):    # replaced meanwhile
            sizes += path.stat().st_size
    return sizes


def _check_weights(graph: Graph, weights: Mapping[str, NDArray[np.generic]], text: str) -> None:
    shapes = {node.name: node.shape for node in graph.nodes}
    expected = {f"{node.name}.{suffix}": shape for node in graph.nodes[1:]
                for suffix, shape in tensor_shapes(node, shapes[node.inputs[0]]).items()}
    for name in sorted(expected.keys() | weights.keys()):
        got = np.shape(weights[name]) if name in weights else None
        if got != expected.get(name):
            raise StoreError(f"tensor {name} has shape {got}, architecture {text} has {expected.get(name)} there; "
                             "insert the state dict of its own network")


def _claim(folder: AnyPath, space: SearchSpace) -> None:
    about = folder / "pool.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not about.exists():
        write_whole(about, json.dumps({"space": _family(space)}).encode())
    check_folder(folder, space)


def _family(space: SearchSpace) -> str:
    return re.sub(r",?\b(channels|classes)=\d+", "", space.space_id)


def check_folder(folder: AnyPath, space: SearchSpace) -> None:
    """One folder, one space; what the dataset decides (channels, classes) may differ. StoreError if the pool in
    `folder` is of another one; a folder without a pool is free for any. Changes nothing."""
    family, about = _family(space), folder / "pool.json"
    if not about.exists():
        return
    try:
        theirs = json.loads(about.read_bytes())["space"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{about} is damaged ({error}); remove the folder or name another one") from error
    if theirs != family:
        raise StoreError(f"the knowledge pool {folder} holds blocks of {theirs}, not of {family}; name another folder "
                         "for this search space")


class KnowledgeService:
    """Driver side: the pool as an actor on this node, where its folder is. `actor` is the handle for trainers.

    Killed, it comes back with what is in the folder and the gate file; calls in flight are repeated.
    """

    def __init__(self, folder: str | AnyPath, space: SearchSpace, epochs: int, maximum_mb: float = MAXIMUM_MB,
                 gate_file: str | AnyPath | None = None, name: str = "knowledge",
                 gate: GateSettings = USUAL_GATE) -> None:
        """StoreError as the pool, ClusterError if the actor does not start."""
        folder = absolute(folder)
        KnowledgePool(folder, space, epochs, maximum_mb)    # a refusal is raised here, in one sentence
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options: Any = ray.remote(KnowledgePool).options(
            name=f"{name}.{uuid.uuid4().hex[:6]}", num_cpus=0, max_restarts=-1, max_task_retries=-1,
            scheduling_strategy=here)
        file = None if gate_file is None else absolute(gate_file)
        self.actor = options.remote(folder, space, epochs, maximum_mb, file, gate)
        try:
            ray.get(self.actor.statistics.remote(), timeout=START_TIME_OUT_S)
        except RayError as error:
            ray.kill(self.actor)
            raise ClusterError(f"the knowledge pool did not start within {START_TIME_OUT_S:g} s "
                               f"({type(error).__name__}); look at this node's load and memory") from error

    def close(self) -> None:
        """Ends the actor; the pool stays on the disk."""
        ray.kill(self.actor)
