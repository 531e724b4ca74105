"""What an exported ONNX file itself computes, by ONNX Runtime: its parity with torch, and its accuracy."""
from __future__ import annotations

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from actors.data import Images, Preprocessing
from searchspaces.errors import EvaluationError

PARITY_TOLERANCE = 1e-3  # of the largest logit; float32 kernels that differ only in summation order stay below


def _session(model: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # warns of every unused operation of a cell otherwise
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _logits(session: onnxruntime.InferenceSession, images: NDArray[np.float32]) -> NDArray[np.float32]:
    batch = session.get_inputs()[0].shape[0]
    batch = batch if isinstance(batch, int) else len(images)
    padded = np.concatenate([images, np.zeros((-len(images) % batch, *images.shape[1:]), np.float32)])
    chunks = [session.run(None, {"images": padded[i:i + batch]})[0] for i in range(0, len(padded), batch)]
    return np.concatenate(chunks)[:len(images)]


def check_parity(network: torch.nn.Module, model: bytes, images: NDArray[np.float32]) -> float:
    """Largest difference between ONNX Runtime's logits and torch's; EvaluationError beyond the tolerance."""
    with torch.inference_mode():
        expected = network(torch.from_numpy(images)).numpy()
    difference = float(np.abs(_logits(_session(model), images) - expected).max())
    if not difference <= PARITY_TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise EvaluationError(f"the exported file differs from torch by {difference:.3g} in a logit; it is not handed "
                              "over")
    return difference


def file_accuracy(model: bytes, images: Images, preprocessing: Preprocessing, chunk: int = 1000) -> float:
    """Share of images that the exported file itself classifies correctly."""
    session = _session(model)
    hits = 0
    for start in range(0, len(images), chunk):
        logits = _logits(session, preprocessing.numpy(images.images[start:start + chunk]))
        hits += int((logits.argmax(1) == images.labels[start:start + chunk]).sum())
    return hits / len(images)
