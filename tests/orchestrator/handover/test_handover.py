"""A budget is hard: what is handed over meets it by the measurement of the exported file, or nothing is."""
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from actors.data import Images, Preprocessing, Splits
from actors.targets.target import LatencySample
from configs.own_space import PlainCnn
from orchestrator.config import DeliverySettings
from orchestrator.controllers.controller import Answer
from orchestrator.handover.delivered import Candidate, Final, contenders, ranked_under
from orchestrator.handover.exported import check_parity, file_accuracy
from orchestrator.handover.models import HandOver
from orchestrator.record.goals import Goal
from searchspaces.errors import EvaluationError
from searchspaces.network import GraphNetwork
from searchspaces.onnxgraph import to_onnx
from searchspaces.space import Tokens

SPACE = PlainCnn(classes=3, channels=1, resolution=8)
RNG = np.random.default_rng(0)
IMAGES = Images(RNG.integers(0, 255, (12, 8, 8, 1)).astype(np.uint8), np.arange(12) % 3)
SPLITS = Splits(IMAGES, IMAGES, IMAGES, ("a", "b", "c"), "noise")
ROWS = SPACE.sample_uniform(np.random.default_rng(1), 4)


class Bench:
    """A workbench with latencies and accuracies as told: `before` when measured as a graph, `after` as a file."""

    def __init__(self, before: Mapping[str, float], after: Mapping[str, float], diverged: str = "",
                 final: Mapping[str, float] | None = None) -> None:
        self.before, self.after, self.diverged, self.final = before, after, diverged, final or {}
        self.trained: list[str] = []
        self.ahead: list[str] = []

    def latencies_ms(self, target: str, tokens_NT: Tokens) -> list[float | None]:
        return [self.before.get(SPACE.arch_id(row)) for row in tokens_NT]

    def accuracies(self, tokens_NT: Tokens) -> list[float | None]:
        return [0.5 for _ in tokens_NT]

    def finals(self, tokens_NT: Tokens) -> list[Final | None]:
        known = [self.final.get(SPACE.arch_id(row)) for row in tokens_NT]
        return [None if accuracy is None else Final(accuracy) for accuracy in known]

    def training(self) -> dict[str, Any]:
        return {"fine_tune_epochs": 1}

    def train_ahead(self, tokens_NT: Tokens) -> None:
        self.ahead += [SPACE.arch_id(row) for row in tokens_NT]

    def trained_weights(self, tokens_T: Tokens) -> dict[str, NDArray[np.float32]]:
        arch_id = SPACE.arch_id(tokens_T)
        if arch_id == self.diverged:
            raise EvaluationError("fine-tuning diverged")
        self.trained.append(arch_id)
        torch.manual_seed(0)
        return {name: tensor.numpy() for name, tensor in GraphNetwork(SPACE.graph(tokens_T)).state_dict().items()}

    def time_file(self, target: str, model: bytes) -> LatencySample:
        arch_id = {p.key: p.value for p in onnx.load_from_string(model).metadata_props}["arch_id"]
        ms = self.after[arch_id]
        return LatencySample("cpu-0", ms, 1.0, ms, 0.01, 6, 0.0, 0.0, ((ms,),), ((1.0,),), 0.0, 0.1)


def handover(bench: Bench, folder: Path) -> HandOver:
    settings = DeliverySettings(alternatives=3, fine_tune_epochs=1, margin=0.02)
    lineage = {"run": "r", "weights_version": 2, "targets": {"cpu": {"target": {"batch": 1}}}}
    return HandOver(SPACE, SPLITS, Preprocessing.fit(IMAGES, 8), bench, settings, folder, lineage,
                    Goal("cpu", ("cpu",), (1.0,)))


def candidates(latencies: list[float], accuracies: list[float]) -> list[Candidate]:
    return [Candidate(row, SPACE.arch_id(row), accuracy, ms, ms)
            for row, ms, accuracy in zip(ROWS, latencies, accuracies)]


def ids(values: list[float]) -> dict[str, float]:
    return {SPACE.arch_id(row): value for row, value in zip(ROWS, values)}


def test_ranking_prefers_accuracy_within_the_margin() -> None:
    found = candidates([0.90, 0.99, 0.97, 1.01], [0.7, 0.9, 0.8, 0.95])
    assert [c.accuracy for c in ranked_under(1.0, found, margin=0.02)] == [0.8, 0.7, 0.9]


def test_model_is_complete_and_documented(tmp_path: Path) -> None:
    bench = Bench(ids([1, 2, 3, 4]), ids([1, 2, 3, 4]))
    entry = next(iter(handover(bench, tmp_path).deliver([2.5], candidates([1, 2, 3, 4], [0.6, 0.7, 0.8, 0.9]))))
    assert (entry.feasible, entry.latency_ms, entry.arch_id) == (True, 2, SPACE.arch_id(ROWS[1]))
    sidecar: dict[str, Any] = json.loads((tmp_path / entry.onnx).with_suffix(".json").read_text())
    assert sidecar["tokens"] == ROWS[1].tolist()
    assert sidecar["weights_version"] == 2
    assert sidecar["latencies"]["cpu"]["candidate_ms"] == [[2]]
    assert sidecar["input"]["preprocessing"]["resolution"] == 8
    assert sidecar["output"]["classes"] == ["a", "b", "c"]
    assert sidecar["parity_max_difference"] < 1e-4
    model = (tmp_path / entry.onnx).read_bytes()
    assert entry.test_accuracy == file_accuracy(model, SPLITS.test, Preprocessing.fit(IMAGES, 8))
    onnx.checker.check_model(onnx.load_from_string(model))


@pytest.mark.parametrize(("searched", "worse"), [(1.0, True), (0.0, False)])
def test_a_training_that_loses_accuracy_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture, searched: float,
                                                worse: bool) -> None:
    """The bench's weights are random: one of three classes is right about a third of the time."""
    bench = Bench({}, ids([1, 2, 3, 4]))
    entry = next(iter(handover(bench, tmp_path).deliver([1.5], candidates([1, 2, 3, 4], [searched] * 4))))
    assert entry.accuracy is not None and 0 < entry.accuracy < 0.9
    said = [record.getMessage() for record in caplog.records if "change the epochs" in record.getMessage()]
    assert bool(said) is worse
    assert not worse or (f"at {100 * entry.accuracy:.1f} % after" in said[0] and "100.0 % in the search" in said[0])


def test_slower_after_export_means_the_next_candidate(tmp_path: Path) -> None:
    bench = Bench({}, ids([0.8, 1.05, 3, 4]))
    entry = next(iter(handover(bench, tmp_path).deliver([1.0], candidates([0.8, 0.9, 3, 4], [0.6, 0.7, 0.8, 0.9]))))
    assert bench.trained == [SPACE.arch_id(ROWS[1]), SPACE.arch_id(ROWS[0])]
    assert (entry.feasible, entry.latency_ms) == (True, 0.8)


def test_nothing_is_handed_over_above_the_budget(tmp_path: Path) -> None:
    bench = Bench({}, ids([1.1, 1.2, 3, 4]))
    entry = next(iter(handover(bench, tmp_path).deliver([1.0], candidates([0.9, 0.95, 3, 4], [0.6, 0.7, 0.8, 0.9]))))
    assert not entry.feasible
    assert entry.onnx == ""
    assert entry.reason == ("no exported model meets 1 ms on cpu: 2 that had been measured under it took 1.1 ms or "
                            "more from their files; candidates reach 0.9 to 4 ms")


def test_diverged_training_costs_one_candidate(tmp_path: Path) -> None:
    bench = Bench({}, ids([1, 2, 3, 4]), diverged=SPACE.arch_id(ROWS[3]))
    entry = next(iter(handover(bench, tmp_path).deliver([5.0], candidates([1, 2, 3, 4], [0.6, 0.7, 0.8, 0.9]))))
    assert entry.arch_id == SPACE.arch_id(ROWS[2])


def test_larger_budgets_never_get_worse_models_and_models_are_made_once(tmp_path: Path) -> None:
    bench = Bench({}, ids([1, 2, 3, 4]))
    found = candidates([1, 2, 3, 4], [0.6, 0.7, 0.8, 0.9])
    made = list(handover(bench, tmp_path).deliver([4.5, 1.5, 2.5], found))
    assert [entry.budget_ms for entry in made] == [1.5, 2.5, 4.5]
    validation = [entry.accuracy for entry in made]
    assert validation == sorted(validation, key=lambda value: value or 0.0)
    again = list(handover(bench, tmp_path).deliver([1.5, 2.5, 4.5], found))
    assert again == made
    assert len(bench.trained) == len(set(bench.trained)) == 3
    assert bench.ahead == [SPACE.arch_id(row) for row in (ROWS[3], ROWS[0], ROWS[1])], "first choices, together"


def test_a_file_faster_than_measured_before_serves_the_smaller_budget_too(tmp_path: Path) -> None:
    first, *_, last = handover(Bench({}, ids([1, 2, 3, 4])), tmp_path / "all").deliver(
        [1.5, 2.5, 3.5, 4.5], candidates([1, 2, 3, 4], [0.6, 0.7, 0.8, 0.9]))
    assert (first.accuracy or 0) < (last.accuracy or 0)
    worse, better = (Candidate(np.array(entry.tokens, np.int8), entry.arch_id, accuracy, ms, ms)
                     for entry, accuracy, ms in ((first, 0.6, 1.0), (last, 0.7, 2.0)))
    bench = Bench({}, {worse.arch_id: 1.0, better.arch_id: 0.9})
    made = list(handover(bench, tmp_path / "two").deliver([1.5, 2.5], [worse, better]))
    assert [entry.arch_id for entry in made] == [better.arch_id] * 2
    assert len(bench.trained) == 2


def test_of_equals_the_slowest_is_fine_tuned_too_and_validation_chooses(tmp_path: Path) -> None:
    found = candidates([1, 2, 3, 4], [0.525, 0.53, 0.521, 0.9])
    names, two = [c.arch_id for c in found], DeliverySettings(fine_tuned=2)
    # One standard error of 0.53 is 0.00998 on 2,500 images, 0.0079 on 4,000; under 3.05 ms, 3 ms are within the margin.
    for budget_ms, images, order in ((3.5, 2500, [1, 2, 0]), (3.5, 4000, [1, 0, 2]), (3.05, 2500, [1, 0, 2])):
        assert [c.arch_id for c in contenders(budget_ms, found, two, images)] == [names[i] for i in order]
    assert [c.arch_id for c in contenders(3.5, found, DeliverySettings(), 2500)] == [names[i] for i in (1, 0, 2)]
    assert contenders(0.5, found, two, 2500) == []
    bench = Bench({}, ids([1, 2, 3, 4]))
    maker = handover(bench, tmp_path)
    maker.settings = maker.settings.model_copy(update={"fine_tuned": 2})
    entry = next(iter(maker.deliver([3.5], found)))
    assert bench.ahead == bench.trained == [names[1], names[2]]     # twelve images tell nothing
    made = [json.loads(path.read_text())["accuracy"]["validation"] for path in (tmp_path / "models").glob("*.json")]
    assert len(made) == 2 and entry.accuracy == max(made)


def test_finalists_are_each_budgets_best_ranked_by_their_final_weights(tmp_path: Path) -> None:
    names = [SPACE.arch_id(row) for row in ROWS]
    found = candidates([1, 2, 2.1, 4], [0.6, 0.7, 0.8, 0.9])
    maker = handover(Bench({}, {}, final=dict(zip(names, [0.5, 0.95, 0.8, 0.7]))), tmp_path)
    maker.settings = maker.settings.model_copy(update={"alternatives": 2})
    finals = maker.finalists([2.5, 5.0], found)
    # 2.5 ms shortlists 2.1 and 2 ms, 5 ms shortlists 4 and 2.1 ms: three in all, none of them twice; the fastest stays.
    assert {c.arch_id: c.accuracy for c in finals} == {
        names[0]: pytest.approx(-0.4), names[1]: 0.95, names[2]: 0.8, names[3]: 0.7}
    assert ranked_under(5.0, finals, 0.02)[0].arch_id == names[1]


def test_a_controller_that_ranks_finalists_decides_what_is_retrained(tmp_path: Path) -> None:
    """Its order comes before the accuracies of the search; what does not fit the budget is not retrained for it."""
    names = [SPACE.arch_id(row) for row in ROWS]
    found = candidates([1, 2, 2.1, 4], [0.6, 0.7, 0.8, 0.9])
    maker = handover(Bench({}, {}, final=dict.fromkeys(names, 0.5)), tmp_path)
    maker.settings = maker.settings.model_copy(update={"alternatives": 2})
    order = [Answer(2.5, ROWS[i], 1.0, 0.5, 0.5, observed=True, feasible=True) for i in (3, 0, 1)]
    retrained = [c.arch_id for c in maker.finalists([2.5], found, [order]) if c.accuracy == 0.5]
    assert retrained == [names[0], names[1]]
    retrained = [c.arch_id for c in maker.finalists([2.5], found, [order[:2]]) if c.accuracy == 0.5]
    assert retrained == [names[0], names[2]], "the others fill up, most accurate first"


def test_a_budget_without_final_weights_keeps_its_most_promising(tmp_path: Path) -> None:
    names = [SPACE.arch_id(row) for row in ROWS]
    found = candidates([1, 2, 2.1, 4], [0.6, 0.7, 0.8, 0.9])
    maker = handover(Bench({}, {}, final={names[3]: 0.99}), tmp_path)
    fastest = (names[0], pytest.approx(-0.4))
    assert [(c.arch_id, c.accuracy) for c in maker.finalists([5.0], found)] == [fastest, (names[3], 0.99)]
    assert [(c.arch_id, c.accuracy) for c in maker.finalists([2.5], found)] == [
        (names[2], pytest.approx(-0.2)), fastest]
    entry = next(iter(maker.deliver([0.5], maker.finalists([0.5, 5.0], found))))
    assert entry.reason == "no measured candidate meets 0.5 ms on cpu; candidates reach 1 to 4 ms"


def test_candidates_use_what_is_known_and_evaluate_the_rest(tmp_path: Path) -> None:
    bench = Bench(ids([1, 2, 3, 4]), {})
    del bench.before[SPACE.arch_id(ROWS[2])]  # type: ignore[attr-defined]
    answers = [[Answer(1.0, ROWS[0], 1.0, 0.9, 0.9, observed=True, feasible=True)],
               [Answer(2.0, ROWS[1], 1.9, 0.8, 0.8, observed=False, feasible=True),
                Answer(3.0, ROWS[2], 1.9, 0.8, 0.8, observed=False, feasible=True)]]
    found = {c.arch_id: c for c in handover(bench, tmp_path).candidates(answers, ROWS[3:])}
    assert {a: c.accuracy for a, c in found.items()} == {SPACE.arch_id(ROWS[0]): 0.9, SPACE.arch_id(ROWS[1]): 0.5,
                                                        SPACE.arch_id(ROWS[3]): 0.5}
    assert found[SPACE.arch_id(ROWS[1])].latency_ms == 2
    assert found[SPACE.arch_id(ROWS[1])].predicted_ms == 1.9


def test_parity_catches_another_network() -> None:
    network = GraphNetwork(SPACE.graph(ROWS[0])).eval()
    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    images, preprocessing = IMAGES.images, Preprocessing.fit(IMAGES, 8)
    assert check_parity(network, to_onnx(SPACE.graph(ROWS[0]), weights).SerializeToString(), images,
                        preprocessing) < 1e-5
    weights["head.linear.bias"] = weights["head.linear.bias"] + 0.1
    with pytest.raises(EvaluationError, match="differs from torch by 0.1"):
        check_parity(network, to_onnx(SPACE.graph(ROWS[0]), weights).SerializeToString(), images, preprocessing)
