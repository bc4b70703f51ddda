"""`SteppedRecurrence`: a time loop whose step is more than pointwise, as a short program that runs once a step.

    for t in range(T):                                        r = linear(s, w)         a call
        r = linear(s, w)                               ->     s, v = kernel(v, x, r)   a region
        h = 0.9*v + x[t] + r
        s = H(h - 1); v = h - s

A *call* is an ATen op run as eager runs it (a matrix product, a convolution, a batch norm's statistics), so it gives eager's
bits. A *region* is the largest group of pointwise ops of one shape between calls; it is one kernel, generated like that of
a pointwise recurrence (a `Recurrence` without states that runs for one step). What depends on no state and no input runs
once, before the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx

from snn_compile.ir.recurrence import Carry, Const, Output, Recurrence, Signature, TimeSeries


@dataclass
class Region:
    """Pointwise ops as one kernel: `kernel` reads ``slots[i] for i in inputs`` and writes ``slots[o] for o in outputs``."""

    kernel: Recurrence
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass
class Call:
    """One op. ``args`` and ``kwargs`` hold `Slot` where a value goes."""

    target: Callable[..., object]
    args: tuple[object, ...]
    kwargs: dict[str, object]
    output: int


@dataclass(frozen=True)
class Slot:
    index: int


@dataclass
class Program:
    """A straight-line program over numbered slots; the first slots are its inputs."""

    size: int
    inputs: int
    #: units that read invariant inputs only: run once, before the loop
    prologue: list[Region | Call]
    units: list[Region | Call]
    #: a slot a result; None: the result is zero
    outputs: list[int | None]


@dataclass(frozen=True)
class Reduced:
    """How a gradient of an invariant operand adds up over the steps.

    ``"sum"``: step by step, of slot `a`. ``"matmul"``: ``sum_t a[t].T @ b[t]``, as one product over all steps at the end.
    ``"rows"``: ``sum_t a[t].sum(0)``, likewise.
    """

    kind: str
    a: int
    b: int = -1


@dataclass
class SteppedRecurrence(Signature):
    """See the module's docstring. Operands are passed in the order ``inits, xs, consts``, results come as ``ys, finals``.

    ``forward(*carries, *xs, *consts) -> (*next_carries, *ys, *residuals)``

    ``backward(*carries, *xs, *consts, *residuals, *ct_next_carries, *ct_ys) -> (*ct_carries, *grad_xs)``, and
    `reduced` says how each gradient of an invariant operand is found. ``carries`` are those before the step.
    """

    name: str
    carries: tuple[Carry, ...]
    xs: tuple[TimeSeries, ...]
    consts: tuple[Const, ...]
    ys: tuple[Output, ...]
    forward: Program
    backward: Program | None = None
    #: size and dtype of each output of `forward`
    results: tuple[tuple[tuple[int, ...], torch.dtype], ...] = ()
    #: carries whose value before each step the backward program reads, and results of calls that it would have to run again
    history: tuple[int, ...] = ()
    n_residuals: int = 0
    #: for each operand, whether the backward program needs it; the others may be written into after the loop
    reads: tuple[bool, ...] = ()
    reduced: tuple[Reduced | None, ...] = ()
    #: size and dtype of the slots of `backward` that `reduced` reads
    rows: dict[int, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    #: the ATen graphs, for the op's name and for reports
    step: fx.GraphModule | None = None
    step_backward: fx.GraphModule | None = None
    location: str = ""
    meta: dict = field(default_factory=dict)
    #: by direction: who answers later calls without Python (`lowering.launch.DirectCalls`)
    direct: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def shared(self) -> tuple[int | None, ...]:
        """For each carry of `history`, the output that holds the same values in the same order, or None."""
        n = len(self.carries)
        stored = [(slot, i) for i, slot in enumerate(self.forward.outputs[n : n + len(self.ys)])]
        plain = {slot: i for slot, i in stored if self.ys[i].time_dim == 0 and not self.ys[i].reverse}
        return tuple(plain.get(self.forward.outputs[i]) for i in self.history)


def describe(unit: Region | Call) -> str:
    if isinstance(unit, Call):
        return str(unit.target).removesuffix(".default")
    ops = sum(n.op == "call_function" for n in unit.kernel.step.graph.nodes)
    return f"one kernel of {ops} pointwise ops"
