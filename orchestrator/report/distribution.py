"""How sure a gradient system became: the chance of the most probable value per decision and epoch, a map per budget."""
from __future__ import annotations

from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from orchestrator.report.data import RunView
from searchspaces.space import SearchSpace


def distribution_figure(run: RunView, space: SearchSpace | None) -> go.Figure | None:
    """None for runs whose epochs record no logits. Without `space` decisions are numbered."""
    epochs = {event["epoch"]: event["logits"] for event in run.events
              if event.get("kind") == "epoch" and isinstance(event.get("logits"), dict) and event["logits"]}
    if not epochs:
        return None
    budgets = budget_names(run)
    figure = go.Figure(layout={"margin": {"l": 110, "r": 12, "t": 44, "b": 44}, "xaxis": {"title": {"text": "epoch"}},
                               "yaxis": {"autorange": "reversed"}})
    for b, name in enumerate(budgets):
        figure.add_trace(_map(epochs, b, space, name, visible=b == 0))
    buttons = [{"label": name, "method": "update", "args": [{"visible": [other == b for other in range(len(budgets))]}]}
               for b, name in enumerate(budgets)]
    if len(buttons) > 1:
        figure.update_layout(updatemenus=[{"buttons": buttons, "x": 0, "y": 1.16, "xanchor": "left"}])
    return figure


def budget_names(run: RunView) -> list[str]:
    """In the order in which the logits are numbered."""
    goals = [goal for goal in run.state.get("goals", []) if isinstance(goal, dict)]
    several = len(goals) > 1
    return [escape(f"{goal['label']} {ms:.4g} ms" if several else f"{ms:.4g} ms")
            for goal in goals for ms in goal.get("budgets_ms", [])]


def _map(epochs: dict[int, dict[str, list[float]]], budget: int, space: SearchSpace | None, name: str,
         visible: bool) -> go.Heatmap:
    order = sorted(epochs)
    decisions = len([key for key in epochs[order[0]] if key.startswith(f"{budget}.")])
    p = [[softmax(epochs[epoch][f"{budget}.{e}"]) for epoch in order] for e in range(decisions)]
    names = [str(e) if space is None else escape(space.choices[e].name) for e in range(decisions)]
    values = [[_value(space, e, int(row.argmax())) for row in rows] for e, rows in enumerate(p)]
    return go.Heatmap(
        x=order, y=names, z=[[round(float(row.max()), 3) for row in rows] for rows in p], text=values,
        zmin=0, zmax=1, colorscale="Viridis", visible=visible, name=name, colorbar={"title": {"text": "chance"}},
        hovertemplate="epoch %{x}, %{y}: %{text} has %{z:.0%}<extra></extra>")


def _value(space: SearchSpace | None, decision: int, token: int) -> str:
    return escape(str(space.choices[decision].values[token])) if space is not None else f"value {token}"


def softmax(logits: Any) -> NDArray[np.float64]:
    row = np.asarray(logits, dtype=np.float64)
    weights = np.exp(row - row.max())
    return weights / weights.sum()
