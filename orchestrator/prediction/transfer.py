"""From measured devices to a new one: a table as a model, and which networks to measure first.

Shape legend: N candidates, F features, D known devices.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from orchestrator.controllers.controller import LatencyModel
from orchestrator.prediction.fit import TRIVIAL_SHARE, Array, fit_linear, inputs
from searchspaces.errors import DataError
from searchspaces.space import SearchSpace, Tokens

POOL = 2000         # candidates that are looked at, drawn by the seed
DOUBT = 0.3         # how little is known beforehand of each feature's weight, against one measurement


class LookedUp:
    """A latency table of every network of a space, as a model. For one with some networks fit a LatencyPredictor."""

    def __init__(self, tokens_NT: Tokens, latency_ms_N: ArrayLike) -> None:
        """`tokens_NT` canonical; DataError where a latency is not a positive number of ms."""
        self._tokens_NT = np.asarray(tokens_NT, dtype=np.int8)
        self._latency_N = np.asarray(latency_ms_N, dtype=np.float64)
        if not (np.isfinite(self._latency_N).all() and (self._latency_N > 0).all()):
            raise DataError("latencies of a table must be positive numbers of ms; leave failed ones out")
        self._rows = {row.tobytes(): index for index, row in enumerate(self._tokens_NT)}

    def predict(self, tokens_NT: Tokens) -> Array:
        """DataError for a network that is not in the table."""
        tokens_NT = np.ascontiguousarray(tokens_NT, dtype=np.int8)
        rows = [self._rows.get(row.tobytes(), -1) for row in tokens_NT]
        if -1 in rows:
            raise DataError(f"the latency table has no row for tokens {tokens_NT[rows.index(-1)].tolist()}; fit a "
                            "latency predictor to a table that does not hold every network")
        return self._latency_N[rows]

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self._tokens_NT, "latency_ms": self._latency_N}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> LookedUp:
        return cls(np.asarray(state["tokens"]), np.asarray(state["latency_ms"]))


def choose_to_measure(space: SearchSpace, candidates_NT: Tokens, known: Sequence[LatencyModel], count: int,
                      seed: int = 0) -> NDArray[np.int64]:
    """int64[count]: rows of the candidates to measure on a new device, best first; fewer where there are fewer.

    What features explain of the known devices' latencies (multiply-adds without any) cuts the candidates into `count`
    parts of equal size, from fast to slow, and each part gives the one network of which those chosen before tell least:
    the largest variance phi (sum phi phi' + DOUBT F I)^-1 phi of a linear model of its normalised features. So the
    choice is spread over the latencies and diverse. Parts take turns from afar: the first two are at the ends.
    """
    candidates_NT = np.asarray(candidates_NT, dtype=np.int8)
    rng = np.random.default_rng(seed)
    pool_P = rng.permutation(len(candidates_NT))[:POOL]
    tokens_PT = candidates_NT[pool_P]
    features_PF = inputs(space, tokens_PT, True, ())
    latency_P = _relative_latency(space, tokens_PT, known)
    latency_P = fit_linear(features_PF, latency_P).predict(features_PF)
    phi_PF = features_PF / np.maximum(np.sqrt((features_PF**2).mean(axis=0)), 1e-9)
    parts = np.array_split(np.argsort(latency_P, kind="stable"), min(count, len(pool_P)))
    precision_FF, chosen = DOUBT * phi_PF.shape[1] * np.eye(phi_PF.shape[1]), []
    for part in (parts[index] for index in _from_afar(len(parts))):
        variance = np.einsum("pf,fp->p", phi_PF[part], np.linalg.solve(precision_FF, phi_PF[part].T))
        best = part[int(np.argmax(variance))]
        precision_FF += np.outer(phi_PF[best], phi_PF[best])
        chosen.append(int(pool_P[best]))
    return np.array(chosen, dtype=np.int64)


def _relative_latency(space: SearchSpace, tokens_PT: Tokens, known: Sequence[LatencyModel]) -> Array:
    """Mean over the known devices of latency over median, at least TRIVIAL_SHARE."""
    models = [model.predict(tokens_PT) for model in known] or [space.cost(tokens_PT)[0].astype(np.float64)]
    latency_PD = np.stack(models, axis=1)
    return np.maximum((latency_PD / np.median(latency_PD, axis=0)).mean(axis=1), TRIVIAL_SHARE)


def _from_afar(count: int) -> list[int]:
    """0, count - 1, then always the index furthest from those before."""
    order = [0, count - 1][:count]
    while len(order) < count:
        order.append(max(range(count), key=lambda index: min(abs(index - other) for other in order)))
    return order
