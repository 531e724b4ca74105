"""Budgets of one and of several targets: tuples as one number, the panel of controllers, state of earlier versions."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from orchestrator.config import parse_config
from orchestrator.controllers.controller import Answer, Controller, Observation, Proposal, Task
from orchestrator.record.files import write_json
from orchestrator.record.goals import (
    Goal,
    GoalLatency,
    goal_named,
    make_goals,
    read_goals,
    save_goals,
    target_state,
    trial_latencies,
    update_target_state,
)
from orchestrator.record.store import RunStore, Trial
from orchestrator.services.panel import Panel
from searchspaces.errors import BudgetError, ConfigError, StoreError
from searchspaces.nasbench201.space import NasBench201
from searchspaces.space import Tokens

TUPLES = ((1.0, 10.0), (2.0, 15.0), (4.0, 15.0), (5.0, 30.0))
BOTH = Goal("together", ("cpu", "phone"), (1.0, 2.0, 4.0, 5.0), TUPLES)
SPACE = NasBench201()
ROWS = SPACE.sample_uniform(np.random.default_rng(0), 8)


def test_a_tuple_is_met_exactly_where_its_number_is() -> None:
    rng = np.random.default_rng(0)
    latency_N2 = rng.uniform(0.1, 8, (20000, 2)) * [1, 4] * rng.uniform(0.3, 2, (20000, 2))
    number_N = BOTH.latency_ms({"cpu": latency_N2[:, 0], "phone": latency_N2[:, 1]})
    for budgets in TUPLES:
        assert np.array_equal((latency_N2 <= budgets).all(axis=1), number_N <= budgets[0])
    # Between and beyond the tuples: the polyline through them, in proportion outside.
    for budget_ms, phone_ms in ((0.5, 5.0), (1.5, 12.5), (3.0, 15.0), (4.5, 22.5), (10.0, 60.0)):
        assert BOTH.budgets_at(budget_ms) == {"cpu": budget_ms, "phone": pytest.approx(phone_ms)}
        met = (latency_N2 <= [budget_ms, phone_ms]).all(axis=1)
        assert np.array_equal(met, number_N <= budget_ms)


def test_one_target_keeps_its_latency() -> None:
    goal = Goal("cpu", ("cpu",), (1.0, 2.0))
    assert goal.latency_ms({"cpu": [3.0, np.nan]}) == pytest.approx([3.0, np.nan], nan_ok=True)
    assert goal.budgets_at(1.7) == {"cpu": 1.7}
    assert np.isnan(BOTH.latency_ms({"cpu": [1.0], "phone": [np.nan]})[0])


def test_a_goal_predicts_with_the_models_of_its_targets() -> None:
    class Sum:
        def __init__(self, factor: float) -> None:
            self.factor = factor

        def predict(self, tokens_NT: Tokens) -> NDArray[np.float64]:
            return self.factor * tokens_NT.sum(axis=1)

    models = {"cpu": Sum(0.2), "phone": Sum(2.0)}
    expected = BOTH.latency_ms({label: model.predict(ROWS) for label, model in models.items()})
    assert GoalLatency(BOTH, models).predict(ROWS) == pytest.approx(expected)


def test_goals_of_a_configuration() -> None:
    two = {"targets": ["onnx_cpu", {"name": "cuda", "label": "gpu"}]}
    own = parse_config(two | {"budgets": {"count": 3, "gpu": ["2ms", "1ms"]}}, "test")
    assert own.budgets.of("onnx_cpu").count == 3 and own.budgets.of("gpu").values_ms == [2.0, 1.0]
    goals = make_goals(own, {"onnx_cpu": [1.0, 3.0], "gpu": [2.0, 1.0]})
    assert goals == [Goal("onnx_cpu", ("onnx_cpu",), (1.0, 3.0)), Goal("gpu", ("gpu",), (1.0, 2.0))]
    joint = parse_config(two | {"budgets": {"together": True, "onnx_cpu": [1, 2], "gpu": [5, 9]}}, "test")
    assert make_goals(joint, {"onnx_cpu": [1.0, 2.0], "gpu": [5.0, 9.0]}) == [
        Goal("together", ("onnx_cpu", "gpu"), (1.0, 2.0), ((1.0, 5.0), (2.0, 9.0)))]


@pytest.mark.parametrize(("raw", "message"), [
    ({"budgets": {"gpu": ["1ms"]}}, "budgets are given for target 'gpu', which is not among the targets: onnx_cpu"),
    ({"targets": ["onnx_cpu", "onnx_cpu"]}, "two targets are called 'onnx_cpu'; give each its own label"),
    ({"target": "onnx_cpu", "targets": ["cuda"]}, "'target' and 'targets' are both given"),
    ({"targets": []}, "'targets' = [] is not allowed"),
    ({"target": {"name": "cuda", "label": "../x"}}, "'../x' is not a usable label of a target"),
    ({"budgets": {"onnx_cpu": {"cuont": 3}}}, "unknown key 'budgets.by_target.onnx_cpu.cuont'; did you mean 'count'"),
    ({"targets": ["onnx_cpu", "cuda"], "budgets": {"together": True, "onnx_cpu": [1, 2], "cuda": [1]}},
     "as many budgets for every target, given are onnx_cpu 2, cuda 1"),
    ({"targets": ["onnx_cpu", "cuda"], "budgets": {"together": True, "onnx_cpu": [1, 2], "cuda": [2, 1]}},
     "budgets of cuda are [2.0, 1.0]; with budgets.together every list ascends"),
])
def test_mistakes_are_named(raw: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(raw, "mine.yaml")
    assert message in str(error.value)


def test_state_of_goals_and_targets(tmp_path: Path) -> None:
    store, config = RunStore.create(tmp_path, "run", "{}", {}), parse_config({}, "test")
    with pytest.raises(StoreError, match="run run has not measured its target yet"):
        read_goals(store, config)
    update_target_state(store, "cpu", target_id="cpu-1", reference_ms=2.0)
    update_target_state(store, "cpu", slowest_ms=9.0)
    update_target_state(store, "phone", target_id="phone-1")
    assert target_state(store, "cpu") == {"target_id": "cpu-1", "reference_ms": 2.0, "slowest_ms": 9.0}
    save_goals(store, [BOTH])
    assert read_goals(store, config) == [BOTH]
    assert goal_named([BOTH], None) is BOTH
    for label, what in (("tpu", "'tpu' is not one of them"), (None, "a budget needs to say which one it is for")):
        with pytest.raises(BudgetError, match=f"models for together, cpu, and {what}; add --target together"):
            goal_named([BOTH, Goal("cpu", ("cpu",), (1.0,))], label)


def test_a_run_of_an_earlier_version_is_read_in_todays_form(tmp_path: Path) -> None:
    store, config = RunStore.create(tmp_path, "run", "{}", {}), parse_config({}, "test")
    write_json(store.path / "state.json", {"stage": "done", "target_id": "onnx_cpu-1", "target": {"kind": "onnx_cpu"},
                                           "reference_ms": 2.0, "budgets_ms": [1.0, 2.0], "fastest_ms": 0.5,
                                           "slowest_ms": 3.0})
    assert target_state(store, "onnx_cpu")["slowest_ms"] == 3.0
    assert read_goals(store, config) == [Goal("onnx_cpu", ("onnx_cpu",), (1.0, 2.0))]
    assert trial_latencies(trial(ROWS[0], None), ["cpu", "phone"]) == {"cpu": 7.0, "phone": pytest.approx(
        np.nan, nan_ok=True)}


def trial(row: Tokens, latencies: dict[str, float] | None = None, number: int = 0) -> Trial:
    entries = None if latencies is None else tuple(
        {"target": label, "target_id": label, "latency_ms": ms, "source": "measured"}
        for label, ms in latencies.items())
    return Trial(number, SPACE.arch_id(row), tuple(int(t) for t in row), SPACE.space_id, "stub", 0.5, "table", 0, 7.0,
                 "measured", "cpu", 1, 1, None, None, 0, 0.0, 0.0, "host", latencies=entries)


class Stub(Controller):
    """Proposes the rows it is given, in order, and writes down what it sees."""

    def __init__(self, rows: Tokens, factor: float = 1.0) -> None:
        super().__init__(SPACE, None, Task((1.0,), 8, 0))
        self.rows, self.factor = list(rows), factor
        self.seen: list[Observation] = []

    def propose(self, n: int) -> list[Proposal]:
        taken, self.rows = self.rows[:n], self.rows[n:]
        return [Proposal(row) for row in taken]

    def observe(self, trials: Sequence[Observation]) -> None:
        self.seen += trials

    def generate(self, budgets_ms: Sequence[float], alternatives: int = 1) -> list[list[Answer]]:
        raise AssertionError

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError

    def reward(self, tokens_NT: Tokens, accuracy_N: NDArray[np.float64],
               latency_ms_N: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.factor * accuracy_N / latency_ms_N

    def metrics(self) -> dict[str, float]:
        return {"factor": self.factor}


def test_controllers_take_turns_and_learn_from_one_log() -> None:
    cpu, phone = Stub(ROWS[:4]), Stub(ROWS[[0, 4, 5, 6]], factor=2.0)
    goals = [Goal("cpu", ("cpu",), (1.0,)), Goal("phone", ("phone",), (1.0,))]
    panel = Panel(goals, [cpu, phone], ["cpu", "phone"])
    first = panel.propose(4)
    assert [label for label, _ in first] == ["cpu", "cpu", "phone"]     # both wanted ROWS[0]: it is evaluated once
    assert [p.tokens.tobytes() for _, p in first] == [row.tobytes() for row in ROWS[[0, 1, 4]]]
    assert [label for label, _ in panel.propose(1)] == ["phone"]        # the other one's turn
    panel.observe([trial(ROWS[0], {"cpu": 1.0, "phone": 10.0}), trial(ROWS[4], {"cpu": 2.0, "phone": 20.0})])
    assert [seen.latency_ms for seen in cpu.seen] == [1.0, 2.0]
    assert [seen.latency_ms for seen in phone.seen] == [10.0, 20.0]
    by_target = {"cpu": np.array([1.0, 2.0, 4.0]), "phone": np.array([10.0, 20.0, 40.0])}
    rewards = panel.rewards(["cpu", "phone", None], ROWS[:3], np.full(3, 0.5), by_target)
    assert rewards == pytest.approx([0.5, 2 * 0.5 / 20, np.nan], nan_ok=True)
    assert panel.metrics() == {"cpu/factor": 1.0, "phone/factor": 2.0}
    assert panel.state_dicts() == {"cpu": {"factor": 1.0}, "phone": {"factor": 2.0}}


def test_a_controller_with_nothing_to_propose_leaves_its_turn_to_the_other() -> None:
    goals = [Goal("cpu", ("cpu",), (1.0,)), Goal("phone", ("phone",), (1.0,))]
    panel = Panel(goals, [Stub(ROWS[:0]), Stub(ROWS)], ["cpu", "phone"])
    assert [label for label, _ in panel.propose(4)] == ["phone"] * 4
