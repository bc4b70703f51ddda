"""Where the tensors of a channel kernel lie in memory: what of it the kernel's text depends on, and the numbers of a call.

A whole value ``[N, C, *space]`` is read as ``[N, C, inner]``: its last dims must be one run of equal strides, as they are where
it is contiguous, channels-last or one number everywhere. Tensors of equal strides form a group, whose offsets are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Strides of one tensor, in elements; of a channel's value `row` and `inner` are 0."""

    is_whole: bool
    step: int
    row: int
    channel: int
    inner: int

    @property
    def lanes(self) -> tuple[int, int, int]:
        return self.row, self.channel, self.inner


def place(value: Tensor, timed: bool, reverse: bool, shape: torch.Size) -> Place | None:
    """`shape`: of a whole value. None where the last dims are no run of equal strides."""
    sizes, strides = value.shape[timed:], value.stride()[timed:]
    step = (-1 if reverse else 1) * value.stride(0) if timed else 0
    if sizes != shape:
        return Place(False, step, 0, next((s for s, size in zip(strides, sizes, strict=True) if size != 1), 0), 0)
    inner = _run(sizes[2:], strides[2:])
    return None if inner is None else Place(True, step, strides[0], strides[1], inner)


def _run(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """The stride of several dims as one, or None; 0 where they hold one element."""
    inner, following = 0, None
    for size, stride in reversed(list(zip(sizes, strides, strict=True))):
        if size == 1:
            continue
        if following is None:
            inner = stride
        elif stride != following:
            return None
        following = stride * size
    return inner


@dataclass(frozen=True)
class Group:
    """The offsets of tensors of equal strides: whether from lane to lane, from channel to channel, the stride is 1."""

    unit_lane: bool
    unit_channel: bool


@dataclass(frozen=True)
class ChannelLayout:
    #: every tensor is one run over rows and what is inside of them: a lane needs no division
    flat: bool
    groups: tuple[Group, ...]
    #: the group of each tensor; None: a channel's value
    group_of: tuple[int | None, ...]
    #: channels next to each other in memory that a program owns together
    channels: int


@dataclass(frozen=True)
class Layout:
    """`key` decides the kernel's text; the rest is of one call."""

    key: ChannelLayout
    rows: int
    inner: int
    #: of each group: lane or row, channel, inner
    strides: tuple[tuple[int, int, int], ...]


#: Eight fp32 values are one sector of memory.
_CHANNELS = 8


def lay_out(places: Sequence[Place], shape: Sequence[int], processors: int = 0) -> Layout:
    """The layout of a call; `shape`: of a whole value; `processors`: of the device, 0 where nothing is known of them."""
    rows, channels, inner = shape[0], shape[1], 1
    for size in shape[2:]:
        inner *= size
    different = list(dict.fromkeys(p.lanes for p in places if p.is_whole))
    flat = inner == 1 or all(rows == 1 or row == inner * of_inner for row, _, of_inner in different)
    if flat:
        strides = [(of_inner if inner > 1 else row, channel, 0) for row, channel, of_inner in different]
        rows, inner = rows * inner, 1
    else:
        strides = different
    groups = tuple(Group((row if flat else of_inner) == 1, channel == 1) for row, channel, of_inner in strides)
    group_of = tuple(different.index(p.lanes) if p.is_whole else None for p in places)
    beside = _CHANNELS if channels > 1 and any(g.unit_channel and not g.unit_lane for g in groups) else 1
    while beside > 1 and 2 * -(-channels // beside) < processors:  # half of a sector each, for twice as many programs
        beside //= 2
    return Layout(ChannelLayout(flat, groups, group_of, beside), rows, inner, tuple(strides))
