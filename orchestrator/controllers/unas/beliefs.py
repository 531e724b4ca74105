"""What observed trials make one believe of any architecture, and distributions that follow it by RELAX (ours;
specification unas 2.4, 4 and 6).

Without a supernet nothing is differentiable in the architecture. The black box is, for a budget B and at vertices z,

    L_B(z) = -(optimistic accuracy of z) / s + penalty of z's latency over B        s: their standard deviation

and a ridge regression g on the one-hots of the decisions is its control variate at relaxed points. A forest believes
what it likes about interactions of decisions; g cannot, and need not: the estimate is unbiased however wrong g is.

Legend: B budgets, S samples a step, E decisions, K values of one, N architectures, M trials.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.controllers.controller import LatencyModel, Observation
from orchestrator.controllers.unas.settings import BlackBoxOptions
from orchestrator.prediction import earlier
from orchestrator.prediction.earlier import InformedPosterior, Signals
from orchestrator.prediction.posterior import Posterior
from orchestrator.prediction.predictor import predictor_of_trials
from searchspaces.space import SearchSpace, Tokens
from searchspaces.training import estimators

SURROGATE_ROWS = 1000   # architectures whose losses g is fitted to: they cost nothing
RIDGE = 1e-3            # a share of the rows (specification 6)
Logits = list[NDArray[np.float64]]


class Beliefs:
    """The losses L_B of any architecture, remembered for those that were asked for before."""

    def __init__(self, space: SearchSpace, trials: Sequence[Observation], latency: LatencyModel | None,
                 budgets_ms: Sequence[float], options: BlackBoxOptions, seed: int,
                 signals: Signals | None = None, elsewhere: Sequence[Observation] = ()) -> None:
        """`latency`: None where it is known through trials only. `signals` of earlier runs on other tasks; `elsewhere`
        are their trials, whose latencies are this device's."""
        self.space, self.options, self.budgets_B = space, options, np.asarray(budgets_ms, dtype=np.float64)
        known = [*trials, *elsewhere]
        tokens_MT = np.stack([trial.tokens for trial in trials])
        self.posterior = fit_posterior(space, trials, options, seed, signals)
        self.latency = latency or predictor_of_trials(space, np.stack([trial.tokens for trial in known]),
                                                      np.array([trial.latency_ms for trial in known]))
        self.spread = max(1e-9, float(self.posterior.believe(space.features(tokens_MT)).mean_N.std()))
        self._known: dict[bytes, tuple[float, float]] = {}

    def losses(self, tokens_NT: Tokens) -> NDArray[np.float64]:
        """float64[N, B] of canonical architectures."""
        optimistic_N, latency_N = self._believed(tokens_NT)
        over_NB = np.maximum(latency_N[:, None] / self.budgets_B - 1, 0)
        return (self.options.over * (over_NB > 0) + self.options.slope * over_NB
                - optimistic_N[:, None] / self.spread)

    def _believed(self, tokens_NT: Tokens) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(optimistic accuracy [N], latency in ms [N])."""
        keys = [row.tobytes() for row in tokens_NT]
        new = {key: row for key, row in zip(keys, tokens_NT) if key not in self._known}
        if new:
            rows_NT = np.stack(list(new.values()))
            believed = self.posterior.believe(self.space.features(rows_NT))
            optimistic_N = believed.upper_N(self.options.posterior.optimism)
            self._known |= dict(zip(new, zip(optimistic_N, self.latency.predict(rows_NT))))
        both_N2 = np.array([self._known[key] for key in keys])
        return both_N2[:, 0], both_N2[:, 1]


def fit_posterior(space: SearchSpace, trials: Sequence[Observation], options: BlackBoxOptions, seed: int,
                  signals: Signals | None = None) -> Posterior | InformedPosterior:
    """As without earlier runs where these are not believed at all."""
    features_MF = space.features(np.stack([trial.tokens for trial in trials]))
    accuracy_M = np.array([trial.accuracy for trial in trials])
    believed = earlier.fit_posterior(features_MF, accuracy_M, signals, options.posterior, seed)
    if isinstance(believed, InformedPosterior) and not believed.agreement:
        return earlier.fit_posterior(features_MF, accuracy_M, None, options.posterior, seed)
    return believed


def follow(beliefs: Beliefs, seed: int) -> Logits:
    """float64[B, K] per decision: the distributions after Adam's steps along RELAX estimates of the gradient of
    E_{p_phi_B(z)}[L_B(z)], from uniform ones on."""
    options, space, generator = beliefs.options, beliefs.space, torch.Generator().manual_seed(seed)
    surrogate = fit_surrogate(beliefs, np.random.default_rng(seed))
    phi = [torch.zeros(len(beliefs.budgets_B), int(k), dtype=torch.float64, requires_grad=True)
           for k in space.vocabulary_sizes]
    optimizer = torch.optim.Adam(phi, lr=options.learning_rate)
    for _ in range(options.steps):
        phi_SBK = [p.expand(options.draws, *p.shape) for p in phi]
        drawn = estimators.draw(phi_SBK, options.temperature, estimators.uniform(phi_SBK, generator))
        estimate_SB = estimators.one_pass(_at_vertices(beliefs, drawn.z), surrogate(drawn.zeta_hat), drawn)
        optimizer.zero_grad()
        estimate_SB.mean(0).sum().backward()
        optimizer.step()
    return [p.detach().numpy().copy() for p in phi]


def _at_vertices(beliefs: Beliefs, z: Sequence[Tensor]) -> Tensor:
    """float64[S, B]: the black box at z [S, B, K] per decision, every sample under its own budget."""
    tokens_SBE = torch.stack([hard.argmax(-1) for hard in z], dim=-1).numpy().astype(np.int8)
    rows_NT = beliefs.space.canonical(tokens_SBE.reshape(-1, tokens_SBE.shape[-1]))
    losses_SBB = beliefs.losses(rows_NT).reshape(*tokens_SBE.shape[:2], -1)
    return torch.from_numpy(np.diagonal(losses_SBB, axis1=1, axis2=2).copy())


def fit_surrogate(beliefs: Beliefs, rng: np.random.Generator) -> estimators.Loss:
    """g: ridge regression of the losses on the one-hots of uniform architectures, for every budget."""
    sizes = beliefs.space.vocabulary_sizes
    tokens_NT = beliefs.space.sample_uniform(rng, SURROGATE_ROWS)
    losses_NB = beliefs.losses(tokens_NT)
    onehot_NF = np.concatenate([np.eye(int(k))[tokens_NT[:, e]] for e, k in enumerate(sizes)], axis=1)
    gram_FF = onehot_NF.T @ onehot_NF + RIDGE * len(tokens_NT) * np.eye(onehot_NF.shape[1])
    offset_B = losses_NB.mean(axis=0)
    weights_FB = np.linalg.solve(gram_FF, onehot_NF.T @ (losses_NB - offset_B))
    weights = [torch.from_numpy(part_KB.T.copy()) for part_KB in np.split(weights_FB, np.cumsum(sizes)[:-1])]

    def surrogate(point: estimators.Point) -> Tensor:
        """Points [..., B, K] per decision: [..., B]."""
        parts = [(w_BK * x).sum(-1) for w_BK, x in zip(weights, point)]
        return torch.stack(parts).sum(0) + torch.from_numpy(offset_B)

    return surrogate
