"""On which device a process trains."""
from __future__ import annotations

import logging
import os
from typing import Literal

import ray
import torch
from torch import nn

from searchspaces.errors import ConfigError

log = logging.getLogger(__name__)
Device = Literal["auto", "cpu", "cuda"]


def training_device(wanted: Device) -> torch.device:
    """The device of this process; `auto` is the GPU that it may use, if there is one.

    On a GPU, from then on, only deterministic kernels and full float32 products.
    """
    granted = _granted()
    usable = torch.cuda.is_available() and granted is not False
    if wanted == "cuda" and not usable:
        raise ConfigError("device 'cuda' is asked for and this worker has no GPU; declare GPUs for it, or use 'auto' "
                          "or 'cpu'")
    if granted and wanted == "auto" and not usable:
        log.warning("Ray gave this worker a GPU that torch %s cannot use, so it works on the CPU; install a torch "
                    "built for CUDA or set gpus: 0", torch.__version__)
    if wanted == "cpu" or not usable:
        return torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first handle is made
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda")


def device_of(module: nn.Module) -> torch.device:
    """Where the module's parameters are; the CPU for a module without any."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def _granted() -> bool | None:
    """Has Ray given this worker a GPU, or a share of one? None for a driver, and for a process without Ray.

    Ray hides no GPU from a worker that has declared none, so that CPU workers would crowd the first one.
    """
    if not ray.is_initialized() or ray.get_runtime_context().get_task_id() is None:
        return None
    return bool(ray.get_runtime_context().get_accelerator_ids().get("GPU"))
