"""What a search for spaces believed over time: the chance of every bin after each epoch, a map per aim."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from orchestrator.report.data import RunView
from orchestrator.report.distribution import softmax
from orchestrator.report.figures import plain_figure

Logits = Mapping[int, Mapping[str, Sequence[float]]]


def recorded_logits(run: RunView) -> dict[int, dict[str, Any]]:
    """By epoch, "AIM.GROUP" -> logits; an epoch that a resumed run did again counts once."""
    return {event["epoch"]: event["logits"] for event in run.events
            if event.get("kind") == "epoch" and isinstance(event.get("logits"), dict) and event["logits"]}


def aims_recorded(logits: Mapping[str, Sequence[float]]) -> int:
    return len({key.split(".")[0] for key in logits})


def last_chances(run: RunView, aim: int, bins: Sequence[int]) -> list[list[float]] | None:
    """Per group those of its bins; None where the events do not say, or have other groups."""
    epochs = recorded_logits(run)
    last = epochs[max(epochs)] if epochs else {}
    rows = [last.get(f"{aim}.{k}", []) for k in range(len(bins))]
    return [softmax(row).tolist() for row in rows] if [len(row) for row in rows] == list(bins) else None


def bin_map(run: RunView, aims: Sequence[str], names: Sequence[str], labels: Sequence[Sequence[str]]) -> go.Figure:
    """Rows are bins, by group from the top. `aims` name the maps, escaped; every epoch needs logits of the groups."""
    epochs = recorded_logits(run)
    rows = [(k, b) for k, of_group in enumerate(labels) for b in range(len(of_group))]
    y = [[escape(names[k]) for k, _ in rows], [escape(labels[k][b]) for k, b in rows]]
    figure = plain_figure("epoch", "")
    for a, aim in enumerate(aims):
        chances = [[softmax(epochs[epoch][f"{a}.{k}"]) for k in range(len(names))] for epoch in sorted(epochs)]
        figure.add_heatmap(
            x=sorted(epochs), y=y, z=[[round(float(at[k][b]), 3) for at in chances] for k, b in rows],
            zmin=0, zmax=1, colorscale="Blues", visible=a == 0, name=aim, xgap=1, ygap=1,
            colorbar={"title": {"text": "chance"}, "tickformat": ".0%", "thickness": 14},
            hovertemplate="epoch %{x}, %{y}: %{z:.0%}<extra></extra>")
    buttons = [{"label": aim, "method": "update", "args": [{"visible": [a == b for b in range(len(aims))]}]}
               for a, aim in enumerate(aims)]
    if len(buttons) > 1:
        figure.update_layout(updatemenus=[{"buttons": buttons, "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom",
                                           "pad": {"b": 6}}], margin={"t": 48})
    figure.update_yaxes(autorange="reversed", type="multicategory", showgrid=False)
    return figure.update_xaxes(showgrid=False, dtick=1 if len(epochs) <= 20 else None)
