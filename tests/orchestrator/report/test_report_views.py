"""The report of a run with several targets: a front for each, and how well their rankings agree."""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau

from orchestrator.frontier import pareto_mask
from orchestrator.record.files import write_json
from orchestrator.record.goals import Goal, save_goals, update_target_state
from orchestrator.record.store import RunStore, Trial
from orchestrator.report.data import read_run
from orchestrator.report.page import page_data, write_report
from orchestrator.report.views import agreements, views
from tests.orchestrator.example_run import empty_run, example_space
from tests.orchestrator.report.test_report import Tab, chromium

__all__ = ["chromium"]     # a fixture

CPU, PHONE = "onnx_cpu", "phone"
GOALS = [Goal(CPU, (CPU,), (2.0,)), Goal(PHONE, (PHONE,), (30.0,))]
N = 60


def two_targets(folder: Path, goals: list[Goal]) -> RunStore:
    """The phone is ten times slower, and its noise turns some pairs of networks over."""
    space, store, rng = example_space(), empty_run(folder), np.random.default_rng(0)
    rows = space.canonical(space.sample_uniform(rng, N))
    cpu_ms = space.cost(rows)[0] / 1e7
    phone_ms = 10 * cpu_ms * rng.normal(1, 0.1, N)
    accuracy = 0.95 - 0.3 * np.exp(-cpu_ms) - abs(rng.normal(0, 0.02, N))
    for label in (CPU, PHONE):
        update_target_state(store, label, target_id=f"{label}-1")
    save_goals(store, goals)
    store.append_trials([Trial(
        i, space.arch_id(row), tuple(int(t) for t in row), space.space_id, "pnag", float(accuracy[i]), "supernet", 1,
        float(cpu_ms[i]), "predicted", f"{CPU}-1", 1, 1, None, None, 0, 1.79e9, 0.1, "host", latencies=(
            {"target": CPU, "target_id": f"{CPU}-1", "latency_ms": float(cpu_ms[i]), "source": "predicted"},
            {"target": PHONE, "target_id": f"{PHONE}-1", "latency_ms": float(phone_ms[i]), "source": "predicted"}))
        for i, row in enumerate(rows)])
    for label, latency_ms, count in ((CPU, cpu_ms, N), (PHONE, phone_ms, 40)):
        store.latency.append([{
            "arch_id": space.arch_id(row), "tokens": row.tolist(), "target_id": f"{label}-1", "latency_ms": float(ms),
            "predicted_ms": float(1.02 * ms), "stderr_ms": 0.01, "source": "measured"}
            for row, ms in list(zip(rows, latency_ms))[:count]])
        store.event("predictor", target=label, n=count, heldout_error=0.02, noise_floor=0.01 if label == CPU else 0.05)
    store.event("controller", **{f"{PHONE}/{key}": 3.0 for key in ("trained", "trusted", "reward_mean", "reward_best")})
    best = int(np.argmax(accuracy))
    write_json(store.path / "generated.json", [{
        "budget_ms": budget_ms, "feasible": True, "tokens": rows[best].tolist(), "arch_id": space.arch_id(rows[best]),
        "text": "x", "latency_ms": float(ms[best]), "accuracy": 0.9, "test_accuracy": 0.89, "madds": 1, "params": 1,
        "onnx": f"models/{label}.onnx", "target": label}
        for label, ms, budget_ms in ((CPU, cpu_ms, 9.0), (PHONE, phone_ms, 90.0))])
    return store


def test_every_target_has_its_front_behind_a_tab(chromium: Any, tmp_path: Path) -> None:
    store = two_targets(tmp_path, GOALS)
    trials = store.read_trials()
    opened = Tab(chromium, write_report(store.path, example_space()))
    assert opened.page.inner_text("#targets").split() == [CPU, PHONE]
    for number, label in enumerate((CPU, PHONE)):
        opened.page.click(f"#targets button[data-target={label}]")
        latency_ms = np.array([(t.latencies or ())[number]["latency_ms"] for t in trials])
        accuracy = np.array([t.accuracy for t in trials], dtype=float)
        mask = pareto_mask(latency_ms, accuracy)
        front = sorted((x, 100 * y) for x, y in zip(latency_ms[mask], accuracy[mask]))
        assert opened.trace("front", "Pareto front") == [pytest.approx(point) for point in front]
        assert len(opened.trace("prediction", "held-out network")) == (60, 40)[number]
        assert f"measurement noise {('1.0', '5.0')[number]}%" in opened.page.inner_text("main")
        assert opened.page.is_visible("#figure-learning") == (label == PHONE)
        opened.set_budget(1000.0)
        assert opened.shown("model")["file"] == f"models/{label}.onnx"
        opened.set_budget(0.001, "#budget-number")
        assert f"--target {label}" in opened.page.inner_text("#choice-model")
    head, *rows = opened.page.inner_text("#models").splitlines()
    assert head.startswith("Target") and [row.split()[0] for row in rows] == [CPU, PHONE]
    assert opened.page.inner_text("#agreement").splitlines()[1].startswith(f"{CPU} and {PHONE}")
    assert opened.complaints == []


def test_devices_agree_as_their_measured_rankings_do(tmp_path: Path) -> None:
    run = read_run(two_targets(tmp_path, GOALS).path)
    pair, = agreements(run)
    rows = run.latency.to_pylist()
    by_arch = [{row["arch_id"]: row["latency_ms"] for row in rows if row["target_id"] == f"{label}-1"}
               for label in (CPU, PHONE)]
    shared = list(by_arch[1])
    expected = kendalltau([by_arch[0][a] for a in shared], [by_arch[1][a] for a in shared]).statistic
    assert (pair.first, pair.second, pair.networks) == (CPU, PHONE, 40)
    assert pair.kendall == pytest.approx(expected) and 0.3 < pair.kendall < pair.spearman < 1
    few = dataclasses.replace(run, latency=run.latency.slice(0, N + 2))
    assert np.isnan(agreements(few)[0].kendall), "two networks on both say nothing"


def test_budgets_that_hold_together_have_one_front(tmp_path: Path) -> None:
    goal = Goal("together", (CPU, PHONE), (1.0, 3.0), ((1.0, 10.0), (3.0, 30.0)))
    run = read_run(two_targets(tmp_path, [goal]).path)
    (label, view), = views(run)
    assert label == "together"
    entries = run.trials.column("latencies").to_pylist()
    expected = [max(cpu["latency_ms"], phone["latency_ms"] / 10) for cpu, phone in entries]
    assert view.numbers("latency_ms") == pytest.approx(expected)
    data = page_data(run, None, [])
    assert [one["label"] for one in data["views"]] == ["together"]
    assert json.dumps(data)
