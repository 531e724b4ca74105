"""What is printed, and where: text of a recorded console, with a clock the test moves."""
from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from orchestrator.record.progress import Best, FinalRow, Progress, duration, quantity, roughly

ROWS = [
    FinalRow(2.5, "d233 [k7]", 2.45, 2.4131, 0.0123, 0.951, 0.9482, 350_100_000, 7_340_000, "models/2.5ms.onnx"),
    FinalRow(4, "d444 k777", 3.9, None, None, 0.97, None, None, None, "models/4ms.onnx"),
    FinalRow(0.1, "the fastest takes 0.3 ms", None, None, None, None, None, None, None, "", feasible=False),
]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def plain() -> Console:
    return Console(file=io.StringIO(), width=120)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_log_lines_every_ten_seconds_of_work_when_not_a_terminal(clock: Clock) -> None:
    console = plain()
    with Progress(console, clock=clock) as progress:
        progress.stage("collecting", 400)
        progress.best([Best(2.5, 2.41, 0.951, "d233"), Best(1.0)])
        for _ in range(100):
            clock.now += 0.25
            progress.advance(accuracy=0.9, hypervolume=math.nan)
    lines = text(console).splitlines()
    assert lines[0] == "collecting: started, 400 to do, 0 done"
    assert [line.split()[1] for line in lines[1:]] == ["40/400", "80/400", "100/400"], "at 10 s, 20 s and the end"
    assert lines[-1] == "collecting: 100/400  4.0/s  1 min 15 s left  accuracy 0.9  best <=2.5ms 95.10%"


def test_a_resumed_stage_counts_what_was_done_but_not_as_speed(clock: Clock) -> None:
    progress = Progress(plain(), clock=clock)
    progress.stage("collecting", 100, done=60)
    assert math.isnan(progress.rate()) and math.isnan(progress.time_left_s())
    clock.now += 5
    progress.advance(10)
    assert progress.rate() == 2 and progress.time_left_s() == 15


def test_a_long_first_step_tells_the_time_left_from_its_parts(clock: Clock) -> None:
    """Two epochs of 100 s that start after 30 s, which do not count; said once, and not of short work."""
    console, heard = plain(), list[str]()
    with Progress(console, clock=clock, heard=heard.append) as progress:
        progress.stage("train supernet", 2, tell="training the supernet")
        clock.now += 30
        for step in range(1, 80):
            clock.now += 1
            progress.part(step / 100)
            assert math.isnan(progress.time_left_s()) == (step == 1)
        assert progress.time_left_s() == pytest.approx(200 - 79, rel=0.02)
        clock.now += 21
        progress.advance()
        assert progress.time_left_s() == pytest.approx(100, rel=0.02)
        progress.stage("search", 20, tell="the search")
        for _ in range(20):
            clock.now += 2
            progress.advance()
    notes = [line for line in text(console).splitlines() if "takes" in line]
    assert notes == ["training the supernet takes about 3 minutes from here, judged by 10 s of it"]
    assert heard[:2] == ["train supernet: started, 2 to do, 0 done", "train supernet: 0/2  0.6/min  2 min 50 s left"]
    assert heard == [line for line in text(console).splitlines() if line not in notes], "a job's status hears no notes"


def test_a_resumed_stage_tells_what_is_left_of_it(clock: Clock) -> None:
    console = plain()
    progress = Progress(console, clock=clock)
    progress.stage("search", 100, done=60, tell="the search")
    for _ in range(3):
        clock.now += 300
        progress.advance()
    assert "the search takes about 3.2 hours from here, judged by 5 min 00 s of it" in text(console)
    assert [roughly(seconds) for seconds in (80, 100, 5000, 36_100)] == [
        "about a minute", "about 2 minutes", "about 83 minutes", "about 10 hours"]


def test_rate_forgets_a_slow_start_and_falls_while_work_stalls(clock: Clock) -> None:
    progress = Progress(plain(), clock=clock)
    progress.stage("collecting", 10_000)
    clock.now += 100
    for _ in range(1000):
        clock.now += 0.1
        progress.advance()
    assert progress.rate() == pytest.approx(10, rel=0.02)
    clock.now += 60
    assert progress.rate() == pytest.approx(5, rel=0.02)


def test_memory_of_the_rate_does_not_grow_with_speed(clock: Clock) -> None:
    progress = Progress(plain(), clock=clock)
    progress.stage("collecting")
    for _ in range(50_000):
        clock.now += 0.001
        progress.advance()
    assert len(progress._recent) < 300
    assert progress.rate() == pytest.approx(1000, rel=0.01)


def test_unknown_total_shows_count_and_speed_without_time_left(clock: Clock) -> None:
    console = plain()
    with Progress(console, clock=clock) as progress:
        progress.stage("measuring")
        clock.now += 60
        progress.advance(6)
    assert text(console).splitlines()[-1] == "measuring: 6  6.0/min"


def test_live_panel_on_a_terminal_names_stage_counts_and_best_and_then_goes(clock: Clock) -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    with Progress(console, clock=clock, title="run [bold]x") as progress:
        progress.stage("collecting", 40)
        clock.now += 2
        progress.advance(4, hypervolume=0.5)
        progress.best([Best(2.5, 2.41, 0.951, "d233 [k]"), Best(1.0)])
        progress.note("worker [7] was replaced")
    shown = text(console)
    for part in ("run [bold]x", "collecting", "4/40", "2.0/s", "18 s left", "hypervolume 0.5", "95.10% at 2.410 ms",
                 "d233 [k]", "nothing yet", "worker [7] was replaced"):
        assert part in shown, part
    assert "\x1b[?25h" in shown, "the cursor is back"
    assert shown.index("worker [7]") and shown.endswith("\x1b[2K"), "the last thing written erases the panel"


def test_an_error_inside_leaves_the_terminal_clean() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with pytest.raises(RuntimeError, match="lost"), Progress(console) as progress:
        progress.stage("collecting", 40)
        raise RuntimeError("lost")
    assert "\x1b[?25h" in text(console)


def test_final_table_fits_eighty_columns_and_tells_everything() -> None:
    console = Console(file=io.StringIO(), width=80)
    Progress(console).final_table(ROWS)
    shown = text(console)
    for part in ("2.413 ±0.012", "2.450", "95.10%", "94.82%", "350.1M", "7.34M", "models/2.5ms.onnx", "d233 [k7]"):
        assert part in shown, part
    row_4 = next(line for line in shown.splitlines() if line.split()[:1] == ["4"])
    assert row_4.split()[1:] == ["?", "3.900", "97.00%", "?", "?", "?"]
    assert shown.count("no model") == 2 and "the fastest takes 0.3 ms" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_nothing_goes_around_the_console(capsys: pytest.CaptureFixture[str]) -> None:
    console = plain()
    with Progress(console) as progress:
        progress.stage("collecting", 2)
        progress.advance(2)
        progress.note("done")
    progress.final_table(ROWS)
    assert capsys.readouterr() == ("", "") and "done" in text(console)


@pytest.mark.parametrize(("seconds", "expected"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"),
                                                   (7500, "2 h 05 min")])
def test_durations(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


@pytest.mark.parametrize(("count", "expected"), [(None, "?"), (7, "7"), (12_000, "12k"), (7_340_000, "7.34M"),
                                                 (350_100_000, "350.1M"), (1_250_000_000, "1.25G")])
def test_quantities(count: int | None, expected: str) -> None:
    assert quantity(count) == expected


def test_a_stage_within_another_does_not_slow_it_down(clock: Clock) -> None:
    console = plain()
    with Progress(console, clock=clock) as progress:
        progress.stage("deliver", 6, done=2)
        with progress.within("fine-tune", 2):
            clock.now += 600
            progress.advance()
            assert progress.time_left_s() == 600
        clock.now += 5
        progress.advance()
        assert progress.rate() == 0.2 and progress.time_left_s() == 15
    assert text(console).splitlines()[-1].startswith("deliver: 3/6")
