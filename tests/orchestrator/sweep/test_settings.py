"""The file of a sweep: what it leads to, and what is refused before anything starts."""
from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.record.store import RunStore
from orchestrator.sweep.folder import member_name
from orchestrator.sweep.settings import SweepSettings, load_sweep, parse_sweep
from orchestrator.sweep.sweep import with_paths
from searchspaces.errors import ConfigError, StoreError
from tests.orchestrator.test_mistakes import Capsys, told

BASE = {"data": "digits"}
EVALUATIONS = "search.evaluations"


def sweep(**keys: Any) -> SweepSettings:
    return parse_sweep({"base": BASE} | keys, "mine.yaml")


def test_a_grid_is_every_combination() -> None:
    settings = sweep(over={EVALUATIONS: [10, 20], "controller": ["random", {"name": "pnag", "initial": 0.5}]})
    points = settings.points()
    assert settings.count == len(points) == 4
    assert points[1] == {EVALUATIONS: 10, "controller": {"name": "pnag", "initial": 0.5}}
    configs = [settings.config(values) for values in points]
    assert [config.search.evaluations for config in configs] == [10, 10, 20, 20]
    assert configs[3].controller.options == {"initial": 0.5} and settings.base == BASE


def test_the_shipped_file() -> None:
    settings = load_sweep(Path(__file__).parents[3] / "configs" / "sweep.yaml", ["base.search.evaluations=9"])
    assert settings.count == 4 and settings.stop_early is not None
    assert [settings.config(values).search.evaluations for values in settings.points()] == [9] * 4


def test_what_is_drawn_lies_in_its_range_and_is_the_same_again() -> None:
    over = {"supernet.learning_rate": {"log_uniform": [1e-4, 1.0]}, EVALUATIONS: {"integers": [5, 7]},
            "delivery.margin": {"uniform": [0.1, 0.2]}, "seed": [3, 4]}
    settings = sweep(over=over, search="random", samples=300, seed=1)
    points = settings.points()
    assert points == sweep(over=over, search="random", samples=300, seed=1).points() != \
        sweep(over=over, search="random", samples=300, seed=2).points()
    assert {point[EVALUATIONS] for point in points} == {5, 6, 7} and {point["seed"] for point in points} == {3, 4}
    assert all(0.1 <= point["delivery.margin"] <= 0.2 for point in points)
    decades = [math.floor(math.log10(point["supernet.learning_rate"])) for point in points]
    assert set(decades) == {-4, -3, -2, -1} and all(50 < decades.count(decade) < 100 for decade in set(decades))


def test_probes_hold_every_extreme_of_what_optuna_may_suggest() -> None:
    settings = sweep(over={EVALUATIONS: {"integers": [5, 7]}, "seed": [1, 2, 3]}, search="optuna", samples=9)
    probes = settings.probes()
    assert settings.points() == [] and settings.count == 9
    assert {probe[EVALUATIONS] for probe in probes} == {5, 7} and {probe["seed"] for probe in probes} == {1, 2, 3}


@pytest.mark.parametrize(("keys", "reason"), [
    ({"over": {"search.evalutions": [1]}}, "unknown key 'search.evalutions'; did you mean 'evaluations'?"),
    ({"over": {"serch": [1]}}, "unknown key 'serch'; did you mean 'search'?"),
    ({"over": {EVALUATIONS: [5, 0]}}, "'search.evaluations' = 0 is not allowed"),
    ({"over": {"target.batch": [1], "target": ["onnx_cpu"], "targets": [["onnx_cpu"]]}}, "are both given"),
    ({"over": {}}, "at least 1 item"),
    ({"ovr": {"seed": [1]}}, "unknown key 'ovr'; did you mean 'over'?"),
    ({"over": {"seed": []}}, "at least 1 item"),
    ({"over": {"seed": [1, 1]}}, "a value is listed twice"),
    ({"over": {"seed": 1}}, "valid dictionary"),
    ({"over": {"seed": {"unifrom": [0, 1]}}}, "unknown key 'over.seed.unifrom'; did you mean 'uniform'?"),
    ({"over": {"seed": {"integers": [0, 1], "choice": [1]}}}, "choice and integers given; write"),
    ({"over": {"seed": {}}}, "nothing given; write"),
    ({"over": {"seed": {"integers": [3, 1]}}}, "integers is [3, 1]; its first end is the smaller one"),
    ({"over": {"seed": {"log_uniform": [0, 1]}}}, "the smaller one and above 0"),
    ({"over": {"seed": {"integers": [0, 3]}}}, "tries every combination of lists, and 'seed' is a range"),
    ({"over": {"seed": [1, 2]}, "samples": 3}, "has 2 combinations and takes no samples"),
    ({"over": {"seed": list(range(40)), EVALUATIONS: list(range(1, 40))}}, "1560 combinations, at most 1000"),
    ({"over": {"seed": [1]}, "search": "random"}, "needs the number of searches; give samples"),
    ({"over": {"seed": {"integers": [-1, 3]}}, "search": "random", "samples": 40}, "'seed' = -1 is not allowed"),
    ({"over": {EVALUATIONS: {"integers": [0, 3]}}, "search": "optuna", "samples": 2}, "'search.evaluations' = 0"),
    ({"over": {"seed": [1]}, "parallel": 0}, "greater than or equal to 1"),
    ({"over": {"seed": [1]}, "stop_early": {"after": 3, "factor": 1}}, "greater than 1"),
    ({"over": {"seed": [1]}, "stop_early": {"grace": 3}}, "unknown key 'stop_early.grace'; known keys here: after"),
    ({"over": {"seed": [1]}, "name": "a/b"}, "a sweep's name"),
    ({"over": {"name.x.y": [1]}, "base": {"name": "n"}}, "over.name.x.y: 'name' is a value, not a section"),
])
def test_mistakes_are_one_sentence(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        sweep(**keys)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_overrides_reach_the_sweep_and_the_file_of_its_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"base": str(tmp_path / "base.yaml"), "over": {"seed": [1]}}))
    overrides = ["base.data.limit=70", "parallel=3", "over.seed=[4, 5]", f"over.{EVALUATIONS}=[7]"]
    settings = load_sweep(tmp_path / "sweep.yaml", overrides)
    assert (settings.parallel, settings.points()) == (3, [{"seed": 4, EVALUATIONS: 7}, {"seed": 5, EVALUATIONS: 7}])
    (tmp_path / "other.yaml").write_text("data: scattered_digits")
    other = load_sweep(tmp_path / "sweep.yaml", [f"base={tmp_path / 'other.yaml'}"])
    assert other.base == {"data": "scattered_digits"}
    config = settings.config({"seed": 5})
    assert (config.seed, config.data.name, config.data.limit) == (5, "digits", 70)


@pytest.mark.parametrize(("text", "arguments", "reason"), [
    ("base: nowhere.yaml\nover: {seed: [1]}\n", (), "cannot read the configuration nowhere.yaml"),
    ("over: {seed: [1]}\n", (), "'base' is missing; give the configuration that all searches share"),
    ("base: {data: digits}\nover: {serch.rollouts: [1]}\n", (), "unknown key 'serch'; did you mean 'search'?"),
    ("base: {data: digits}\nover: {space.widht: [1]}\n", (), "widht"),
    ("base: {data: digits}\nover: {controller: [random, pnga]}\n", (), "no controller 'pnga'; did you mean 'pnag'?"),
    ("base: {data: digits}\nover: {target: [cpu_onnx]}\n", (), "cpu_onnx"),
    ("base: {data: digits}\nover: {seed: [1]}\n", ("--name", "a/b"), "not a usable run name"),
    ("base: {data: digits}\nover: {seed: [1]}\n", ("--resume", "--name", "b"), "leave --name and --set out"),
])
def test_a_sweep_that_cannot_work_leaves_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Capsys, tmp_path: Path,
                                                 text: str, arguments: tuple[str, ...], reason: str) -> None:
    (tmp_path / "sweep.yaml").write_text(text)
    runs = tmp_path / "runs"
    assert reason in told(monkeypatch, capsys, "sweep", str(tmp_path / "sweep.yaml"), "--runs", str(runs), *arguments)
    assert not runs.exists()


@pytest.mark.parametrize(("arguments", "reason"), [
    ((), "needs the YAML file of a sweep"),
    (("--resume",), "is left to go on with"),
    (("--resume", "mine"), "there is no sweep 'mine'"),
])
def test_nothing_to_go_on_with(monkeypatch: pytest.MonkeyPatch, capsys: Capsys, tmp_path: Path,
                               arguments: tuple[str, ...], reason: str) -> None:
    assert reason in told(monkeypatch, capsys, "sweep", *arguments, "--runs", str(tmp_path))


def test_runs_that_searches_begin_with_are_told_by_their_path(tmp_path: Path) -> None:
    """In the folder of a sweep their names would mean something else."""
    for name in ("one", "two"):
        RunStore.create(tmp_path, name, "seed: 1", {})
    settings = with_paths(sweep(base=BASE | {"warm_start": ["one"]}, over={"warm_start": [["one"], ["one", "two"]],
                                                                          "seed": [1]}), tmp_path)
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert settings.base["warm_start"] == [one]
    assert [settings.config(values).warm_start for values in settings.points()] == [[one], [one, two]]
    with pytest.raises(StoreError, match="there is no run 'three'"):
        with_paths(sweep(over={"warm_start": [["three"]]}), tmp_path)


def test_names_tell_the_values() -> None:
    assert member_name(3, {"controller": "pnag", "rate": 0.05123456}) == "003-pnag-0.05123"
    assert member_name(12, {"controller": {"name": "my:Class"}, "path": "../x"}) == "012-name-my-Class-x"
    long = member_name(1000, {"a": "x" * 200})
    assert len(long) <= 60 and long.startswith("1000-xxx")
