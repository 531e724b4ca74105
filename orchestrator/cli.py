"""The command line. Every failure is one sentence on stderr and a non-zero exit code; `--help` teaches."""
from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from orchestrator.cluster import prepare_environment
from orchestrator.interrupt import Interrupted
from searchspaces.errors import ConfigError, ParetorayError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=(
    "Finds the best neural network under any latency budget, measured on your hardware, and hands over the trained "
    "ONNX file. Start with: paretoray search configs/quickstart.yaml"))
stdout = Console()
stderr = Console(stderr=True)

Runs = Annotated[Path, typer.Option("--runs", help="Folder that holds the runs.")]
Address = Annotated[str | None, typer.Option(help="host:port of an existing Ray cluster; default: a local one.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override one key: section.key=value. Repeatable.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name of a run, or the path of its folder.")]
RUNS = Path("runs")


@app.command()
def search(config: Annotated[Path, typer.Argument(help="YAML file, see configs/.")],
           name: Annotated[str | None, typer.Option(help="Run name; default: the file's name and the time.")] = None,
           set_: Set = None, address: Address = None, runs: Runs = RUNS) -> None:
    """Search for the best networks under every budget, and hand over trained ONNX files."""
    prepare_environment(address)
    from orchestrator.config import load_config
    from orchestrator.search import Search, default_name

    loaded = load_config(config, set_ or [])
    Search(loaded, runs=runs, name=name or loaded.name or default_name(config), address=address).run()


@app.command()
def resume(run: RunName, address: Address = None, runs: Runs = RUNS) -> None:
    """Go on with a run after a crash, a kill or Ctrl-C; nothing recorded is done twice."""
    prepare_environment(address)
    from orchestrator.search import Search

    Search.resume(run, runs=runs, address=address).run()


@app.command()
def generate(run: RunName,
             budget: Annotated[list[str], typer.Option(help="Latency budget such as 2.5ms. Repeatable.")],
             runs: Runs = RUNS) -> None:
    """A trained, measured ONNX file for a budget nobody asked for before, from a finished run."""
    from orchestrator.config import parse_budget
    from orchestrator.generate import generate_models

    try:
        budgets = [parse_budget(value) for value in budget]
    except ValueError as error:
        raise ConfigError(f"--budget {error}") from error
    generate_models(run, budgets, runs=runs)


@app.command()
def measure(config: Annotated[Path, typer.Argument(help="YAML file with 'space' and 'target' sections.")],
            count: Annotated[int, typer.Option(min=1, help="Random architectures to measure.")] = 200,
            out: Annotated[Path | None, typer.Option(help="Parquet file; default: latency-TARGET.parquet.")] = None,
            set_: Set = None, address: Address = None) -> None:
    """Measure random architectures on the target and write a Parquet table; an existing table is continued."""
    prepare_environment(address)
    from orchestrator.config import load_config
    from orchestrator.measure import measure_table

    measure_table(load_config(config, set_ or []), count, out, address)


@app.command()
def targets(config: Annotated[Path | None, typer.Option(help="Also check this configuration's target.")] = None,
            as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
            address: Address = None) -> None:
    """Which measuring devices does the cluster have, and are they healthy?"""
    prepare_environment(address)
    from orchestrator.targets import list_targets

    rows = list_targets(config, address)
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    _print_table(rows, "no measuring device found; start nodes with --resources='{\"latency_cpu\": 1}'")


@app.command()
def report(run: RunName, runs: Runs = RUNS) -> None:
    """Write the run's report.html: front, budget slider, architectures, latency prediction, history."""
    from orchestrator.generate import write_run_report

    stdout.print(f"report: {write_run_report(run, runs)}")


@app.command("runs")
def list_runs(runs: Runs = RUNS) -> None:
    """List all runs with their stage, trials and models."""
    from orchestrator.generate import run_rows

    _print_table(run_rows(runs), f"no runs in {runs}; start one with: paretoray search configs/quickstart.yaml")


@app.command()
def check(reference: Annotated[str, typer.Argument(metavar="MODULE:CLASS")],
          set_: Annotated[list[str] | None, typer.Option("--set", help="One of its options: key=value. "
                                                                       "Repeatable.")] = None) -> None:
    """Run the conformance suite on your own search space, target, dataset or controller."""
    from orchestrator.check import check_plugin
    from orchestrator.config import parse_options

    kind, problems = check_plugin(reference, parse_options(set_ or []))
    for problem in problems:
        stdout.print(f"- {problem}", markup=False)
    if problems:
        raise ConfigError(f"{reference} breaks {len(problems)} rule(s) of the {kind} contract, listed above")
    stdout.print(f"{reference} passes the {kind} conformance suite", markup=False)


def _print_table(rows: list[dict[str, str]], empty: str) -> None:
    if not rows:
        stdout.print(empty, markup=False)
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    stdout.print(table)


def main() -> None:
    """Entry point of `paretoray` and `python -m orchestrator`."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
    try:
        app(standalone_mode=True)
    except Interrupted as stop:
        sys.exit(128 + stop.signal_number)
    except ParetorayError as error:
        stderr.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
