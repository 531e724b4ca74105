"""What the observed trials tell: triplets, known latencies, and the models of accuracy and latency fitted to them.

Shape legend: M observed trials that succeeded, N architectures asked about, T positions.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.controllers.controller import LatencyModel, Observation
from orchestrator.prediction.chance import chance_under, typical_error
from orchestrator.prediction.earlier import InformedPosterior, fit_posterior, posterior_from_state
from orchestrator.prediction.posterior import Believed, Posterior, PosteriorSettings
from orchestrator.prediction.predictor import LEAST_NETWORKS, LatencyPredictor, predictor_of_trials
from searchspaces.space import SearchSpace, Tokens

if TYPE_CHECKING:
    from orchestrator.controllers.pnag.earlier import Earlier


@dataclass(frozen=True)
class Knowledge:
    """Fitted on the successful trials: `borrowed` ones of earlier runs on this task, then this run's as in the log."""

    space: SearchSpace
    tokens_MT: Tokens
    accuracy_M: NDArray[np.float64]
    latency_M: NDArray[np.float64]
    posterior: Posterior | InformedPosterior
    latency: LatencyModel
    latency_error: float        # median of |log(true / predicted)|
    row_of: dict[bytes, int]
    borrowed: int = 0
    earlier_ms: Mapping[bytes, float] = field(default_factory=dict)     # of networks that earlier runs looked up

    @classmethod
    def fit(cls, space: SearchSpace, trials: Sequence[Observation], settings: PosteriorSettings,
            latency: LatencyModel | None, seed: int, earlier: Earlier | None = None) -> Knowledge | None:
        """None where too few trials succeeded to learn anything."""
        borrowed = _good(earlier.trials if earlier else ())
        good = borrowed + _good(trials)
        if len(good) < LEAST_NETWORKS:
            return None
        tokens_MT = space.canonical(np.stack([trial.tokens for trial in good]))
        accuracy_M = np.array([trial.accuracy for trial in good])
        latency_M = np.array([trial.latency_ms for trial in good])
        posterior = fit_posterior(space.features(tokens_MT), accuracy_M, earlier.signals if earlier else None, settings,
                                  seed)
        known_ms = earlier.known_ms if earlier and latency is None else {}
        model = latency or predictor_of_trials(space, *_with(tokens_MT, latency_M, known_ms))
        return cls(space, tokens_MT, accuracy_M, latency_M, posterior, model,
                   typical_error(model, tokens_MT, latency_M), _rows(tokens_MT), len(borrowed), known_ms)

    def believe(self, tokens_NT: Tokens) -> Believed:
        return self.posterior.believe(self.space.features(tokens_NT))

    def accuracy(self, tokens_NT: Tokens) -> NDArray[np.float64]:
        """float64[N]: posterior mean."""
        return self.believe(tokens_NT).mean_N

    def latency_ms(self, tokens_NT: Tokens) -> NDArray[np.float64]:
        """float64[N]: what the trial says where there is one, here or in an earlier run, else the prediction."""
        latency_N = np.asarray(self.latency.predict(tokens_NT), dtype=np.float64).copy()
        if self.earlier_ms:
            latency_N = np.array([self.earlier_ms.get(row.tobytes(), ms) for row, ms in zip(tokens_NT, latency_N)])
        row_N = self.rows(tokens_NT)
        latency_N[row_N >= 0] = self.latency_M[row_N[row_N >= 0]]
        return latency_N

    def looked_up(self, tokens_NT: Tokens) -> NDArray[np.bool_]:
        """bool[N]: has an earlier run its latency?"""
        return np.array([row.tobytes() in self.earlier_ms for row in tokens_NT], dtype=bool)

    def chance(self, latency_N: NDArray[np.float64], budget_ms: float) -> NDArray[np.float64]:
        """float64[N]: P(latency <= budget) of predicted latencies."""
        return chance_under(latency_N, budget_ms, self.latency_error)

    def rows(self, tokens_NT: Tokens) -> NDArray[np.int64]:
        """int64[N]: index of the successful trial of each canonical architecture, -1 where there is none."""
        return np.array([self.row_of.get(row.tobytes(), -1) for row in tokens_NT], dtype=np.int64)

    def metrics(self) -> dict[str, float]:
        """How far the trials bear out what earlier runs say, 0 to 1."""
        if not isinstance(self.posterior, InformedPosterior):
            return {}
        return {"agreement_with_earlier": self.posterior.agreement}

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"tokens": self.tokens_MT, "accuracy": self.accuracy_M, "latency_ms": self.latency_M,
                                 "borrowed": self.borrowed}
        if self.earlier_ms:
            keys = np.array([np.frombuffer(key, dtype=np.int8) for key in self.earlier_ms])
            state |= {"earlier_tokens": keys, "earlier_ms": np.array(list(self.earlier_ms.values()))}
        state |= {f"posterior.{name}": value for name, value in self.posterior.state_dict().items()}
        if isinstance(self.latency, LatencyPredictor):
            state |= {f"predictor.{name}": value for name, value in self.latency.state_dict().items()}
        return state

    @classmethod
    def from_state(cls, space: SearchSpace, state: dict[str, Any], latency: LatencyModel | None) -> Knowledge:
        def part(prefix: str) -> dict[str, Any]:
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        tokens_MT = np.asarray(state["tokens"], dtype=np.int8)
        model = latency or LatencyPredictor.from_state(space, part("predictor."))
        latency_M = np.asarray(state["latency_ms"])
        return cls(space, tokens_MT, np.asarray(state["accuracy"]), latency_M,
                   posterior_from_state(part("posterior.")), model, typical_error(model, tokens_MT, latency_M),
                   _rows(tokens_MT), int(state.get("borrowed", 0)),
                   {np.asarray(row, dtype=np.int8).tobytes(): float(ms) for row, ms in zip(
                       state.get("earlier_tokens", ()), state.get("earlier_ms", ()))})


def _good(trials: Sequence[Observation]) -> list[Observation]:
    return [trial for trial in trials if np.isfinite(trial.accuracy) and np.isfinite(trial.latency_ms)]


def _with(tokens_MT: Tokens, latency_M: NDArray[np.float64],
          known_ms: Mapping[bytes, float]) -> tuple[Tokens, NDArray[np.float64]]:
    """Trials, then what else is known."""
    if not known_ms:
        return tokens_MT, latency_M
    others_NT = np.array([np.frombuffer(key, dtype=np.int8) for key in known_ms])
    return np.concatenate([tokens_MT, others_NT]), np.concatenate([latency_M, list(known_ms.values())])


def _rows(tokens_MT: Tokens) -> dict[bytes, int]:
    return {row.tobytes(): index for index, row in enumerate(tokens_MT)}
