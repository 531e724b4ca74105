"""Preprocessing inside a file against `actors.data.Preprocessing`: the same numbers for images of every size."""
from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from actors.data import Preprocessing
from searchspaces.onnxgraph import IR_VERSION, Weights, to_onnx
from searchspaces.onnxpixels import RESIZE_OPSET, Pixels, from_pixels, timed_size
from tests.searchspaces.test_onnxgraph import GRAPHS, MOBILE, optimised_operators, trained, weights_of

SIZES = ((24, 24), (48, 48), (24, 12), (7, 11), (1, 1), (31, 24), (60, 24), (24, 90), (10, 90), (90, 10), (241, 163))


def pixels(how: Preprocessing, size: tuple[int, int] = (5, 6)) -> Pixels:
    return Pixels(size, how.mean, how.std, how.scale)


def noise(size: tuple[int, int], channels: int, count: int = 2) -> NDArray[np.uint8]:
    return np.random.default_rng(size).integers(0, 256, (count, *size, channels), dtype=np.uint8)


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("channels", [1, 3])
def test_same_numbers_as_preprocessing_at_every_size(channels: int) -> None:
    """Of one session: smaller, larger and equal images, and those that shrink one way and grow the other."""
    how = Preprocessing((0.47, 0.3, 0.6)[:channels], (0.2, 0.25, 0.3)[:channels], 24, channels)
    nodes, constants = from_pixels(pixels(how), 24, "images", "x")
    values = [helper.make_tensor_value_info("images", TensorProto.UINT8, [2, "height", "width", channels]),
              helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, channels, 24, 24])]
    found = session(helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], constants),
                                      opset_imports=[helper.make_opsetid("", RESIZE_OPSET)], ir_version=IR_VERSION))
    for size in SIZES:
        images = noise(size, channels)
        np.testing.assert_allclose(found.run(None, {"images": images})[0], how.numpy(images), rtol=0, atol=1e-4,
                                   err_msg=str(size))


@pytest.mark.parametrize("batch", [2, None])
@pytest.mark.parametrize("graph", ["every operator", "darts"])
def test_probabilities_are_those_of_torch(graph: str, batch: int | None) -> None:
    network = trained(GRAPHS[graph])
    channels, resolution, _ = GRAPHS[graph].input_shape
    how = Preprocessing((0.4,) * channels, (0.3,) * channels, resolution, channels)
    found = session(to_onnx(GRAPHS[graph], weights_of(network), batch, pixels=pixels(how)))
    assert found.get_inputs()[0].shape == ["batch" if batch is None else 2, "height", "width", channels]
    for size in ((resolution, resolution), (3 * resolution, 2 * resolution + 1), (5, 40)):
        images = noise(size, channels)
        with torch.inference_mode():
            expected = network(how.tensor(images)).softmax(dim=1).numpy()
        given, = found.run(["probabilities"], {"images": images})
        np.testing.assert_allclose(given, expected, rtol=0, atol=1e-4)
        assert np.ptp(given, axis=0).max() > 0


@pytest.mark.parametrize("weights", [None, weights_of(trained(MOBILE.graph(MOBILE.extremes()[0])))])
def test_the_network_itself_is_optimised_as_without_preprocessing(weights: Weights | None, tmp_path: Path) -> None:
    graph = MOBILE.graph(MOBILE.extremes()[0])
    plain = optimised_operators(to_onnx(graph, weights), tmp_path)
    inside = optimised_operators(to_onnx(graph, weights, pixels=Pixels.neutral((40, 40), 3)), tmp_path)
    assert inside - plain == Counter({"Cast": 1, "Transpose": 1, "Resize": 1, "Mul": 1, "Add": 1, "Softmax": 1})
    assert plain - inside == Counter()


def test_the_file_says_with_which_size_it_is_timed() -> None:
    model = to_onnx(GRAPHS["mobilenetv3"], metadata={"run": "r"}, pixels=Pixels.neutral((30, 50), 3))
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["run"] == "r" and timed_size(metadata) == {"height": 30, "width": 50}
    assert timed_size({"run": "r"}) == {}
