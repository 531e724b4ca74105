"""What a hand-over could have chosen for a budget, and what is believed of it."""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.handover.beliefs import belief_of_models, belief_of_search
from orchestrator.handover.certainty import Belief, Certainty
from orchestrator.handover.delivered import Candidate, Final
from orchestrator.handover.paired import unpacked
from searchspaces.space import SearchSpace, Tokens

CONTENDERS = 300        # the most promising of a table's candidates are weighed, whatever the search evaluated


class Considered:
    """`models`: by arch_id the sidecar and the latency (ms) of every complete model. `candidates`: from which they were
    made, or might yet have been. `images`: of the validation split."""

    def __init__(self, models: Mapping[str, tuple[Mapping[str, Any], float]], candidates: Sequence[Candidate],
                 images: int) -> None:
        self._latency_ms = {c.arch_id: c.latency_ms for c in candidates}
        self._latency_ms |= {arch_id: latency_ms for arch_id, (_, latency_ms) in models.items()}
        self._searched = {c.arch_id: c.searched for c in candidates}
        self._final = {c.arch_id: c.final for c in candidates if c.final is not None}
        for arch_id, (sidecar, _) in models.items():
            self._searched[arch_id] = sidecar.get("accuracy_in_search", self._searched.get(arch_id))
            self._final[arch_id] = Final(sidecar["accuracy"]["validation"], sidecar.get("validation_hits", ""))
        self._images = images
        self._belief = self._believed() if self._final else None

    def certainty(self, chosen: str, budget_ms: float) -> Certainty:
        """Of a model as the choice for a budget; all that fit the budget are considered."""
        assert self._belief is not None     # the chosen one is a model
        fitting = {arch_id for arch_id, latency_ms in self._latency_ms.items() if latency_ms <= budget_ms}
        return self._belief.certainty(chosen, fitting, self._final)

    def _believed(self) -> Belief:
        arch_ids = sorted(self._latency_ms)     # the same whatever order they came in
        finals = [self._final.get(arch_id) for arch_id in arch_ids]
        return belief_of_models(arch_ids, _numbers(self._searched.get(a) for a in arch_ids),
                                _numbers(None if final is None else final.accuracy for final in finals),
                                [unpacked(final.hits, self._images) if final and final.hits else None
                                 for final in finals], self._images)


def searched_belief(space: SearchSpace, ranked: Sequence[Sequence[Candidate]], tokens_MT: Tokens,
                    accuracy_M: NDArray[np.float64]) -> Belief:
    """Of what was only searched. `ranked`: candidates per budget, the most promising first."""
    contenders = _contenders(ranked)
    names = {c.tokens.tobytes() for c in contenders}
    further = [m for m, row in enumerate(space.canonical(tokens_MT)) if row.tobytes() not in names]
    features = space.features(np.concatenate([np.stack([c.tokens for c in contenders]), tokens_MT[further]]))
    return belief_of_search([c.arch_id for c in contenders], features[:len(contenders)],
                            np.array([c.accuracy for c in contenders]), features[len(contenders):], accuracy_M[further])


def _contenders(ranked: Sequence[Sequence[Candidate]]) -> list[Candidate]:
    """The first of every budget, then the second of every budget and so on."""
    found: dict[str, Candidate] = {}
    for candidate in _by_rank(ranked):
        if len(found) >= max(CONTENDERS, len(ranked)):
            break
        found.setdefault(candidate.arch_id, candidate)
    return list(found.values())


def _by_rank(ranked: Sequence[Sequence[Candidate]]) -> Iterator[Candidate]:
    for rank in zip_longest(*ranked):
        yield from (candidate for candidate in rank if candidate is not None)


def _numbers(values: Iterable[float | None]) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
