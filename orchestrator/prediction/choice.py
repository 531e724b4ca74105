"""Which of several latency models fits a device best, by cross-validation (see predictor.py).

Shape legend: M measured architectures, I inputs, D other devices.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.prediction.fit import Array, Correction, Linear, Prior, fit_correction, fit_helped, fit_linear

FOLDS = 10
GAIN = 0.97                 # what makes a model more complex must lower the held-out error by at least this factor
LEAST_CORRECTED = 20        # networks below which a correction learns from its own choice of settings
LENGTH_SCALES = (2.0, 4.0, 8.0, 16.0)       # of the correction, in standard deviations of all inputs together
NOISE_SHARES = (0.1, 0.3, 1.0, 3.0)         # noise variance over signal variance of the correction
STRENGTHS = (0.03, 0.3, 3.0, 1000.0)        # of what other devices say; the last is scale and offset alone
TRUSTED, DISTRUST = 0.3, 0.7    # the strength where devices are alike, unless another has 0.7 times its error


@dataclass(frozen=True)
class Recipe:
    """`counts`: with counts of choices; `strength`: of the other devices, None without them; `rest`: with what
    features do not explain of their latencies, noise of their measurements included."""

    counts: bool = False
    strength: float | None = None
    rest: bool = False


@dataclass(frozen=True)
class Measured:
    """Inputs and priors by whether choices are counted; inputs end with the `others` columns of other devices."""

    latency_M: Array
    inputs_MI: Mapping[bool, Array]
    priors: Mapping[bool, Prior]
    others: int

    def inputs(self, recipe: Recipe) -> Array:
        inputs_MI = self.inputs_MI[recipe.counts]
        return inputs_MI if recipe.rest else inputs_MI[:, :inputs_MI.shape[1] - self.others]

    def fit(self, recipe: Recipe, rows_M: NDArray[np.bool_]) -> Linear:
        """To the measured networks of `rows_M`."""
        inputs_MI, latency_M = self.inputs(recipe)[rows_M], self.latency_M[rows_M]
        if recipe.strength is None:
            return fit_linear(inputs_MI, latency_M)
        return fit_helped(inputs_MI, latency_M, self.priors[recipe.counts], recipe.strength)


@dataclass(frozen=True)
class Chosen:
    """The model fitted to everything, and what the other folds predicted for each network."""

    recipe: Recipe
    linear: Linear
    correction: Correction | None
    heldout_M: Array


def choose(measured: Measured, seed: int) -> Chosen:
    """The recipe that cross-validation likes best, with a correction if that helps; help must also beat what a
    correction makes of the best recipe without."""
    latency_M = measured.latency_M
    folds_M = np.random.default_rng(seed).permutation(len(latency_M)) % min(FOLDS, len(latency_M))
    recipes = [Recipe(False), Recipe(True)]
    if measured.others:
        recipes += [Recipe(counts, strength, rest) for strength in STRENGTHS for counts in (False, True)
                    for rest in (False, True)]
    heldout = {recipe: _heldout(measured, recipe, folds_M) for recipe in recipes}
    errors = {recipe: _error(predicted_M, latency_M) for recipe, predicted_M in heldout.items()}
    best = _best(errors)
    alone = _best({recipe: error for recipe, error in errors.items() if recipe.strength is None})
    finalists = [_corrected(measured, recipe, heldout[recipe], folds_M) for recipe in dict.fromkeys((best, alone))]
    if finalists[0].correction is None and finalists[-1].correction is None:
        return finalists[0]
    return min(finalists, key=lambda chosen: _error(chosen.heldout_M, latency_M))


def _corrected(measured: Measured, recipe: Recipe, heldout_M: Array, folds_M: NDArray[np.int64]) -> Chosen:
    """The recipe fitted to everything, with the best correction where that helps."""
    latency_M, inputs_MI = measured.latency_M, measured.inputs(recipe)
    linear = measured.fit(recipe, np.ones(len(latency_M), dtype=bool))
    if len(latency_M) < LEAST_CORRECTED:
        return Chosen(recipe, linear, None, heldout_M)
    tried = _heldout_corrected(measured, recipe, folds_M)
    length, noise = min(tried, key=lambda option: (_error(tried[option], latency_M), *option))
    if _error(tried[length, noise], latency_M) >= GAIN * _error(heldout_M, latency_M):
        return Chosen(recipe, linear, None, heldout_M)
    correction = fit_correction(inputs_MI, latency_M / linear.predict(inputs_MI) - 1.0, length, noise)
    return Chosen(recipe, linear, correction, tried[length, noise])


def _best(errors: Mapping[Recipe, float]) -> Recipe:
    """The smallest held-out error, with two doubts. The simplest recipe is left only for a gain. And few networks are
    few to judge by: where scale and offset of the other devices alone predict better than no help at all, these are
    alike, and the usual strength is kept unless another recipe is clearly better."""
    plain, trusted = Recipe(), Recipe(True, TRUSTED)
    best = min(errors, key=lambda recipe: errors[recipe])
    if trusted in errors:
        without = min(error for recipe, error in errors.items() if recipe.strength is None)
        scaled = min(error for recipe, error in errors.items() if recipe.strength == STRENGTHS[-1])
        if scaled < without and errors[best] >= DISTRUST * errors[trusted]:
            return trusted
    return best if errors[best] < GAIN * errors[plain] else plain


def _heldout(measured: Measured, recipe: Recipe, folds_M: NDArray[np.int64]) -> Array:
    """Predictions of every network by a fit to the other folds."""
    inputs_MI, predicted_M = measured.inputs(recipe), np.empty(len(folds_M))
    for fold in range(folds_M.max() + 1):
        held = folds_M == fold
        predicted_M[held] = measured.fit(recipe, ~held).predict(inputs_MI[held])
    return predicted_M


def _heldout_corrected(measured: Measured, recipe: Recipe,
                       folds_M: NDArray[np.int64]) -> dict[tuple[float, float], Array]:
    """The same with a correction, by its (length, noise)."""
    inputs_MI, latency_M = measured.inputs(recipe), measured.latency_M
    predicted = {(length, noise): np.empty(len(folds_M)) for length in LENGTH_SCALES for noise in NOISE_SHARES}
    for fold in range(folds_M.max() + 1):
        held = folds_M == fold
        linear = measured.fit(recipe, ~held)
        residual_M = latency_M[~held] / linear.predict(inputs_MI[~held]) - 1.0
        for (length, noise), predicted_M in predicted.items():
            correction = fit_correction(inputs_MI[~held], residual_M, length, noise)
            predicted_M[held] = linear.predict(inputs_MI[held]) * (1.0 + correction.predict(inputs_MI[held]))
    return predicted


def _error(predicted_M: Array, latency_M: Array) -> float:
    """Mean absolute percentage error, as a share."""
    return float(np.mean(np.abs(predicted_M / latency_M - 1.0)))
