"""The page as a person meets it: opened in a real browser, moved, and compared with what Python says."""
from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from orchestrator.frontier import best_under
from orchestrator.record.files import write_json, write_text
from orchestrator.record.store import TRIAL_SCHEMA, Trial
from orchestrator.report.data import TRIAL_COLUMNS, read_run
from orchestrator.report.drawing import drawing_data
from orchestrator.report.figures import front_figure, hypervolume_figure, noise_floor, prediction_error
from orchestrator.report.page import json_in_html, page_data, render, write_report
from orchestrator.report.sections import safe_link
from searchspaces.darts.space import DartsS16
from searchspaces.expanded.space import ExpandedS16
from searchspaces.mnas.space import MnasS16
from searchspaces.nasbench201.space import NasBench201
from tests.leftovers import mark
from tests.orchestrator.example_run import (
    CONFIG,
    add_epochs,
    add_iterations,
    add_latencies,
    empty_run,
    example_space,
    full_run,
)
from tests.orchestrator.report.browser import NAMES, NoBrowser, browser

ROOT = Path(__file__).parents[3]
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>&amp;$title"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    pytest.importorskip("playwright", reason="playwright is not installed; pip install -e '.[dev]'")
    with contextlib.ExitStack() as stack:
        try:
            running = stack.enter_context(browser())
        except NoBrowser as error:
            pytest.skip(str(error))
        yield running


LAUNCH = """
from tests.orchestrator.report.browser import NoBrowser, browser
try:
    with browser():
        print("started")
except NoBrowser as error:
    print(error, error.__cause__)
"""


def test_browser_of_the_system_or_of_playwright_or_what_to_install(tmp_path: Path) -> None:
    pytest.importorskip("playwright", reason="playwright is not installed; pip install -e '.[dev]'")

    def launch() -> str:
        names = dict.fromkeys(("PATH", "PLAYWRIGHT_BROWSERS_PATH", "HOME"), str(tmp_path))
        # Playwright leaves a profile where it finds no browser, and Chromium's socket needs a shorter path.
        with tempfile.TemporaryDirectory() as place:
            environment = names | mark() | {"TMPDIR": place}
            done = subprocess.run([sys.executable, "-c", LAUNCH], cwd=ROOT, env=environment, capture_output=True,
                                  text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = launch()
    assert "is on the PATH" in said and "playwright install chromium" in said
    system = next((path for path in map(shutil.which, NAMES) if path), None)
    if system is not None:  # stands for Playwright's own, where that would be
        place = Path(re.findall(r"exist at (\S+)", said)[0])
        place.parent.mkdir(parents=True)
        place.write_text(f'#!/bin/sh\nPATH=/usr/bin:/bin exec {system} "$@"\n')
        place.chmod(0o755)
        assert launch() == "started\n"


class Tab:
    """An opened page that records everything it should not do."""

    def __init__(self, chromium: Any, path: Path, width: int = 1280) -> None:
        self.complaints: list[str] = []
        self.page = chromium.new_page(viewport={"width": width, "height": 900})
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._request)
        self.page.goto(path.as_uri())

    def _request(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")) or request.url.endswith("/x"):
            self.complaints.append(f"asked for {request.url}")

    def set_budget(self, budget_ms: float, control: str = "#budget") -> None:
        self.page.evaluate("([s, v]) => { const e = document.querySelector(s); e.value = v;"
                           " e.dispatchEvent(new Event('input', {bubbles: true})); }", [control, budget_ms])

    def shown(self, kind: str) -> dict[str, str]:
        """The numbers of one card, and the architecture it draws."""
        return dict(self.page.evaluate("""(kind) => {
            const card = document.querySelector('#choice-' + kind), out = {};
            for (const f of card.querySelectorAll('[data-field]')) out[f.dataset.field] = f.textContent;
            const drawing = card.querySelector('svg.drawing');
            if (drawing) out.arch = drawing.dataset.arch;
            return out; }""", kind))

    def trace(self, figure: str, name: str) -> list[tuple[float, float]]:
        return [(x, y) for x, y in self.page.evaluate("""([id, name]) => {
            const t = document.getElementById('figure-' + id)._fullData.find(t => t.name === name);
            return Array.from(t.x).map((x, i) => [x, t.y[i]]); }""", [figure, name])]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = full_run(tmp_path_factory.mktemp("runs"))
    write_report(store.path, example_space())
    return store.path


@pytest.fixture(scope="module")
def tab(chromium: Any, run_dir: Path) -> Iterator[Tab]:
    opened = Tab(chromium, run_dir / "report.html")
    yield opened
    assert opened.complaints == []


@pytest.fixture(scope="module")
def trials(run_dir: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(run_dir / "trials").to_pylist())


def test_front_is_exactly_the_non_dominated_trials(tab: Tab, trials: list[dict[str, Any]]) -> None:
    points = [(t["latency_ms"], t["accuracy"]) for t in trials if t["accuracy"] is not None]
    front = [(x, 100 * y) for x, y in points
             if not any(a <= x and b >= y and (a < x or b > y) for a, b in points)]
    assert tab.trace("front", "Pareto front") == [pytest.approx(point) for point in sorted(front)]
    drawn = sum(len(tab.trace("front", f"pnag: {why}")) for why in ("exploration", "for a budget"))
    assert drawn == len(points) - len(front), "every other trial is in the cloud"
    assert "Trials are scored with the supernet's weights" in tab.page.inner_text("main")


@pytest.mark.parametrize("control", ["#budget", "#budget-number"])
def test_slider_shows_the_best_trial_and_model_under_any_budget(tab: Tab, trials: list[dict[str, Any]], run_dir: Path,
                                                                control: str) -> None:
    models = [m for m in json.loads((run_dir / "generated.json").read_text()) if m["feasible"]]
    latency_ms = [t["latency_ms"] for t in trials]
    accuracy = [np.nan if t["accuracy"] is None else t["accuracy"] for t in trials]
    seen = set()
    for budget_ms in np.quantile(latency_ms, [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]):
        tab.set_budget(float(budget_ms), control)
        trial = trials[best_under(budget_ms, latency_ms, accuracy)]
        assert tab.shown("trial")["arch"] == trial["arch_id"]
        assert tab.shown("trial")["accuracy"] == f"{trial['accuracy']:.2%}".replace("%", " %")
        assert float(tab.shown("trial")["latency"].split()[0]) == pytest.approx(trial["latency_ms"], rel=1e-3)
        model = models[i] if (i := best_under(budget_ms, [m["latency_ms"] for m in models],
                                              [m["accuracy"] for m in models])) >= 0 else None
        card = tab.shown("model")
        if model is None:
            assert card == {} and "paretoray generate example --budget" in tab.page.inner_text("#choice-model")
            continue
        assert (card["arch"], card["file"]) == (model["arch_id"], model["onnx"])
        assert card["test"] == f"{model['test_accuracy']:.2%}".replace("%", " %")
        assert card["madds"] == f"{model['madds'] / 1e6:.1f}M"
        assert float(card["latency"].split()[0]) == pytest.approx(model["latency_ms"], rel=1e-3)
        seen.add((trial["arch_id"], model["arch_id"]))
    assert len(seen) >= 4, "the budgets of this test show different architectures"


def test_below_everything_the_page_says_so(tab: Tab) -> None:
    tab.set_budget(0.001, "#budget-number")
    assert "none at or under" in tab.page.inner_text("#choice-trial")
    assert tab.shown("trial") == {}


def test_drawing_has_one_rectangle_per_layer_and_a_gap_per_skipped_one(tab: Tab, trials: list[dict[str, Any]]) -> None:
    tab.set_budget(100.0, "#budget-number")
    best = max((t for t in trials if t["accuracy"] is not None), key=lambda t: t["accuracy"])
    graph = example_space().graph(np.array(best["tokens"], dtype=np.int8))
    labels = tab.page.evaluate("[...document.querySelectorAll('#choice-trial g.block')].map(g => g.dataset.label)")
    assert labels == [block.label for block in graph.blocks]
    assert len(tab.page.query_selector_all("#choice-trial rect.skipped")) == 20 - (len(graph.blocks) - 4)
    tab.page.hover("#choice-trial g.block:nth-of-type(3)")
    assert graph.blocks[2].label in tab.page.inner_text("#choice-trial .hint")
    assert f"expand {graph.blocks[2].settings['expand']}" in tab.page.inner_text("#choice-trial .hint")


def test_clicking_a_model_makes_its_latency_the_budget(tab: Tab, run_dir: Path) -> None:
    x, y = tab.trace("front", "handed-over model")[0]
    box = tab.page.evaluate("""([x, y]) => { const g = document.getElementById('figure-front'), l = g._fullLayout,
        r = g.getBoundingClientRect();
        return [r.left + l.xaxis._offset + l.xaxis.d2p(x), r.top + l.yaxis._offset + l.yaxis.d2p(y)]; }""", [x, y])
    tab.page.mouse.move(*box)
    tab.page.mouse.click(*box)
    tab.page.wait_for_function("x => Math.abs(document.querySelector('#budget-number').value / x - 1) < 1e-3", arg=x,
                               timeout=5000)
    assert float(tab.shown("model")["latency"].split()[0]) == pytest.approx(x, rel=1e-3)


def test_table_and_figures_are_there(tab: Tab) -> None:
    rows = tab.page.inner_text("#models").splitlines()
    assert len(rows) == 8 and "no measured candidate meets it" in rows[1]
    for name in ("front", "prediction", "best", "hypervolume", "training"):
        assert tab.page.query_selector(f"#figure-{name} .main-svg"), name
    assert len(tab.trace("prediction", "held-out network")) == 60
    assert "measurement noise 1.5%" in tab.page.inner_text("main")


def test_architectures_without_models_are_called_that(chromium: Any, tmp_path: Path) -> None:
    store = full_run(tmp_path)
    entries = json.loads((store.path / "generated.json").read_text())
    for entry in entries:
        entry |= {"onnx": "", "latency_stderr_ms": None, "test_accuracy": None}
    write_json(store.path / "generated.json", entries)
    tab = Tab(chromium, write_report(store.path, example_space()))
    largest = entries[-1]
    tab.set_budget(largest["budget_ms"])
    shown, main = tab.shown("model"), tab.page.inner_text("main")
    assert (shown["file"], shown["test"]) == ("none", "?") and "±" not in shown["latency"]
    assert "Chosen architecture not trained or exported; for" in tab.page.inner_text("#choice-model").replace("\n", " ")
    assert largest["text"] in tab.page.inner_text("#models") and len(tab.trace("front", "chosen architecture")) == 6
    tab.set_budget(0.02, "#budget-number")
    assert "Choose one" in tab.page.inner_text("#choice-model")
    assert not re.search("handed-over|measured from|a model for", main, re.IGNORECASE)
    assert not tab.complaints


def test_usable_at_phone_width(chromium: Any, run_dir: Path) -> None:
    phone = Tab(chromium, run_dir / "report.html", width=400)
    assert phone.page.evaluate("document.documentElement.scrollWidth") == 400, "nothing sticks out sideways"
    assert phone.page.evaluate("document.getElementById('budget').getBoundingClientRect().width") > 250
    assert phone.complaints == []


def test_hostile_names_are_inert(chromium: Any, tmp_path: Path) -> None:
    store = full_run(tmp_path, trials=60)
    write_json(store.path / "state.json", {"stage": HOSTILE})
    (store.path / "config.yaml").write_text(yaml.safe_dump({"space": {"name": HOSTILE}, "note": HOSTILE}))
    generated = json.loads((store.path / "generated.json").read_text())
    generated[0]["reason"] = HOSTILE
    generated[1] |= {"text": HOSTILE, "onnx": "javascript:window.hacked=1"}
    generated[2]["onnx"] = HOSTILE
    write_json(store.path / "generated.json", generated)
    run = dataclasses.replace(read_run(store.path), name=HOSTILE)
    run = dataclasses.replace(run, trials=run.trials.set_column(
        3, "controller", pa.array([HOSTILE] * run.trials.num_rows)), problems=(HOSTILE,))
    path = tmp_path / "hostile.html"
    path.write_text(render(run, example_space()))
    opened = Tab(chromium, path)
    for budget_ms in (0.001, generated[1]["latency_ms"], 100):
        opened.set_budget(budget_ms, "#budget-number")
    assert opened.page.evaluate("window.hacked") is None
    assert HOSTILE in opened.page.inner_text("h1")
    assert opened.page.title().startswith(HOSTILE)
    assert len(opened.page.query_selector_all("script")) == 3
    assert opened.page.query_selector_all("main img") == []
    schemes = opened.page.evaluate("[...document.querySelectorAll('a[href]')].map(a => a.protocol)")
    assert set(schemes) == {"file:"}
    assert opened.complaints == []


@pytest.mark.parametrize("stage", ["nothing", "created", "trained", "measured"])
def test_opens_at_any_stage(chromium: Any, tmp_path: Path, stage: str) -> None:
    run_dir, space = tmp_path / "bare", example_space()
    run_dir.mkdir()
    if stage != "nothing":
        store = empty_run(tmp_path)
        run_dir = store.path
        if stage in ("trained", "measured"):
            add_epochs(store, 3)
        if stage == "measured":
            add_latencies(store, space, 20)
    opened = Tab(chromium, write_report(run_dir, space))
    text = opened.page.inner_text("body")
    assert "No trials yet." in text and "No model has been handed over yet." in text
    assert ("config.yaml is missing." in text) == (stage == "nothing")
    assert bool(opened.page.query_selector("#figure-training .main-svg")) == (stage in ("trained", "measured"))
    assert bool(opened.page.query_selector("#figure-prediction .main-svg")) == (stage == "measured")
    assert opened.page.is_hidden("#slider")
    assert opened.complaints == []


def test_learning_shows_trained_against_trusted_samples_and_the_reward(chromium: Any, tmp_path: Path) -> None:
    store = empty_run(tmp_path)
    add_iterations(store, [20, 12, 10], [0, 5, 10])
    add_iterations(store, [20, 12, 11], [0, 5, 9])  # a resumed run did the iterations again: what it found counts
    store.event("controller", iteration=4, loss=0.1)  # metrics of another kind are no iteration
    opened = Tab(chromium, write_report(store.path, None))
    assert opened.trace("learning", "trained") == [(1, 20), (2, 12), (3, 11)]
    assert opened.trace("learning", "trusted to the critic") == [(1, 0), (2, 5), (3, 9)]
    assert opened.trace("learning", "mean reward of fresh samples") == [
        (1, pytest.approx(0.30)), (2, pytest.approx(0.32)), (3, pytest.approx(0.34))]
    assert opened.trace("learning", "best reward so far")[-1] == (3, pytest.approx(0.52))
    assert opened.page.is_visible("#figure-learning .main-svg")
    assert opened.complaints == []


def test_figures_that_do_not_apply_are_left_out(chromium: Any, tmp_path: Path) -> None:
    store = empty_run(tmp_path, "without")
    assert Tab(chromium, write_report(store.path, None)).page.is_hidden("#figure-learning")
    write_text(store.path / "config.yaml", yaml.safe_dump(CONFIG | {"accuracy": {"source": "training"}}))
    page = Tab(chromium, write_report(store.path, None)).page
    assert page.is_hidden("#figure-training") and page.is_visible("#figure-best")


def test_trials_without_models_and_without_a_space(chromium: Any, tmp_path: Path) -> None:
    store = full_run(tmp_path, trials=60)
    (store.path / "generated.json").unlink()
    opened = Tab(chromium, write_report(store.path, None))
    assert "none at or under" in opened.page.inner_text("#choice-model")
    assert opened.shown("trial")["accuracy"].endswith("%") and "arch" not in opened.shown("trial")
    assert opened.complaints == []


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    store = full_run(tmp_path, trials=60)
    store.append_trials([Trial(60, "a", (0,) * 45, "s", "pnag", 0.5, "supernet", 1, 1.0, "predicted", "t", 1, 1, None,
                               None, 0, 1.0, 1.0, "n")])
    last = sorted((store.path / "trials").glob("part-*"))[-1]
    last.write_bytes(last.read_bytes()[:-20])
    (store.path / "latency" / "part-000000999.parquet.damaged").write_bytes(b"")
    (store.path / "environment.json").write_text("{not json")
    (store.path / "state.json").write_text("[]")
    with (store.path / "events.jsonl").open("a") as events:
        events.write('{"kind": "epo')
    page = write_report(store.path, example_space()).read_text()
    for part in (f"trials/{last.name} cannot be read", "latency/part-000000999.parquet.damaged was damaged",
                 "environment.json cannot be read", "state.json holds list instead of dict",
                 "1 of 32 lines of events.jsonl cannot be read"):
        assert part in page, part
    assert read_run(store.path).trials.num_rows == 60


def test_foreign_tokens_are_said_and_everything_else_is_drawn(tmp_path: Path) -> None:
    run = read_run(full_run(tmp_path, trials=60).path)
    problems: list[str] = []
    data = page_data(run, NasBench201(classes=10, channels=3), problems)
    assert data["drawing"]["architectures"] == {} and len(data["views"][0]["front"]) > 2
    assert problems and "is not of this search space and not drawn" in problems[0]


def test_a_hundred_thousand_trials_stay_small_and_their_front_exact(tmp_path: Path) -> None:
    store, rng, n = empty_run(tmp_path), np.random.default_rng(0), 100_000
    latency_ms = rng.uniform(1, 10, n)
    accuracy = 0.9 - np.exp(-latency_ms) - rng.exponential(0.1, n)
    columns: dict[str, Any] = {name: pa.nulls(n, TRIAL_SCHEMA.field(name).type) for name in TRIAL_SCHEMA.names}
    columns |= {"sequence": pa.array(range(n)), "arch_id": pa.array([str(i) for i in range(n)]),
                "latency_ms": pa.array(latency_ms), "accuracy": pa.array(accuracy)}
    pq.write_table(pa.table(columns, schema=TRIAL_SCHEMA), store.path / "trials" / "part-000000000.parquet")
    run = read_run(store.path)
    figure = front_figure(run)
    assert figure is not None
    cloud, front = figure.data
    best = np.maximum.accumulate(accuracy[order := np.argsort(latency_ms)])
    expected = order[np.flatnonzero(np.diff(best, prepend=-1) > 0)]
    assert front.x.tolist() == latency_ms[expected].tolist() and len(cloud.x) == 5000
    page = render(run, None)
    assert "5,000 of" in page and len(page) < 5_600_000
    history = hypervolume_figure(run)
    assert history is not None and len(history.data[0].x) < 2000


def test_prediction_error_and_noise_floor_from_the_rows(tmp_path: Path) -> None:
    store = empty_run(tmp_path)
    store.latency.append([
        {"arch_id": "a", "latency_ms": 2.0, "predicted_ms": 2.2, "stderr_ms": 0.02},
        {"arch_id": "b", "latency_ms": 4.0, "predicted_ms": 3.0, "stderr_ms": 0.12},
        {"arch_id": "c", "latency_ms": 5.0, "predicted_ms": None, "stderr_ms": 0.10},
    ])
    run = read_run(store.path)
    assert prediction_error(run) == pytest.approx((0.1 + 0.25) / 2)
    assert noise_floor(run) == pytest.approx(0.02), "median of 1, 3 and 2 percent"
    store.event("predictor", n=2, heldout_error=0.1, noise_floor=0.015)
    assert noise_floor(read_run(store.path)) == 0.015


def test_drawing_of_a_cell_space_shows_its_operations() -> None:
    space = NasBench201(classes=10, channels=3)
    tokens = np.array([3, 1, 0, 2, 4, 3], dtype=np.int8)
    data = drawing_data(space, {"one": tokens})
    cell = data["blocks"][data["architectures"]["one"][1]]
    assert sorted(cell["parts"]) == sorted(space.choices[i].values[t] for i, t in enumerate(tokens))
    assert -1 not in data["architectures"]["one"]


def test_drawing_of_two_cell_types_shows_what_each_operation_reads() -> None:
    space = DartsS16()
    tokens = space.parse("normal sep3~0+sep5~1 avg3~0+max3~1 dil3~2+dil3~2 skip~3+skip~3 / "
                         "reduction skip~0+sep7~1 avg3~0+max3~1 dil3~0+sep3~2 skip~1+skip~4")
    data = drawing_data(space, {"one": tokens})
    stem, *cells, head = (data["blocks"][i] for i in data["architectures"]["one"])
    assert [cell["label"].split()[0] for cell in cells] == ["normal", "reduction", "normal", "reduction", "normal"]
    assert cells[0]["parts"][4:6] == ["dil_conv_3x3"] * 2 and len(cells[1]["parts"]) == 8
    assert "node3a from 1 skip_connect, node3b from 4 skip_connect" in cells[1]["detail"]
    script = (Path(__file__).parents[3] / "orchestrator/report/templates/report.js").read_text()
    colours = script.split("PART_COLOURS = [")[1].split("]")[0].split(",")
    assert len(set(colours)) >= len({part for cell in (stem, *cells) for part in cell["parts"]}), "two look alike"


def test_drawing_grows_with_kernel_and_expansion() -> None:
    space = example_space()
    low, high = space.canonical(space.extremes())
    data = drawing_data(space, {"low": low, "high": high})
    layers = [i for i, slot in enumerate(data["slots"]) if slot["stage"] >= 0]
    assert len(layers) == 20 and -1 not in data["architectures"]["high"]
    assert sum(i == -1 for i in data["architectures"]["low"]) == 10, "two of four layers in each of five stages"
    block = {name: data["blocks"][data["architectures"][name][layers[0]]] for name in ("low", "high")}
    assert block["low"]["height"] < block["high"]["height"] == 1 and block["low"]["width"] < block["high"]["width"] == 1


def test_drawing_of_a_block_of_layers_shows_its_op_once_per_layer() -> None:
    """The slowest: conv 5x5 blocks of a layer more than the base; the fastest: sep 3x3 blocks of a layer less."""
    space = MnasS16()
    fastest, slowest = space.extremes()
    data = drawing_data(space, {"fastest": fastest, "slowest": slowest})
    assert [slot["stage"] for slot in data["slots"]] == [-1, *range(7), -1, -1]
    blocks = {name: [data["blocks"][i] for i in data["architectures"][name]] for name in ("fastest", "slowest")}
    assert [block["parts"] for block in blocks["slowest"][1:8]] == [["conv"] * n for n in (2, 3, 3, 3, 3, 3, 2)]
    assert [block["parts"] for block in blocks["fastest"][1:8]] == [["sep"]] * 7
    assert blocks["fastest"][2]["height"] < blocks["slowest"][2]["height"] == 1
    assert "op conv, kernel 5, se yes, skip pool, channels 20, layers 3" in blocks["slowest"][2]["detail"]
    assert "layers" in data["hint"] and "expansion" in data["hint"]


def test_drawing_of_a_space_of_widths_shows_them() -> None:
    data = drawing_data(ExpandedS16(), {"one": ExpandedS16().parse("d2w8 d1w16 d4w32")})
    row = data["architectures"]["one"]
    assert [slot["stage"] for slot in data["slots"]] == [-1, *[0] * 4, *[1] * 4, *[2] * 4, -1]
    assert [index < 0 for index in row[1:13]] == [False] * 2 + [True] * 2 + [False] + [True] * 3 + [False] * 4
    widths = [data["blocks"][row[position]]["width"] for position in (1, 5, 9)]
    assert np.diff(widths)[1] == pytest.approx(2 * np.diff(widths)[0], abs=0.01) and widths[2] == 1
    assert "channels" in data["hint"]


def test_a_finished_run_is_called_finished_and_another_says_how_to_go_on(tmp_path: Path) -> None:
    from orchestrator.run.search import Stage

    store = empty_run(tmp_path)
    store.update_state(stage=Stage.SEARCH.value)
    page = write_report(store.path, None).read_text()
    assert "in stage: search" in page and f"paretoray resume example --runs {tmp_path}" in page
    store.update_state(stage=Stage.DONE.value)
    page = write_report(store.path, None).read_text()
    assert ">finished<" in page and "paretoray resume" not in page


def test_the_fixed_network_is_drawn_and_listed_beside_what_is_handed_over(tmp_path: Path) -> None:
    store = full_run(tmp_path)
    without = render(read_run(store.path), None)
    budgets_ms = [row["budget_ms"] for row in read_run(store.path).generated]
    rows = [{"budget_ms": budget_ms, "target": "onnx_cpu", "feasible": number > 1, "resolution": HOSTILE,
             "reason": "" if number > 1 else f"no resolution fits {HOSTILE}", "onnx": f"compared/{number // 4}.onnx",
             "latency_ms": 40.0 + number // 4, "accuracy": 0.8, "test_accuracy": 0.7}
            for number, budget_ms in enumerate(budgets_ms)]
    for row in rows[:2]:
        row["onnx"] = ""
    write_json(store.path / "compared.json", {"fixed": {"latencies_ms": {}, "entries": rows}})
    figure = front_figure(read_run(store.path))
    assert figure is not None
    drawn = {trace.name: list(zip(trace.x, trace.y)) for trace in figure.data}
    made = sorted({(row["latency_ms"], row["onnx"]) for row in rows[2:]})
    assert drawn["fixed, fine-tuned"] == [(ms, 80.0) for ms, _ in made]
    assert drawn["fixed, fine-tuned (test)"] == [(ms, 70.0) for ms, _ in made]
    assert len(drawn["handed-over model (test)"]) == len(drawn["handed-over model"])
    assert figure.layout.xaxis.range[1] > 40 + len(made) - 1
    page = render(read_run(store.path), None)
    assert page.count('class="fixed"') == len(rows) - 2 and page.count('class="infeasible fixed"') == 2
    assert HOSTILE not in page and "Not everything could be read" not in page
    for damaged in ({"fixed": 3}, {"fixed": {"entries": [1, {"budget_ms": "x"}]}}, {"other": []}):
        write_json(store.path / "compared.json", damaged)
        assert "compared.json" in render(read_run(store.path), None)
    (store.path / "compared.json").unlink()
    assert render(read_run(store.path), None) == without


def test_columns_of_the_report_are_columns_of_the_store() -> None:
    assert set(TRIAL_COLUMNS) <= set(TRIAL_SCHEMA.names)


@pytest.mark.parametrize(("path", "expected"), [
    ("models/2.5ms-ab.onnx", "models/2.5ms-ab.onnx"), ("models/a b.onnx", "models/a%20b.onnx"), ("/etc/passwd", ""),
    ("../x.onnx", ""), ("javascript:alert(1)", ""), ("https://x.y/z", ""), ("a\\b", ""), (None, ""), (3, ""), ("", "")])
def test_links_stay_inside_the_run_folder(path: Any, expected: str) -> None:
    assert safe_link(path) == expected


def test_json_in_html_cannot_end_its_element_and_reads_back() -> None:
    text = json_in_html({"a": HOSTILE, "b": "\u2028"})
    assert "<" not in text and ">" not in text and "&" not in text and text.isascii()
    assert json.loads(text) == {"a": HOSTILE, "b": "\u2028"}
