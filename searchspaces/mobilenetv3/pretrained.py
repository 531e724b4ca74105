"""The supernets that Once-for-all published for this space (ofa/imagenet_classification/elastic_nn, ofa_mbv3.py).

A file has the names of the class OFAMobileNetV3: `blocks.0` is the first block, `blocks.1` to `blocks.20` are the
searched layers. Matrices between kernels and the order of channels mean the same here and there, so every subnet
computes what it computes there. Channels therefore keep their order: those that small expand ratios use were trained
for them. Sorting them anew, as is right where only the largest network was trained, would give these ratios others.
"""
from __future__ import annotations

from searchspaces.mobilenetv3.skeleton import KERNELS, MobileNetV3Skeleton
from searchspaces.supernet import Supernet
from searchspaces.trained.given import Published, paired

PARTS = (("expand", "inverted_bottleneck.conv.conv"), ("expand_bn", "inverted_bottleneck.bn.bn"),
         ("depthwise", "depth_conv.conv.conv"), ("depthwise_bn", "depth_conv.bn.bn"),
         ("se.reduce", "depth_conv.se.fc.reduce"), ("se.expand", "depth_conv.se.fc.expand"),
         ("project", "point_linear.conv.conv"), ("project_bn", "point_linear.bn.bn"))
FIXED = {
    "stem.conv": "first_conv.conv", "stem.conv_bn": "first_conv.bn",
    "first.depthwise": "blocks.0.conv.depth_conv.conv", "first.depthwise_bn": "blocks.0.conv.depth_conv.bn",
    "first.project": "blocks.0.conv.point_linear.conv", "first.project_bn": "blocks.0.conv.point_linear.bn",
    "final.conv": "final_expand_layer.conv", "final.conv_bn": "final_expand_layer.bn",
    "head.conv": "feature_mix_layer.conv", "head.linear": "classifier.linear",
}


def _names(supernet: Supernet) -> dict[str, str]:
    space = supernet.space
    assert isinstance(space, MobileNetV3Skeleton)
    modules, matrices = dict(FIXED), dict[str, str]()
    for number, spec in enumerate(space.layers, start=1):
        modules |= {f"{spec.name}.{ours}": f"blocks.{number}.conv.{theirs}" for ours, theirs in PARTS}
        matrices |= {f"{spec.name}.depthwise.matrices.to_{small}":
                     f"blocks.{number}.conv.depth_conv.conv.{large}to{small}_matrix"
                     for small, large in zip(KERNELS, KERNELS[1:])}
    return paired(supernet.state_dict(), modules) | matrices


PUBLISHED = Published(
    _names, colours="first_conv.conv.weight", head="classifier.linear",
    fitting="ofa_mbv3_d234_e346_k357_w1.0 fits width 1, ofa_mbv3_d234_e346_k357_w1.2 fits width 1.2",
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    renamed={".mobile_inverted_conv.": ".conv."})
