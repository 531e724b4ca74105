"""How fair the knowledge pool was to the trainings of one batch: one line in events.jsonl when all of them are back.

    {"kind": "batch", "batch": 7, "trained": 5, "warm": 1.0, "lineage_min": 80, "lineage_max": 320}

`warm` is the share that started warm (0 or 1), the lineages are iterations along the chains of warm starts, over all
blocks of all its networks.
"""
from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence

from orchestrator.controllers.controller import Proposal
from orchestrator.record.events import read_lines
from orchestrator.record.store import RunStore, Trial


class BatchLog:
    """Knows what the run has recorded and logged already, so that after a restart nothing is logged twice."""

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._logged = set(_logged(store))
        self._open: dict[int, list[Mapping[str, float]]] = {}
        self._newest = -1
        self._take(store.trials.read(["details"]).column("details").to_pylist())

    def add(self, trials: Sequence[Trial], in_flight: Iterable[Proposal]) -> None:
        """New trials, and what is still being trained. Batches are proposed one after the other: one is complete when
        a later one has begun and nothing of it is in flight. Without anything in flight the search is over."""
        self._take([trial.details for trial in trials])
        running = {proposal.batch for proposal in in_flight if proposal.batch is not None}
        self._newest = max([self._newest, *running, *self._open])
        over = not running and not trials
        for batch in sorted(self._open):
            if batch not in running and (batch < self._newest or over):
                self._log(batch, self._open.pop(batch))

    def _take(self, texts: Iterable[str | None]) -> None:
        """Of the trials' details those that name a batch."""
        for details in (json.loads(text) for text in texts if text and '"batch"' in text):
            if "batch" in details and details["batch"] not in self._logged:
                self._open.setdefault(int(details["batch"]), []).append(details)

    def _log(self, batch: int, details: Collection[Mapping[str, float]]) -> None:
        self._logged.add(batch)
        self._store.event("batch", batch=batch, trained=len(details),
                          warm=sum(d["warm"] for d in details) / len(details),
                          lineage_min=min(d["lineage_min"] for d in details),
                          lineage_max=max(d["lineage_max"] for d in details))


def _logged(store: RunStore) -> Iterable[int]:
    for line in read_lines(store.path):
        try:
            event = json.loads(line)
        except ValueError:
            continue  # a line that a crash cut short
        if event.get("kind") == "batch":
            yield int(event["batch"])
