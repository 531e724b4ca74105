"""What is compared while searches run: rungs, the one reference, hypervolumes from what is on disk."""
from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from orchestrator.frontier import hypervolume
from orchestrator.record.partfolder import PartFolder
from orchestrator.record.store import TRIAL_SCHEMA, RunStore
from orchestrator.sweep.folder import Member, SweepFolder, wait_until_free
from orchestrator.sweep.recorded import Recorded, State, at, reference_ms, rungs, settle_reference
from orchestrator.sweep.settings import StopEarly, parse_sweep
from orchestrator.sweep.trial import EVALUATIONS, HYPERVOLUME
from orchestrator.sweep.truth import Truth
from orchestrator.sweep.tuning import Names, halving, optuna_search, suggestion_of, values_of
from searchspaces.errors import StoreError

SEEDS = {"base": {"data": "digits"}, "over": {"seed": [0, 1, 2]}}


def record(run: Path, rows: list[tuple[float | None, float | None]]) -> None:
    """Trials of latency in ms and accuracy, as one more part."""
    parts = PartFolder(run / "trials", TRIAL_SCHEMA)
    empty = dict.fromkeys(TRIAL_SCHEMA.names)
    parts.append([empty | {"sequence": parts.rows + i, "latency_ms": ms, "accuracy": accuracy}
                  for i, (ms, accuracy) in enumerate(rows)])


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    found = SweepFolder.create(tmp_path, "s", parse_sweep(SEEDS, "test"))
    found.lock()
    return found


def test_rungs() -> None:
    assert list(islice(rungs(4, 3), 4)) == [4, 12, 36, 108]
    assert list(islice(rungs(5, 1.5), 4)) == [5, 8, 12, 17]      # 7.5, 11.25 and 16.875 are reached there


def test_hypervolume_grows_with_the_parts_and_is_a_share_of_one_reference(folder: SweepFolder) -> None:
    run = folder.path / "a"
    record(run, [(2.0, 0.5), (None, None)])
    recorded = Recorded(folder.path, "a")
    recorded.look()
    assert recorded.history == [] and at(recorded.history, 3) == 0.0    # nothing bounds it yet
    (run / "state.json").write_text(json.dumps({"targets": {"x": {"slowest_ms": 4.0}, "y": {"slowest_ms": 9.0}}}))
    recorded.look()
    assert recorded.history == [0.25, 0.25] and reference_ms(folder.path) == 4.0
    record(run, [(1.0, 0.4), (3.0, 0.9), (5.0, 1.0)])
    recorded.look()
    points = np.array([[2.0, 0.5], [1.0, 0.4], [3.0, 0.9], [5.0, 1.0]])
    assert recorded.history[-1] == pytest.approx(hypervolume(points[:, 0], points[:, 1], 4.0) / 4.0)
    assert [at(recorded.history, n) for n in (0, 1, 3, 99)] == [0.0, 0.25, recorded.history[2], recorded.history[-1]]
    settle_reference(folder.path, 7.0, "late")
    assert reference_ms(folder.path) == 4.0 and not list(folder.path.glob("*.part"))


def test_stopping_goes_on_from_what_settled_searches_reached(folder: SweepFolder) -> None:
    """A resumed sweep stops the same as one that was never interrupted."""
    settle_reference(folder.path, 2.0, "given")
    good = [(1.0, 0.2), (1.0, 0.4), (1.0, 0.6), (1.0, 0.8)]
    for name, state, rows, evaluations in (("a", State.DONE, good, 4), ("b", State.STOPPED, good[:2], 2),
                                           ("c", State.RUNNING, good, 0)):
        record(folder.path / name, rows)
        folder.add(Member(name, {"seed": 0}, state, evaluations))
    scheduler: Any = halving(SweepFolder(folder.path), StopEarly(after=2, factor=2))

    def decision(evaluations: int, value: float) -> str:
        trial = Trial("MemberTrial", stub=True)
        scheduler.on_trial_add(None, trial)
        return str(scheduler.on_trial_result(None, trial, {EVALUATIONS: evaluations, HYPERVOLUME: value}))

    assert decision(1, 0.0) == TrialScheduler.CONTINUE
    assert decision(2, 0.199) == TrialScheduler.STOP        # at two evaluations both had 0.4 / 2
    assert decision(4, 0.399) == TrialScheduler.STOP        # at four the first had 0.8 / 2; the other was stopped
    assert decision(4, 0.41) == TrialScheduler.CONTINUE


def test_optuna_is_told_of_settled_searches_and_tries_open_ones_again(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    settings = parse_sweep({"base": {"data": "digits"}, "search": "optuna", "samples": 5, "over": {
        "controller": ["random", {"name": "pnag"}], "supernet.learning_rate": {"log_uniform": [0.01, 1.0]},
        "search.evaluations": {"integers": [5, 9]}}}, "test")
    done, begun = ({"controller": {"name": "pnag"}, "supernet.learning_rate": 0.5, "search.evaluations": 7},
                   {"controller": "random", "supernet.learning_rate": 0.02, "search.evaluations": 5})
    assert suggestion_of(settings, done) == done | {"controller": 1}
    assert values_of(settings, suggestion_of(settings, done)) == done
    folder = SweepFolder.create(tmp_path, "s", settings)
    folder.add(Member("001-x", done, State.DONE, 7, 0.8))
    folder.add(Member("002-y", begun, State.RUNNING))
    search: Any = optuna_search(folder, settings)
    names = Names(folder, settings)
    first, second = (search.suggest(f"t{i}") for i in range(2))
    assert values_of(settings, first) == begun and names(_trial(first)) == "002-y"
    assert settings.config(values_of(settings, second)) and names(_trial(second)).startswith("003-")
    assert folder.member(folder.members[-1].name).values == values_of(settings, second)
    assert [t.value for t in search._ot_study.trials if t.value is not None] == [0.8]


def _trial(config: dict[str, Any]) -> Trial:
    return Trial("MemberTrial", config=config, stub=True)


def test_regret_against_brute_force() -> None:
    tokens = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=np.int8)
    truth = Truth({row.tobytes(): i for i, row in enumerate(tokens)}, np.array([1.0, 2.0, 3.0, 4.0]),
                  np.array([0.5, 0.7, 0.6, 0.9]))
    met = {"budget_ms": 3.0, "tokens": [1, 0], "feasible": True}        # 0.7 - 0.6
    missed = {"budget_ms": 2.5, "tokens": [1, 1], "feasible": True}     # over its budget: 0.7 - 0
    none = {"budget_ms": 1.5, "tokens": [], "feasible": False}          # 0.5 - 0
    assert truth.regret([met]) == pytest.approx(0.1)
    assert truth.regret([met, missed, none]) == pytest.approx((0.1 + 0.7 + 0.5) / 3)
    assert truth.regret([]) is None and truth.regret([met | {"budget_ms": 0.5}]) is None


def test_the_folder_of_a_sweep(folder: SweepFolder, tmp_path: Path) -> None:
    folder.add(Member("001-0", {"seed": 0}))
    folder.update("001-0", state=State.DONE, evaluations=5)
    again = SweepFolder.open(tmp_path, "s")
    assert again.members == [Member("001-0", {"seed": 0}, State.DONE, 5)] and again.settings == folder.settings
    with pytest.raises(StoreError, match="'s' exists already in .*; go on with 'paretoray sweep --resume s --runs"):
        SweepFolder.create(tmp_path, "s", folder.settings)
    with pytest.raises(StoreError, match="is being driven by another process"):
        again.lock()
    with pytest.raises(StoreError, match="there is no sweep 't' in .*; known sweeps: s"):
        SweepFolder.open(tmp_path, "t")
    run = RunStore.create(tmp_path, "run", "seed: 1", {})
    with pytest.raises(StoreError, match="'run' is a single run, not a sweep"):
        SweepFolder.open(tmp_path, "run")
    run.lock()
    wait_until_free(run.path, 0.3)      # bounded
