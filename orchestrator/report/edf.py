"""Error distributions inside and outside a found space ([S3 4.5], after RegNet; specification nss 10): the whole, and
those of networks about as costly as the space was asked to be."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from orchestrator.report.data import RunView
from orchestrator.report.figures import COLOURS, INK, VERMILLION, axis, plain_figure
from searchspaces.bins import BinGroup
from searchspaces.elite.found import FoundSpace
from searchspaces.elite.space import EliteSpace, restricted
from searchspaces.space import SearchSpace

WINDOW = 0.1    # of the cost that was aimed at, to either side
LEAST = 5       # trials on a side, for its distribution to be drawn

HALVES = ((0.0, 0.47), (0.55, 1.0))

Errors = NDArray[np.float64]


@dataclass(frozen=True)
class Sides:
    """Errors (shares of images) of the trials inside a space and outside it. `window`: which of them, "" for all."""

    window: str
    inside: Errors
    outside: Errors

    @property
    def enough(self) -> bool:
        return min(len(self.inside), len(self.outside)) >= LEAST

    def words(self) -> str:
        """One sentence: the medians, or that there are too few trials to say."""
        counts = f"{_trials(len(self.inside))} inside, {len(self.outside)} outside"
        where = f"Within {self.window}" if self.window else "All trials"
        if not self.enough:
            return f"{where}: too few to compare ({counts}; it takes {LEAST} on each side)."
        return (f"{where}: median error {np.median(self.inside):.1%} inside, {np.median(self.outside):.1%} outside "
                f"({counts}).")


def edf(errors_N: Errors, at_M: Errors) -> NDArray[np.float64]:
    """F(e) = share of errors < e, [M]; N >= 1."""
    return np.searchsorted(np.sort(errors_N), at_M, side="left") / len(errors_N)


def members(run: RunView, space: SearchSpace, groups: tuple[BinGroup, ...], bins: tuple[int, ...]) -> NDArray[np.bool_]:
    """bool[N]: which trials lie in the space of these bins? SpaceError where one is not of `space` at all."""
    tokens = run.trials.column("tokens").to_pylist()
    if not tokens:
        return np.zeros(0, dtype=np.bool_)
    found = EliteSpace(space, restricted(space, groups, [[b] for b in bins]))
    return found.contains(space.check_tokens(np.array(tokens)))


def sides(run: RunView, inside_N: NDArray[np.bool_], found: FoundSpace, amount: str) -> tuple[Sides, Sides]:
    """Of all trials with an accuracy, and of those that cost within 10 % of what was aimed at: the target, or where no
    space's mean reaches that the nearest mean. `amount`: that, as one reads it."""
    error_N = 1 - run.numbers("accuracy")
    cost_N = run.numbers("latency_ms" if found.unit == "ms" else "madds")
    scored_N = np.isfinite(error_N)
    near_N = scored_N & (np.abs(cost_N / found.aim - 1) <= WINDOW)
    return tuple(Sides(name, error_N[chosen & inside_N], error_N[chosen & ~inside_N])       # type: ignore[return-value]
                 for name, chosen in (("", scored_N), (f"{WINDOW:.0%} of {amount}", near_N)))


def edf_figure(compared: tuple[Sides, ...]) -> go.Figure | None:
    """Those with enough trials, side by side; None without any."""
    drawn = [sides for sides in compared if sides.enough]
    if not drawn:
        return None
    figure = plain_figure("", "")
    figure.update_layout(margin={"t": 48}, legend={"x": 0, "y": 1.13})     # above the panels' titles
    for number, one in enumerate(drawn):
        suffix = str(number + 1) if number else ""
        left, right = (0.0, 1.0) if len(drawn) == 1 else HALVES[number]
        figure.update_layout({f"xaxis{suffix}": axis("error (%)") | {"domain": [left, right], "anchor": f"y{suffix}"},
                              f"yaxis{suffix}": axis("share below" if not number else "") | {
                                  "anchor": f"x{suffix}", "range": [0, 1.02]}})
        ends = np.array([min(one.inside.min(), one.outside.min()), max(one.inside.max(), one.outside.max())])
        for name, errors, look in (("inside", one.inside, {"color": VERMILLION, "width": 2.5}),
                                   ("outside", one.outside, {"color": COLOURS[4], "width": 2, "dash": "dash"})):
            x, y = _staircase(errors, ends)
            figure.add_scatter(x=100 * x, y=y, mode="lines", name=name, line={"shape": "hv", **look},
                               xaxis=f"x{suffix}", yaxis=f"y{suffix}", showlegend=not number,
                               hovertemplate=name + ": %{y:.0%} below %{x:.1f} %<extra></extra>")
        figure.add_annotation(text=f"cost within {WINDOW:.0%}" if one.window else "all trials", xref="paper",
                              yref="paper", x=left, y=1.0, xanchor="left", yanchor="bottom", showarrow=False,
                              font={"size": 12, "color": INK})
    return figure


def _staircase(errors: Errors, ends: Errors) -> tuple[Errors, NDArray[np.float64]]:
    """Corners from end to end: just right of an error the errors up to it count."""
    steps = np.unique(errors)
    right = np.append(steps[1:], np.inf)        # F is constant up to the next error, and includes it there not yet
    x = np.concatenate([ends[:1], steps, ends[1:]])
    return x, np.concatenate([[0.0], edf(errors, right), [1.0]])


def _trials(count: int) -> str:
    return f"{count} trial{'' if count == 1 else 's'}"
