"""The map of a gradient system's distributions."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from orchestrator.report.data import read_run
from orchestrator.report.distribution import distribution_figure
from tests.actors.tinyspace import TinySpace
from tests.orchestrator.example_run import empty_run


def test_chances_are_those_of_the_logits_and_budgets_have_their_own_map(tmp_path: Path) -> None:
    store = empty_run(tmp_path)
    run = read_run(store.path)
    assert distribution_figure(run, None) is None
    logits = {"0.0": [0.0, 0.0, 0.0], "0.1": [2.0, 0.0], "1.0": [0.0, 0.0, 5.0], "1.1": [0.0, 0.0]}
    store.event("epoch", epoch=3, loss=1.0, logits={name: [0.0] * len(row) for name, row in logits.items()})
    store.event("epoch", epoch=4, loss=0.9, logits=logits)
    store.update_state(goals=[{"label": "onnx_cpu", "budgets_ms": [1.5, 4.0]}])
    figure = distribution_figure(read_run(store.path), TinySpace())
    assert figure is not None
    tight, wide = figure.data
    sure = pytest.approx(np.exp(2) / (1 + np.exp(2)), abs=1e-3)
    assert [list(row) for row in tight.z] == [[0.333, 0.333], [0.5, sure]]
    assert list(tight.x) == [3, 4] and list(tight.y) == ["width", "kernel"] and wide.text[0][1] == "16"
    assert (tight.visible, wide.visible) == (True, False)
    assert [button.label for button in figure.layout.updatemenus[0].buttons] == ["1.5 ms", "4 ms"]
    nameless = distribution_figure(replace(read_run(store.path), name="other"), None)
    assert nameless is not None and list(nameless.data[0].y) == ["0", "1"]
