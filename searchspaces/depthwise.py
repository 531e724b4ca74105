"""Depthwise convolutions whose weights learn quickly on CPUs.

oneDNN has a kernel for the weights' gradient of depthwise convolutions up to 3 wide, of any height. Wider ones it takes
for convolutions of 16 channels with 16: that gradient alone took five times as long as the output, and more. Here it
comes from columns of the kernel, 3 wide each; the output and the gradient of the input are torch's own.
"""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH = 3           # of the columns
LEAST_SIDE = 8      # of a map: on smaller ones the copies cost more than they save (measured)


def depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """`F.conv2d` with stride 1, odd kernels of weight[C, 1, K, K], zeros around, and as many groups as channels."""
    padding, channels = weight.shape[-1] // 2, x.shape[1]
    if (weight.shape[-1] > WIDTH and min(x.shape[2:]) >= LEAST_SIDE and x.device.type == "cpu"
            and x.dtype == torch.float32 and weight.requires_grad and torch.is_grad_enabled()
            and x.is_contiguous(memory_format=torch.channels_last)):
        output: Tensor = _Depthwise.apply(x, weight)
        return output
    return F.conv2d(x, weight, padding=padding, groups=channels)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=x.shape[1])

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        slope = slope.contiguous(memory_format=torch.channels_last)
        padding = weight.shape[-1] // 2
        of_x = _gradients(slope, x, weight, (padding, padding), of_weight=False) if ctx.needs_input_grad[0] else None
        columns = []
        for first in range(0, weight.shape[-1], WIDTH):
            column = weight[..., first:first + WIDTH]
            sides = (padding - first, first + column.shape[-1] - 1 - padding)   # below 0: cut off
            moved = F.pad(x, sides).contiguous(memory_format=torch.channels_last)
            columns.append(_gradients(slope, moved, column.contiguous(), (padding, 0), of_weight=True))
        return of_x, torch.cat(columns, dim=3)


def _gradients(slope: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, int], of_weight: bool) -> Tensor:
    both = torch.ops.aten.convolution_backward(slope, x, weight, None, [1, 1], list(padding), [1, 1], False, [0, 0],
                                               x.shape[1], [not of_weight, of_weight, False])
    gradient: Tensor = both[int(of_weight)]
    return gradient
