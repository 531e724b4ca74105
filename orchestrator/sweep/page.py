"""report.html of a sweep: the fronts of its searches on top of each other, and a table that compares them.

One file like a run's page (orchestrator/report/page.py), with its style and its rules: nothing is loaded, and text of
the searches reaches the page escaped.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Set
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from urllib.parse import quote

import numpy as np
import plotly.graph_objects as go
import yaml
from plotly.offline import get_plotlyjs

from orchestrator.record.files import write_text
from orchestrator.report.data import read_run
from orchestrator.report.figures import COLOURS, MARKERS, VERMILLION, plain_figure
from orchestrator.report.page import json_in_html
from orchestrator.report.sections import problem_list
from orchestrator.sweep.folder import SweepFolder, resume_command
from orchestrator.sweep.recorded import SETTLED, Recorded
from orchestrator.sweep.results import Result, Results, budget_columns, points, read_results, share

BUDGETS_SHOWN = 8
PALETTE = (*COLOURS[:5], VERMILLION)


def write_sweep_report(folder: SweepFolder) -> Path:
    """Of a sweep in any state."""
    results = read_results(folder)
    linked = {member.name for member in folder.members if (folder.path / member.name / "report.html").exists()}
    figures = {"fronts": fronts_figure(folder), "history": history_figure(folder)}
    report, own = (files(f"orchestrator.{room}") / "templates" for room in ("report", "sweep"))
    text = Template((own / "sweep.html").read_text()).substitute(
        title=escape(folder.name), badge=_badge(results), facts=_facts(folder, results),
        problems=problem_list(list(results.problems)), table=_table(results, linked), note=_note(results),
        command=escape(resume_command(folder.path)),
        settings=escape(yaml.safe_dump(folder.settings.model_dump(mode="json", exclude_none=True), sort_keys=False)),
        style=(report / "report.css").read_text(), plotly=get_plotlyjs(),
        data=json_in_html({name: json.loads(figure.to_json()) if figure else None for name, figure in figures.items()}))
    path = folder.path / "report.html"
    write_text(path, text)
    return path


def fronts_figure(folder: SweepFolder) -> go.Figure | None:
    """The Pareto front of every search; a click on its name in the legend hides it."""
    figure = plain_figure("latency (ms)", "validation accuracy (%)")
    for number, name in enumerate(_begun(folder)):
        run = read_run(folder.path / name)
        figure.add_scatter(
            x=run.numbers("latency_ms")[run.front], y=100 * run.numbers("accuracy")[run.front], mode="lines+markers",
            name=escape(name), line={"shape": "hv", "width": 2, "color": PALETTE[number % len(PALETTE)]},
            marker={"symbol": MARKERS[number // len(PALETTE) % len(MARKERS)], "size": 6},
            hovertemplate="%{x:.4g} ms, %{y:.2f} %<extra>" + escape(name) + "</extra>")
    return figure if figure.data else None


def history_figure(folder: SweepFolder) -> go.Figure | None:
    """Hypervolume over evaluations: what searches are stopped by."""
    figure = plain_figure("evaluations", "hypervolume")
    for number, name in enumerate(_begun(folder)):
        recorded = Recorded(folder.path, name)
        recorded.look()
        figure.add_scatter(
            x=np.arange(1, len(recorded.history) + 1), y=np.array(recorded.history), mode="lines", name=escape(name),
            line={"shape": "hv", "width": 2, "color": PALETTE[number % len(PALETTE)]},
            hovertemplate="after %{x}: %{y:.4f}<extra>" + escape(name) + "</extra>")
    return figure.update_layout(showlegend=False) if figure.data else None


def _begun(folder: SweepFolder) -> list[str]:
    """Searches with a trial."""
    return [member.name for member in folder.members
            if any((folder.path / member.name / "trials").glob("part-*.parquet"))]


def _badge(results: Results) -> str:
    left = sum(result.state not in SETTLED for result in results.searches)
    return (f'<span class="badge open">{left} of {len(results.searches)} not done</span>' if left else
            '<span class="badge done">finished</span>')


def _facts(folder: SweepFolder, results: Results) -> str:
    settings = folder.settings
    facts = {"Searches": f"{len(results.searches)} of {settings.count}", "Over": ", ".join(settings.over),
             "Chosen by": settings.search, "Trials": f"{sum(result.trials for result in results.searches):,}",
             "Largest hypervolume": results.leader or "none yet"}
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    return f'<dl class="facts">{items}</dl>'


def _table(results: Results, linked: Set[str]) -> str:
    """`linked`: searches that have a page of their own."""
    if not results.searches:
        return '<p class="empty">No search has begun yet.</p>'
    budgets = budget_columns(results, BUDGETS_SHOWN)
    columns: list[tuple[str, Callable[[Result], str]]] = [
        *((key, lambda result, key=key: _value(result.values[key])) for key in results.searches[0].values),
        ("State", lambda result: result.state.value), ("Trials", lambda result: f"{result.trials:,}"),
        ("Hypervolume", lambda result: f"{result.hypervolume:.4f}"),
        *((f"Best at {results.budgets_ms[i]:.4g} ms", lambda result, i=i: share(result.best[i])) for i in budgets),
        ("Best test accuracy", lambda result: share(result.test_accuracy))]
    if any(result.regret is not None for result in results.searches):
        columns.append(("Regret (points)", lambda result: points(result.regret)))
    head = "".join(f"<th>{escape(name)}</th>" for name in (*(name for name, _ in columns), "Search"))
    rows = ""
    for result in results.searches:
        cells = "".join(f"<td>{escape(cell(result))}</td>" for _, cell in columns) + f"<td>{_link(result, linked)}</td>"
        rows += f'<tr{" class=chosen" if result.name == results.leader else ""}>{cells}</tr>'
        if result.note:
            rows += f'<tr class="infeasible"><td colspan="{len(columns) + 1}">{escape(result.note)}</td></tr>'
    return (f'<div class="scroll"><table id="searches"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
            "</div>")


def _link(result: Result, linked: Set[str]) -> str:
    name = escape(result.name)
    return f'<a href="{quote(result.name)}/report.html">{name}</a>' if result.name in linked else name


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _note(results: Results) -> str:
    if results.reference_ms is None:
        return ""
    told = (f"Hypervolume: share of the area between 0 and {results.reference_ms:.4g} ms, 0 and 100 % accuracy, that "
            "the trials dominate; the same reference for all.")
    if any(result.regret is not None for result in results.searches):
        told += (" Regret: accuracy that the answers lack against the best of the table under the same budget, mean "
                 "over the budgets of the search.")
    return told
