"""Recurrence -> C++ text. `forward.py` and `backward.py` are the two kernels; `writer.py` is what they share.

What they cost (LIF, T=64, N=524288, fp32, two cores of an EPYC Zen 4; `benchmarks/kernel_lif_cpp.py` measures it):

The floor is memory: forward reads x and writes s, backward reads x and grad s and writes grad x - five tensors, 2.5 copies
of one. Forward runs at the speed of a copy or faster: it stores past the caches, fetches the next row beside the
arithmetic, and its states never leave L1. Backward is bound by arithmetic: the exp and the division of the sigmoid's
gradient take about 11 ns for 16 lanes, all else 1 ns, which is 13 ms on two cores beside 12 ms of memory traffic. What
keeps it from the floor is the part of the two that does not overlap. What was tried, in the order of what it brought:

- prefetching grad s and the next replay's x between chunks of the walk back, so that memory works while the arithmetic
  does (26 -> 20 ms; the same prefetches in front of a whole row bring nothing: they fill the miss buffers and stall);
- recording a minimum cut (h) and not the states (v), so that x is not read and h not computed again (3 ms of these);
- storing results past the caches (forward 10 -> 8 ms: a plain store reads the line first), blocks of 2048 lanes;
- an exp inlined into the loop in place of Sleef's vector function: 4 % of backward; not worth a second exp.
"""

from __future__ import annotations

from snn_compile.ir.recurrence import Recurrence
from snn_compile.lowering.cpp.backward import backward_source
from snn_compile.lowering.cpp.forward import forward_source
from snn_compile.lowering.cpp.writer import KernelSource
from snn_compile.lowering.launch import Direction
from snn_compile.lowering.layout import Layout


def generate(recurrence: Recurrence, direction: Direction, layout: Layout) -> KernelSource:
    return forward_source(recurrence, layout) if direction == "forward" else backward_source(recurrence, layout)
