"""How the tensors of one kernel call lie in memory: T, the lanes, and a stride per tensor and dim.

All tensors of a call - operands, results, cotangents, gradients - share one index space ``[T, *S]``. A tensor has a time
stride (0 where it does not depend on t) and one stride per dim of ``S`` (0 where it is broadcast). Dims that are
contiguous in *every* tensor are merged, innermost last, so that the usual case is a single dim of N lanes with stride 1.

Sizes and strides are run-time arguments of a kernel. What is compiled in is the `Layout`: the number of merged dims and,
per tensor, whether its innermost stride is 1, 0 or anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layout:
    """What of the memory layout a kernel is compiled for. ``inner[i]``: 1 contiguous, 0 broadcast, -1 strided."""

    ndim: int
    inner: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.ndim}d_" + "".join("c" if i == 1 else "b" if i == 0 else "s" for i in self.inner)


@dataclass(frozen=True)
class Placement:
    """The run-time half: ``sizes[d]``, ``strides[i][d]`` and ``time_strides[i]`` in elements, innermost dim last."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    time_strides: tuple[int, ...]
    layout: Layout


def place(shape: Sequence[int], tensors: Sequence[torch.Tensor], has_time: Sequence[bool]) -> Placement:
    """Merge the dims of ``[*shape]`` over all `tensors`.

    A tensor with `has_time` has shape ``[T, *shape]`` (broadcast dims expanded), any other ``[*shape]``.
    """
    time_strides, all_strides = [], []
    for tensor, timed in zip(tensors, has_time, strict=True):
        strides = tensor.stride()
        time_strides.append(strides[0] if timed else 0)
        all_strides.append(strides[1:] if timed else strides)
    sizes, merged = _merge(shape, all_strides)
    # a dim of size 1 (or an empty shape) leaves one lane, contiguous in everything
    inner = tuple(1 if sizes[-1] == 1 else s[-1] if s[-1] in (0, 1) else -1 for s in merged)
    return Placement(tuple(sizes), tuple(merged), tuple(time_strides), Layout(len(sizes), inner))


def _merge(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[tuple[int, ...]]]:
    # order the dims so that the one with the smallest strides is innermost (channels-last stays one run of lanes)
    dims = [d for d, size in enumerate(shape) if size != 1]
    dims.sort(key=lambda d: tuple(-s[d] for s in strides if s[d]) or (0,))
    sizes: list[int] = []
    columns: list[list[int]] = []  # strides of one merged dim, per tensor
    for d in dims:
        column = [s[d] for s in strides]
        if columns and all(outer == inner * shape[d] for outer, inner in zip(columns[-1], column, strict=True)):
            sizes[-1] *= shape[d]
            columns[-1] = column
        else:
            sizes.append(shape[d])
            columns.append(column)
    if not sizes:
        sizes, columns = [1], [[1] * len(strides)]
    return sizes, [tuple(column[i] for column in columns) for i in range(len(strides))]
