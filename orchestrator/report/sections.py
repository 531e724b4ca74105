"""The sections of the page that are text: HTML, every value of the run escaped."""
from __future__ import annotations

import json
import time
from html import escape
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

import numpy as np

from actors.objectpath import as_path
from orchestrator.record.progress import quantity
from orchestrator.record.store import NARROW, run_arguments
from orchestrator.report.data import RunView, column_numbers
from orchestrator.report.views import agreements

FINISHED, DELIVER = "done", "deliver"   # of Stage in orchestrator/run/search.py


def badge(run: RunView) -> str:
    if _ended(run):
        return '<span class="badge done">finished</span>'
    return f'<span class="badge open">in stage: {escape(_stage(run))}</span>'


def _inner(run: RunView) -> bool:
    """Did it search spaces for the run whose folder it is in? That one is resumed, and this ends before delivering."""
    return run.path.name == NARROW and (run.path.parent / "config.yaml").exists()


def _ended(run: RunView) -> bool:
    return _stage(run) == FINISHED or (_inner(run) and _stage(run) == DELIVER)


def facts(run: RunView) -> str:
    accuracy = run.numbers("accuracy")
    started = run.numbers("started_at")
    failed = sum(1 for error in run.trials.column("error").to_pylist() if error)
    targets = sorted({name for name in run.trials.column("target_id").to_pylist() if name})
    facts = {
        "Search space": _name(run, "space"), "Target": _targets(run) or ", ".join(targets),
        "Dataset": _name(run, "data"), "Controller": _name(run, "controller"),
        "Trials": f"{len(accuracy):,}" + (f" ({failed:,} failed)" if failed else ""),
        "On the front": f"{len(run.front):,}", "Networks measured": f"{_networks_measured(run):,}",
        "Architectures chosen" if run.bare else "Models handed over":
            f"{_handed_over(run)} for {len({r['budget_ms'] for r in run.generated})} budgets",
    }
    if run.config.get("warm_start"):
        facts["Earlier runs"] = _earlier(run)
    if np.isfinite(started).any():
        facts["First trial"] = time.strftime("%Y-%m-%d %H:%M", time.localtime(np.nanmin(started)))
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v or 'unknown')}</dd></div>" for k, v in facts.items())
    return f'<dl class="facts">{items}</dl>'


def _earlier(run: RunView) -> str:
    """Whose trials it started from, and how far its own trials agree with those of other tasks, where that was found.
    """
    names = ", ".join(as_path(str(name)).name for name in run.config["warm_start"])
    agreement = [value for event in run.events for key, value in event.items()
                 if key.endswith("agreement_with_earlier") and isinstance(value, int | float)]
    return f"{names} (agreement {agreement[-1]:.2f})" if agreement else names


def _name(run: RunView, section: str) -> str:
    value = run.config.get(section)
    return str(value.get("name", "")) if isinstance(value, dict) else str(value or "")


def _targets(run: RunView) -> str:
    """Labels of the configured devices; `target` is a configuration of an earlier version."""
    listed = run.config.get("targets")
    if not isinstance(listed, list):
        return _name(run, "target")
    return ", ".join(str(t.get("label") or t.get("name")) if isinstance(t, dict) else str(t) for t in listed)


def _stage(run: RunView) -> str:
    return str(run.state.get("stage") or "unknown")


def _handed_over(run: RunView) -> int:
    """Models; architectures where none has become one."""
    return sum(run.bare or bool(row.get("onnx")) for row in run.models)


def _networks_measured(run: RunView) -> int:
    """Distinct ones: a network may have been visited several times, or in vain."""
    measured = np.isfinite(column_numbers(run.latency, "latency_ms"))
    return len(set(run.latency.filter(measured).column("arch_id").to_pylist()))


def problem_list(problems: list[str]) -> str:
    if not problems:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in problems)
    return f'<section class="problems"><h2>Not everything could be read</h2><ul>{items}</ul></section>'


def agreement(run: RunView) -> str:
    """A section for runs with several targets: do their rankings of networks agree?"""
    pairs = agreements(run)
    if not pairs:
        return ""
    head = "".join(f"<th>{name}</th>" for name in ("Targets", "Kendall tau", "Spearman", "Networks on both"))
    rows = "".join(f"<tr><td>{escape(pair.first)} and {escape(pair.second)}</td><td>{_rank(pair.kendall)}</td>"
                   f"<td>{_rank(pair.spearman)}</td><td>{pair.networks}</td></tr>" for pair in pairs)
    return ('<section><h2>Do the devices agree?</h2><p class="note">Rank correlation of measured latencies: at 1 the '
            'devices put networks in the same order, and one front would serve both.</p><div class="scroll">'
            f'<table id="agreement"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></section>')


def _rank(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "?"


def table(run: RunView, several: bool) -> str:
    if not run.generated:
        return '<p class="empty">No model has been handed over yet.</p>'
    head = (*(("Target",) if several else ()), "Budget (ms)",
            "Latency (ms)" if run.bare else "Measured latency (ms)", "Test accuracy",
            "Validation accuracy", "Chance to be best", "Multiply-adds", "Parameters",
            "Architecture" if run.bare else "File")
    rows = sorted(run.generated, key=lambda row: _key(row, several))
    beside = {_key(row, several): row for row in run.compared}
    body = "".join(_row(row, several, run.bare) + _fixed_row(beside.get(_key(row, several)), several) for row in rows)
    return (f'<div class="scroll"><table id="models"><thead><tr>{"".join(f"<th>{h}</th>" for h in head)}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>{_meaning(run)}")


def _meaning(run: RunView) -> str:
    """Of the column of chances; "" for runs of a version that did not say."""
    if not any(isinstance(row.get("probability_best"), int | float) for row in run.models):
        return ""
    what = ("architectures considered for the budget would be more accurate after a final training" if run.bare else
            "networks considered for the budget is truly more accurate (on infinitely many images)")
    caution = (" As nothing was trained, high chances are rather too high (docs/uncertainty.md)." if run.bare else "")
    return (f'<p class="note">Chance to be best: how probable it is that none of the other {what}; then the expected '
            f"gain over the next best, and how many were considered.{caution}</p>")


def _key(row: dict[str, Any], several: bool) -> tuple[str, float]:
    return str(row.get("target") or "") if several else "", row["budget_ms"]


def _row(row: dict[str, Any], several: bool, bare: bool) -> str:
    target = f"<td>{escape(str(row.get('target') or ''))}</td>" if several else ""
    budget = f"{target}<td>{row['budget_ms']:.4g}</td>"
    if not row.get("feasible"):
        reason = escape(str(row.get("reason") or "no architecture found under this budget"))
        return f'<tr class="infeasible">{budget}<td colspan="7">{reason}</td></tr>'
    return f"<tr>{budget}{_numbers(row, bare)}</tr>"


def _fixed_row(row: dict[str, Any] | None, several: bool) -> str:
    """Below the row of the same budget; "" where nothing is compared with it."""
    if row is None:
        return ""
    target = "<td></td>" if several else ""
    if not row.get("feasible"):
        return (f'<tr class="infeasible fixed">{target}<td>fixed</td><td colspan="7">'
                f"{escape(str(row.get('reason') or 'no resolution fits'))}</td></tr>")
    return (f'<tr class="fixed">{target}<td>fixed, {escape(str(row.get("resolution")))} px</td>'
            f"{_numbers(row, bare=False)}</tr>")


def _numbers(row: dict[str, Any], bare: bool) -> str:
    stderr = row.get("latency_stderr_ms")
    href, file = safe_link(row.get("onnx")), escape(str(row.get("onnx") or (bare and row.get("text")) or "no file"))
    cells = [_format(row.get("latency_ms"), ".3f") + ("" if stderr is None else f" ± {stderr:.3f}"),
             _format(row.get("test_accuracy"), ".2%"), _format(row.get("accuracy"), ".2%"), _certainty(row),
             quantity(row.get("madds")), quantity(row.get("params")), f'<a href="{href}">{file}</a>' if href else file]
    return "".join(f"<td>{cell}</td>" for cell in cells)


def _certainty(row: dict[str, Any]) -> str:
    """Empty for the fixed network, and for entries of a version that did not say."""
    chance, gain, count, trained = (value if isinstance(value := row.get(key), int | float) else None for key in (
        "probability_best", "expected_gain", "considered", "considered_trained"))
    if chance is None:
        return ""
    parts = [f"{chance:.0%}", "" if gain is None else f"{100 * gain:+.2f} points"]
    among = ["" if count is None else f"of {count}", f"{trained} trained" if trained and row.get("onnx") else ""]
    return ", ".join(filter(None, parts)) + f" ({', '.join(filter(None, among))})"


def _format(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "?"


def safe_link(path: Any) -> str:
    """A link to a file inside the run folder; "" for anything else (schemes, absolute paths, "..")."""
    if not isinstance(path, str) or not path:
        return ""
    parts = PurePosixPath(path)
    return "" if parts.is_absolute() or ".." in parts.parts or ":" in path or "\\" in path else quote(str(parts))


def commands(run: RunView, seen: list[dict[str, Any]]) -> str:
    name = run_arguments(run.path.parent if _inner(run) else run.path)
    lines = [] if _ended(run) else [f"paretoray resume {name}    # go on with this run"]
    for view in seen:
        example = f"{view['budget']['start']:.3g}" if view["budget"] else "2.5"
        target = f" --target {view['label']}" if len(seen) > 1 else ""
        lines.append(f"paretoray generate {name} --budget {example}ms{target}    # {_what(run)} for any budget")
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def _what(run: RunView) -> str:
    return "an architecture" if run.bare else "a model"


def environment(run: RunView) -> str:
    return escape(json.dumps({"configuration": run.config, "environment": run.environment}, indent=2, default=str))
