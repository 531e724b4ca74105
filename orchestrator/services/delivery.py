"""What a run hands over for one goal, in the last stage of a search and for new budgets afterwards.

The goal's controller, as the search left it, answers for every budget. Its answers are the candidates, with a few
networks that any budget may fall back on. A hand-over makes models of the best, or only names them where no file can be
timed. An entry is recorded when it is there.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from actors.data import Preprocessing, Splits
from orchestrator.config import Config
from orchestrator.controllers.catalogue import make_controller
from orchestrator.controllers.controller import Answer, Controller, Task
from orchestrator.data.accuracy import TableAccuracy
from orchestrator.data.sources import looked_up
from orchestrator.handover.architectures import architectures, look_ups, makes_models
from orchestrator.handover.candidates import measured_candidates
from orchestrator.handover.delivered import Candidate, Delivered
from orchestrator.handover.generated import delivered_entries, record_entries
from orchestrator.handover.models import HandOver, Workbench
from orchestrator.record.files import read_json
from orchestrator.record.goals import Goal, goal_model, read_goals, target_state
from orchestrator.record.store import RunStore
from orchestrator.services.distributions import recorded_distributions
from orchestrator.services.states import load_predictor, load_state, state_name
from searchspaces.space import SearchSpace, Tokens


@dataclass(frozen=True, eq=False)
class Delivery:
    """`controller`: see `restored_controller`."""

    config: Config
    store: RunStore
    space: SearchSpace
    splits: Splits
    preprocessing: Preprocessing
    goal: Goal
    controller: Controller

    def answers(self, budgets_ms: Sequence[float]) -> list[list[Answer]]:
        """The controller's, one list per budget; in milliseconds."""
        return self.controller.generate(budgets_ms, self.config.delivery.alternatives)

    def entries(self, bench: Workbench, budgets_ms: Sequence[float], answers: Sequence[Sequence[Answer]],
                retrained: Callable[[], None] | None = None) -> Iterator[Delivered]:
        """One recorded entry per budget, ascending; `answers` are for these budgets.

        Where finalists are retrained, those of one budget after the other's; with `retrained`, which is called when
        they are there, those of all budgets at once.
        """
        handover = HandOver(self.space, self.splits, self.preprocessing, bench, self.config.delivery, self.store.path,
                            lineage(self.store, self.config), self.goal, slowest_ms(self.store, self.goal))
        for entry in (self._models(handover, budgets_ms, answers, retrained) if makes_models(self.config, self.goal)
                      else self._architectures(handover, budgets_ms, answers)):
            record_entries(self.store, [entry], self.config)
            yield entry

    def _models(self, handover: HandOver, budgets_ms: Sequence[float], answers: Sequence[Sequence[Answer]],
                retrained: Callable[[], None] | None) -> Iterator[Delivered]:
        options, candidates = measured_candidates(handover, self.answers, budgets_ms, answers,
                                                  self._for_any_budget())
        wanted = sorted(zip(budgets_ms, options, strict=True), key=lambda pair: pair[0])
        for group in ([wanted] if retrained else [[pair] for pair in wanted]):
            chosen = self._finalists(handover, group, candidates)
            if retrained and self._retrains:
                retrained()
            yield from handover.deliver([budget_ms for budget_ms, _ in group], chosen)

    def _architectures(self, handover: HandOver, budgets_ms: Sequence[float],
                       answers: Sequence[Sequence[Answer]]) -> Iterator[Delivered]:
        """Whatever the search evaluated is a candidate where looking its latency up costs nothing: the search only
        predicted it. What was chosen before is one too, so that a larger budget never gets a worse architecture."""
        known = [entry.tokens for entry in delivered_entries(self.store, self.config)
                 if entry.feasible and entry.target == self.goal.label]
        trials = [trial for trial in self.store.read_trials() if not trial.error and trial.accuracy is not None]
        if set(self.goal.targets) <= set(look_ups(self.config)):
            known += [trial.tokens for trial in trials]
        extra_NT = np.array([*self._for_any_budget(), *known], dtype=np.int8)
        seen = (np.array([trial.tokens for trial in trials], dtype=np.int8).reshape(-1, extra_NT.shape[1]),
                np.array([trial.accuracy for trial in trials], dtype=np.float64))
        return architectures(handover, budgets_ms, handover.candidates(answers, extra_NT), self._test_accuracies, seen)

    def _for_any_budget(self) -> Tokens:
        """What was reachable before anybody searched: the ends of the latency range, and the network whose weights the
        supernet started from at every resolution."""
        ends_NT = fallbacks(self.store, self.space, self.goal)
        if self.config.supernet.start is None or self.config.accuracy.source != "supernet":
            return ends_NT
        return np.concatenate([ends_NT, largest_at_each_resolution(self.space)])

    def _test_accuracies(self, tokens_NT: Tokens) -> list[float | None]:
        """Of architectures that nobody trains: what a table says."""
        accuracy = self.config.accuracy
        if not isinstance(accuracy, TableAccuracy) or accuracy.test_column is None:
            return [None] * len(tokens_NT)
        return looked_up(accuracy, self.space, tokens_NT, accuracy.test_column)

    @property
    def _retrains(self) -> bool:
        return self.config.accuracy.source != "supernet"

    def _finalists(self, handover: HandOver, group: Sequence[tuple[float, Sequence[Answer]]],
                   candidates: list[Candidate]) -> list[Candidate]:
        if not self._retrains:
            return candidates
        return handover.finalists([budget_ms for budget_ms, _ in group], candidates,
                                  [answers for _, answers in group] if self.controller.ranks_finalists else None)


def restored_controller(store: RunStore, config: Config, space: SearchSpace, goal: Goal) -> Controller:
    """The goal's controller with what it learned in the search; it answers without learning again."""
    models = {label: load_predictor(store, config, space, label) for label in goal.targets}
    model = goal_model(goal, {label: found for label, found in models.items() if found is not None})
    task = Task(goal.budgets_ms, config.search.evaluations, config.seed, model,
                distributions=recorded_distributions(store, config, read_goals(store, config), goal))
    controller = make_controller(config.controller.name, space, task, config.controller.options)
    controller.load_state_dict(load_state(store, state_name("controller", goal.label, config)))
    return controller


def fallbacks(store: RunStore, space: SearchSpace, goal: Goal) -> Tokens:
    """Candidates for any budget that a run called reachable: the extremes, and the fastest network measured on each of
    the goal's targets."""
    rows = [row for row in store.latency.read(["tokens", "target_id", "latency_ms", "error"]).to_pylist()
            if not row["error"]]
    fastest = [min((row for row in rows if row["target_id"] == target_state(store, label)["target_id"]),
                   key=lambda row: float(row["latency_ms"]))["tokens"] for label in goal.targets]
    return space.canonical(np.concatenate([space.extremes(), np.array(fastest, dtype=np.int8)]))


def largest_at_each_resolution(space: SearchSpace) -> Tokens:
    """int8[R, T]; a single row where resolution is not searched."""
    rows = [space.extremes()[1]]
    for position, choice in enumerate(space.choices):
        if choice.name == "resolution":
            there_T = np.arange(len(space.choices)) == position
            rows = [np.where(there_T, value, rows[0]) for value in range(len(choice.values))]
    return space.canonical(np.stack(rows).astype(np.int8))


def slowest_ms(store: RunStore, goal: Goal) -> float:
    """The goal's latency of a network as slow as the slowest that was measured."""
    return float(goal.latency_ms({label: [target_state(store, label)["slowest_ms"]] for label in goal.targets})[0])


def lineage(store: RunStore, config: Config) -> dict[str, object]:
    """What every sidecar says about where a model comes from."""
    environment = read_json(store.path / "environment.json")
    targets = {label: target_state(store, label) for label in config.labels}
    return {"run": store.name, "weights_version": store.state()["weights_version"],
            "targets": {label: {key: state[key] for key in ("target_id", "target", "reference_ms")}
                        for label, state in targets.items()},
            "versions": environment.get("versions", {}), "commit": environment.get("commit")}
