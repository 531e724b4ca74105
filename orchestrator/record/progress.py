"""What a person sees while a run works: one live panel, then one final table. Nothing else prints.

    with Progress() as progress:
        progress.stage("collecting", total=400, done=64)        # resumed: 64 were there already
        progress.advance(accuracy=0.93, hypervolume=0.71)       # one more, and the latest facts
        progress.best([Best(2.5, 2.41, 0.951, "d233 k535 e643")])
        progress.note("latency worker lost, started another")
    progress.final_table(rows)

On a terminal the panel is drawn by a thread of its own and disappears at the end; elsewhere (CI, job logs) a line is
printed every `log_every_s` while work advances, every minute of a long step, and at the end of each stage. All methods
may be called from any thread.
Rate and time left come from the last minute of the stage, so that a slow start or a resumed run does not distort them.
A stage of few long steps tells how much of one is done (`part`), so that its time left is known early.
"""
from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

RATE_WINDOW_S = 60.0
MEASURED_S = 10.0   # of work before a stage's duration is told
WORTH_TELLING_S = 90.0  # shorter ones are over soon
PART_EVERY_S = 60.0  # between two lines of a long step
SAMPLE_S = 0.25  # of the rate: advances closer together are one sample, so memory does not grow with the speed


@dataclass(frozen=True)
class Best:
    """The best trial under one budget so far; `latency_ms` None: nothing under the budget yet. `target` is named where
    a run has several."""

    budget_ms: float
    latency_ms: float | None = None
    accuracy: float | None = None
    architecture: str = ""
    target: str = ""


@dataclass(frozen=True)
class FinalRow:
    """One handed-over model; None where a value is not known. `feasible` False: no model for this budget, and
    `architecture` holds the reason. Without a `file` it is an architecture whose latency was looked up."""

    budget_ms: float
    architecture: str
    predicted_ms: float | None
    measured_ms: float | None
    measured_stderr_ms: float | None
    accuracy: float | None
    test_accuracy: float | None
    madds: int | None
    params: int | None
    file: str
    feasible: bool = True
    target: str = ""


class Progress:
    """See the module docstring. `console` and `clock` (seconds, monotonic) are given by tests. `heard`: who else
    is told the lines that are printed where there is no terminal, notes left out."""

    def __init__(self, console: Console | None = None, *, title: str = "paretoray", log_every_s: float = 10.0,
                 clock: Callable[[], float] = time.monotonic, heard: Callable[[str], None] = lambda line: None) -> None:
        self.console = console or Console()
        self._title, self._log_every_s, self._clock, self._heard = title, log_every_s, clock, heard
        self._lock = threading.RLock()
        self._name, self._total, self._done, self._part = "starting", 0, 0, 0.0
        self._untold = ""     # what a note on the stage's duration is still to be about
        self._facts: dict[str, float | str] = {}
        self._unsaid = False  # work was done that no line tells of yet
        self._best: tuple[Best, ...] = ()
        self._stage_started = self._logged = clock()
        self._recent: deque[tuple[float, float]] = deque([(self._stage_started, 0)])
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._live = Live(get_renderable=self._panel, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """The panel is gone, from any thread; lines can still be printed."""
        self._end_stage()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def stage(self, name: str, total: int | None = None, done: int = 0, tell: str = "") -> None:
        """A new stage of `total` steps (None: unknown), `done` of them finished earlier. `tell`: what a person is told
        the duration of, in a note, once some seconds of work are measured."""
        with self._lock:
            self._end_stage()
            self._name, self._total, self._done, self._part, self._untold = name, total or 0, done, 0.0, tell
            self._facts = {}
            self._stage_started = self._logged = self._clock()
            self._recent = deque([(self._stage_started, done)])
            if self._live is None:
                self._log(f"{name}: started" + (f", {total} to do, {done} done" if total else ""))

    @contextlib.contextmanager
    def within(self, name: str, total: int) -> Iterator[None]:
        """A stage inside the one under way, which then goes on; its time left is not judged by this one's."""
        with self._lock:
            outer, before, done, untold = self._name, self._total, self._done, self._untold
        self.stage(name, total)
        yield
        self.stage(outer, before, done, untold)

    def advance(self, n: int = 1, **facts: float | str) -> None:
        """n more steps are done; `facts` are the latest values worth reading, by name."""
        with self._lock:
            now = self._clock()
            self._done, self._part, self._unsaid = self._done + n, 0.0, True
            self._facts |= facts
            self._sample(now)
            if self._live is None and now - self._logged >= self._log_every_s:
                self._unsaid = False
                self._log(self._line())

    def part(self, share: float) -> None:
        """So much of the next step is done, 0 to 1. The time before the first is none of work: something started."""
        with self._lock:
            if self._part == 0 and len(self._recent) == 1:
                self._recent[0] = (self._clock(), self._done + share)
            self._part = share
            self._sample(self._clock())
            if self._live is None and self._clock() - self._logged >= PART_EVERY_S:
                self._log(self._line())

    def _sample(self, now: float) -> None:
        if len(self._recent) > 1 and now - self._recent[-2][0] < SAMPLE_S:
            self._recent.pop()
        self._recent.append((now, self._done + self._part))
        while len(self._recent) > 2 and now - self._recent[0][0] > RATE_WINDOW_S:
            self._recent.popleft()
        measured_s, left_s = now - self._recent[0][0], self.time_left_s()
        if self._untold and measured_s >= MEASURED_S and not math.isnan(left_s):
            what, self._untold = self._untold, ""
            if left_s >= WORTH_TELLING_S:
                self._print(f"{what} takes {roughly(left_s)} from here, judged by {duration(measured_s)} of it")

    def best(self, rows: Sequence[Best]) -> None:
        """The best trial per budget, in the order to show them."""
        with self._lock:
            self._best = tuple(rows)

    def note(self, text: str) -> None:
        """Something a person should read once (a worker was replaced, a budget cannot be met)."""
        with self._lock:
            self._print(text)  # above the live panel, where it stays

    def rate(self) -> float:
        """Steps per second over the last minute of this stage; nan before the first."""
        with self._lock:
            start, first = self._recent[0]
            elapsed = self._clock() - start  # up to now, so that the rate of stalled work falls
            done = self._done + self._part
            return (done - first) / elapsed if elapsed > 0 and done > first else math.nan

    def time_left_s(self) -> float:
        """Expected seconds until the stage is done; nan where the rate or the total is not known."""
        return max(0.0, self._total - self._done - self._part) / self.rate() if self._total else math.nan

    def final_table(self, rows: Sequence[FinalRow]) -> None:
        """The one table a run ends with; also after the `with` block."""
        self.console.print(final_table(rows))

    def _end_stage(self) -> None:
        if self._live is None and self._unsaid:
            self._log(self._line())
        self._unsaid = False

    def _log(self, line: str) -> None:
        self._logged = self._clock()
        self._print(line)
        self._heard(line)

    def _print(self, text: str) -> None:
        self.console.print(Text(text), highlight=False, soft_wrap=True)

    def _counts(self) -> str:
        done = f"{self._done:,}" + (f"/{self._total:,}" if self._total else "")
        rate, left = self.rate(), self.time_left_s()
        speed = "" if math.isnan(rate) else f"{rate:.1f}/s" if rate >= 1 else f"{60 * rate:.1f}/min"
        return "  ".join(part for part in (done, speed, f"{duration(left)} left" if left >= 0 else "") if part)

    def _fact_text(self) -> str:
        return "  ".join(f"{key.replace('_', ' ')} {number(value)}" for key, value in self._facts.items()
                         if value == value)  # nan: not known yet

    def _line(self) -> str:
        best = "  ".join(f"{_on(b.target)}<={b.budget_ms:g}ms {b.accuracy:.2%}" for b in self._best
                         if b.accuracy is not None)
        return "  ".join(part for part in (f"{self._name}: {self._counts()}", self._fact_text(),
                                           f"best {best}" if best else "") if part)

    def _panel(self) -> RenderableType:
        with self._lock:
            elapsed = duration(self._clock() - self._stage_started)
            head = Table.grid(padding=(0, 2))
            bar = ProgressBar(self._total or None, self._done + self._part, width=24)
            head.add_row(Text(self._name, style="bold"), bar, self._counts(),
                         Text(f"{elapsed} in this stage", style="dim"))
            parts: list[RenderableType] = [head]
            if self._facts:
                parts.append(Text(self._fact_text(), style="dim"))
            if self._best:
                parts.append(_best_table(self._best))
            return Panel(Group(*parts), title=escape(self._title), title_align="left", border_style="blue")


def final_table(rows: Sequence[FinalRow]) -> RenderableType:
    """Handed-over models, one row per budget; then where each lies and what it is. Fits 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1), pad_edge=False)
    bare = [row for row in rows if row.feasible and not row.file]
    measured = "measured" if any(row.file for row in rows) or not bare else "looked up"
    for name in ("budget\nms", f"{measured}\nms", "predicted\nms", "val\naccuracy", "test\naccuracy",
                 "multiply-\nadds", "\nparams"):
        table.add_column(name, justify="right", no_wrap=True)
    files = Table.grid(Column(no_wrap=True), Column(no_wrap=True),
                       Column(no_wrap=True, overflow="ellipsis", ratio=1), padding=(0, 2), expand=True)
    section = ""
    for row in rows:
        budget = f"{row.budget_ms:g}"
        if row.target != section:   # one block of rows per target
            section = row.target
            table.add_row(Text(section, style="bold"))
            files.add_row(Text(section, style="bold"), "", "")
        if not row.feasible:
            table.add_row(budget, Text("no model", style="yellow"))
            files.add_row(f"{budget} ms", Text("no model", style="yellow"), Text(row.architecture, style="dim"))
            continue
        error = "" if row.measured_stderr_ms is None else f" ±{row.measured_stderr_ms:.3f}"
        table.add_row(budget, _optional(row.measured_ms, ".3f") + error, _optional(row.predicted_ms, ".3f"),
                      _optional(row.accuracy, ".2%"), _optional(row.test_accuracy, ".2%"), quantity(row.madds),
                      quantity(row.params))
        files.add_row(f"{budget} ms", Text(row.file or "no file", style="bold" if row.file else "dim"),
                      Text(row.architecture, style="dim"))
    if bare:
        return Group(table, files, Text("no file: the target only looks latencies up, so these are architectures"))
    return Group(table, files)


def _best_table(rows: Sequence[Best]) -> Table:
    table = Table.grid(padding=(0, 2))
    for row in rows:
        found = row.latency_ms is not None and row.accuracy is not None
        numbers = f"{row.accuracy:.2%} at {row.latency_ms:.3f} ms" if found else "nothing yet"
        table.add_row(f"{_on(row.target)}≤ {row.budget_ms:g} ms", Text(numbers, style="green" if found else "dim"),
                      Text(row.architecture, style="dim", overflow="ellipsis", no_wrap=True))
    return table


def _on(target: str) -> str:
    return f"{target} " if target else ""


def _optional(value: float | None, form: str) -> str:
    return "?" if value is None else format(value, form)


def number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def quantity(value: float | None) -> str:
    """Counts as a person reads them: 350.1M, 7.34M, 12.0k."""
    if value is None:
        return "?"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}" if value < 100 * size else f"{value / size:.1f}{unit}"
    return f"{value:g}"


def roughly(seconds: float) -> str:
    """An estimate: about a minute, about 25 minutes, about 3 hours."""
    if seconds < 90:
        return "about a minute"
    hours = seconds / 3600
    return f"about {seconds / 60:.0f} minutes" if hours < 1.5 else f"about {hours:.1f} hours" if hours < 10 else \
        f"about {hours:.0f} hours"


def duration(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 05 min."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"
