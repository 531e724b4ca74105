"""A trainer's side of the knowledge pool (FNAS section 4.3): ask for a start, give back what was learnt.

The pool makes trainings shorter, it is not needed for them. A pool that does not answer in time, or has died, costs a
warning and a cold start, never the training.
"""
from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from actors.knowledge.pool import KnowledgePool, Start
from actors.remote import fetch
from searchspaces.errors import ParetorayError
from searchspaces.network import GraphNetwork
from searchspaces.space import Tokens
from searchspaces.trained.adaptation import inherit

log = logging.getLogger(__name__)
ANSWER_TIME_OUT_S = 30.0


class KnowledgeLink:
    """`pool` may be the handle of the actor around it (actors/knowledge/pool.py)."""

    def __init__(self, pool: KnowledgePool | ActorHandle, time_out_s: float = ANSWER_TIME_OUT_S) -> None:
        self._pool, self._time_out_s = pool, time_out_s

    def warm_start(self, tokens_T: Tokens, network: GraphNetwork) -> dict[str, Any]:
        """Initialises a fresh `network` from the pool if that is switched on; the numbers of this start. `lineage`:
        training iterations behind the initial weights of each block, 0 for fresh ones."""
        try:
            start: Start = self._call("start", tokens_T)
        except (RayError, ParetorayError, OSError) as error:
            log.warning("the knowledge pool gives no answer (%s); training starts cold", _first_line(error))
            return {"active": False, "hits": 0, "queries": 0, "lineage": [0] * len(network.graph.blocks)}
        inherit(network, start.sources)
        numbers = {"active": start.active, "hits": start.hits, "queries": start.queries, "lineage": list(start.lineage)}
        return numbers if start.batch is None else numbers | {"batch": start.batch}

    def insert(self, tokens_T: Tokens, weights: Mapping[str, NDArray[np.generic]], iterations: int,
               lineage: Sequence[int]) -> None:
        """A trained network's blocks for those who come later. `lineage` as `warm_start` returned it."""
        try:
            self._call("insert", tokens_T, weights, iterations, [before + iterations for before in lineage])
        except (RayError, ParetorayError, OSError) as error:
            log.warning("the knowledge pool did not take a trained network (%s)", _first_line(error))

    def _call(self, method: str, *arguments: Any) -> Any:
        bound = getattr(self._pool, method)
        if isinstance(self._pool, ActorHandle):
            return fetch(bound.remote(*arguments), self._time_out_s)
        return bound(*arguments)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
