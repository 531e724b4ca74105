"""Which stored block suits a block, and when a search may use the pool: the fairness rules of FNAS 4.3.

A block's key is its stage, then its tokens. Similarity is the cosine of the concatenated one-hots, which is the share
of equal tokens; from s_min = (q - 1) / q on (at most one of q tokens differs) it is a hit. Blocks without choices
(stem, head) match their own kind.
"""
from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from actors.knowledge.entry import BlockId, Entry
from actors.objectpath import AnyPath
from actors.wholefile import write_whole
from searchspaces.graph import Block

log = logging.getLogger(__name__)
REMEMBERED = 1000       # architectures whose batch is known; more are not under way
Entries = Mapping[BlockId, Entry]


def block_id(block: Block) -> BlockId:
    return block.stage, "" if block.key else block.name, block.key


def similarity(a: Sequence[int], b: Sequence[int]) -> float:
    """Cosine of two keys as concatenated one-hots; 1 for keyless blocks."""
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(a) if a else 1.0


def best_match(block: Block, entries: Entries) -> Entry | None:
    """The entry of the same stage with most equal tokens, None if more than one differs.

    Among equally similar ones the lineage nearest to the pool's median, so that blocks and networks have had equal
    training; then the most recent.
    """
    if not block.key:
        return entries.get(block_id(block))
    candidates = [e for e in entries.values() if e.stage == block.stage and len(e.key) == len(block.key)]
    if not candidates:
        return None
    equal = (np.array([entry.key for entry in candidates]) == np.array(block.key)).sum(axis=1)
    if equal.max() < len(block.key) - 1:
        return None
    median = float(np.median([entry.lineage for entry in entries.values()]))
    tied = [candidates[index] for index in np.flatnonzero(equal == equal.max())]
    return min(tied, key=lambda entry: (abs(entry.lineage - median), -entry.written_ns))


@dataclass(frozen=True)
class GateSettings:
    """The pool is switched on once `least_hits` of the last `window` queries of searched blocks were hits."""

    window: int = 200
    least_hits: float = 0.99


USUAL_GATE = GateSettings()


class Gate:
    """Is the pool switched on for this search, and for which of its batches? Kept in a small file if one is given.

    Batches are numbered upwards. A batch is warm if the pool was on when it was first announced, and all later ones
    are: so one number says it all, and asking again, after a restart or while an older batch has trainings that have
    not begun, gives the same answer.
    """

    def __init__(self, path: AnyPath | None, settings: GateSettings = USUAL_GATE) -> None:
        self._path, self._settings = path, settings
        self.recent: deque[bool] = deque(maxlen=settings.window)
        self.on = False
        self._begun, self._warm_from = -1, None  # type: int, int | None
        self._batch_of: dict[str, int] = {}      # by arch_id
        if path is not None and path.exists():
            try:
                state = json.loads(path.read_bytes())
                self.recent.extend(bool(hit) for hit in state["recent"])
                self.on, self._begun, self._warm_from = bool(state["on"]), int(state["begun"]), state["warm_from"]
                self._batch_of = {str(arch_id): int(batch) for arch_id, batch in state["batch_of"].items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                log.warning("%s is damaged (%s); the hits of recent queries are counted anew", path, error)

    def begin(self, batch: int, arch_ids: Sequence[str]) -> bool:
        """These architectures belong to `batch`: all of them start warm, or none. Which?"""
        if batch > self._begun:
            self._begun = batch
            if self.on and self._warm_from is None:
                self._warm_from = batch
        self._batch_of |= dict.fromkeys(arch_ids, batch)
        for arch_id in list(self._batch_of)[:-REMEMBERED]:
            del self._batch_of[arch_id]
        self.save()
        return self._is_warm(batch)

    def decision(self, arch_id: str) -> tuple[bool, int | None]:
        """(does it start warm, its batch); without a batch it does as soon as the pool is on."""
        batch = self._batch_of.get(arch_id)
        return (self.on if batch is None else self._is_warm(batch)), batch

    def _is_warm(self, batch: int) -> bool:
        return self._warm_from is not None and batch >= self._warm_from

    @property
    def hit_ratio(self) -> float:
        """0 before the first query."""
        return sum(self.recent) / max(1, len(self.recent))

    def record(self, hits: Sequence[bool]) -> None:
        self.recent.extend(hits)
        full = len(self.recent) == self._settings.window
        self.on = self.on or (full and self.hit_ratio >= self._settings.least_hits)
        self.save()

    def save(self) -> None:
        if self._path is not None:
            state = {"recent": [int(hit) for hit in self.recent], "on": self.on, "begun": self._begun,
                     "warm_from": self._warm_from, "batch_of": self._batch_of}
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(self._path, json.dumps(state).encode())
            except OSError as error:
                log.warning("%s cannot be written (%s)", self._path, error.strerror or error)
