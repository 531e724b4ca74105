"""Mistakes of a stranger: each is refused with one sentence, a non-zero exit code and no traceback."""
from __future__ import annotations

import logging
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.config import load_config
from orchestrator.controllers.catalogue import check_controller_options
from searchspaces.catalogue import make_space
from searchspaces.errors import ConfigError, ParetorayError, SpaceError

Capsys = pytest.CaptureFixture[str]


def told(monkeypatch: pytest.MonkeyPatch, capsys: Capsys, *arguments: str) -> str:
    """The one line on stderr of a command that must fail."""
    monkeypatch.setattr("sys.argv", ["paretoray", *arguments])
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)   # the test runner's handlers stay
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr()
    assert end.value.code == 2 and "Traceback" not in printed.err + printed.out
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), printed.err
    return lines[0]


@pytest.mark.parametrize(("override", "reason"), [
    ("delivery.alternatives=true", "true and false are no numbers"),
    ("seed=false", "true and false are no numbers"),
    ("supernet.learning_rate=true", "true and false are no numbers"),
    ("search.rollouts=true", "true and false are no numbers"),
    ("accuracy={source: training, epochs: true}", "true and false are no numbers"),
    ("data.limit=true", "true and false are no numbers"),
    ("budgets=[true]", "true and false are no numbers"),
    ("supernet.epochs=1180591620717411303424", "less than or equal to 100000"),
    ("search.validation_images=1180591620717411303424", "less than or equal to 10000000"),
    ("search.evaluations=1e300", "'search.evaluations'"),
    ("supernet.learning_rate=.nan", "finite number"),
    ("supernet.learning_rate=.inf", "finite number"),
    ("latency.time_out_s=.inf", "finite number"),
    ("delivery.margin=-.inf", "finite number"),
    ("supernet.learning_rate=-0.0", "greater than 0"),
    ("search.rollouts=0", "greater than or equal to 1"),
    ("search.rollouts=-3", "greater than or equal to 1"),
    ("seed=-1", "greater than or equal to 0"),
    ("name=''", "a run's name"),
    ("name=a/b", "a run's name"),
    ("name=..", "a run's name"),
    ("budgets=[1e400]", "more than an hour"),
    ("budgets=[nan]", "not a latency budget"),
    ("budgets=[-0.0]", "not a latency budget"),
    ("warm_start=quickstart", "valid list"),
    ("budgets=[" + "1," * 500 + "]", "at most 100 items"),
    ("supernet=", "valid dictionary"),
    ("supernet=5", "valid dictionary"),
    ("space={}", "'space.name' is missing"),
    ("space=''", "at least 1 character"),
    ("data.classes=true", "true and false are no numbers"),
    ("data.classes=-2", "greater than or equal to 2"),
    ("supernet=[", "no valid YAML"),
    ("seed=" + "9" * 5000, "no valid YAML"),
    ("supernet={1: 2}", "supernet"),
])
def test_a_bad_value_of_the_configuration(monkeypatch: pytest.MonkeyPatch, capsys: Capsys, tmp_path: Path,
                                          override: str, reason: str) -> None:
    (tmp_path / "mine.yaml").write_text("data: {name: digits}\n")
    line = told(monkeypatch, capsys, "search", str(tmp_path / "mine.yaml"), "--runs", str(tmp_path), "--set", override)
    assert reason in line and len(line) < 600
    assert list(tmp_path.iterdir()) == [tmp_path / "mine.yaml"]


@pytest.mark.parametrize(("arguments", "reason"), [
    (("search", "{}/mine.yaml", "--name", ""), "'' is not a usable run name"),
    (("search", "{}/mine.yaml", "--name", "a/../b"), "not a usable run name"),
    (("runs", "--runs", "{}/nowhere"), "there is no folder"),
    (("report", "x", "--runs", "{}/nowhere"), "there is no run 'x'"),
    (("report", "", "--runs", "{}"), "not a usable run name"),
    (("resume", "../up", "--runs", "{}"), "holds no config.yaml"),
    (("generate", "x", "--budget", "nan", "--runs", "{}"), "'nan' is not a latency budget"),
    (("generate", "x", "--budget", "1e999", "--runs", "{}"), "more than an hour"),
    (("search", "{}"), "cannot read the configuration"),
    (("search", "{}/binary.yaml"), "not valid YAML"),
    (("search", "{}/deep.yaml"), "not valid YAML"),
    (("search", "{}/list.yaml"), "not a mapping"),
])
def test_a_bad_argument(monkeypatch: pytest.MonkeyPatch, capsys: Capsys, tmp_path: Path, arguments: tuple[str, ...],
                        reason: str) -> None:
    (tmp_path / "mine.yaml").write_text("data: digits\n")
    (tmp_path / "binary.yaml").write_bytes(b"seed: \xff\xfe\x00")
    (tmp_path / "deep.yaml").write_text("seed: " + "[" * 5000)
    (tmp_path / "list.yaml").write_text("- seed\n")
    assert reason in told(monkeypatch, capsys, *(a.replace("{}", str(tmp_path)) for a in arguments))


@pytest.mark.parametrize(("name", "option", "value"), [
    ("pnag", "budgets", True), ("pnag", "evaluator", {"epochs": True}), ("fnas", "batch", False),
    ("pnag", "range_ms", [True, 2.0]), ("nsga2", "population", True), ("evolution", "sample", 2**70),
    ("pnag", "generator", {"reward_scale": float("inf")}),
])
def test_options_of_controllers(name: str, option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"option '{option}"):
        check_controller_options(name, {option: value})


@pytest.mark.parametrize("value", [True, 2**70, 16.0, "16", float("nan"), [16, True]])
def test_options_of_spaces(value: object) -> None:
    with pytest.raises(ConfigError, match="option 'resolution'"):
        make_space("mobilenetv3-s16", classes=10, channels=1, options={"resolution": value})


BODY = '''
from paretoray import INPUT, Choice, GraphBuilder, SearchSpace


class Mine(SearchSpace):
    {init}

    @property
    def space_id(self):
        return "mine"

    @property
    def choices(self):
        return {choices}

    def graph(self, tokens_T):
        builder = GraphBuilder(self.channels, 8)
        {begin}
        x = builder.conv(INPUT, "conv", {width}, 3)
        {layers}
        x = builder.flatten(builder.global_pool(x, "pool"), "flat")
        builder.linear(x, "linear", self.classes)
        return {result}
'''
WHOLE = {"init": "pass", "choices": '(Choice("width", "width", (8, 16)),)', "width": "(8, 16)[tokens_T[0]]",
         "begin": 'builder.begin_block("all", stage=0, label="all")', "layers": "pass", "result": "builder.build()"}
BROKEN = [
    ({"layers": 'x = builder.activation(x, "act", "hardswish")'}, "'hardswish'; did you mean 'h_swish'? allowed are"),
    ({"layers": 'x = builder.add((x, INPUT), "sum")'}, "inputs of different shapes"),
    ({"layers": 'x = builder.concat([x, x], "cat")'}, "a tuple of node names"),
    ({"layers": 'x = builder.pool(x, "p", "mean", 3)'}, "allowed are avg_pool, max_pool"),
    ({"layers": 'x = builder.conv(x, "conv", 8, 3)'}, "two nodes are named 'conv'"),
    ({"layers": 'x = builder.conv("cnov", "b", 8, 3)'}, "did you mean 'conv'?"),
    ({"layers": 'x = builder.conv(x, "b", 9, 3, groups=2)'}, "2 groups, which must divide"),
    ({"layers": 'x = builder.linear(x, "b", 9)'}, "flatten it first"),
    ({"layers": 'x = builder.mul(x, INPUT, "m")'}, "one value per channel"),
    ({"layers": 'x = builder.pool(x, "p", "avg_pool", 20, padding=0)'}, "would have shape"),
    ({"layers": "x = undefined"}, "NameError: name 'undefined' is not defined"),
    ({"width": "tokens_T[0] * 4.0 + 8"}, "it must be an int of at least 1"),
    ({"width": "0"}, "out is 0 (int)"),
    ({"begin": "pass"}, "call begin_block before the first node"),
    ({"result": "builder"}, "it must return a Graph"),
    ({"result": "None"}, "it must return a Graph"),
    ({"choices": '[Choice("width", "width", (8, 16))]'}, "it must be a tuple of one or more Choice"),
    ({"choices": "()"}, "it must be a tuple of one or more Choice"),
    ({"choices": '(Choice("width", "width", 8),)'}, "tuple of 1 to 127 values"),
    ({"choices": '(Choice("width", "width"),)'}, "missing 1 required positional argument: 'values'"),
    ({"init": "def __init__(self, classes=10, channels=3): pass"}, "must call super().__init__(classes, channels)"),
    ({"init": "def __init__(self, colour=1): super().__init__()"}, "unexpected keyword argument 'classes'"),
]


@pytest.mark.parametrize(("change", "reason"), BROKEN, ids=[reason[:40] for _, reason in BROKEN])
def test_a_broken_space_names_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str],
                                       reason: str) -> None:
    text = BODY.format(**WHOLE | change)
    module = own(tmp_path, monkeypatch, text)
    with pytest.raises(ParetorayError) as error:
        make_space(f"{module}:Mine", classes=10, channels=3, options={})
    assert reason in str(error.value) and "\n" not in str(error.value)
    part = next(iter(change))
    place = text[:text.index(change[part])].count("\n") + 1 if change[part] not in ("pass", "()") else 1
    number = int(str(error.value).rpartition(", line ")[2].partition(":")[0].rstrip(")"))
    assert f"{module}.py, line" in str(error.value) and abs(number - place) <= 24
    if "x = builder." in change.get("layers", "") and "cnov" not in reason:
        assert number == place


def own(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> str:
    """A module of its own name, importable; that name."""
    module = "own" + "".join(c for c in folder.name if c.isalnum())
    (folder / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    return module


def test_search_and_check_say_it_before_anything_starts(monkeypatch: pytest.MonkeyPatch, capsys: Capsys,
                                                        tmp_path: Path) -> None:
    module = own(tmp_path, monkeypatch, BODY.format(**WHOLE | BROKEN[0][0]))
    (tmp_path / "mine.yaml").write_text(f"data: digits\nspace: '{module}:Mine'\n")
    lines = [told(monkeypatch, capsys, "search", str(tmp_path / "mine.yaml"), "--runs", str(tmp_path / "runs")),
             told(monkeypatch, capsys, "check", f"{module}:Mine")]
    assert all("'hardswish'; did you mean 'h_swish'" in line and f"{module}.py, line " in line for line in lines)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("text", "reason"), [
    ("x = (1,\n", "is not valid Python"),
    ("1 / 0\n", "raised ZeroDivisionError: division by zero (at "),
    ("from paretoray import LatencyTarget\nclass Mine(LatencyTarget): pass\n", "raised TypeError"),
    ("from paretoray import Controller\nclass Mine(Controller): pass\n", "lacks generate, load_state_dict"),
    ("def Mine():\n    return [][0]\n", "raised IndexError: list index out of range (at "),
    ("from paretoray import SearchSpace\nclass Mine(SearchSpace): pass\n", "raised TypeError: Can't instantiate"),
])
def test_other_plug_ins(monkeypatch: pytest.MonkeyPatch, capsys: Capsys, tmp_path: Path, text: str,
                        reason: str) -> None:
    module = own(tmp_path, monkeypatch, text)
    line = told(monkeypatch, capsys, "check", f"{module}:Mine")
    assert reason in line and f"{module}.py, line " in line


def test_a_whole_space_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = own(tmp_path, monkeypatch, BODY.format(**WHOLE))
    assert make_space(f"{module}:Mine", classes=10, channels=3, options={}).space_id == "mine"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpaceError, match="no supernet"):
        make_space(f"{module}:Mine", classes=10, channels=3, options={}).make_supernet()
    (tmp_path / "mine.yaml").write_text("seed: 1\n")
    assert load_config("mine.yaml").seed == 1
