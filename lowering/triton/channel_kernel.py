"""Launching the kernels of `by_channel`: the form that fits the sizes, the text for the layout, the arguments of a call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from snn_compile.ir.stepped import Program
from snn_compile.lowering.channel_program import Given, Shapes, Unsupported, Wanted
from snn_compile.lowering.triton.by_channel import Form, generate
from snn_compile.lowering.triton.channel_layout import ChannelLayout, Layout, Place, lay_out
from snn_compile.lowering.triton.heuristics import Tile, channel_tile, fills_device
from snn_compile.lowering.triton.memory import Argument
from snn_compile.lowering.triton.target import Function, Launch, compile_options, on_device, warp_size
from snn_compile.lowering.triton.text import KernelText

#: Lanes and offsets within a step that 32-bit indices do not reach.
_INT32 = 1 << 31


class ChannelKernel:
    """A program with its inputs and results; a text for each layout of them that is met."""

    def __init__(
        self, name: str, program: Program, values: Sequence[Any], given: Sequence[Given], wanted: Sequence[Wanted], reverse: bool
    ) -> None:
        """Arguments as of `generate`; `values`: an example of each slot."""
        self.name, self.program, self.given, self.wanted, self.reverse = name, program, given, wanted, reverse
        self.shapes = Shapes(values)
        self.shape = self.shapes.whole
        if self.shape.numel() // self.shape[1] < 2:  # a whole value is then not to be told from one of a channel
            raise Unsupported
        self._functions: dict[tuple[ChannelLayout, bool], Function | None] = {}

    @property
    def count(self) -> int:
        """Values of a channel."""
        return self.shape.numel() // self.shape[1]

    def text(self, layout: ChannelLayout, tile: Tile) -> KernelText:
        """Raises `Unsupported`."""
        form = Form(not tile.fits, self.reverse)
        return generate(self.name, self.program, self.shapes, self.given, self.wanted, layout, form)

    def text_for(self, places: Sequence[Place], device: torch.device) -> KernelText:
        """Of a call with tensors in these places. Raises `Unsupported`."""
        layout = lay_out(places, self.shape, processors(device))
        return self.text(layout.key, channel_tile(self.count, layout.key.channels, warp_size(device)))

    def _function(self, layout: ChannelLayout, tile: Tile) -> Function | None:
        key = layout, tile.fits
        if key not in self._functions:
            try:
                self._functions[key] = _compiled(self.text(layout, tile))
            except Unsupported:
                self._functions[key] = None
        return self._functions[key]

    def run(self, places: Sequence[Place], tensors: Sequence[Tensor], steps: int) -> bool:
        """`tensors` begin at their first step. False, and nothing is done, where the program or the sizes do not run so."""
        device = tensors[0].device
        layout = lay_out(places, self.shape, processors(device))
        programs = -(-self.shape[1] // layout.key.channels)
        if self.count >= _INT32 // 2 or not fills_device(self.count, programs, processors(device), layout.key.channels):
            return False
        tile = channel_tile(self.count, layout.key.channels, warp_size(device))
        function = self._function(layout.key, tile)
        if function is None:
            return False
        with on_device(device):
            self._prepare(function, tile, places, layout, tensors, steps)()
        return True

    def _prepare(
        self, function: Function, tile: Tile, places: Sequence[Place], layout: Layout, tensors: Sequence[Tensor], steps: int
    ) -> Launch:
        programs = -(-self.shape[1] // layout.key.channels)
        values = [self._argument(a, places, layout, tensors, steps) for a in function.text.arguments]
        constants = {"BLOCK": tile.block, "CHANNELS": layout.key.channels, "INDEX": _index_type(places, self.shape)}
        return Launch(function.for_values(values), programs, values, constants, channel_options(tile))

    def _argument(
        self, argument: Argument, places: Sequence[Place], layout: Layout, tensors: Sequence[Tensor], steps: int
    ) -> Tensor | int:
        channels = -self.shape[1] // layout.key.channels * -layout.key.channels
        match argument.kind:
            case "pointer":
                return tensors[argument.tensor]
            case "scratch":
                return tensors[0].new_empty(argument.dim * channels * self.count)
            case "T":
                return steps
            case "size":
                return (layout.rows, layout.inner, self.shape[1])[argument.dim]
            case "lane_stride":
                return layout.strides[argument.tensor][argument.dim]
            case "stride":
                return places[argument.tensor].channel
            case _:
                return places[argument.tensor].step


@cache
def _compiled(text: KernelText) -> Function:
    return Function(text)


@cache
def processors(device: torch.device) -> int:
    """0 where nothing is known of them."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def _index_type(places: Sequence[Place], shape: Sequence[int]) -> Any:
    import triton.language as tl

    n, channels, *space = shape
    inner = torch.Size(space).numel()
    reach = max((n - 1) * p.row + (channels - 1) * p.channel + (inner - 1) * p.inner for p in places)
    return tl.int64 if max(reach, 2 * torch.Size(shape).numel()) >= _INT32 else tl.int32


def channel_options(tile: Tile, hip: bool | None = None) -> dict[str, Any]:
    options = {"num_warps": tile.warps, **compile_options(hip)}
    if "maxnreg" in options:
        options["maxnreg"] = tile.registers
    return options
