"""From a name and options to a space; every mistake is one sentence that lists what is allowed."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from searchspaces.catalogue import SPACES, make_space
from searchspaces.errors import ConfigError

OWN = '''
from typing import Literal
from searchspaces.nasbench201.space import NasBench201

class Mine(NasBench201):
    def __init__(self, classes: int, channels: int, size: int, mode: Literal["a", "b"] = "a", flag: bool = False,
                 scale: float | None = None) -> None:
        super().__init__(classes, channels, width=size)
        self.mode, self.flag, self.scale = mode, flag, scale

class Other:
    pass
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "catalogue_own_space.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "catalogue_own_space:Mine"


@pytest.mark.parametrize("name", SPACES)
def test_shipped_spaces_take_classes_and_channels_from_the_data(name: str) -> None:
    space = make_space(name, classes=7, channels=2, options={})
    graph = space.graph(space.extremes()[0])
    assert graph.input_shape[0] == 2 and graph.nodes[-1].shape == (7,)


def test_options_reach_the_space() -> None:
    space = make_space("mobilenetv3", classes=10, channels=3, options={"width": 1, "resolution": [128, 160]})
    assert space.space_id == "mobilenetv3(width=1,resolution=128-160,strides=222212,channels=3,classes=10)"
    variant = make_space("mobilenetv3-s32", classes=10, channels=3, options={})
    same = make_space("mobilenetv3", classes=10, channels=3, options={
        "width": 0.5, "resolution": 32, "stem_stride": 1, "unit_strides": [1, 2, 2, 1, 2]})
    assert variant.space_id == same.space_id


@pytest.mark.parametrize("name, options, expected", [
    ("mobilnetv3", {}, "did you mean 'mobilenetv3'"),
    ("zz", {}, "choose one of darts, darts-s16, efficientnet_lite, efficientnet_lite-s, elite"),
    ("mobilenetv3", {"widht": 1.0}, "did you mean 'width'"),
    ("mobilenetv3", {"widht": 1.0}, "resolution (int or a list of int)"),
    ("mobilenetv3", {"width": "1"}, "must be float"),
    ("mobilenetv3", {"width": True}, "must be float"),
    ("mobilenetv3", {"resolution": 32.5}, "int or a list of int"),
    ("mobilenetv3", {"resolution": [32, "48"]}, "int or a list of int"),
    ("mobilenetv3", {"classes": 3}, "no option 'classes'"),
    ("nasbench201", {"cells": 0}, "at least 1"),
    ("no_such_module_here:Space", {}, "cannot import"),
    ("searchspaces.graph:Graph", {}, "not a search space"),
])
def test_mistakes(name: str, options: Mapping[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_space(name, classes=10, channels=3, options=options)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_own_space(own: str) -> None:
    space = make_space(own, classes=10, channels=1, options={"size": 4, "scale": None, "flag": True, "mode": "b"})
    assert (space.width, space.scale, space.flag, space.mode) == (4, None, True, "b")  # type: ignore[attr-defined]
    for options, expected in (({}, "needs the option 'size'"), ({"size": 4, "mode": "c"}, "'a' or 'b'"),
                              ({"size": 4, "flag": 1}, "true or false"), ({"size": 4, "scale": "x"}, "float or")):
        with pytest.raises(ConfigError, match=expected):
            make_space(own, classes=10, channels=1, options=options)
    with pytest.raises(ConfigError, match="derive the class"):
        make_space("catalogue_own_space:Other", classes=10, channels=1, options={})
