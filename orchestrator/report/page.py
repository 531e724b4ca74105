"""report.html: one self-contained page about a run, at any stage of it. Opens offline, in any browser, for years.

Everything is in the file: figures, script, style and data. The page's policy forbids it any connection. Text that comes
from a run (names, configuration, errors) reaches the page escaped, as text or as JSON, never as markup.
"""
from __future__ import annotations

import json
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from actors.objectpath import AnyPath
from orchestrator.record.files import write_text
from orchestrator.report import figures, sections
from orchestrator.report.data import RunView, read_run
from orchestrator.report.distribution import distribution_figure
from orchestrator.report.drawing import drawing_data
from orchestrator.report.spaces import searches_spaces, spaces_section
from orchestrator.report.views import views
from searchspaces.errors import SpaceError
from searchspaces.space import SearchSpace, Tokens


def write_report(run_dir: AnyPath, space: SearchSpace | None = None) -> AnyPath:
    """Writes run_dir/report.html and returns its path. Without `space` architectures are not drawn."""
    path = run_dir / "report.html"
    write_text(path, render(read_run(run_dir), space))
    return path


def render(run: RunView, space: SearchSpace | None) -> str:
    """The page as text."""
    problems = list(run.problems)
    payload, spaces = page_data(run, space, problems), spaces_section(run, space, problems)
    payload["figures"] |= spaces.figures
    templates = files("orchestrator.report") / "templates"
    # Template is safe here: values are inserted once and never scanned again.
    return Template((templates / "report.html").read_text()).substitute(
        title=escape(run.name), facts=sections.facts(run), badge=sections.badge(run),
        problems=sections.problem_list(problems),
        heading="Chosen architectures" if run.bare else "Handed-over models",
        table=sections.table(run, len(payload["views"]) > 1), agreement=sections.agreement(run), spaces=spaces.html,
        commands=sections.commands(run, payload["views"]), environment=sections.environment(run),
        style=(templates / "report.css").read_text(), script=(templates / "report.js").read_text(),
        data=json_in_html(payload), plotly=get_plotlyjs())


def json_in_html(value: Any) -> str:
    """JSON that cannot end its script element, whatever strings it holds."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def page_data(run: RunView, space: SearchSpace | None, problems: list[str]) -> dict[str, Any]:
    """Everything the page's script reads: one view per goal (figures, front, models, notes and the range of the
    slider), and what all of them share."""
    seen = views(run)
    training = figures.training_figure(run)
    distribution = None if searches_spaces(run) else distribution_figure(run, space)
    hidden = [] if training or _trains_a_supernet(run) else ["training"]
    return {"run": run.name, "views": [_view(label, view, space) for label, view in seen],
            "hidden": hidden + ([] if distribution else ["distribution"]),
            "drawing": _drawing(run, [view for _, view in seen], space, problems),
            "figures": {name: json.loads(figure.to_json()) if figure else None
                        for name, figure in (("training", training), ("distribution", distribution))}}


def _view(label: str, run: RunView, space: SearchSpace | None) -> dict[str, Any]:
    front, models = _front(run, space), [_model(row) for row in run.models]
    made: dict[str, go.Figure | None] = {
        "front": figures.front_figure(run), "prediction": figures.prediction_figure(run),
        "hypervolume": figures.hypervolume_figure(run), "best": figures.best_figure(run),
        "learning": figures.learning_figure(run)}
    return {"label": label, "bare": run.bare, "front": front, "models": models, "budget": _budget_range(front, models),
            "hidden": [] if made["learning"] else ["learning"],
            "notes": {"front": _front_note(run), "prediction": _prediction_note(run), "history": _history_note(run)},
            "figures": {name: json.loads(figure.to_json()) if figure else None for name, figure in made.items()}}


def _trains_a_supernet(run: RunView) -> bool:
    accuracy = run.config.get("accuracy")
    source = accuracy.get("source", "supernet") if isinstance(accuracy, dict) else accuracy or "supernet"
    return bool(source == "supernet")


def _front(run: RunView, space: SearchSpace | None) -> list[dict[str, Any]]:
    """Front trials for the slider, fastest first; of equal ones the earliest. Their accuracy strictly increases."""
    rows: list[dict[str, Any]] = []
    for row in run.trials.take(run.front).to_pylist():
        if rows and rows[-1]["latency_ms"] == row["latency_ms"]:
            continue
        keys = ("arch_id", "latency_ms", "latency_source", "accuracy", "accuracy_source", "madds", "params", "sequence")
        rows.append({key: row[key] for key in keys} | {"text": _text(space, row["tokens"])})
    return rows


def _model(row: dict[str, Any]) -> dict[str, Any]:
    keys = ("arch_id", "budget_ms", "latency_ms", "latency_stderr_ms", "predicted_ms", "accuracy", "test_accuracy",
            "madds", "params", "text")
    onnx = row.get("onnx")
    return {key: _finite(row.get(key)) for key in keys} | {"file": onnx, "href": sections.safe_link(onnx)}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _budget_range(front: list[dict[str, Any]], models: list[dict[str, Any]]) -> dict[str, float] | None:
    """Slider from the fastest thing known to just beyond the slowest, starting at the middle of what was asked for."""
    latencies = [row["latency_ms"] for row in front + models] + [m["budget_ms"] for m in models]
    if not latencies:
        return None
    asked = sorted(m["budget_ms"] for m in models)
    start = asked[len(asked) // 2] if asked else front[len(front) // 2]["latency_ms"]
    return {"min": min(latencies), "max": max(latencies) * 1.02, "start": start}


def _drawing(run: RunView, seen: list[RunView], space: SearchSpace | None,
             problems: list[str]) -> dict[str, Any] | None:
    """Only what the slider can show is drawn, so the page stays small."""
    if space is None:
        return None
    shown = run.models + [row for view in seen for row in view.trials.take(view.front).to_pylist()]
    rows: dict[str, Tokens] = {}
    for row in shown:
        try:
            rows[row["arch_id"]] = space.check_tokens(np.array([row["tokens"]]))[0]
        except (SpaceError, KeyError, TypeError, ValueError, OverflowError) as error:
            problems.append(f"Architecture {row.get('arch_id')} is not of this search space and not drawn ({error}).")
    return drawing_data(space, rows)


def _text(space: SearchSpace | None, tokens: list[int] | None) -> str:
    if space is None or tokens is None or len(tokens) != len(space.choices):
        return ""
    try:
        return space.text(space.check_tokens(np.array([tokens]))[0])
    except SpaceError:
        return ""


def _front_note(run: RunView) -> str:
    known = int((np.isfinite(run.numbers("latency_ms")) & np.isfinite(run.numbers("accuracy"))).sum())
    dominated = known - len(run.front)
    thinned = (f" {figures.DOMINATED_SHOWN:,} of {dominated:,} dominated trials are drawn; the front is complete."
               if dominated > figures.DOMINATED_SHOWN else "")
    sources = sorted({name for name in run.trials.column("accuracy_source").to_pylist() if name})
    how = {"supernet": "with the supernet's weights", "proxy": "by a short training", "table": "from a table"}
    scored = " or ".join(how.get(name, f"by {name}") for name in sources)
    after = ("Chosen architectures are not trained or exported: their latencies were looked up." if run.bare else
             "Handed-over models are trained further and measured from their exported file.")
    fixed = (" The fixed network is the one the supernet started from, fine-tuned on as many images at the largest "
             "resolution that meets a budget; open marks are test accuracy." if run.fixed else "")
    return (f"Trials are scored {scored}. " if scored else "") + after + fixed + thinned


def _prediction_note(run: RunView) -> str:
    error, floor = figures.prediction_error(run), figures.noise_floor(run)
    count = len(figures.prediction_pairs(run)[0])
    parts = [f"Mean error {error:.1%} over {count} held-out networks" if count else "",
             f"measurement noise {floor:.1%}" if np.isfinite(floor) else ""]
    return "; ".join(part for part in parts if part) + "." if any(parts) else ""


def _history_note(run: RunView) -> str:
    if not len(run.front):
        return ""
    latency_ms, accuracy = figures.hypervolume_reference(run)
    return f"Area between the front and the corner at {latency_ms:.4g} ms and {accuracy:.1%}."
