"""Candidates that nobody has to search for."""
from __future__ import annotations

from orchestrator.services.delivery import largest_at_each_resolution
from searchspaces.efficientnet_lite.space import EfficientNetLite
from searchspaces.mobilenetv3.space import MobileNetV3S16


def test_the_published_network_is_a_candidate_at_every_resolution() -> None:
    space = EfficientNetLite(classes=10, channels=3, resolution=(32, 48, 64))
    rows_RT = largest_at_each_resolution(space)
    assert [space.graph(row).input_shape[-1] for row in rows_RT] == [32, 48, 64]
    fixed = [EfficientNetLite(classes=10, channels=3, resolution=resolution) for resolution in (32, 48, 64)]
    whole = [other.cost(other.extremes()[1:])[0][0] for other in fixed]
    assert space.cost(rows_RT)[0].tolist() == whole
    small = MobileNetV3S16(classes=10, channels=1)
    assert largest_at_each_resolution(small).tolist() == small.canonical(small.extremes()[1:]).tolist()
