"""What `paretoray dashboard` writes. That a real search fills every panel is in orchestrator/cluster/test_jobs.py."""
from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.record.dashboard import ALERTS, GUIDE, PANELS, write_dashboard
from orchestrator.record.raymetrics import METRICS
from searchspaces.errors import StoreError

ROOT = Path(__file__).parents[3]
OWN = re.compile(r"\bray_paretoray_\w+")


def test_every_metric_is_drawn_and_nothing_else() -> None:
    series = {metric.series + ("_bucket" if metric.kind == "histogram" else "") for metric in METRICS}
    assert {name for panel in PANELS for name in OWN.findall(panel.expression)} == series
    assert {name for alert in ALERTS for name in OWN.findall(alert.expression)} <= series
    assert len({panel.title for panel in PANELS}) == len(PANELS)
    assert len({alert.name for alert in ALERTS}) == len(ALERTS)


def test_labels_in_expressions_are_those_of_the_metrics() -> None:
    for metric in METRICS:
        for panel in PANELS:
            if metric.series in OWN.findall(panel.expression):
                (grouped, *_) = re.findall(r"by \(([^)]*)\)", panel.expression)
                assert set(grouped.split(", ")) <= {*metric.labels, "le"}, panel.title
                assert set(re.findall(r"{{(\w+)}}", panel.legend)) <= set(grouped.split(", ")), panel.title


def test_every_alarm_is_explained() -> None:
    headings = re.findall(r"^### (.*)$", (ROOT / GUIDE).read_text(), re.MULTILINE)
    assert headings == [alert.name for alert in ALERTS]


def test_the_command_writes_what_grafana_and_prometheus_read(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["dashboard", "--out", str(tmp_path / "m"), "--ray-folder", "/somewhere/ray"])
    assert done.exit_code == 0, done.output
    page = json.loads((tmp_path / "m" / "grafana" / "paretoray.json").read_text())
    graphs = [panel for panel in page["panels"] if panel["type"] == "timeseries"]
    assert [panel["targets"][0]["expr"] for panel in graphs] == [panel.expression for panel in PANELS]
    assert len({panel["id"] for panel in page["panels"]}) == len(page["panels"])
    cells = [(panel["gridPos"]["x"] // 12, panel["gridPos"]["y"]) for panel in page["panels"]]
    assert len(set(cells)) == len(cells), "one panel lies on another"
    configuration = yaml.safe_load((tmp_path / "m" / "prometheus.yml").read_text())
    (scrape,) = configuration["scrape_configs"]
    assert scrape["file_sd_configs"][0]["files"] == ["/somewhere/ray/prom_metrics_service_discovery.json"]
    assert (tmp_path / "m" / configuration["rule_files"][0]).exists()
    assert "--web.listen-address=127.0.0.1:9090" in done.output


def promtool(*arguments: str) -> str:
    program = shutil.which("promtool") or shutil.which(str(ROOT / ".venv" / "prometheus" / "usr/bin/promtool"))
    if program is None:
        pytest.skip("there is no promtool here; Debian's package prometheus has it")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_agrees(tmp_path: Path) -> None:
    assert f"{len(ALERTS)} rules found" in promtool("check", "config", str(write_dashboard(tmp_path, Path("/x"))[-1]))


# One value a minute; "x" repeats or counts on, "_" is no value, "stale" the end of a series.
STORY = {
    'stage{run="gone",stage="search"}': "1x20 stale",
    'stage{run="ended",stage="deliver"}': "1x19 0 stale",
    'stage{run="ended",stage="done"}': "_x19 1 stale",
    'stage{run="stuck",stage="search"}': "1x80",
    'stage{run="well",stage="search"}': "1x80",
    'trials_total{run="stuck",controller="a"}': "0+1x20 20x60",
    'trials_total{run="well",controller="a"}': "0+1x80",
    'trials_failed_total{run="well",controller="a"}': "0x40 0+1x40",
    'devices{run="well",target="p",state="quarantined"}': "0x40 1x40",
    'devices{run="well",target="q",state="waiting"}': "1x80",
    'latency_queue{run="well",target="q"}': "0x40 3x40",
    'rollout_restarts{run="well"}': "0x40 0+1x40",
    'rollout_restarts{run="stuck"}': "7x80",
    'store_errors{run="well"}': "0x40 1x40",
}
LATER = ("DeviceQuarantined", "DeviceWaits", "StoreErrors", "TrialsFail", "WorkersDie")
FIRING = {"15m": (), "25m": (("RunGone", "gone"),), "40m": (),
          "60m": (("NoTrial", "stuck"), *((name, "well") for name in LATER))}


def test_alarms_go_off_when_they_should(tmp_path: Path) -> None:
    """A run whose driver goes after 20 minutes, one that ends well, one that records nothing from then on, and one that
    gets every trouble after 40 minutes."""
    write_dashboard(tmp_path, Path("/x"))
    firing = [{"expr": 'count by (alertname, run) (ALERTS{alertstate="firing"})', "eval_time": minute,
               "exp_samples": [{"labels": f'{{alertname="Paretoray{name}", run="{run}"}}', "value": 1}
                               for name, run in expected]} for minute, expected in FIRING.items()]
    story = [{"series": f"ray_paretoray_{name}", "values": values} for name, values in STORY.items()]
    (tmp_path / "story.yml").write_text(yaml.safe_dump({
        "rule_files": ["paretoray-alerts.yml"], "evaluation_interval": "30s",
        "tests": [{"interval": "1m", "input_series": story, "promql_expr_test": firing}]}))
    promtool("test", "rules", str(tmp_path / "story.yml"))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="choose another --out folder"):
        write_dashboard(tmp_path / "file", Path("/tmp/ray"))
