"""Recurrence -> the text of its forward kernel and of its backward kernel."""

from __future__ import annotations

from snn_compile.ir.recurrence import Recurrence
from snn_compile.lowering.layout import Layout
from snn_compile.lowering.triton.backward import BackwardKernel
from snn_compile.lowering.triton.forward import ForwardKernel
from snn_compile.lowering.triton.text import KernelText


def generate(recurrence: Recurrence, direction: str, layout: Layout) -> KernelText:
    kernel = ForwardKernel if direction == "forward" else BackwardKernel
    return kernel(recurrence, layout).generate()
