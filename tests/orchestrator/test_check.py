"""`paretoray check`: of every kind of plug-in a good one passes and a broken one is refused, with a reason."""
from __future__ import annotations

import logging

import pytest

from orchestrator.cli import main

HERE = "tests.orchestrator.plugins"


def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and what was printed."""
    monkeypatch.setattr("sys.argv", ["paretoray", "check", *arguments])
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)  # the test runner's handlers stay
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    return int(end.value.code or 0), " ".join((printed.out + printed.err).split())


@pytest.mark.parametrize(("kind", "good"), [
    ("search space", ("tests.actors.tinyspace:TinySpace", "--set", "resolution=6")),
    ("latency target", (f"{HERE}:Weighing", "--set", "unit=0.001")),
    ("controller", (f"{HERE}:Lazy", "--set", "most=3")),
    ("dataset", (f"{HERE}:Stripes", "--set", "limit=20", "--set", "classes=[down, across]")),
    ("dataset", (f"{HERE}:stripes",)),
])
def test_good_ones_pass(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str,
                        good: tuple[str, ...]) -> None:
    assert check(monkeypatch, capsys, *good) == (0, f"{good[0]} passes the {kind} conformance suite")


@pytest.mark.parametrize(("broken", "reason"), [
    ((f"{HERE}:BrokenSpace",), "of the search space contract"),
    ((f"{HERE}:BrokenTarget", "--set", "unit=0.001"), "samples are not in the order of the handles"),
    ((f"{HERE}:BrokenController",), "proposed an architecture that was observed already"),
    ((f"{HERE}:BrokenDataset",), "40 images but 39 labels"),
    ((f"{HERE}:NeedyDataset",), "needs the argument 'folder'"),
    ((f"{HERE}:Nothing",), "nor a dataset, which is a function, or a class with __call__"),
    ((f"{HERE}:Weighing",), "needs the option 'unit' (float)"),
    ((f"{HERE}:Weighing", "--set", "units=1.0"), "did you mean 'unit'?"),
    ((f"{HERE}:Lazy", "--set", "most=few"), "option 'most' of controller"),
    ((f"{HERE}:Stripes", "--set", "limits=20"), "unknown key 'data.limits'; did you mean 'limit'?"),
    ((f"{HERE}:Stripes", "--set", "limit"), "not of the form key=value"),
])
def test_broken_ones_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                 broken: tuple[str, ...], reason: str) -> None:
    code, printed = check(monkeypatch, capsys, *broken)
    assert code == 2 and "error: " in printed and reason in printed
