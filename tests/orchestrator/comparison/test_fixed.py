"""The fixed network: what it is, what is refused, and per budget the largest resolution that meets it; a whole run."""
from __future__ import annotations

import contextlib
import gc
import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console

from actors.data import Images, Preprocessing, Splits
from actors.targets.target import LatencySample, Workload
from orchestrator.comparison.compared import FOLDER, Comparison
from orchestrator.comparison.fixed import FixedNetworks, fixed_accuracies, resolutions_of
from orchestrator.comparison.handover import FixedHandOver
from orchestrator.config import Config, DeliverySettings, parse_config
from orchestrator.handover.delivered import Candidate, Delivered
from orchestrator.handover.exported import file_accuracy
from orchestrator.interrupt import Interrupted
from orchestrator.record.files import read_json
from orchestrator.record.goals import Goal
from orchestrator.record.store import RunStore
from orchestrator.run.search import Search
from orchestrator.services.context import data_and_space
from orchestrator.services.pretrained import preprocessing_for, started
from searchspaces.efficientnet_lite.space import EfficientNetLite, EfficientNetLiteS
from searchspaces.errors import EvaluationError, ParetorayError
from searchspaces.network import GraphNetwork
from searchspaces.onnxgraph import to_onnx
from searchspaces.space import Tokens
from tests.orchestrator.plugins import Sizing
from tests.orchestrator.run.test_search import stage

SMALL = {"name": "efficientnet_lite-s", "resolution": [8, 40]}
UNIT = 1e-8     # ms for a weight and a pixel
PUBLISHED = {"stem.conv": "_conv_stem", "stem.conv_bn": "_bn0", "final.conv": "_conv_head", "final.conv_bn": "_bn1",
             "head.linear": "_fc"}
OF_A_BLOCK = {"expand": "_expand_conv", "expand_bn": "_bn0", "depthwise": "_depthwise_conv", "depthwise_bn": "_bn1",
              "project": "_project_conv", "project_bn": "_bn2"}
RAW = {
    "seed": 3, "data": {"name": "digits", "limit": 200}, "space": SMALL,
    "target": {"name": "tests.orchestrator.plugins:Sizing", "unit": UNIT}, "budgets": [0.1, 1.0, 2.85, 5.0],
    "latency": {"initial": 10, "maximum": 10, "visits": 1}, "controller": "random",
    "supernet": {"epochs": 1, "batch_size": 64, "learning_rate": 0.02},
    "search": {"evaluations": 6, "calibration_images": 64, "rollouts": 1},
    "delivery": {"alternatives": 1, "fine_tune_epochs": 1}, "compare": ["fixed"]}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights for the small space, under the names of those from ImageNet."""
    torch.manual_seed(0)
    space = EfficientNetLiteS(resolution=8)
    blocks = ["first", *(spec.name for spec in space.layers)]
    names = PUBLISHED | {f"{block}.{ours}": f"_blocks.{number}.{theirs}" for number, block in enumerate(blocks)
                         for ours, theirs in OF_A_BLOCK.items()}
    state, path = space.make_supernet().state_dict(), tmp_path_factory.mktemp("weights") / "small.pth"
    split = {name: name.rpartition(".") for name in state}
    torch.save({f"{names[module]}.{suffix}": state[name] for name, (module, _, suffix) in split.items()
                if module in names}, path)
    return path


def config_of(weights: Path, **changes: Any) -> Config:
    raw = RAW | {"supernet": {**RAW["supernet"], "start": str(weights)}} | changes  # type: ignore[dict-item]
    return parse_config({key: value for key, value in raw.items() if value is not None}, "test")


def test_a_user_may_choose_any_multiple_of_16() -> None:
    assert resolutions_of(EfficientNetLite(resolution=[24, 48, 72])) == (24, 32, 48, 64, 72)
    assert resolutions_of(EfficientNetLite(resolution=50)) == (50,)


@pytest.mark.parametrize("space", [
    SMALL, {"name": "elite", "base": SMALL, "ranges": {"depth0": [1], "resolution": [8]}}], ids=["whole", "elite"])
def test_it_is_the_largest_architecture_with_the_given_weights(weights: Path, space: dict[str, Any]) -> None:
    config = config_of(weights, space=space)
    fixed = FixedNetworks(config, 10, 1)
    assert fixed.resolutions == (8, 16, 32, 40)
    for resolution in fixed.resolutions:
        alone = EfficientNetLiteS(resolution=resolution)
        tokens_T = fixed.tokens(resolution)
        assert fixed.space.graph(tokens_T) == alone.graph(alone.extremes()[1])
        assert fixed.resolution(tokens_T) == resolution
    given, used = torch.load(weights, weights_only=True), fixed.start()
    assert np.array_equal(used["stem.conv.weight"], given["_conv_stem.weight"])
    alone = EfficientNetLiteS(resolution=16)
    other = started(str(weights), 3, alone).extract(alone.extremes()[1]).state_dict()
    assert used.keys() == other.keys() and all(np.array_equal(used[name], other[name]) for name in used)
    assert (fixed.settings.epochs, fixed.settings.learning_rate, fixed.settings.batch_size) == (2, 0.02, 64)


@pytest.mark.parametrize(("changes", "words"), [
    ({"supernet": {}}, "compare: .fixed. fine-tunes the network .* set supernet.start"),
    ({"accuracy": {"source": "training"}}, "set supernet.start .with accuracy: supernet."),
    ({"target": {"name": "table", "path": "t", "token_columns": ["a"], "column": "ms"}}, "table only looks"),
    ({"compare": ["fixd"]}, "'compare.0' = 'fixd' is not allowed"),
    ({"compare": ["fixed", "fixed"]}, "at most 1 item")])
def test_what_cannot_be_compared_is_said_before_a_run_exists(weights: Path, tmp_path: Path, changes: dict[str, Any],
                                                             words: str) -> None:
    with pytest.raises(ParetorayError, match=words) as caught:
        Search(config_of(weights, **changes), runs=tmp_path, name="run")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


SPACE = EfficientNetLiteS(resolution=[8, 16, 24])
NOISE = Images(np.random.default_rng(0).integers(0, 255, (6, 8, 8, 1)).astype(np.uint8), np.arange(6) % 3)


class Bench:
    """Latencies of files by resolution, as told; training diverges at one of them."""

    def __init__(self, file_ms: Mapping[int, float], diverging: int = 0) -> None:
        self.file_ms, self.diverging = file_ms, diverging
        self.trained: list[int] = []

    def latencies_ms(self, target: str, tokens_NT: Tokens) -> list[float | None]:
        raise AssertionError("not asked for")

    accuracies = finals = latencies_ms

    def training(self) -> dict[str, Any]:
        return {}

    def trained_weights(self, tokens_T: Tokens) -> dict[str, NDArray[np.float32]]:
        graph = SPACE.graph(tokens_T)
        self.trained.append(graph.input_shape[-1])
        if graph.input_shape[-1] == self.diverging:
            raise EvaluationError("training diverged")
        return {name: tensor.numpy() for name, tensor in GraphNetwork(graph).state_dict().items()}

    def time_file(self, target: str, model: bytes) -> LatencySample:
        ms = self.file_ms[onnx.load_from_string(model).graph.input[0].type.tensor_type.shape.dim[2].dim_value]
        return LatencySample("cpu-0", ms, 1.0, ms, 0.01, 6, 0.0, 0.0, ((ms,),), ((1.0,),), 0.0, 0.1)


def entries(bench: Bench, folder: Path, budgets_ms: list[float], latencies_ms: list[float]) -> list[Delivered]:
    handover = FixedHandOver(
        SPACE, Splits(NOISE, NOISE, NOISE, ("a", "b", "c"), "noise"), Preprocessing.fit(NOISE, 24),
        bench, DeliverySettings(margin=0.02), folder,  # type: ignore[arg-type]
        {"run": "r", "weights_version": 0, "targets": {"cpu": {"target": {"batch": 1}}}},
        Goal("cpu", ("cpu",), tuple(budgets_ms)), folder=FOLDER)
    rows = np.repeat(SPACE.extremes()[1][None], 3, axis=0)
    rows[:, -1] = range(3)
    found = [Candidate(row, SPACE.arch_id(row), float("nan"), ms, ms) for row, ms in zip(rows, latencies_ms)]
    first = [handover.resolution(candidate) for candidate in handover.unmade(budgets_ms, found)]
    models = list(handover.deliver(budgets_ms, found))
    assert bench.trained[:len(first)] == first and not handover.unmade(budgets_ms, found)
    return models


def test_every_budget_gets_the_largest_that_meets_it(tmp_path: Path) -> None:
    bench = Bench({8: 1.0, 16: 2.0, 24: 3.0})
    found = entries(bench, tmp_path, [0.9, 2.5, 3.5], [1.0, 2.0, 3.0])
    assert [model.onnx for model in found] == ["", "compared/fixed-r16.onnx", "compared/fixed-r24.onnx"]
    assert found[0].reason == ("no resolution fits 0.9 ms: the fixed network takes 1 ms at 8 px, 3 ms at 24 px")
    assert bench.trained == [16, 24] and [model.latency_ms for model in found[1:]] == [2.0, 3.0]


def test_a_file_that_misses_the_budget_or_a_training_that_diverges_makes_room(tmp_path: Path) -> None:
    bench = Bench({8: 1.0, 16: 2.0, 24: 3.1}, diverging=16)
    found = entries(bench, tmp_path, [3.07], [1.0, 2.0, 3.0])
    assert bench.trained == [24, 16, 8] and found[0].onnx == "compared/fixed-r8.onnx"
    slow = entries(Bench({8: 1.2}), tmp_path / "slow", [1.1], [1.0, 2.0, 3.0])[0]
    assert not slow.feasible and slow.reason.startswith("no resolution fits 1.1 ms: the exported file took 1.2 ms")


def stop_at_the_first_file(config: Config, runs: Path) -> None:
    search, make = Search(config, runs=runs, name="run", console=Console(quiet=True)), FixedHandOver._made

    def made(handover: FixedHandOver, candidate: Candidate, budget_ms: float) -> dict[str, Any]:
        complete = make(handover, candidate, budget_ms)
        search.stop.set(signal.SIGTERM)
        return complete

    with pytest.MonkeyPatch.context() as patched, contextlib.suppress(Interrupted):
        patched.setattr(FixedHandOver, "_made", made)
        search.run()


@pytest.mark.soak
def test_a_run_that_ends_while_it_compares_trains_nothing_twice(
        ray_local: None, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, config = tmp_path / "run", config_of(weights)
    stop_at_the_first_file(config, tmp_path)
    gc.collect()    # what holds the run's lock
    assert stage(run) == "compare" and len(list((run / "checkpoints" / "comparing").iterdir())) == 2
    made = {path: path.stat().st_mtime_ns for path in (run / FOLDER).iterdir()}
    epochs = {path: path.stat().st_mtime_ns for path in (run / "checkpoints" / "comparing" / "r40").iterdir()}
    monkeypatch.setattr("orchestrator.run.stages.compare.remove_tree", lambda *_, **__: None)
    with (tmp_path / "log").open("w") as log:
        models = Search.resume("run", runs=tmp_path, console=Console(file=log, width=80)).run()
    assert len(made) == 2 and {path: path.stat().st_mtime_ns for path in made} == made
    assert len(epochs) == 4 and {path: path.stat().st_mtime_ns for path in epochs} == epochs

    fixed, found = FixedNetworks(config, 10, 1), Comparison(RunStore(run))
    target = Sizing((1, 40, 40), unit=UNIT)
    weighed = {r: target.prepare([Workload(onnx=to_onnx(fixed.space.graph(fixed.tokens(r))).SerializeToString())])[0]
               for r in fixed.resolutions}
    assert found.latencies_ms == {"Sizing": pytest.approx(weighed)}
    largest = [max((r for r, ms in weighed.items() if ms <= budget * 0.98), default=None) for budget in RAW["budgets"]]  # type: ignore
    assert [entry.resolution for entry in found.entries] == largest == [None, 16, 16, 40]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert sorted(event["resolution"] for event in events if event["kind"] == "tuned") == [16, 40, 40]

    splits, space = data_and_space(config)
    preprocessing = preprocessing_for(config, space, splits.train, 40)
    for entry in found.entries[1:]:
        model = (run / entry.model.onnx).read_bytes()
        sidecar = read_json((run / entry.model.onnx).with_suffix(".json"))
        own = Preprocessing.from_dict(sidecar["input"]["preprocessing"])
        assert own.resolution == entry.resolution and sidecar["fine_tune_epochs"] == 2
        assert entry.model.accuracy == sidecar["accuracy"]["validation"] == file_accuracy(model, splits.val, own)
        assert entry.model.test_accuracy == sidecar["accuracy"]["test"] == file_accuracy(model, splits.test, own)
        assert entry.model.latency_ms == pytest.approx(weighed[entry.resolution or 0])
    alone = fixed_accuracies(config, splits, preprocessing, 16, tmp_path / "alone")
    assert alone == read_json(run / FOLDER / "fixed-r16.json")["accuracy"]

    said = (tmp_path / "log").read_text()
    assert "no resolution fits" in said and "fixed, fine-tuned" in said and len(models) == 4
    page = (run / "report.html").read_text()
    assert '"fixed, fine-tuned (test)"' in page and "fixed, 40 px" in page and "no resolution fits 0.1 ms" in page
    # A run that was done without it gets the comparison when somebody writes it into its configuration.
    recorded = read_json(run / "compared.json")
    (run / "compared.json").unlink()
    monkeypatch.undo()
    Search.resume("run", runs=tmp_path, console=Console(quiet=True)).run()
    assert read_json(run / "compared.json") == recorded and stage(run) == "done"
    assert not (run / "checkpoints" / "comparing").exists()
