"""Configuration: every key checked, one sentence per mistake."""
from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config import Config, dump_config, load_config, parse_budget, parse_config
from orchestrator.controllers.catalogue import check_controller_options
from searchspaces.catalogue import make_space
from searchspaces.errors import ConfigError

CONFIGS = sorted(path for path in (Path(__file__).parents[2] / "configs").glob("*.yaml") if path.stem != "sweep")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configurations_load_and_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config
    check_controller_options(config.controller.name, config.controller.options)
    if config.controller.name == "fnas":
        space = make_space(config.space.name, classes=10, channels=3, options=config.space.options)
        assert space.space_id.startswith("mnas(")
        assert config.delivery.alternatives == 10


@pytest.mark.parametrize(("text", "milliseconds"), [("2.5", 2.5), (4, 4.0), ("2.5ms", 2.5), ("300us", 0.3),
                                                    ("0.01s", 10.0), ("1e1 ms", 10.0)])
def test_budgets(text: object, milliseconds: float) -> None:
    assert parse_budget(text) == pytest.approx(milliseconds)


@pytest.mark.parametrize("text", ["fast", "-1", "0", "2.5min", "", "nan"])
def test_bad_budgets(text: str) -> None:
    with pytest.raises(ConfigError, match="not a latency budget"):
        parse_config({"budgets": [text]}, "test")


@pytest.mark.parametrize(("raw", "message"), [
    ({"sead": 1}, "unknown key 'sead'; did you mean 'seed'"),
    ({"supernet": {"epoch": 1}}, "unknown key 'supernet.epoch'; did you mean 'epochs'"),
    ({"search": {"qqq": 1}}, "unknown key 'search.qqq'; known keys here: evaluations"),
    ({"supernet": {"epochs": "many"}}, "'supernet.epochs' = 'many' is not allowed"),
    ({"supernet": {"epochs": 0}}, "'supernet.epochs' = 0 is not allowed"),
    ({"space": 3}, "'space' = 3"),
    ({"data": {"name": "digitz"}}, "dataset 'digitz' is unknown"),
])
def test_mistakes_are_named(raw: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(raw, "mine.yaml")
    assert message in str(error.value)
    assert "mine.yaml" in str(error.value)


def test_ten_finalists_are_retrained_and_six_fine_tuned_unless_told_otherwise(tmp_path: Path) -> None:
    for accuracy, delivery, expected in (("supernet", {}, 6), ("training", {}, 10), ("training", {"margin": 0.1}, 10),
                                         ("training", {"alternatives": 6}, 6)):
        config = parse_config({"accuracy": accuracy, "delivery": delivery}, "test")
        assert config.delivery.alternatives == expected
        (tmp_path / "again.yaml").write_text(dump_config(config))
        assert load_config(tmp_path / "again.yaml") == config
    assert Config().delivery.alternatives == 6


def test_overrides(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("space: mobilenetv3-s16\n")
    config = load_config(tmp_path / "c.yaml", ["supernet.epochs=3", "space={name: mobilenetv3, width: 1.2}",
                                               "budgets=[1ms, 2.5]"])
    assert (config.supernet.epochs, config.space.name, config.space.options) == (3, "mobilenetv3", {"width": 1.2})
    assert config.budgets.values_ms == [1.0, 2.5]
    with pytest.raises(ConfigError, match="key=value"):
        load_config(tmp_path / "c.yaml", ["supernet.epochs"])


@pytest.mark.parametrize(("text", "message"), [("a: [", "not valid YAML"), ("- 1", "not a mapping"),
                                               (None, "cannot read")])
def test_unreadable_files(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "c.yaml")


def test_defaults_are_complete() -> None:
    assert parse_config({}, "empty") == Config()


def test_an_override_goes_into_a_section_that_was_written_in_its_short_form(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("target: onnx_cpu\ndata: digits\naccuracy: training\n")
    config = load_config(tmp_path / "mine.yaml", ["target.batch=2", "data.limit=100", "accuracy.epochs=3"])
    assert (config.targets[0].name, config.targets[0].options) == ("onnx_cpu", {"batch": 2})
    assert (config.data.name, config.data.limit) == ("digits", 100)
    assert config.accuracy.model_dump()["epochs"] == 3
