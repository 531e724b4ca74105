"""The figures of report.html, as plotly figures; None where there is nothing to show yet.

Colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), told apart by colour-blind readers; groups differ in
marker too. Units are on the axes.
"""
from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from orchestrator.frontier import hypervolume_history
from orchestrator.report.data import RunView, column_numbers

INK, GRID = "#1f2933", "#e4e7eb"
COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#0072B2", "#F0E442")
MARKERS = ("circle", "diamond", "square", "triangle-up", "cross", "x")
VERMILLION = "#D55E00"
DOMINATED_SHOWN = 5000
BUDGET_LINES = 6
FIXED = "fixed, fine-tuned"
# Dark to light blue-yellow (cividis): ordered, and readable without colour.
ORDERED = ("#00204D", "#31446B", "#666970", "#958F78", "#CAB969", "#E8CF3A")


def front_figure(run: RunView) -> go.Figure | None:
    """Every trial (dominated ones thinned out), the front, and the handed-over models with their measured error."""
    latency_ms, accuracy = run.numbers("latency_ms"), run.numbers("accuracy")
    known = np.isfinite(latency_ms) & np.isfinite(accuracy)
    if not known.any() and not run.models:
        return None
    figure = plain_figure("latency (ms)", "accuracy (%)" if run.fixed else "validation accuracy (%)")
    front = run.front
    dominated = known.copy()
    dominated[front] = False
    shown = np.flatnonzero(dominated)
    if len(shown) > DOMINATED_SHOWN:
        shown = np.sort(np.random.default_rng(0).choice(shown, DOMINATED_SHOWN, replace=False))
    look = {"size": 6, "opacity": 0.6} if len(shown) < 1000 else {"size": 4, "opacity": 0.4}
    groups = trial_groups(run)
    for number, name in enumerate(sorted(set(groups.tolist()))):
        members = shown[groups[shown] == name]
        figure.add_scatter(
            x=_short(latency_ms[members]), y=_short(100 * accuracy[members]), mode="markers", name=escape(name),
            marker={"color": COLOURS[number % len(COLOURS)], "symbol": MARKERS[number % len(MARKERS)], **look},
            hovertemplate="%{x:.4g} ms, %{y:.2f} %<extra>" + escape(name) + "</extra>")
    figure.add_scatter(
        x=latency_ms[front], y=100 * accuracy[front], mode="lines+markers", name="Pareto front",
        line={"shape": "hv", "color": INK, "width": 2}, marker={"color": INK, "size": 5},
        hovertemplate="%{x:.4g} ms, %{y:.2f} %<extra>Pareto front</extra>")
    models = run.models
    if models:
        figure.add_scatter(
            x=[m["latency_ms"] for m in models], y=[100 * m["accuracy"] for m in models], mode="markers",
            name=run.handed_over, customdata=[m["budget_ms"] for m in models],
            error_x={"type": "data", "array": [m.get("latency_stderr_ms") or 0 for m in models], "color": VERMILLION},
            marker={"symbol": "star", "size": 14, "color": VERMILLION, "line": {"color": "white", "width": 1}},
            hovertemplate="%{x:.4g} ms " + ("looked up" if run.bare else "measured") + ", %{y:.2f} %<br>budget "
                          "%{customdata:.4g} ms<extra>" + run.handed_over + "</extra>")
    _add_fixed(figure, run)
    # Fixed, because the page draws a line at the budget, and a shape would move an automatic range.
    ends = np.concatenate([latency_ms[front], latency_ms[shown], [m["latency_ms"] for m in models + run.fixed]])
    pad = 0.04 * float(np.ptp(ends)) or 0.1 * float(ends[0])
    return figure.update_xaxes(range=[float(ends.min()) - pad, float(ends.max()) + pad])


def _add_fixed(figure: go.Figure, run: RunView) -> None:
    """The fixed network at every resolution that was trained, validation filled and test open; test of ours too."""
    fixed, models = run.fixed, [m for m in run.models if isinstance(m.get("test_accuracy"), int | float)]
    if not fixed:
        return
    looks = [(fixed, "accuracy", FIXED, "square", COLOURS[4]),
             (fixed, "test_accuracy", f"{FIXED} (test)", "square-open", COLOURS[4]),
             (models, "test_accuracy", f"{run.handed_over} (test)", "star-open", VERMILLION)]
    for rows, key, name, symbol, colour in looks:
        figure.add_scatter(
            x=[row["latency_ms"] for row in rows], y=[100 * row[key] for row in rows], mode="markers", name=name,
            customdata=[f"{escape(str(row.get('resolution')))} px" if rows is fixed
                        else f"budget {row['budget_ms']:.4g} ms" for row in rows],
            marker={"symbol": symbol, "size": 10 if rows is fixed else 14, "color": colour},
            hovertemplate="%{x:.4g} ms measured, %{y:.2f} %<br>%{customdata}<extra>" + name + "</extra>")


def trial_groups(run: RunView) -> NDArray[np.str_]:
    """Who proposed each trial and why: its controller, for a budget or to explore."""
    controllers = np.array([name or "unknown" for name in run.trials.column("controller").to_pylist()], dtype=str)
    budgets = run.numbers("budget_ms")
    return np.array([f"{name}: {'exploration' if np.isnan(budget) else 'for a budget'}"
                     for name, budget in zip(controllers, budgets)], dtype=str)


def prediction_pairs(run: RunView) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Held-out predictions and their measurements in ms, of the same networks."""
    predicted, measured = column_numbers(run.latency, "predicted_ms"), column_numbers(run.latency, "latency_ms")
    both = np.isfinite(predicted) & np.isfinite(measured) & (measured > 0)
    return predicted[both], measured[both]


def prediction_error(run: RunView) -> float:
    """Mean absolute percentage error of held-out latency predictions as a share; nan without any."""
    predicted, measured = prediction_pairs(run)
    return float(np.mean(np.abs(predicted - measured) / measured)) if len(predicted) else float("nan")


def noise_floor(run: RunView) -> float:
    """Relative repeatability of the measurements: as the predictor reported it, else the median standard error."""
    for event in reversed(run.events):
        if event.get("kind") == "predictor" and isinstance(event.get("noise_floor"), int | float):
            return float(event["noise_floor"])
    share = column_numbers(run.latency, "stderr_ms") / column_numbers(run.latency, "latency_ms")
    share = share[np.isfinite(share)]
    return float(np.median(share)) if len(share) else float("nan")


def prediction_figure(run: RunView) -> go.Figure | None:
    predicted, measured = prediction_pairs(run)
    models = [m for m in run.models if isinstance(m.get("predicted_ms"), int | float)]
    if not len(predicted) and not models:
        return None
    figure = plain_figure("measured latency (ms)", "predicted latency (ms)")
    ends = np.concatenate([predicted, measured, [m["latency_ms"] for m in models]])
    low, high = float(ends.min()) * 0.97, float(ends.max()) * 1.03
    figure.add_scatter(x=[low, high], y=[low, high], mode="lines", name="identity", hoverinfo="skip",
                       line={"color": "#7b8794", "dash": "dash", "width": 1})
    figure.add_scatter(x=_short(measured), y=_short(predicted), mode="markers", name="held-out network",
                       marker={"color": COLOURS[4], "size": 6, "opacity": 0.7},
                       hovertemplate="measured %{x:.4g} ms, predicted %{y:.4g} ms<extra></extra>")
    if models:
        figure.add_scatter(x=[m["latency_ms"] for m in models], y=[m["predicted_ms"] for m in models], mode="markers",
                           name=run.handed_over, marker={"symbol": "star", "size": 12, "color": VERMILLION},
                           hovertemplate="measured %{x:.4g} ms, predicted %{y:.4g} ms<extra></extra>")
    return figure


def hypervolume_reference(run: RunView) -> tuple[float, float]:
    """Slowest latency (ms) and lowest accuracy of any trial: one reference for the whole history."""
    latency_ms, accuracy = run.numbers("latency_ms"), run.numbers("accuracy")
    known = np.isfinite(latency_ms) & np.isfinite(accuracy)
    return float(latency_ms[known].max()), float(accuracy[known].min())


def hypervolume_figure(run: RunView) -> go.Figure | None:
    latency_ms, accuracy = run.numbers("latency_ms"), run.numbers("accuracy")
    if not (np.isfinite(latency_ms) & np.isfinite(accuracy)).any():
        return None
    history = hypervolume_history(latency_ms, accuracy, *hypervolume_reference(run))
    if history[-1] <= 0:
        return None
    steps = _steps(history)
    figure = plain_figure("trial", "hypervolume (% of the final)")
    figure.add_scatter(x=steps + 1, y=_short(100 * history[steps] / history[-1]), mode="lines", name="hypervolume",
                       line={"shape": "hv", "color": COLOURS[4], "width": 2},
                       hovertemplate="after trial %{x}: %{y:.1f} %<extra></extra>")
    return figure.update_layout(showlegend=False)


def budget_lines(run: RunView) -> list[float]:
    """Budgets whose history is drawn: those of the hand-over or the configuration, else spread over the front."""
    if not len(run.front):
        return []
    reachable = run.numbers("latency_ms")[run.front]
    asked = sorted({float(row["budget_ms"]) for row in run.generated})
    if not asked:
        section = run.config.get("budgets")
        values = section.get("values_ms") if isinstance(section, dict) else None
        asked = sorted(float(v) for v in values or [] if isinstance(v, int | float))
    asked = [budget for budget in asked if budget >= reachable[0]]
    if not asked:
        asked = [float(f"{v:.3g}") for v in np.linspace(reachable[0], reachable[-1], BUDGET_LINES + 1)[1:]]
    picked = np.unique(np.linspace(0, len(asked) - 1, min(BUDGET_LINES, len(asked))).round().astype(int))
    return [asked[i] for i in picked]


def best_figure(run: RunView) -> go.Figure | None:
    """Best accuracy so far under each budget."""
    latency_ms, accuracy = run.numbers("latency_ms"), run.numbers("accuracy")
    figure = plain_figure("trial", "best validation accuracy (%)")
    for number, budget_ms in enumerate(budget_lines(run)):
        under = np.where((latency_ms <= budget_ms) & np.isfinite(accuracy), accuracy, -np.inf)
        if not np.isfinite(under).any():
            continue
        best = np.maximum.accumulate(under)
        steps = _steps(best)
        steps = steps[np.isfinite(best[steps])]  # nothing to draw before the first trial under the budget
        figure.add_scatter(x=steps + 1, y=_short(100 * best[steps]), mode="lines", name=f"≤ {budget_ms:.4g} ms",
                           line={"shape": "hv", "color": ORDERED[number], "width": 2},
                           hovertemplate="after trial %{x}: %{y:.2f} %<extra>≤ " + f"{budget_ms:.4g} ms</extra>")
    return figure if figure.data else None


def training_figure(run: RunView) -> go.Figure | None:
    """The supernet's loss, and below it every accuracy its epochs report."""
    epochs = [e for e in run.events if e.get("kind") == "epoch" and isinstance(e.get("epoch"), int)]
    # After a resumed run an epoch may appear twice; the last one is the one the weights come from.
    epochs = [dict(e) for _, e in sorted({e["epoch"]: e for e in epochs}.items())]
    if not epochs:
        return None
    figure = plain_figure("epoch", "loss")
    names = sorted({key for e in epochs for key, v in e.items()
                    if key.startswith("accuracy") and isinstance(v, int | float)})
    x = [e["epoch"] for e in epochs]
    figure.add_scatter(x=x, y=[e.get("loss") for e in epochs], mode="lines", name="loss",
                       line={"color": VERMILLION, "width": 2}, hovertemplate="epoch %{x}: %{y:.4f}<extra>loss</extra>")
    if any(e.get("validation_loss") for e in epochs):      # 0 while a gradient system warms up
        figure.add_scatter(x=x, y=[e.get("validation_loss") or None for e in epochs], mode="lines",
                           name="validation loss", line={"color": VERMILLION, "width": 2, "dash": "dot"},
                           hovertemplate="epoch %{x}: %{y:.4f}<extra>validation loss</extra>")
    for number, key in enumerate(names):
        label = escape(key.replace("_", " ") + ("" if key != "accuracy" else " (validation)"))
        figure.add_scatter(x=x, y=[None if e.get(key) is None else 100 * e[key] for e in epochs], mode="lines",
                           name=label, yaxis="y2", line={"color": (COLOURS[4], COLOURS[0], COLOURS[2])[number % 3],
                                                         "width": 2, "dash": ("solid", "dot", "dash")[number % 3]},
                           hovertemplate="epoch %{x}: %{y:.2f} %<extra>" + label + "</extra>")
    if names:
        figure.update_layout(yaxis={"domain": [0.56, 1]}, xaxis={"anchor": "y2"}, yaxis2=axis("accuracy (%)") | {
            "domain": [0, 0.44], "anchor": "x"})
    return figure


LEARNING = ("trained", "trusted", "reward_mean", "reward_best")  # what a controller's metrics must hold to be drawn


def learning_iterations(run: RunView) -> list[dict[str, float]]:
    """One row per iteration of the controller: samples `trained` and `trusted` in it, and its rewards ([S4 Fig. 4]).

    The counts of the metrics run over the whole search. An iteration that a resumed run did again counts once.
    """
    events = [e for e in run.events if e.get("kind") == "controller"
              and all(isinstance(e.get(key), int | float) for key in LEARNING)]
    by_iteration = {float(e.get("iteration", number)): e for number, e in enumerate(events)}
    rows: list[dict[str, float]] = []
    before = {"trained": 0.0, "trusted": 0.0}
    for iteration, event in sorted(by_iteration.items()):
        counts = {key: max(0.0, event[key] - before[key]) for key in before}
        before = {key: float(event[key]) for key in before}
        rows.append({"iteration": iteration, **counts, **{key: float(event[key]) for key in LEARNING[2:]}})
    return rows


def learning_figure(run: RunView) -> go.Figure | None:
    """Trained against trusted samples of every iteration, and below them the reward."""
    rows = learning_iterations(run)
    if not rows:
        return None
    x = [row["iteration"] for row in rows]
    figure = plain_figure("iteration", "samples")
    for key, name, colour in (("trained", "trained", COLOURS[4]), ("trusted", "trusted to the critic", COLOURS[1])):
        figure.add_bar(x=x, y=[row[key] for row in rows], name=name, marker={"color": colour},
                       hovertemplate="iteration %{x}: %{y}<extra>" + name + "</extra>")
    for key, name, look in (("reward_mean", "mean reward of fresh samples", {"color": COLOURS[2], "dash": "dot"}),
                            ("reward_best", "best reward so far", {"color": INK, "shape": "hv"})):
        figure.add_scatter(x=x, y=_short([row[key] for row in rows]), mode="lines", name=name, yaxis="y2",
                           line={"width": 2, **look},
                           hovertemplate="iteration %{x}: %{y:.4f}<extra>" + name + "</extra>")
    return figure.update_layout(
        barmode="stack", bargap=0.15, yaxis={"domain": [0.56, 1]}, xaxis={"anchor": "y2"},
        yaxis2=axis("reward") | {"domain": [0, 0.44], "anchor": "x"})


def plain_figure(x_title: str, y_title: str) -> go.Figure:
    return go.Figure(layout={
        "template": "none", "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "margin": {"l": 64, "r": 16, "t": 8, "b": 48}, "paper_bgcolor": "white", "plot_bgcolor": "white",
        "xaxis": axis(x_title), "yaxis": axis(y_title), "hovermode": "closest",
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 12}}})


def axis(title: str) -> dict[str, Any]:
    return {"title": {"text": title, "standoff": 8}, "gridcolor": GRID, "zeroline": False, "linecolor": "#9aa5b1",
            "ticks": "outside", "tickcolor": "#9aa5b1", "automargin": True}


def _steps(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Where a staircase changes, its first and its last index: all that a drawing of it needs."""
    changed = np.flatnonzero(values[1:] != values[:-1]) + 1
    return np.unique(np.concatenate([[0], changed, [len(values) - 1]]))


def _short(values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float32]:
    """Half the bytes; seven digits are more than a pixel."""
    return np.asarray(values, dtype=np.float32)
