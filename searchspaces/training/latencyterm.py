"""UNAS' measured latency in the loop: RELAX on latencies that arrive after their architectures were drawn.

Before an epoch, architectures are drawn from today's distributions and wished for; the driver measures them, and each
is used in one step of the epoch, at which phi may have moved on. The importance weight p/q keeps the expectation
exactly (estimators.py, `off_policy`): the step's phi has not seen this sample. The linear surrogate g is fitted on what
was known before the samples were drawn, so it does not depend on them: however wrong it is, it costs variance only.

Where fewer latencies are measured than an epoch has steps, the steps that have one count for the others.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from searchspaces.errors import ConfigError
from searchspaces.space import SearchSpace, Tokens
from searchspaces.training.estimators import Point, draw, off_policy, surrogate_terms, uniform
from searchspaces.training.objective import AdditiveLatency, LatencyMode, latency_loss, ramp
from searchspaces.training.training import Latencies, Wishes


@dataclass(frozen=True)
class Aim:
    """What one distribution is for: a budget in ms of the goal with this label."""

    label: str
    budget_ms: float


@dataclass(frozen=True)
class LatencySettings:
    """`weight` of the latency as a share of the budget, reached after `ramp` of the search steps. `samples`: latencies
    wished for per epoch; `networks`: uniform architectures that the surrogate is first fitted on."""

    mode: LatencyMode = "hinge"
    weight: float = 1.0
    ramp: float = 0.25
    samples: int = 64
    networks: int = 100

    def __post_init__(self) -> None:
        if self.weight < 0 or not 0 <= self.ramp <= 1:
            raise ConfigError(f"latency weight and ramp of unas are {self.weight} and {self.ramp}; the weight must be "
                              "at least 0, the ramp a share of the search between 0 and 1")
        if self.samples < 1 or self.networks < 2:
            raise ConfigError(f"unas measures {self.samples} latencies per epoch after {self.networks} networks; give "
                              "at least 1 and 2")


@dataclass(frozen=True)
class Term:
    """What latency adds to a step: a surrogate whose gradient is the estimate; the latency loss of the measured sample
    and the surrogate's error there, as shares of the budget (0 in steps without one)."""

    surrogate: Tensor
    loss: float = 0.0
    error: float = 0.0


@dataclass(frozen=True, eq=False)
class Sample:
    """Drawn with log q, measured since (nan: it failed, and its step does without)."""

    tokens_T: Tokens
    log_q: float
    latency_ms: float
    copies: float       # steps that it counts for


class LatencyTerm:
    """Of one training; the same on every rank. `known` are latencies by label, in the order in which they came."""

    def __init__(self, space: SearchSpace, settings: LatencySettings, aims: Sequence[Aim], temperature: float,
                 softening: float) -> None:
        self._sizes = [int(size) for size in space.vocabulary_sizes]
        self._settings, self._aims, self._tau, self._softening = settings, aims, temperature, softening
        self._known: dict[str, dict[bytes, float]] = {aim.label: {} for aim in aims}
        self._surrogates: dict[str, AdditiveLatency] = {}
        self._drawn_at = -1
        self._wishes: dict[str, Tokens] = {}
        self._slots: dict[tuple[int, int], tuple[str, int, float, float]] = {}    # label, row, log q, copies
        self._samples: dict[tuple[int, int], Sample] = {}

    # --- between epochs ----------------------------------------------------------------------------------------------

    def begin_epoch(self, step: int, slots: Sequence[tuple[int, int]], phi: Sequence[Sequence[Tensor]],
                    turn: Callable[[int], int], seed: int) -> Wishes:
        """Draws this epoch's architectures for some of its (step, part) slots; `turn` says which budget a step is."""
        if self._drawn_at == step or self._settings.weight == 0:
            return self._wishes
        self._drawn_at, self._slots, self._samples = step, {}, {}
        rows: dict[str, list[Tokens]] = {label: [] for label in self._known}
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence([seed, step, 0x1a7e]).generate_state(1)[0]))
        for label, known in self._known.items():
            if known:
                self._fit(label)
            else:  # the first time: phi is still uniform
                first = next(b for b, aim in enumerate(self._aims) if aim.label == label)
                rows[label] += [self._draw(phi[first], generator)[0] for _ in range(self._settings.networks)]
        for b, aim in enumerate(self._aims):
            mine = [slot for slot in slots if turn(slot[0]) == b]
            for slot, copies in spread(mine, self._settings.samples // len(self._aims) or 1):
                tokens_T, log_q = self._draw(phi[b], generator)
                self._slots[slot] = (aim.label, len(rows[aim.label]), log_q, copies)
                rows[aim.label].append(tokens_T)
        self._wishes = {label: np.stack(tokens) for label, tokens in rows.items() if tokens}
        return self._wishes

    def _draw(self, phi: Sequence[Tensor], generator: torch.Generator) -> tuple[Tokens, float]:
        with torch.no_grad():
            drawn = draw(phi, self._tau, uniform(phi, generator), softening=self._softening)
        return np.array([int(z.argmax()) for z in drawn.z], dtype=np.int8), float(drawn.log_p)

    def give(self, latencies: Latencies) -> None:
        """Latencies of the wishes, row by row; nan where measuring failed."""
        for label, rows_NT in self._wishes.items():
            found_N = latencies[label]
            assert len(found_N) == len(rows_NT), "one latency for each architecture wished for"
            fresh = not self._known[label]
            first = self._settings.networks if fresh else 0
            self._remember(label, rows_NT[:first], found_N[:first])
            if fresh:
                self._fit(label)
        for slot, (label, row, log_q, copies) in self._slots.items():
            self._samples[slot] = Sample(self._wishes[label][row], log_q, float(latencies[label][row]), copies)
        for label, rows_NT in self._wishes.items():     # after the fit: g must not depend on this epoch's samples
            self._remember(label, rows_NT, latencies[label])
        self._wishes = {}

    def _remember(self, label: str, rows_NT: Tokens, latency_N: Sequence[float] | np.ndarray) -> None:
        for row, ms in zip(rows_NT, latency_N):
            if np.isfinite(ms):
                self._known[label].setdefault(row.tobytes(), float(ms))

    def _fit(self, label: str) -> None:
        rows_NT = np.array([np.frombuffer(key, dtype=np.int8) for key in self._known[label]])
        if not len(rows_NT):
            raise ConfigError(f"none of {self._settings.networks} networks drawn for unas could be measured for "
                              f"{label}; check the target with: paretoray targets")
        onehot_ND = np.concatenate([np.eye(size)[rows_NT[:, e]] for e, size in enumerate(self._sizes)], axis=1)
        self._surrogates[label] = AdditiveLatency.fit(onehot_ND, np.array(list(self._known[label].values())))

    # --- in a step ---------------------------------------------------------------------------------------------------

    def term(self, step: int, part: int, turn: int, phi: Sequence[Tensor], progress: float, u: Point,
             v: Point) -> Term:
        """`progress`: share of the search steps done. `u`, `v`: noise of the fresh sample and of the measured one."""
        aim = self._aims[turn]
        if self._settings.weight == 0:
            return Term(torch.zeros((), dtype=torch.float64))
        weight = ramp(progress, self._settings.weight, self._settings.ramp)
        latency = self._surrogates[aim.label]

        def h(ms: Tensor) -> Tensor:
            return latency_loss(ms / aim.budget_ms, 1.0, weight, self._settings.mode)

        def surrogate(point: Point) -> Tensor:
            return h(latency(point))

        total = surrogate_terms(surrogate, draw(phi, self._tau, u, softening=self._softening))
        sample = self._samples.get((step, part))
        if sample is None or not np.isfinite(sample.latency_ms):
            return Term(total)
        z = [F.one_hot(torch.tensor(int(token)), size).double() for token, size in zip(sample.tokens_T, self._sizes)]
        measured = torch.tensor(sample.latency_ms, dtype=torch.float64)
        score = off_policy(h(measured), surrogate, phi, z, torch.tensor(sample.log_q, dtype=torch.float64), self._tau,
                           v, self._softening)
        error = abs(float(latency(z)) - sample.latency_ms) / aim.budget_ms
        return Term(total + sample.copies * score, float(h(measured)) * sample.copies, error * sample.copies)

    # --- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """known.LABEL.tokens int8[N, T] and known.LABEL.ms float64[N]."""
        state = {}
        for label, known in self._known.items():
            if known:
                rows_NT = np.array([np.frombuffer(key, dtype=np.int8) for key in known])
                state[f"known.{label}.tokens"] = torch.from_numpy(rows_NT)
                state[f"known.{label}.ms"] = torch.tensor(list(known.values()), dtype=torch.float64)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._drawn_at, self._wishes, self._slots, self._samples = -1, {}, {}, {}
        for label in self._known:
            rows = state.get(f"known.{label}.tokens")
            if rows is None:
                self._known[label] = {}
                continue
            self._known[label] = {row.numpy().tobytes(): float(ms)
                                  for row, ms in zip(rows, state[f"known.{label}.ms"], strict=True)}


def spread(slots: Sequence[tuple[int, int]], count: int) -> list[tuple[tuple[int, int], float]]:
    """At most `count` of the slots, evenly spaced, each with the number of slots that it stands for."""
    count = min(count, len(slots))
    chosen = [slots[len(slots) * i // count] for i in range(count)]
    return [(slot, len(slots) / count) for slot in chosen]
