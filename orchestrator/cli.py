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

from orchestrator.cluster.joining import prepare_environment
from orchestrator.interrupt import Interrupted
from searchspaces.errors import ConfigError, ParetorayError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=(
    "Finds the best neural network under any latency budget, measured on your hardware, and hands over the trained "
    "ONNX file. Start with: paretoray search configs/quickstart.yaml"))
stdout = Console()
stderr = Console(stderr=True)

Runs = Annotated[str, typer.Option("--runs", help="Folder that holds the runs, or s3://BUCKET/FOLDER.")]
Address = Annotated[str | None, typer.Option(help="host:port of an existing Ray cluster; default: a local one.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override one key: section.key=value. Repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name of a run, or the path of its folder.")]
RUNS = "runs"


def _print_version(wanted: bool) -> None:
    if wanted:
        from paretoray import __version__

        stdout.print(f"paretoray {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_print_version, help=(
        "Print the version."))] = False) -> None:
    """Options of no command."""


@app.command()
def search(config: Annotated[Path, typer.Argument(help="YAML file, see configs/.")],
           name: Annotated[str | None, typer.Option(help="Run name; default: the file's name and the time.")] = None,
           set_: Set = None, address: Address = None, runs: Runs = RUNS) -> None:
    """Search for the best networks under every budget, and hand over trained ONNX files."""
    prepare_environment(address)
    from orchestrator.config import load_config
    from orchestrator.run.search import Search, default_name

    loaded = load_config(config, set_ or [])
    Search(loaded, runs=runs, name=loaded.name or default_name(config) if name is None else name,
           address=address).run()


@app.command()
def init(path: Annotated[Path, typer.Argument(help="Folder with a sub-folder of images per class, or Parquet file.")],
         out: Annotated[Path | None, typer.Option(help="File to write; default: configs/NAME.yaml where there is a "
                                                       "folder configs, else NAME.yaml.")] = None,
         force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False) -> None:
    """Look at your images and this machine, and write an annotated configuration that runs."""
    prepare_environment(None)
    from orchestrator.init import write_config

    name = Path(f"{path.resolve().stem or 'mine'}.yaml")
    for sentence in write_config(path, out or ("configs" / name if Path("configs").is_dir() else name), force):
        stdout.print(sentence, markup=False, highlight=False, soft_wrap=True)


@app.command()
def resume(run: RunName, address: Address = None, runs: Runs = RUNS) -> None:
    """Go on with a run after a crash, a kill or Ctrl-C; nothing recorded is done twice."""
    prepare_environment(address)
    from orchestrator.run.search import Search

    Search.resume(run, runs=runs, address=address).run()


@app.command()
def sweep(config: Annotated[str | None, typer.Argument(help=(
              "YAML file, see configs/sweep.yaml; with --resume the name of the sweep, default: the newest that is not "
              "done."))] = None,
          name: Annotated[str | None, typer.Option(help="Sweep name; default: the file's name and the time.")] = None,
          resume_: Annotated[bool, typer.Option("--resume", help="Go on after a crash, a kill or Ctrl-C; what failed "
                                                                "is tried again.")] = False,
          set_: Set = None, address: Address = None, runs: Runs = RUNS) -> None:
    """Run many searches over any keys of a configuration, some at a time, and compare them on one page."""
    prepare_environment(address)
    from orchestrator.run.search import default_name
    from orchestrator.sweep.settings import load_sweep
    from orchestrator.sweep.sweep import Sweep

    if resume_:
        if name is not None or set_:
            raise ConfigError("--resume goes on with a sweep as it was begun; leave --name and --set out")
        Sweep.resume(config, runs=runs, address=address).run()
        return
    if config is None:
        raise ConfigError("paretoray sweep needs the YAML file of a sweep, for example configs/sweep.yaml, or --resume")
    settings = load_sweep(config, set_ or [])
    Sweep(settings, runs=runs, name=settings.name or default_name(Path(config)) if name is None else name,
          address=address).run()


@app.command()
def generate(run: RunName,
             budget: Annotated[list[str], typer.Option(help="Latency budget such as 2.5ms. Repeatable.")],
             target: Annotated[str | None, typer.Option(help="Label of the target whose budgets these are; needed for "
                                                             "a run with several.")] = None,
             address: Annotated[str | None, typer.Option(help="host:port of a Ray cluster with the run's devices; "
                                                              "default: this machine, without Ray.")] = None,
             runs: Runs = RUNS) -> None:
    """A trained, measured ONNX file for a budget nobody asked for before, from a finished run."""
    if address is not None:
        prepare_environment(address)
    from orchestrator.config import parse_budget
    from orchestrator.run.generate import generate_models

    try:
        budgets = [parse_budget(value) for value in budget]
    except ValueError as error:
        raise ConfigError(f"--budget {error}") from error
    generate_models(run, budgets, target=target, runs=runs, address=address)


@app.command()
def measure(config: Annotated[Path, typer.Argument(help="YAML file with 'space' and 'target' sections.")],
            count: Annotated[int, typer.Option(min=1, max=1_000_000, help="Random architectures to measure.")] = 200,
            out: Annotated[Path | None, typer.Option(help="Parquet file; default: latency-TARGET.parquet.")] = None,
            target: Annotated[str | None, typer.Option(help="Label of the target, where there are several.")] = None,
            set_: Set = None, address: Address = None) -> None:
    """Measure random architectures on the target and write a Parquet table; an existing table is continued."""
    prepare_environment(address)
    from orchestrator.config import load_config
    from orchestrator.latencytables.collect import measure_table, with_target

    measure_table(with_target(load_config(config, set_ or []), target), count, out, address)


@app.command()
def merge(tables: Annotated[list[Path], typer.Argument(metavar="TABLE...", help="Files of 'paretoray measure'.")],
          out: Annotated[Path, typer.Option(help="Parquet file to write; may be one of the tables.")]) -> None:
    """Merge latency tables of one search space and one target; a network in several tables gets its visits' mean."""
    from orchestrator.latencytables.merge import merge_tables

    done = merge_tables(tables, out)
    stdout.print(f"{done.path}: {done.networks} networks from {len(tables)} tables, {done.averaged} of them averaged"
                 + (f", {done.failed} failed" if done.failed else ""), markup=False, highlight=False, soft_wrap=True)


@app.command()
def targets(config: Annotated[Path | None, typer.Option(help="Look at devices with the options of this file.")] = None,
            as_json: AsJson = False, address: Address = None,
            probe: Annotated[bool, typer.Option("--probe/--no-probe", help="Look at devices that nobody uses.")] = True,
            ) -> None:
    """Which measuring devices are there, who uses them, and are they healthy? Without an address: of this machine.

    A search that measures is not disturbed: its workers answer beside their measurement. A device that nobody uses is
    opened for a moment to see whether it works (at most 30 s).
    """
    prepare_environment(address)
    from orchestrator.resources.health import list_targets, targets_table

    rows = list_targets(config, address, probe)
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
    elif rows:
        wide_enough().print(targets_table(rows))
    else:
        stdout.print("no measuring device found; join the machine that has one with: paretoray worker --address "
                     "HOST:PORT", markup=False)


@app.command()
def worker(address: Annotated[str | None, typer.Option(
               help="host:port of the cluster to join; default: this machine becomes the head of one.")] = None,
           target: Annotated[list[str] | None, typer.Option(
               help="Announce devices of this kind only (onnx_cpu, module:Class, ...). Repeatable.")] = None,
           config: Annotated[Path | None, typer.Option(help="Announce what this configuration measures on.")] = None,
           measure_cores: Annotated[int | None, typer.Option(
               min=0, max=4096, help="Cores kept from Ray; default: 1 where the processor is measured, or 0.")] = None,
           start: Annotated[bool, typer.Option("--start", help="Run the node here until Ctrl-C.")] = False,
           as_json: AsJson = False) -> None:
    """Print the 'ray start' line that brings this machine and its devices into a cluster, or run it with --start.

    Devices are announced as Ray resources: 'latency_cpu' for the processor, 'android:SERIAL' for each phone; GPUs are
    found by Ray. Each is then measured by one worker at a time.

    Why cores are reserved: the worker that measures the processor stays on the last core that it may use. Ray hands out
    slots, not cores: with one slot less than cores there is always a core to which the system can move other work, and
    the last one is left to the measurement. Reserve as many as your target has threads. With 0 every core is a slot,
    and the measuring worker's own slot is all that is kept free.
    """
    prepare_environment(address)
    from orchestrator.resources.worker import inspect, start_node

    offer = inspect(address, target or [], config, measure_cores)
    if as_json:
        sys.stdout.write(json.dumps(offer.as_json(), indent=2) + "\n")
    else:
        sys.stdout.write(offer.line + "\n")
        for sentence in offer.sentences():
            stderr.print(sentence, markup=False, highlight=False, soft_wrap=True)
    sys.stdout.flush()
    if start:
        start_node(offer)


@app.command()
def report(run: RunName, runs: Runs = RUNS) -> None:
    """Write the report.html of a run (front, budget slider, architectures, latency prediction, history) or a sweep."""
    from orchestrator.run.generate import write_run_report
    from orchestrator.sweep.folder import SweepFolder, is_sweep, on_disk
    from orchestrator.sweep.page import write_sweep_report

    path = (write_sweep_report(SweepFolder.open(on_disk(runs), run)) if is_sweep(runs, run) else
            write_run_report(run, runs))
    stdout.print(f"report: {path}")


@app.command()
def dashboard(out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("monitoring"),
              ray_folder: Annotated[Path | None, typer.Option(help="Where Ray keeps its sessions on the head; default: "
                                                                   "RAY_TMPDIR or /tmp, and ray.")] = None) -> None:
    """Write a Grafana dashboard, a configuration of Prometheus and its alarms, for searches on a Ray cluster."""
    prepare_environment(None)
    from ray._common.utils import get_default_ray_temp_dir

    from orchestrator.record.dashboard import PROMETHEUS_FILE, write_dashboard

    for path in write_dashboard(out, ray_folder or Path(get_default_ray_temp_dir())):
        stdout.print(str(path), markup=False, highlight=False, soft_wrap=True)
    stdout.print(f"on the head: prometheus --config.file={out / PROMETHEUS_FILE} --web.listen-address=127.0.0.1:9090",
                 markup=False, highlight=False, soft_wrap=True)


@app.command()
def keys(section: Annotated[str | None, typer.Argument(
             help="supernet, accuracy.training, controller.pnag, target.onnx_cpu, space.module:Class, ...")] = None,
         as_json: AsJson = False) -> None:
    """Print the keys of a configuration with type, default, bounds and meaning: all, or those of one section."""
    from orchestrator.keys import keys_of, keys_table

    found = keys_of(section)
    if as_json:
        sys.stdout.write(json.dumps([vars(key) for key in found], indent=2) + "\n")
    elif found:
        wide_enough().print(keys_table(found))
    else:
        stdout.print(f"{section} has no options", markup=False)


@app.command("runs")
def list_runs(runs: Runs = RUNS) -> None:
    """List all runs with their stage, trials and models, and all sweeps, whose folders hold runs too."""
    from orchestrator.run.generate import run_rows
    from orchestrator.sweep.results import sweep_rows

    _print_table(run_rows(runs) + sweep_rows(runs),
                 f"no runs in {runs}; start one with: paretoray search configs/quickstart.yaml")


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


def wide_enough() -> Console:
    """120 columns where nobody's terminal says otherwise."""
    return stdout if stdout.is_terminal else Console(width=120)


def main() -> None:
    """Entry point of `paretoray` and `python -m orchestrator`."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
    try:
        app(standalone_mode=True)
    except Interrupted as stop:
        _say(_notes(stop))
        sys.exit(128 + stop.signal_number)
    except ParetorayError as error:
        _say([f"error: {error}", *_notes(error)])
        sys.exit(2)


def _notes(error: BaseException) -> list[str]:
    """What becomes of the run; below a traceback Python itself prints them."""
    return list(getattr(error, "__notes__", ()))


def _say(sentences: list[str]) -> None:
    for sentence in sentences:
        stderr.print(sentence, markup=False, highlight=False, soft_wrap=True)
