"""What an exported ONNX file itself computes, by ONNX Runtime: its parity with torch, and its accuracy."""
from __future__ import annotations

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from actors.data import LabelledImages, PreparedInChunks, Preprocessing, chunks_of
from searchspaces.errors import EvaluationError

CHUNK_MB = 256.0         # of images as the network sees them
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


def file_accuracy(model: bytes, images: LabelledImages, preprocessing: Preprocessing, chunk: int = 1000) -> float:
    """Share of images that the exported file itself classifies correctly, at most `chunk` of them in memory."""
    session = _session(model)
    chunk = max(1, min(chunk, int(CHUNK_MB / preprocessing.input_mb(1))))
    inputs = PreparedInChunks(images, preprocessing).chunks(chunk)
    hits = sum(int((_logits(session, some.numpy()).argmax(1) == images.labels[rows]).sum())
               for some, rows in zip(inputs, chunks_of(len(images), chunk), strict=True))
    return hits / len(images)
