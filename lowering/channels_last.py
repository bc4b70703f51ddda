"""Values ``[N, C, *space]`` of a step, and series of them, in two layouts: space innermost, or channels innermost.

``[N, C]`` and PyTorch's channels-last have their channels innermost, with all of N and space one distance apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from snn_compile.lowering.result_memory import allocate


def fits(value: Tensor, dim: int, channels_last: bool, timed: bool = False) -> bool:
    """Whether a whole value, of `dim` dims, lies in memory so; others do. `timed`: a series, dim 0 is time."""
    sizes, strides = value.shape[timed:], value.stride()[timed:]
    if len(sizes) != dim:
        return True
    if not channels_last:
        return is_dense(sizes[2:], strides[2:])
    return (strides[1] == 1 or sizes[1] == 1) and row_stride(sizes, strides) is not None


def is_dense(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether dims lie in memory one in the other without gaps, as `Tensor.is_contiguous` asks of all dims."""
    expected = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def row_stride(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """Of ``[N, C, *space]`` from one position to the next, where all of N and space lie one distance apart."""
    stride = expected = None
    for size, now in [(sizes[d], strides[d]) for d in (*range(len(sizes) - 1, 1, -1), 0)]:
        if size == 1:
            continue
        if expected is not None and now != expected:
            return None
        stride = now if stride is None else stride
        expected = now * size
    return 0 if stride is None else stride


def is_channels_last(step: Tensor) -> bool:
    """Whether the channels of a whole value ``[N, C, *space]`` lie together in memory."""
    if step.dim() == 2 or not fits(step, step.dim(), channels_last=True):
        return step.dim() == 2
    return step.shape[2:].numel() == 1 or not step.is_contiguous()


def arranged(value: Tensor, dim: int, channels_last: bool, timed: bool = False) -> Tensor:
    """`value`, or a copy that lies in memory so. Of a whole value that is one number everywhere, one row, for all rows."""
    if value.dim() - timed != dim:
        return value.contiguous()
    if not timed and not any(value.stride()) and value.numel():
        shape = (value.shape[1], *(1,) * (dim - 2)) if channels_last else value.shape[2:]
        return value.as_strided(shape, (0,) * len(shape)).contiguous().expand(value.shape)
    if fits(value, dim, channels_last, timed):
        return value
    return empty_arranged(value.shape, value.dtype, value.device, channels_last, timed).copy_(value)


def empty_arranged(shape: Sequence[int], dtype: torch.dtype, device: torch.device, channels_last: bool, timed: bool) -> Tensor:
    """An empty whole value, or a series of them, in settled memory."""
    if not channels_last:
        return allocate(shape, dtype, device)
    channel = 1 + timed
    order = (*shape[:channel], *shape[channel + 1 :], shape[channel])
    return allocate(order, dtype, device).movedim(-1, channel)
