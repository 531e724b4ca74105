"""What the page says about spaces: those that a search found, and the one that a search stayed in."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from orchestrator.record.files import write_json, write_text
from orchestrator.record.store import RunStore, Trial
from orchestrator.report.data import read_run
from orchestrator.report.edf import Sides, edf, edf_figure
from orchestrator.report.page import page_data, write_report
from orchestrator.report.ranges import KEPT, LEFT_OUT, PART, states_of_space
from orchestrator.report.spaces import spaces_section
from searchspaces.bins import checked_groups
from searchspaces.elite.found import DrawnSpace, FoundSpace
from searchspaces.elite.space import EliteSpace, restricted, tokens_of_ranges
from searchspaces.expanded.space import ExpandedS16
from searchspaces.mobilenetv3.space import MobileNetV3S32
from tests.orchestrator.report.test_report import HOSTILE, Tab, chromium

__all__ = ["chromium"]     # a fixture

SPACE = ExpandedS16(classes=10, channels=1)
GROUPS = checked_groups(SPACE)
SMALL, LARGE, OTHER = (0, 0, 0, 1, 0, 1), (1, 3, 1, 3, 1, 3), (0, 1, 0, 1, 0, 1)
MS = 1e6        # multiply-adds of a millisecond
CONFIG = {"space": {"name": "expanded-s16"}, "controller": {"name": "nss"}}


def elite(bins: tuple[int, ...]) -> EliteSpace:
    return EliteSpace(SPACE, restricted(SPACE, GROUPS, [[b] for b in bins]))


def searched(folder: Path, target: float = 1.0, label: str = "1-8") -> RunStore:
    """Trials of both spaces and of the whole one, after three epochs that made up their minds."""
    store, rng = RunStore.create(folder, "narrow", yaml.safe_dump(CONFIG), {}), np.random.default_rng(0)
    for epoch, sure in enumerate((0.0, 1.0, 3.0), 1):
        store.event("epoch", epoch=epoch, loss=2.0, logits={
            f"{a}.{k}": [sure * (b == bins[k]) for b in range(len(group))]
            for a, bins in enumerate((SMALL, LARGE)) for k, group in enumerate(GROUPS)})
    rows = np.concatenate([SPACE.sample_uniform(rng, 200), *(
        elite(bins).widened(elite(bins).sample_uniform(rng, 30)) for bins in (SMALL, LARGE))])
    rows = SPACE.canonical(rows)
    madds = SPACE.cost(rows)[0]
    accuracy = 0.9 - 0.3 * np.exp(-madds / MS / 3) - abs(rng.normal(0, 0.03, len(rows)))
    accuracy[:5] = np.nan
    store.append_trials([Trial(
        i, SPACE.arch_id(row), tuple(int(t) for t in row), SPACE.space_id, "nss",
        None if np.isnan(accuracy[i]) else float(accuracy[i]), "supernet", 1, float(madds[i] / MS), "predicted",
        "onnx_cpu-1", int(madds[i]), 1, None, None, 0, 1.79e9, 0.1, "host") for i, row in enumerate(rows)])
    found = [FoundSpace(target, target, "ms", (DrawnSpace(OTHER, 1.3, 0.3, -2.0), DrawnSpace(SMALL, 1.1, 0.1, -1.0),
                                               DrawnSpace(SMALL, 1.1, 0.1, -1.0)), 1),
             FoundSpace(1.6e7, 1.4e7, "madds", (DrawnSpace(LARGE, 1.36e7, -0.15, -0.5),), 0)]
    labels = [list(group.labels) for group in GROUPS]
    labels[1][0] = label
    write_json(store.path / "elite.json", {
        "format": 1, "space": CONFIG["space"], "space_id": SPACE.space_id, "classes": 10, "channels": 1,
        "groups": [{"name": group.name, "labels": of_group} for group, of_group in zip(GROUPS, labels)],
        "spaces": [{"goal": "onnx_cpu", **one.as_json()} for one in found]})
    return store


def test_error_distribution_as_in_the_specification() -> None:
    errors = np.array([7.0, 4.0, 6.0, 5.0])
    assert edf(errors, np.array([4.0, 5.0, 5.5, 8.0])).tolist() == [0.0, 0.25, 0.5, 1.0]
    rng = np.random.default_rng(0)
    errors, at = rng.integers(0, 10, 30).astype(float), rng.uniform(-1, 11, 40)
    assert edf(errors, at).tolist() == [sum(e < limit for e in errors) / 30 for limit in at]


def test_the_drawn_staircase_is_the_distribution() -> None:
    rng = np.random.default_rng(1)
    one = Sides("", rng.integers(10, 30, 12) / 100, rng.integers(20, 50, 9) / 100)
    figure = edf_figure((one, Sides("10% of 1 ms", one.inside[:4], one.outside)))
    assert figure is not None and len(figure.data) == 2, "four trials on a side are not drawn"
    for trace, errors in zip(figure.data, (one.inside, one.outside)):
        for e in np.arange(0.105, 0.5, 0.01):      # between errors; a corner's height holds to its right
            if trace.x[0] < 100 * e < trace.x[-1]:
                assert trace.y[np.flatnonzero(trace.x < 100 * e)[-1]] == edf(errors, np.array([e]))[0]
    assert "too few to compare (4 trials inside, 9 outside" in Sides("x", one.inside[:4], one.outside).words()


def test_spaces_that_were_found(chromium: Any, tmp_path: Path) -> None:
    store = searched(tmp_path, target=0.5)
    opened = Tab(chromium, write_report(store.path, SPACE))
    text = opened.page.inner_text("#spaces")
    trials = store.read_trials()
    tokens = np.array([t.tokens for t in trials])
    scored = [t.accuracy is not None for t in trials]
    for a, (bins, near) in enumerate(((SMALL, lambda t: 0.45 <= t.latency_ms <= 0.55),
                                      (LARGE, lambda t: 1.26e7 <= t.madds <= 1.54e7))):
        panels = 0
        inside = elite(bins).contains(SPACE.canonical(tokens))
        for which in (scored, [s and near(t) for s, t in zip(scored, trials)]):
            errors = [[1 - (t.accuracy or 0) for t, i, w in zip(trials, inside, which) if w and i == side]
                      for side in (True, False)]
            if min(map(len, errors)) >= 5:
                panels += 1
                assert (f"median error {np.median(errors[0]):.1%} inside, {np.median(errors[1]):.1%} outside "
                        f"({len(errors[0])} trials inside, {len(errors[1])} outside)") in text
            else:
                assert f"({len(errors[0])} trials inside, {len(errors[1])} outside; it takes 5" in text
        assert panels == a + 1, "the test shows both cases"
        assert len(opened.page.query_selector_all(f"#figure-edf-{a} .scatterlayer .js-line")) == 2 * panels
        kept = opened.page.evaluate("n => [...document.querySelectorAll('.space')[n].querySelectorAll('.kept')]"
                                    ".map(cell => cell.firstChild.textContent.trim())", a)
        assert kept == [group.labels[b] for group, b in zip(GROUPS, bins)]
    assert "Within 10% of 14 M multiply-adds" in text and "so the nearest was aimed at" in text
    rows = [row.split("\t") for row in opened.page.inner_text(".draws tbody").splitlines()]
    assert rows == [["1", "1.3 ms", "+30.0%", "14%", "width0 9-16"], ["2", "1.1 ms", "+10.0%", "37%", "kept"]]
    assert opened.page.is_hidden("#figure-distribution")
    z = opened.page.evaluate("document.getElementById('figure-bins').data.map(t => t.z.map(r => Array.from(r)))")
    assert z[0][0] == [0.5, 0.731, 0.953] and z[1][0] == [0.5, 0.269, 0.047] and len(z[0]) == 18
    assert opened.complaints == []


def test_before_spaces_are_found_the_bins_have_their_names(tmp_path: Path) -> None:
    store = searched(tmp_path)
    (store.path / "elite.json").unlink()
    run = read_run(store.path)
    section = spaces_section(run, SPACE, [])
    assert "No spaces have been found yet" in section.html and list(section.figures) == ["bins"]
    groups, labels = section.figures["bins"]["data"][0]["y"]
    assert groups[:6] == ["depth0"] * 2 + ["width0"] * 4
    assert labels[:6] == ["1-2", "3-4", "1-8", "9-16", "17-24", "25-32"]
    assert spaces_section(run, None, []).figures["bins"]["data"][0]["z"] == section.figures["bins"]["data"][0]["z"]
    assert page_data(run, SPACE, [])["figures"]["distribution"] is None


def test_what_cannot_be_read_is_said_and_hostile_labels_are_inert(chromium: Any, tmp_path: Path) -> None:
    store = searched(tmp_path, label=HOSTILE)
    opened = Tab(chromium, write_report(store.path, SPACE))
    assert opened.page.evaluate("window.hacked") is None and opened.complaints == []
    assert "<img" in opened.page.inner_text("#spaces .chosen"), "too long for its cell, so beside it"
    assert not opened.page.query_selector("main img")
    problems: list[str] = []
    assert "figure-edf-0" not in spaces_section(read_run(store.path), MobileNetV3S32(10, 3), problems).html
    assert "are not compared" in problems[0]
    write_text(store.path / "elite.json", '{"format": 1, "groups": [], "spaces": [{"goal": "x"}]}')
    problems.clear()
    assert "No spaces" in spaces_section(read_run(store.path), SPACE, problems).html
    assert "elite.json is not what this version writes" in problems[0]


def test_a_run_inside_a_space_shows_it_and_leads_to_its_search(chromium: Any, tmp_path: Path) -> None:
    base = {"name": "expanded-s16"}
    ranges = {"range0": ["1-8", "25-32"], "depth1": [4]}
    space = EliteSpace(SPACE, tokens_of_ranges(SPACE, ranges))
    config = {"space": {"name": "elite", "run": "elsewhere/narrow", "base": base, "ranges": ranges}}
    store = RunStore.create(tmp_path, "run", yaml.safe_dump(config), {})
    assert "elsewhere/narrow" in (alone := spaces_section(read_run(store.path), space, []).html) and "href" not in alone
    searched(store.path)
    write_report(store.path / "narrow", SPACE)
    opened = Tab(chromium, write_report(store.path, space))
    states = opened.page.evaluate("[...document.querySelectorAll('#inside .range')].map(row => "
                                  "[...row.querySelectorAll('.bin')].map(cell => cell.classList[1] || ''))")
    assert states[:3] == [[KEPT, KEPT], [KEPT, LEFT_OUT, LEFT_OUT, KEPT], [LEFT_OUT, PART]]
    opened.page.click("#inside a")
    opened.page.wait_for_selector("#spaces .space")
    assert opened.complaints == []


def test_overlapping_bins_beside_the_kept_one_are_left_out() -> None:
    base = MobileNetV3S32(classes=10, channels=3)
    groups = checked_groups(base)
    space = EliteSpace(base, restricted(base, groups, [[0]] * len(groups)))
    assert states_of_space(groups, space) == [[KEPT, LEFT_OUT]] * len(groups)
