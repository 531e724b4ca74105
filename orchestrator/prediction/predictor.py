"""Latency of architectures that nobody measured, learnt from a few that were (latency.md section 6).

Shape legend: N architectures, M measured ones, F features, D other devices, I inputs (features, then other devices).

    linear:     y(x) = sum_f w_f x_f,  w >= 0,  minimising sum_i ((X w)_i / y_i - 1)^2    (non-negative least squares)
    helped:     y(x) = sum_f w_f x_f [+ sum_d a_d r_d(x)],  w, a >= 0,  minimising
                sum_i (y(x_i) / y_i - 1)^2 + s sum_f (share_f (w_f - sum_d a_d p_fd))^2
    corrected:  y(x) = linear(x) * (1 + g(x)),  g a Gaussian process on the relative residuals

Features are non-negative sums per stage, so a non-negative w never predicts that a larger network is faster, and needs
few measurements. What is not additive (cache sizes, layouts) is left to g. Counts of choices (how many 3x3 kernels)
are further features, for devices that also run what a compiler would remove.

Models k_d of other devices help a new one: p_fd are the linear weights of k_d, r_d = k_d - sum_f p_fd x_f is the rest,
in which what is not additive on the other device and the noise of its table are mixed; it is used or left out. The
strength s says how much of w is theirs: with s -> infinity y is a non-negative combination of the other devices and an
offset, which four networks teach; with less, weights depart from theirs where the measurements say so. share_f is the
typical share of x_f in a latency, 0 for the offset. All of it is used only where cross-validation says that it helps.

Errors are relative because devices' noise is: `heldout_error` is the mean absolute percentage error in cross-validation
(as a share, 0.02 is 2 %), `typical_error` the median of |log(predicted / true)| there, which a few architectures that
nothing explains do not change, and `noise_floor` what a perfect predictor would show on the same noisy measurements:
for normal errors the mean of sqrt(2 / pi) * stderr_i / y_i.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import pi, sqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from threadpoolctl import threadpool_limits  # comes with scikit-learn

from orchestrator.controllers.controller import LatencyModel
from orchestrator.prediction.choice import Measured, choose
from orchestrator.prediction.fit import (
    TRIVIAL_SHARE,
    Array,
    Correction,
    Linear,
    Prior,
    fit_linear,
    inputs,
    reference_networks,
)
from orchestrator.prediction.transfer import LookedUp
from searchspaces.errors import DataError, StoreError
from searchspaces.space import SearchSpace, Tokens

__all__ = ["LEAST_NETWORKS", "LatencyPredictor", "fit_linear", "predictor_of_trials"]
LEAST_NETWORKS = 4
LATENCY_TRIALS = 150      # enough for a stage-feature predictor (latency.md 6); more only cost time


@dataclass(frozen=True)
class LatencyPredictor:
    """Immutable; refit when more is measured. `n` is the number of networks it was fitted on."""

    space: SearchSpace
    linear: Linear
    correction: Correction | None
    n: int
    heldout_error: float
    typical_error: float
    noise_floor: float
    fastest_ms: float       # measured, or expected with help; half of it is the least that is ever predicted
    counts: bool = False    # are counts of choices among the inputs?
    known: tuple[LatencyPredictor | LookedUp, ...] = ()     # other devices whose predictions are inputs

    @classmethod
    def fit(cls, space: SearchSpace, tokens_NT: Tokens, latency_ms_N: ArrayLike, stderr_ms_N: ArrayLike | None = None,
            seed: int = 0, known: Sequence[LatencyModel] = ()) -> LatencyPredictor:
        """`known` are models of other devices, of any number and quality, for every network of the space: predictors,
        or tables (`transfer.LookedUp`); anything else is replaced by a predictor that learns from its predictions, so
        that a state needs nothing but itself.

        DataError with fewer than four networks or with latencies that are not positive numbers.
        """
        latency_N = np.asarray(latency_ms_N, dtype=np.float64)
        if len(latency_N) < LEAST_NETWORKS:
            raise DataError(f"a latency predictor needs at least {LEAST_NETWORKS} measured networks, got "
                            f"{len(latency_N)}; measure more")
        if not (np.isfinite(latency_N).all() and (latency_N > 0).all()):
            raise DataError("latencies to fit a predictor on must be positive numbers of ms; leave failed ones out")
        stderr_N = np.zeros_like(latency_N) if stderr_ms_N is None else np.asarray(stderr_ms_N, dtype=np.float64)
        contained = tuple(_contained(space, model) for model in known)
        with threadpool_limits(1):   # matrices this small are slower on many threads, a hundredfold on a busy machine
            chosen = choose(_measured(space, tokens_NT, latency_N, contained), seed)
        helpers = contained if chosen.recipe.rest else ()
        fastest_ms = float(latency_N.min())
        if chosen.recipe.strength is not None:      # four networks say little about the fastest, the other devices much
            reference_RI = inputs(space, reference_networks(space), chosen.recipe.counts, helpers)
            expected_ms = max(chosen.linear.predict(reference_RI).min(), TRIVIAL_SHARE * np.median(latency_N))
            fastest_ms = min(fastest_ms, float(expected_ms))
        floor, heldout_N = float(np.mean(sqrt(2.0 / pi) * stderr_N / latency_N)), chosen.heldout_M
        typical = float(np.median(np.abs(np.log(np.maximum(heldout_N, 0.5 * fastest_ms) / latency_N))))
        return cls(space, chosen.linear, chosen.correction, len(latency_N),
                   float(np.mean(np.abs(heldout_N / latency_N - 1.0))), typical, floor, fastest_ms,
                   chosen.recipe.counts, helpers)

    def predict(self, tokens_NT: Tokens) -> Array:
        """float64[N] in ms, positive."""
        inputs_NI = inputs(self.space, tokens_NT, self.counts, self.known)
        latency_N = self.linear.predict(inputs_NI)
        if self.correction is not None:
            latency_N = latency_N * (1.0 + self.correction.predict(inputs_NI))
        return np.maximum(latency_N, 0.5 * self.fastest_ms)

    def state_dict(self) -> dict[str, Any]:
        """A flat dictionary of arrays, numbers and strings; the models of other devices are in it, `known0.*` on."""
        state: dict[str, Any] = {
            "space_id": self.space.space_id, "n": self.n, "heldout_error": self.heldout_error,
            "typical_error": self.typical_error, "noise_floor": self.noise_floor, "fastest_ms": self.fastest_ms,
            "weights": self.linear.weights_I, "counts": self.counts, "known": len(self.known)}
        if self.correction is not None:
            c = self.correction
            state |= {"correction_mean": c.mean_I, "correction_scale": c.scale_I, "correction_centres": c.centres_MI,
                      "correction_alpha": c.alpha_M, "correction_length": c.length}
        for index, model in enumerate(self.known):
            state |= {f"known{index}.{name}": value for name, value in model.state_dict().items()}
        return state

    @classmethod
    def from_state(cls, space: SearchSpace, state: Mapping[str, Any]) -> LatencyPredictor:
        """Predicts exactly as the one that wrote `state`. StoreError for a state of another space."""
        if state["space_id"] != space.space_id:
            raise StoreError(f"the stored latency predictor is for {state['space_id']}, not for {space.space_id}; "
                             "measure this space")
        correction = None
        if "correction_alpha" in state:
            mean, scale, centres, alpha = (np.asarray(state[f"correction_{name}"], dtype=np.float64)
                                           for name in ("mean", "scale", "centres", "alpha"))
            correction = Correction(mean, scale, centres, alpha, float(state["correction_length"]))
        known = [_known(space, state, f"known{index}.") for index in range(int(state.get("known", 0)))]
        return cls(space, Linear(np.asarray(state["weights"], dtype=np.float64)), correction, int(state["n"]),
                   float(state["heldout_error"]), float(state.get("typical_error", state["heldout_error"])),
                   float(state["noise_floor"]), float(state["fastest_ms"]), bool(state.get("counts", False)),
                   tuple(known))


def _measured(space: SearchSpace, tokens_NT: Tokens, latency_N: Array, known: Sequence[LatencyModel]) -> Measured:
    """What the choice of a model needs: inputs of the measured networks, and what other devices teach beforehand."""
    plain_NI, counted_NI = (inputs(space, tokens_NT, counts, known) for counts in (False, True))
    if not known:
        return Measured(latency_N, {False: plain_NI, True: counted_NI}, {}, 0)
    priors, reference_RT = {}, reference_networks(space)
    for counts in (False, True):
        reference_RI = inputs(space, reference_RT, counts, known)
        priors[counts] = Prior.learn(reference_RI[:, :-len(known)], reference_RI[:, -len(known):])
    return Measured(latency_N, {False: plain_NI, True: counted_NI}, priors, len(known))


def _contained(space: SearchSpace, model: LatencyModel) -> LatencyPredictor | LookedUp:
    """The model itself where its state can be stored, else a predictor of what it predicts."""
    if isinstance(model, LatencyPredictor | LookedUp):
        return model
    reference_RT = reference_networks(space)
    return LatencyPredictor.fit(space, reference_RT, model.predict(reference_RT))


def _known(space: SearchSpace, state: Mapping[str, Any], prefix: str) -> LatencyPredictor | LookedUp:
    part = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return LookedUp.from_state(part) if "latency_ms" in part else LatencyPredictor.from_state(space, part)


def predictor_of_trials(space: SearchSpace, tokens_MT: Tokens, latency_M: Array) -> LatencyPredictor:
    """From trials alone, where a task has no latency model (a table)."""
    usable = np.flatnonzero(latency_M >= TRIVIAL_SHARE * np.median(latency_M))[:LATENCY_TRIALS]
    return LatencyPredictor.fit(space, tokens_MT[usable], latency_M[usable])
