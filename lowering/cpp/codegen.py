"""Recurrence -> C++ text. See `forward.py` and `backward.py` for the two kernels, `docs/` for what they cost."""

from __future__ import annotations

from snn_compile.ir.recurrence import Recurrence
from snn_compile.lowering.cpp.backward import backward_source
from snn_compile.lowering.cpp.forward import forward_source
from snn_compile.lowering.cpp.writer import KernelSource
from snn_compile.lowering.launch import Direction
from snn_compile.lowering.layout import Layout


def generate(recurrence: Recurrence, direction: Direction, layout: Layout) -> KernelSource:
    return forward_source(recurrence, layout) if direction == "forward" else backward_source(recurrence, layout)
