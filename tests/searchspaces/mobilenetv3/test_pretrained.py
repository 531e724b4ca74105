"""Once-for-all checkpoints in the supernet: every subnet computes what it computes there; other forms; wrong files."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from searchspaces.errors import StoreError
from searchspaces.mobilenetv3.pretrained import PUBLISHED
from searchspaces.mobilenetv3.skeleton import DEPTHS, EXPANDS, KERNELS
from searchspaces.mobilenetv3.space import MobileNetV3
from searchspaces.mobilenetv3.supernet import MobileNetV3Supernet
from searchspaces.trained.given import fill
from tests.searchspaces.mobilenetv3.onceforall import checkpoint, logits


def supernet_of(space: MobileNetV3, path: Path) -> MobileNetV3Supernet:
    supernet = space.make_supernet()
    assert isinstance(supernet, MobileNetV3Supernet)
    fill(supernet, PUBLISHED, path)
    return supernet.eval()


@pytest.mark.parametrize("width", [1.0, 1.2])
def test_random_subnets_give_the_logits_of_once_for_all(width: float, tmp_path: Path) -> None:
    """Ten rows and the two extremes, with the statistics as they are; at 45 pixels maps are odd and even: 23, 12, 6,
    3, 2. In double precision, because random weights make the largest logits 200."""
    state = checkpoint(width)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / f"ofa_mbv3_d234_e346_k357_w{width}")
    space = MobileNetV3(classes=1000, width=width, resolution=[32, 45])
    supernet = supernet_of(space, tmp_path / f"ofa_mbv3_d234_e346_k357_w{width}").double()
    state = {name: tensor.double() for name, tensor in state.items()}
    found = []
    for row in np.concatenate([space.sample_uniform(np.random.default_rng(0), 10), space.extremes()]):
        depth, expand, kernel, resolution = (part[0] for part in space.split(row[None]))
        side = space.resolutions[resolution]
        images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0)).double()
        supernet.set_active(row)
        with torch.no_grad():
            expected = logits(state, images, [DEPTHS[i] for i in depth], [KERNELS[i] for i in kernel],
                              [EXPANDS[i] for i in expand])
            torch.testing.assert_close(supernet(images), expected, rtol=0, atol=1e-8)
        found += list(expected)
    assert min((a - b).abs().max() for i, a in enumerate(found) for b in found[:i]) > 1e-3  # they do say something


@pytest.mark.parametrize("form", ["bare", "data parallel", "older", "safetensors"])
def test_forms_of_a_file(form: str, tmp_path: Path) -> None:
    state, path = checkpoint(0.25), tmp_path / ("ofa.safetensors" if form == "safetensors" else "ofa.pth")
    space = MobileNetV3(classes=1000, width=0.25, resolution=32)
    torch.save({"state_dict": state}, tmp_path / "plain")
    expected = supernet_of(space, tmp_path / "plain").state_dict()
    if form == "safetensors":
        save_file(state, path)
    elif form == "bare":
        torch.save(state, path)
    elif form == "data parallel":
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    else:
        torch.save({"state_dict": {f"module.blocks.{name[7:].replace('.conv.', '.mobile_inverted_conv.', 1)}"
                                   if name.startswith("blocks.") else f"module.{name}": tensor
                                   for name, tensor in state.items()}}, path)
    found = supernet_of(space, path).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_all_but_the_head_is_taken_for_other_classes_and_channels_keep_their_order(tmp_path: Path) -> None:
    state = checkpoint(0.25)
    torch.save(state, tmp_path / "ofa.pth")
    space = MobileNetV3(classes=10, width=0.25, resolution=32)
    torch.manual_seed(1)
    held = supernet_of(space, tmp_path / "ofa.pth").state_dict()
    torch.manual_seed(1)
    fresh = space.make_supernet().state_dict()
    same = [name for name in held if torch.equal(held[name], fresh[name])]
    assert same == ["head.linear.weight", "head.linear.bias"]
    assert torch.equal(held["head.conv.weight"], state["feature_mix_layer.conv.weight"])
    assert torch.equal(held["unit1.layer2.se.reduce.weight"], state["blocks.7.conv.depth_conv.se.fc.reduce.weight"])


@pytest.mark.parametrize("change, words", [
    (lambda state: state.pop("blocks.3.conv.depth_conv.conv.7to5_matrix"),
     "it lacks blocks.3.conv.depth_conv.conv.7to5_matrix"),
    (lambda state: state.update(checkpoint(1.0)),
     r"its first_conv.conv.weight has shape \(16, 3, 3, 3\), the space needs \(8, 3, 3, 3\); .*_w1.2 fits width 1.2"),
    (lambda state: state.update({"blocks.21.conv.depth_conv.bn.bn.bias": torch.zeros(3)}),
     "no place for its blocks.21.conv.depth_conv.bn.bn.bias"),
])
def test_a_file_that_does_not_fit_is_named_and_changes_nothing(
        tmp_path: Path, change: Callable[[dict[str, Tensor]], object], words: str) -> None:
    state = checkpoint(0.25)
    change(state)
    torch.save({"state_dict": state}, tmp_path / "changed")
    supernet = MobileNetV3(width=0.25, resolution=32).make_supernet()
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    with pytest.raises(StoreError, match=f"changed do not fit .*{words}"):
        fill(supernet, PUBLISHED, tmp_path / "changed")
    assert all(torch.equal(tensor, before[name]) for name, tensor in supernet.state_dict().items())
