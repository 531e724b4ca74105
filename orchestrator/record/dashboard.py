"""`paretoray dashboard`: what Grafana and Prometheus need to watch searches, made from the table of metrics.

    grafana/paretoray.json     the dashboard, to import or to put where Grafana is provisioned
    prometheus.yml             scrapes every node that Ray tells of, with the rules beside it
    paretoray-alerts.yml       the alarms, each explained in docs/operations.md

Expressions are written with the metrics' own names (`Metric.series`), so a metric that is renamed is renamed here.
"""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from orchestrator.record import raymetrics as m
from searchspaces.errors import StoreError

ALERTS_FILE, PROMETHEUS_FILE, GRAFANA_FILE = "paretoray-alerts.yml", "prometheus.yml", "grafana/paretoray.json"
DISCOVERY_FILE = "prom_metrics_service_discovery.json"      # Ray's, in its folder: the metrics ports of all nodes
SCRAPE = "10s"
GUIDE = "docs/operations.md"
RUN = 'run=~"$run"'


@dataclass(frozen=True)
class Panel:
    """One graph. `expression` in PromQL, with `$run` for the runs that are chosen; `legend` names its labels."""

    title: str
    expression: str
    legend: str = "{{run}}"
    unit: str = "short"
    description: str = ""


@dataclass(frozen=True)
class Alert:
    """`expression` holds for `lasting` before it is told."""

    name: str
    expression: str
    lasting: str
    summary: str


def _rate(metric: m.Metric, over: str = "5m", by: str = "run") -> str:
    return f"sum by ({by}) (rate({metric.series}{{{RUN}}}[{over}]))"


def _latest(metric: m.Metric, by: str = "run") -> str:
    """A gauge has one writer, but one more right after a run was resumed."""
    return f"max by ({by}) ({metric.series}{{{RUN}}})"


def _quantile(share: float) -> str:
    return f"histogram_quantile({share}, sum by (run, le) (rate({m.EVALUATION_S.series}_bucket{{{RUN}}}[10m])))"


def _failed_share(over: str, runs: str = f"{{{RUN}}}") -> str:
    """0 before the first failure: Ray shows no counter that was never raised."""
    failed, trials = (f"sum by (run) (increase({metric.series}{runs}[{over}]))" for metric in (m.FAILED, m.TRIALS))
    return f"({failed} or 0 * {trials}) / {trials}"


ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    ("Runs", (
        Panel("Stage", f"{_latest(m.STAGE, 'run, stage')} == 1", "{{run}}: {{stage}}", description=m.STAGE.description),
        Panel("Trials left", _latest(m.LEFT), description=m.LEFT.description),
        Panel("Evaluations per second", _rate(m.TRIALS), unit="ops"),
        Panel("Failed share of trials", _failed_share("15m"), unit="percentunit"),
        Panel("Duration of an evaluation, median", _quantile(0.5), unit="s"),
        Panel("Duration of an evaluation, 95 of 100", _quantile(0.95), unit="s"),
        Panel("Hypervolume", _latest(m.HYPERVOLUME), description=m.HYPERVOLUME.description),
        Panel("Best accuracy", _latest(m.BEST), unit="percentunit", description=m.BEST.description),
    )),
    ("Devices", (
        Panel("Devices by state", _latest(m.DEVICES, "run, target, state"), "{{run}} {{target}}: {{state}}",
              description=m.DEVICES.description),
        Panel("Networks that wait to be timed", _latest(m.QUEUE, "run, target"), "{{run}} {{target}}"),
        Panel("Networks timed per second", _rate(m.MEASUREMENTS), unit="ops"),
    )),
    ("Workers", (
        Panel("Evaluations under way", _latest(m.IN_FLIGHT), description=m.IN_FLIGHT.description),
        Panel("Rollout workers", _latest(m.ROLLOUTS), description=m.ROLLOUTS.description),
        Panel("Rollout workers lost", _latest(m.RESTARTS), description=m.RESTARTS.description),
        Panel("Supernet: epoch", _latest(m.EPOCH), description=m.EPOCH.description),
        Panel("Supernet: images per second", _latest(m.IMAGES), description=m.IMAGES.description),
    )),
    ("Nodes", (
        Panel("Failed writes", _latest(m.STORE_ERRORS), description=m.STORE_ERRORS.description),
        Panel("Processor in use", "ray_node_cpu_utilization / 100", "{{ip}}", "percentunit"),
        Panel("Memory in use", "ray_node_mem_used / ray_node_mem_total", "{{ip}}", "percentunit"),
        Panel("Disk in use", "ray_node_disk_utilization_percentage / 100", "{{ip}}", "percentunit"),
    )),
)
PANELS = tuple(panel for _, panels in ROWS for panel in panels)

_SEARCHING = f'max by (run) ({m.STAGE.series}{{stage="search"}}) == 1'
_LIVE = f"max by (run) ({m.STAGE.series})"
ALERTS = (
    Alert("ParetorayRunGone",
          f'(max by (run) (max_over_time({m.STAGE.series}{{stage!="done"}}[15m]) == 1) unless on (run) {_LIVE}) unless '
          f'on (run) max by (run) (max_over_time({m.STAGE.series}{{stage="done"}}[15m]) == 1)', "2m",
          "the driver of run {{ $labels.run }} has ended before its search was done"),
    Alert("ParetorayNoTrial",
          f"({_SEARCHING}) unless on (run) sum by (run) (increase({m.TRIALS.series}[10m])) > 0", "20m",
          "run {{ $labels.run }} searches, and has recorded no trial for half an hour"),
    Alert("ParetorayTrialsFail",
          f"{_failed_share('30m', '')} > 0.2 and on (run) sum by (run) (increase({m.TRIALS.series}[30m])) >= 5", "5m",
          "more than a fifth of the last trials of run {{ $labels.run }} failed"),
    Alert("ParetorayDeviceQuarantined",
          f'max by (run, target) ({m.DEVICES.series}{{state="quarantined"}}) > 0', "1m",
          "run {{ $labels.run }} has given up a device of target {{ $labels.target }}"),
    Alert("ParetorayDeviceWaits",
          f'max by (run, target) ({m.DEVICES.series}{{state=~"waiting|starting"}}) > 0 and on (run, target) '
          f"max by (run, target) ({m.QUEUE.series}) > 0", "15m",
          "run {{ $labels.run }} has waited for a device of target {{ $labels.target }} for a quarter of an hour"),
    Alert("ParetorayWorkersDie", f"max by (run) (delta({m.RESTARTS.series}[15m])) > 5", "1m",
          "run {{ $labels.run }} loses rollout workers again and again"),
    Alert("ParetorayStoreErrors", f"max by (run) ({m.STORE_ERRORS.series}) > 0", "1m",
          "run {{ $labels.run }} could not write to its folder"),
    Alert("ParetorayDiskFull", "ray_node_disk_utilization_percentage > 95", "5m",
          "the disk of node {{ $labels.ip }} is nearly full"),
    Alert("ParetorayMemoryFull", "ray_node_mem_used / ray_node_mem_total > 0.95", "5m",
          "the memory of node {{ $labels.ip }} is nearly full; Ray ends workers at that"),
)


def write_dashboard(folder: Path, ray_folder: Path) -> list[Path]:
    """Writes the three files; `ray_folder` is where Ray keeps its sessions on the machine of Prometheus. StoreError
    where they cannot be written."""
    texts = {GRAFANA_FILE: json.dumps(grafana_dashboard(), indent=2) + "\n", ALERTS_FILE: _yaml(alert_rules()),
             PROMETHEUS_FILE: _yaml(prometheus_configuration(ray_folder))}
    try:
        for name, text in texts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    except OSError as error:
        raise StoreError(f"cannot write {folder / name} ({error.strerror}); choose another --out folder") from error
    return [folder / name for name in texts]


def prometheus_configuration(ray_folder: Path) -> dict[str, Any]:
    return {"global": {"scrape_interval": SCRAPE, "evaluation_interval": SCRAPE}, "rule_files": [ALERTS_FILE],
            "scrape_configs": [{"job_name": "ray", "file_sd_configs": [{"files": [str(ray_folder / DISCOVERY_FILE)]}]}]}


def alert_rules() -> dict[str, Any]:
    rules = [{"alert": alert.name, "expr": alert.expression, "for": alert.lasting, "annotations": {
        "summary": alert.summary, "runbook": f"{GUIDE}#{alert.name.lower()}"}} for alert in ALERTS]
    return {"groups": [{"name": "paretoray", "rules": rules}]}


def grafana_dashboard() -> dict[str, Any]:
    """Grafana's JSON of it: rows of panels, two beside each other."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, group in ROWS:
        panels.append({"type": "row", "title": title, "id": len(panels) + 1, "panels": [],
                       "gridPos": {"h": 1, "w": 24, "x": 0, "y": y}})
        for index, panel in enumerate(group):
            place = {"h": 8, "w": 12, "x": 12 * (index % 2), "y": y + 1 + 8 * (index // 2)}
            panels.append(_graph(panel, len(panels) + 1, place))
        y += 1 + 8 * ((len(group) + 1) // 2)
    return {"title": "paretoray", "uid": "paretoray", "tags": ["paretoray"], "schemaVersion": 39, "editable": True,
            "refresh": SCRAPE, "time": {"from": "now-3h", "to": "now"}, "timezone": "browser",
            "templating": {"list": _variables()}, "panels": panels}


def _graph(panel: Panel, number: int, place: Mapping[str, int]) -> dict[str, Any]:
    return {"type": "timeseries", "title": panel.title, "description": panel.description, "id": number,
            "gridPos": dict(place), "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
            "targets": [{"expr": panel.expression, "legendFormat": panel.legend, "refId": "A"}]}


def _variables() -> Sequence[dict[str, Any]]:
    """What one chooses above the panels: where Prometheus is, and which runs."""
    return [{"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
            {"name": "run", "type": "query", "label": "Run", "multi": True, "includeAll": True, "allValue": ".*",
             "datasource": {"type": "prometheus", "uid": "${datasource}"}, "refresh": 2,
             "query": f"label_values({m.STAGE.series}, run)", "current": {"text": "All", "value": "$__all"}}]


def _yaml(content: Mapping[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, width=120)
