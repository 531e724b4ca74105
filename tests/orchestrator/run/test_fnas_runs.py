"""Whole small FNAS runs on real parts: killed in the middle of a batch, with learners of their own, warm-started.

Every driver is its own process, as for a user. Networks are tiny, and the knowledge pool's gate is set to open early.
"""
from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.knowledge.entry import Entry
from actors.knowledge.pool import KnowledgePool
from actors.knowledge.rules import Gate, GateSettings, best_match, block_id
from orchestrator.config import load_config
from orchestrator.controllers.catalogue import make_controller
from orchestrator.controllers.controller import Observation, Task
from orchestrator.controllers.fnas.controller import Fnas
from orchestrator.data.accuracy import TrainingAccuracy
from orchestrator.prediction.predictor import LatencyPredictor
from orchestrator.record.goals import read_goals
from orchestrator.record.store import RunStore, Trial
from orchestrator.services.context import data_and_space
from orchestrator.services.panel import observation
from orchestrator.services.states import load_state
from orchestrator.services.warmstart import earlier_runs, with_latencies
from searchspaces.mnas.space import MnasS16
from searchspaces.space import SearchSpace
from tests.orchestrator.data.test_accuracy import cells_table, check_models
from tests.orchestrator.run.test_search import finish, parts, ray_workers, stage, start, when

TINY = """
seed: 3
data: {name: digits, limit: 300}
space: {name: mnas-s16, width: 0.25, repeats: [1, 1, 1, 1, 1, 1, 1]}
target: onnx_cpu
budgets: {count: 2}
latency: {initial: 10, maximum: 10, visits: 1}
accuracy: {source: training, epochs: 1, batch_size: 32, knowledge: own, knowledge_window: 42, knowledge_hits: 0.6,
           workers: 2}
controller: {name: fnas, batch: 8, in_flight: 3, policy: {hidden: 16}, critic: {least_trained: 10, hidden: 16}}
search: {evaluations: 28}
delivery: {alternatives: 1, retrain_epochs: 1}
"""


def details(trials: list[Trial]) -> list[dict[str, Any]]:
    return [json.loads(trial.details or "{}") for trial in trials]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    found = (json.loads(line) for line in (run / "events.jsonl").read_text().splitlines())
    return [event for event in found if event["kind"] == kind]


def replayed(run: Path, trials: list[Trial], warm_start: bool = True) -> Fnas:
    """A fresh controller that has observed these trials; it learns in this process."""
    store, config = RunStore(run), load_config(run / "config.yaml")
    _, space = data_and_space(config)
    predictor = LatencyPredictor.from_state(space, load_state(store, "predictor"))
    goal, = read_goals(store, config)
    earlier = tuple(with_latencies(e, predictor) for e in earlier_runs(store, config, space, goal) if warm_start)
    task = Task(goal.budgets_ms, config.search.evaluations, config.seed, predictor, earlier)
    options = config.controller.options
    options["policy"] = options["policy"] | {"num_learners": 0}
    controller = make_controller("fnas", space, task, options)
    assert isinstance(controller, Fnas)
    controller.observe([observation(trial, trial.latency_ms or math.nan) for trial in trials])
    if trials:
        controller.generate([1.0])
    return controller


def check_state(run: Path) -> None:
    """What the run saved at the end of its search is what its log implies: policy, critic and buffer."""
    searched = trials_of(run)[:load_config(run / "config.yaml").search.evaluations]
    saved, expected = load_state(RunStore(run), "controller"), replayed(run, searched).state_dict()
    assert saved.keys() == expected.keys() and {"buffer.tokens", "buffer.rewards"} <= saved.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(np.asarray(saved[name]), np.asarray(value), atol=1e-4, err_msg=name)


def trials_of(run: Path) -> list[Trial]:
    return RunStore(run).read_trials()


def check_pool(run: Path, space: SearchSpace) -> None:
    """The blocks of every trained network and no others, each with the training that the log says."""
    trained: dict[Any, set[tuple[float, float]]] = {}
    for trial, facts in zip(trials_of(run), details(trials_of(run)), strict=True):
        for block in space.graph(np.array(trial.tokens, np.int8)).blocks:
            trained.setdefault(block_id(block), set()).add((facts["lineage_min"], facts["lineage_max"]))
    entries = KnowledgePool(run / "knowledge", space, 1)._store.entries()
    assert entries.keys() == trained.keys()
    for block, entry in entries.items():
        assert any(low <= entry.lineage <= high for low, high in trained[block]), block


def check_batches(run: Path) -> tuple[set[int], set[int]]:
    """No batch mixes warm and cold starts, and no cold one comes after a warm one; the numbers of both kinds."""
    kinds: dict[int, set[float]] = {}
    for facts in details(trials_of(run)):
        if "batch" in facts:
            kinds.setdefault(int(facts["batch"]), set()).add(facts["warm"])
    assert all(len(kind) == 1 for kind in kinds.values()), kinds
    warm = {batch for batch, kind in kinds.items() if kind == {1.0}}
    cold = kinds.keys() - warm
    assert max(cold, default=-1) < min(warm, default=10**9)
    return warm, cold


@pytest.mark.soak
def test_killed_in_a_batch_and_resumed_is_what_its_log_implies(tmp_path: Path) -> None:
    """A trainer dies, then the driver, both with samples in flight; a pool that gets ready meanwhile waits for the
    next batch."""
    (tmp_path / "c.yaml").write_text(TINY)
    run, options = tmp_path / "tiny", ("--runs", str(tmp_path))
    process = start("search", str(tmp_path / "c.yaml"), "--name", "tiny", *options)
    when(process, lambda: stage(run) == "search" and parts(run / "trials") >= 2)
    when(process, lambda: bool(ray_workers(process.pid, "RolloutActor")))
    ray_workers(process.pid, "RolloutActor")[0].kill()
    when(process, lambda: bool(started(run) - {trial.arch_id for trial in trials_of(run)}) and len(trials_of(run)) >= 9)
    process.send_signal(signal.SIGKILL)
    process.wait()
    recorded, begun = trials_of(run), json.loads((run / "checkpoints" / "knowledge.json").read_text())["batch_of"]
    unfinished = begun.keys() - {trial.arch_id for trial in recorded}
    assert unfinished, "nothing was in flight"
    process = start("resume", "tiny", *options)
    output = finish(process)
    assert process.returncode == 0, output
    trials = trials_of(run)
    assert trials[:len(recorded)] == recorded
    assert [t.sequence for t in trials] == list(range(len(trials)))
    assert len({t.arch_id for t in trials}) == len(trials) >= 28
    assert not [t.error for t in trials if t.error]
    again = {t.arch_id: d for t, d in zip(trials, details(trials), strict=True) if t.arch_id in unfinished}
    assert again.keys() == unfinished, "what was in flight is trained after all, in its old batch"
    assert {a: d["batch"] for a, d in again.items()} == {a: begun[a] for a in unfinished}
    check_state(run)
    _, space = data_and_space(load_config(run / "config.yaml"))
    check_pool(run, space)
    warm, cold = check_batches(run)
    assert warm and cold, "the pool was switched on in the course of the run"
    assert events(run, "knowledge")[-1]["active"] == 1
    logged = events(run, "batch")
    assert sorted(e["batch"] for e in logged) == sorted(warm | cold) and {e["warm"] for e in logged} == {0.0, 1.0}
    assert logged[-1]["lineage_max"] > logged[0]["lineage_max"]
    check_models(run, epochs=1)


def started(run: Path) -> set[str]:
    """Architectures with an epoch on disk and no result yet."""
    return {path.parent.name for path in (run / "checkpoints" / "proxy").glob("*/epoch-*")}


@pytest.mark.soak
def test_learners_on_the_cluster_then_models_without_one_then_a_warm_start(tmp_path: Path) -> None:
    """The second run starts from the first: its buffer is full from the first batch on, and its critic has learnt."""
    options = ("--runs", str(tmp_path))
    (tmp_path / "c.yaml").write_text(cells_table(tmp_path / "t.parquet", unit=0.009).replace(
        "controller: random", "controller: {name: fnas, batch: 8, policy: {hidden: 16, num_learners: 1}}"))
    process = start("search", str(tmp_path / "c.yaml"), "--name", "first", *options, "--set", "search.evaluations=24")
    output = finish(process)
    assert process.returncode == 0, output
    first = tmp_path / "first"
    check_state(first)
    assert events(first, "controller")[-1]["iteration"] >= 3
    check_models(first, epochs=1)
    budget = read_goals(RunStore(first), load_config(first / "config.yaml"))[0].budgets_ms[-1]
    process = start("generate", "first", "--budget", f"{1.01 * budget}ms", *options)
    output = finish(process)
    assert process.returncode == 0, output

    process = start("search", str(tmp_path / "c.yaml"), "--name", "second", *options, "--set", "warm_start=[first]",
                    "--set", "controller.policy.num_learners=0", "--set", "seed=4")
    output = finish(process)
    assert process.returncode == 0, output
    second = tmp_path / "second"
    check_state(second)
    with_first, without = (replayed(second, [], warm_start) for warm_start in (True, False))
    assert (len(with_first.propose(8)), len(without.propose(8))) == (4, 8)
    without = replayed(second, trials_of(second)[:12], warm_start=False)
    saved = load_state(RunStore(second), "controller")
    assert not np.array_equal(np.sort(saved["buffer.rewards"]), np.sort(without.state_dict()["buffer.rewards"]))


@pytest.mark.soak
def test_the_small_search_is_long_enough_for_its_pool(tmp_path: Path) -> None:
    """configs/fnas_digits.yaml with made-up accuracies and without trainings: at least a sixth of them start warm."""
    config = load_config(Path(__file__).parents[3] / "configs" / "fnas_digits.yaml")
    assert isinstance(config.accuracy, TrainingAccuracy) and config.accuracy.knowledge == "own"
    space, evaluations = MnasS16(classes=10, channels=1), config.search.evaluations
    gate = Gate(None, GateSettings(config.accuracy.knowledge_window, config.accuracy.knowledge_hits))
    weights_D = 0.02 * np.random.default_rng(1).standard_normal(space.features(space.extremes()).shape[1])
    controller = make_controller("fnas", space, Task((1e9,), evaluations, 0), config.controller.options)
    entries: dict[Any, Entry] = {}
    trained = 0
    while not gate.on and trained < evaluations:
        for proposal in controller.propose(2):
            blocks = space.graph(proposal.tokens).blocks
            gate.record([best_match(block, entries) is not None for block in blocks if block.key])
            entries |= {block_id(b): Entry(*block_id(b), "", "", 1, 40, 40, trained) for b in blocks}
            value = float(np.tanh(space.features(proposal.tokens[None])[0] @ weights_D))
            controller.observe([Observation(proposal.tokens, 0.8 + 0.1 * value, 1.0)])
            trained += 1
    assert gate.on and trained < evaluations * 5 / 6, trained
