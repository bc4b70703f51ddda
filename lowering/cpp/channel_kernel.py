"""Launching the kernels of `by_channel`: how threads share the work, scratch memory, the arguments of a call."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from snn_compile.lowering.channel_operand import Operand
from snn_compile.lowering.cpp import compiler
from snn_compile.lowering.cpp.by_channel import ChannelSource
from snn_compile.lowering.cpp.channel_blocks import BLOCK
from snn_compile.lowering.cpp.direct_call import NOWHERE
from snn_compile.lowering.cpp.plan import is_streamed
from snn_compile.lowering.cpp.target import BoundCall
from snn_compile.lowering.launch import MOST_LAUNCHES, DirectCalls, ResultSpec

#: From this many rows of a block of channels on, all threads share them; otherwise each has blocks of its own.
SHARED_ROWS = 1024


class CpuChannelKernel:
    """A kernel, compiled when it first runs."""

    def __init__(self, source: ChannelSource) -> None:
        self.source = source
        self._bound: dict[object, BoundCall | None] = {}

    @functools.cached_property
    def _function(self) -> Any:
        self._library = compiler.load(self.source.text + _entry_by_arrays(self.source))  # keeps the function's code mapped
        function = getattr(self._library, f"{self.source.entry}_by_arrays")
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        function.restype = None
        return function

    def text(self, operands: Sequence[Operand]) -> str:
        return self.source.text

    def run(self, operands: Sequence[Operand], steps: int) -> bool:
        """`operands` in the order of the source's `given` and `wanted`. False where they do not lie in memory as they should."""
        key = self._key(operands, steps)
        if key not in self._bound:
            if len(self._bound) >= MOST_LAUNCHES:
                self._bound.clear()
            fit = all(o.fits(len(self.source.shape), self.source.is_channels_last) for o in operands)
            self._bound[key] = self._bind(operands, steps) if fit else None
        bound = self._bound[key]
        if bound is None:
            return False
        bound([o.tensor for o in operands])
        return True

    def answer_later(
        self,
        direct: DirectCalls,
        operands: Sequence[tuple[Operand, bool]],
        steps: int,
        tensors: Sequence[Tensor | None],
        results: Sequence[Tensor],
    ) -> None:
        """Have calls like this one, which has run, answered without Python, where its `tensors` are all that the kernel reads.

        `operands`: with each, whether it is zero where it is none of them.
        """
        bound = self._bound[self._key([o for o, _ in operands], steps)]
        places = _places(operands, [*tensors, *results])
        if bound is not None and places is not None:
            pointers = tuple((tensor, offset) for tensor, offset, _ in places)
            copies = {i: n for i, (_, _, n) in enumerate(places) if n}
            call = BoundCall(self._function, pointers, tuple(bound.numbers), bound.scratch)
            direct.add(steps, tensors, [ResultSpec.like(r) for r in results], call, copies)

    @staticmethod
    def _key(operands: Sequence[Operand], steps: int) -> object:
        return steps, torch.get_num_threads(), *((o.tensor.shape, o.tensor.stride(), o.tensor.dtype) for o in operands)

    def _bind(self, operands: Sequence[Operand], steps: int) -> BoundCall:
        source = self.source
        n, channels, *space = source.shape
        rows, inner = (n * math.prod(space), BLOCK) if source.is_channels_last else (n, math.prod(space))
        blocks = -(-channels // BLOCK) if source.is_channels_last else channels
        threads = torch.get_num_threads()
        shared = source.is_channels_last and rows >= max(SHARED_ROWS, threads)
        threads = threads if shared else max(1, min(threads, blocks))
        scratch = 4 * (1 if shared else threads) * source.buffers * rows * inner + 16 * threads * source.sums * BLOCK
        strides = [s for o in operands for s in o.strides(len(source.shape), source.is_channels_last)]
        size = sum(o.tensor.nbytes for o in operands if o.timed)
        streaming = is_streamed(size, 4 * inner)
        layout = (min(torch.get_num_threads(), rows), shared) if source.is_channels_last else (inner, streaming)
        pointers = tuple((i, o.address() - o.tensor.data_ptr()) for i, o in enumerate(operands))
        return BoundCall(self._function, pointers, (steps, channels, rows, *layout, threads, *strides), scratch)


def _entry_by_arrays(source: ChannelSource) -> str:
    """A second entry, of the signature that all kernels have; numbers: as in `_bind`."""
    numbers = ", ".join(f"numbers[{i}]" for i in range(6))
    return f"""
extern "C" void {source.entry}_by_arrays(char* const* addresses, const int64_t* numbers) {{
  {source.entry}((float* const*)addresses, numbers + 6, {numbers}, (float*)addresses[{source.tensors}]);
}}
"""


def _places(operands: Sequence[tuple[Operand, bool]], tensors: Sequence[Tensor | None]) -> list[tuple[int, int, int]] | None:
    """Of each operand: the tensor in whose memory it lies, from where on (bytes), and how many copies of that number it is, or 0.

    None where some lie elsewhere. Tensors that share memory might not do so in another call.
    """
    starts = [None if t is None else t.untyped_storage().data_ptr() for t in tensors]
    known = [s for s in starts if s is not None]
    if 0 in known or len(set(known)) < len(known):
        return None
    found = []
    for operand, may_be_zero in operands:
        value = operand.tensor if operand.copied is None else operand.copied
        start = value.untyped_storage().data_ptr()
        is_one_number = operand.copied is not None and not operand.timed and not any(value.stride())
        copies = operand.tensor.untyped_storage().nbytes() // value.element_size() if is_one_number else 0
        if start in known and (operand.copied is None or is_one_number):
            tensor = starts.index(start)
            offset = (operand.address() if operand.copied is None else value.data_ptr()) - tensors[tensor].data_ptr()  # type: ignore[union-attr]
            found.append((tensor, offset, copies))
        elif may_be_zero and is_one_number:
            found.append((NOWHERE, 0, copies))
        else:
            return None
    return found
