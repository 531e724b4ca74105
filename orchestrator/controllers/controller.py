"""The Controller contract: who decides which architectures are worth an evaluation.

    controller = Pnag(space, settings, task)
    while wanted := controller.propose(8):          # [] means: observe something first, or done
        trials = evaluate(wanted)                   # somewhere, in any order, some may fail
        controller.observe(trials)                  # in the order of the trial log
    answers = controller.generate([2.5, 4.0])

A controller is a pure, single-threaded object. It never calls Ray, reads no clock and no global random state.
Recovery is defined by what a caller can observe: a fresh controller that observes the recorded trials in order proposes
what the original would have proposed next (once all its proposals had been observed). So random numbers are derived
from the seed and the number of observed trials, and every observed trial counts, also failed ones and foreign ones
(a trial that was never proposed is knowledge like any other).
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from searchspaces.space import SearchSpace, Tokens

if TYPE_CHECKING:
    from searchspaces.elite.found import FoundSpace
    from searchspaces.training.training import TrainingMethod
    from searchspaces.training.weights import WeightSettings


class LatencyModel(Protocol):
    """Predicted latency, cheap: float64[N] in ms for int8[N, T]."""

    def predict(self, tokens_NT: Tokens) -> NDArray[np.float64]: ...


@dataclass(frozen=True, eq=False)
class EarlierRun:
    """What an earlier run of the same space learned: one row per successful trial, in the order of its log.

    `same_task`: it searched on the same dataset, so its accuracies are on this run's scale; otherwise only their order
    means something here. `latency_ms_N` is of this run's target, predicted where it was not measured on it; nan where
    there is no latency model either.
    """

    name: str
    same_task: bool
    tokens_NT: Tokens
    accuracy_N: NDArray[np.float64]
    latency_ms_N: NDArray[np.float64]


@dataclass(frozen=True)
class Task:
    """What the search is for. `latency` is None where latency is known only through trials (a table). `earlier` are
    the runs of `warm_start`, for controllers that can learn from them (`uses_earlier_runs`). `distributions`: what the
    controller's own training method learned beside the supernet's weights, logits float64[V_t] per position, one list
    per budget (nss: per group of bins, one list per space); empty for other controllers and sources of accuracy."""

    budgets_ms: tuple[float, ...]
    evaluations: int
    seed: int
    latency: LatencyModel | None = None
    earlier: tuple[EarlierRun, ...] = ()
    distributions: tuple[tuple[NDArray[np.float64], ...], ...] = ()


@dataclass(frozen=True)
class Proposal:
    """An architecture worth evaluating; `budget_ms` is the budget it was proposed for, None for exploration. Results of
    one `batch` are compared with each other, so they should come about alike; numbers ascend, None: none of them."""

    tokens: Tokens
    budget_ms: float | None = None
    batch: int | None = None


@dataclass(frozen=True, slots=True)     # a long search has many
class Observation:
    """What a controller sees of a recorded trial. `accuracy` in 0..1 is nan where `error` says why it failed."""

    tokens: Tokens
    accuracy: float
    latency_ms: float
    error: str = ""


@dataclass(frozen=True)
class Answer:
    """A controller's choice for one budget, best first among `generate`'s alternatives for that budget.

    `accuracy` and `latency_ms` are what is known or predicted; `observed` tells which. `clamped`: the budget lies
    outside the trained range. `feasible` is False where nothing under the budget was found: then the answer is the
    fastest architecture known and must not be handed over as meeting the budget.
    """

    budget_ms: float
    tokens: Tokens
    latency_ms: float
    accuracy: float
    score: float
    observed: bool
    feasible: bool
    clamped: bool = False


class NoSettings(BaseModel):
    """A controller without options: every key is an error."""

    model_config = ConfigDict(extra="forbid")


class Controller(ABC):
    """See the module docstring. `settings` is an instance of the model that `settings_model` names."""

    uses_earlier_runs = False  # does it learn from `task.earlier`?
    trains_supernet = False    # is a supernet, where there is one, trained by a method of its own?
    finds_spaces = False       # does it search for spaces (`spaces_found`)? It needs a supernet
    ranks_finalists = False    # are its answers retrained in its own order? Otherwise in that of their accuracy

    def __init__(self, space: SearchSpace, settings: Any, task: Task) -> None:
        self.space = space
        self.settings = settings
        self.task = task

    @classmethod
    def settings_model(cls) -> type[BaseModel]:
        """The pydantic model that checks this controller's options in the configuration; unknown keys are errors."""
        return NoSettings

    @abstractmethod
    def propose(self, n: int) -> list[Proposal]:
        """At most n proposals, distinct, canonical, none of them observed or pending. Empty: nothing now."""

    @abstractmethod
    def observe(self, trials: Sequence[Observation]) -> None:
        """Recorded trials in the order of the log. Cheap; learning may be put off to `propose` or `generate`."""

    @abstractmethod
    def generate(self, budgets_ms: Sequence[float], alternatives: int = 1) -> list[list[Answer]]:
        """For each budget up to `alternatives` answers, best first; at least one. Works on unseen budgets."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Learned state as a flat dictionary of str to tensors, numbers or strings (safetensors and JSON)."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict` so that `generate` answers as before without learning again."""

    def reward(self, tokens_NT: Tokens, accuracy_N: NDArray[np.float64],
               latency_ms_N: NDArray[np.float64]) -> NDArray[np.float64] | None:
        """What the controller maximises, for these results (nan where an accuracy is nan); recorded with the trials.
        None: it has no scalar reward."""
        return None

    @classmethod
    def cpus(cls, settings: Any) -> int:
        """CPUs of the cluster that it holds while it learns, beside the driver's; `settings` as for the constructor."""
        return 0

    @classmethod
    def training(cls, settings: Any, budgets_ms: Mapping[str, Sequence[float]], weights: WeightSettings,
                 parts: int, latency: Mapping[str, LatencyModel]) -> TrainingMethod | None:
        """How the supernet is trained for it, where it does not take a supernet as section `supernet` trains it.
        `budgets_ms` and `latency` by label of the goal; `weights` are that section's, `parts` what a batch is cut
        into."""
        return None

    @classmethod
    def distributions(cls, settings: Any, budgets_ms: Sequence[float]) -> int:
        """How many distributions that training learns for a goal with these budgets."""
        return len(budgets_ms)

    def spaces_found(self) -> tuple[FoundSpace, ...]:
        """What a search for spaces found, one for every aim; () for controllers that search for networks."""
        return ()

    def close(self) -> None:  # noqa: B027 (most controllers hold nothing)
        """Gives back what it holds on the cluster; nothing is proposed or observed after it."""

    def metrics(self) -> dict[str, float]:
        """Scalars worth a plot (losses, entropy, rank correlation), for TensorBoard and the report. The report draws
        `trained`, `trusted` (samples so far), `reward_mean` and `reward_best` against `iteration` where it finds them.
        """
        return {}
