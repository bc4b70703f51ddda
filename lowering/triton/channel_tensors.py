"""Tensors and lanes of a channel kernel as text: a program owns CHANNELS channels, and ``[BLOCK, CHANNELS]`` of them at a time.

channel = …[None, :]; lane = …[:, None]; lanes = row * stride_row + channel * stride_channel + column
x = tl.load(x_ptr + t * x_stride_t + lanes, mask=inside)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from snn_compile.lowering.triton.channel_layout import ChannelLayout
from snn_compile.lowering.triton.memory import Argument
from snn_compile.lowering.triton.names import RESERVED, Names, identifier

#: What these kernels name themselves.
NAMED = RESERVED | {"program", "channel", "channels", "exists", "beside", "rows", "inner", "count", "size", "area", "CHANNELS"}
NAMED |= {"row", "column", "start", "offset", "home", "seen"}

#: The shape of a whole value in registers.
TILE = "[BLOCK, CHANNELS]"


class ChannelTensor:
    """One tensor of the call; `group`: of a whole value, see `ChannelLayout`."""

    def __init__(self, names: Names, base: str, position: int, group: int | None, is_unit: bool) -> None:
        base = identifier(base)[:40]
        self.group = group
        self.pointer = Argument(names.unique(f"{base}_ptr"), "pointer", position, aligned=is_unit, dtype=torch.float32)
        self.time_stride = Argument(names.unique(f"{base}_stride_t"), "time_stride", position, aligned=is_unit)
        self.channel_stride = Argument(names.unique(f"{base}_stride_c"), "stride", position)

    @property
    def arguments(self) -> list[Argument]:
        return [self.pointer, self.time_stride, *([self.channel_stride] if self.group is None else [])]

    def address(self, step: str = "") -> str:
        """At `step`, where the tensor has one value a step."""
        at = f" + {step} * {self.time_stride.name}" if step else ""
        lanes = f"channel * {self.channel_stride.name}" if self.group is None else _name("lanes", self.group)
        return f"{self.pointer.name}{at} + {lanes}"

    @property
    def mask(self) -> str:
        return "exists" if self.group is None else "inside"

    def load(self, step: str = "") -> str:
        return f"tl.load({self.address(step)}, mask={self.mask})"

    def store(self, value: str, step: str = "") -> str:
        return f"tl.store({self.address(step)}, {value}, mask={self.mask})"


def _name(base: str, group: int) -> str:
    return f"{base}_{group}" if group else base


def group_strides(layout: ChannelLayout, names: Names) -> list[Argument]:
    """The strides of every group that are not 1; `tensor` of the argument is the group."""
    found = []
    for i, group in enumerate(layout.groups):
        unit = group.unit_lane or group.unit_channel
        needed = not (layout.flat and group.unit_lane), not group.unit_channel, not (layout.flat or group.unit_lane)
        for dim in (d for d, is_needed in enumerate(needed) if is_needed):
            name = names.unique(f"{_name('stride', i)}_{'rci'[dim]}")
            found.append(Argument(name, "lane_stride", i, dim, aligned=unit))
    return found


def program_lines() -> list[str]:
    """Once a program."""
    return [
        "program = tl.program_id(0).to(tl.int64)",
        "beside = tl.arange(0, CHANNELS)[None, :]",
        "channel = program.to(INDEX) * CHANNELS + beside",
        "exists = channel < channels",
        "count = rows * inner",
        "size = count.to(tl.float32)",
        "area = count.to(tl.int64) * CHANNELS",
        "offset = tl.arange(0, BLOCK)[:, None].to(INDEX)",
    ]


def lane_lines(layout: ChannelLayout, strides: Sequence[Argument], start: str) -> list[str]:
    """Once a tile; `start`: of its first lane, or empty."""
    lines = [
        f"lane = {start} + offset" if start else "lane = offset",
        "inside = (lane < count) & exists",
        "row = lane // inner",
        "column = lane % inner",
        "home = lane * CHANNELS + beside",
    ]
    for i, _ in enumerate(layout.groups):
        factors = {s.dim: s.name for s in strides if s.tensor == i}
        terms = [("lane" if layout.flat else "row", 0), ("channel", 1), *([] if layout.flat else [("column", 2)])]
        texts = [f"{what} * {factors[dim]}" if dim in factors else what for what, dim in terms]
        lines.append(f"{_name('lanes', i)} = {' + '.join(texts)}")
    return lines
