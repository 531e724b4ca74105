"""Files that hold no weights, and the scale of pixels."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from searchspaces.errors import ConfigError, StoreError
from searchspaces.mobilenetv3.pretrained import PUBLISHED
from searchspaces.mobilenetv3.space import MobileNetV3S16
from searchspaces.trained.given import fill, weights_file


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    supernet = MobileNetV3S16().make_supernet()
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "numbers.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "pickle.pth")    # code, which is never run
    for name, words in (("text.pth", "cannot be read"), ("text.safetensors", "cannot be read"),
                        ("list.pth", "holds list"), ("numbers.pth", "holds dict, not a dictionary of tensors"),
                        ("pickle.pth", "cannot be read")):
        with pytest.raises(StoreError, match=words) as caught:
            fill(supernet, PUBLISHED, tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_missing_file_of_weights_that_no_package_has() -> None:
    with pytest.raises(ConfigError, match=r"no weights 'ofa' to start from; give the path of a file .*_w1.0 fits"):
        weights_file(PUBLISHED, "ofa")


def test_grey_pixels_are_scaled_by_the_mean_of_the_colours() -> None:
    assert PUBLISHED.pixels(3) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert PUBLISHED.pixels(1) == ((pytest.approx(0.449),), (pytest.approx(0.226),))
