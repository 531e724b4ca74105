"""On which device a process trains."""
from __future__ import annotations

import os
from typing import Literal

import ray
import torch
from torch import nn

from searchspaces.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]


def training_device(wanted: Device) -> torch.device:
    """The device of this process; `auto` is the GPU that it may use, if there is one.

    On a GPU, from then on, only deterministic kernels and full float32 products.
    """
    usable = torch.cuda.is_available() and _granted()
    if wanted == "cuda" and not usable:
        raise ConfigError("device 'cuda' is asked for and this worker has no GPU; declare GPUs for it, or use 'auto' "
                          "or 'cpu'")
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


def _granted() -> bool:
    """Ray hides no GPU from a worker that has declared none, so that CPU workers would crowd the first one."""
    if not ray.is_initialized() or ray.get_runtime_context().get_task_id() is None:
        return True  # a driver, or a process without Ray
    return bool(ray.get_runtime_context().get_accelerator_ids().get("GPU"))
