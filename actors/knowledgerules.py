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
from pathlib import Path

import numpy as np

from actors.knowledgeentry import BlockId, Entry
from actors.wholefile import write_whole
from searchspaces.graph import Block

log = logging.getLogger(__name__)
WINDOW = 200            # queries of searched blocks
LEAST_HIT_RATIO = 0.99
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


class Gate:
    """Is the pool switched on for this search? The hits of the last queries, kept in a small file if one is given."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.recent: deque[bool] = deque(maxlen=WINDOW)
        self.on = False
        self.batch: bool | None = None      # the decision for the current batch, if somebody draws that line
        if path is not None and path.exists():
            try:
                state = json.loads(path.read_bytes())
                self.recent.extend(bool(hit) for hit in state["recent"])
                self.on, self.batch = bool(state["on"]), state["batch"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.warning("%s is damaged (%s); the hits of recent queries are counted anew", path, error)

    @property
    def hit_ratio(self) -> float:
        """0 before the first query."""
        return sum(self.recent) / max(1, len(self.recent))

    def record(self, hits: Sequence[bool]) -> None:
        self.recent.extend(hits)
        self.on = self.on or (len(self.recent) == WINDOW and self.hit_ratio >= LEAST_HIT_RATIO)
        self.save()

    def save(self) -> None:
        if self._path is not None:
            state = {"recent": [int(hit) for hit in self.recent], "on": self.on, "batch": self.batch}
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(self._path, json.dumps(state).encode())
            except OSError as error:
                log.warning("%s cannot be written (%s)", self._path, error.strerror or error)
