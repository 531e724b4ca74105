"""Presets: what they set, and that single settings win."""
from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config import Config, dump_config, load_config, parse_config
from orchestrator.presets import FROM_SCRATCH, FROM_TRAINED
from searchspaces.errors import ConfigError


@pytest.mark.parametrize("preset", ["quick", "standard", "long"])
def test_a_preset_sets_what_it_says_and_nothing_else(preset: str) -> None:
    config, plain = parse_config({"training": preset}, "test"), Config().model_dump()
    for section, values in config.model_dump().items():
        said = FROM_SCRATCH[preset].get(section, {})
        assert values == (preset if section == "training" else {**plain[section], **said} if said else plain[section])


def test_longer_presets_train_longer_and_trained_weights_need_less() -> None:
    for table in (FROM_SCRATCH, FROM_TRAINED):
        epochs = [table[preset]["supernet"]["epochs"] for preset in ("quick", "standard", "long")]
        assert epochs == sorted(set(epochs))
    config = parse_config({"training": "quick", "supernet": {"start": "efficientnet_lite0"}}, "test")
    assert config.supernet.epochs == FROM_TRAINED["quick"]["supernet"]["epochs"]
    assert config.supernet.epochs < FROM_SCRATCH["quick"]["supernet"]["epochs"]
    assert config.supernet.teacher == FROM_TRAINED["quick"]["supernet"]["teacher"] > 0
    assert parse_config({"training": "long"}, "test").supernet.teacher == 0


def test_single_settings_win_and_the_written_configuration_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("training: quick\nsupernet: {epochs: 7}\n")
    config = load_config(path, ["search.evaluations=11"])
    assert (config.supernet.epochs, config.search.evaluations, config.latency.maximum) == (7, 11, 60)
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_an_unknown_preset_is_an_error_that_names_the_known() -> None:
    with pytest.raises(ConfigError, match="'training' = 'fast' .*'quick', 'standard' or 'long'"):
        parse_config({"training": "fast"}, "test")
    with pytest.raises(ConfigError, match="'supernet'"):
        parse_config({"training": "quick", "supernet": 3}, "test")
