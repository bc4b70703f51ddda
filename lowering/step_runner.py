"""Running a program once a step, in Python: what each unit is called with is worked out before the steps that repeat it.

A region is a kernel of the recurrence's target; everything about its call but the addresses is worked out once for all steps
whose operands lie in memory in one way. (The states of the first step may lie in another.) The steps between the second and
the last one run in C++ where `lowering/step_loop` can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from snn_compile.ir.recurrence import Recurrence
from snn_compile.ir.stepped import Call, Program, Region, Slot
from snn_compile.lowering.by_channel import runs_by_channel
from snn_compile.lowering.launch import BoundKernel, ResultSpec, Target
from snn_compile.lowering.layout import place
from snn_compile.lowering.series import Series, Slices
from snn_compile.lowering.step_loop import StepLoop, step_loop

aten = torch.ops.aten

#: Values by slot.
Values = list[Any]


class Places:
    """Where the series of a step go: a value is written into its first place, and copied into every other one.

    What no unit writes where it is told to - an operand, a value of the prologue, a view - is copied, too; and so is every value
    of a series whose steps are not aligned: the sums of a matrix product (MKL) depend on the alignment of its operands, and
    eager's are new tensors.
    """

    def __init__(self, wanted: Iterable[tuple[int, Slices]], written: set[int]) -> None:
        self.direct: dict[int, Slices] = {}
        self.copied: list[tuple[int, Slices]] = []
        for slot, views in wanted:
            if slot in written and slot not in self.direct and views.is_aligned:
                self.direct[slot] = views
            else:
                self.copied.append((slot, views))

    def now(self, t: int) -> dict[int, Tensor]:
        return {slot: views[t] for slot, views in self.direct.items()}

    def copy(self, values: Values, t: int) -> None:
        for slot, views in self.copied:
            views[t].copy_(values[slot])


@dataclass
class Steps:
    """One run over time, by slot: what each step is fed, where its results go, which states it hands on."""

    order: range
    streams: Sequence[tuple[int, Series]]
    places: Places
    #: slots of a state before and after a step; None: it is zero after each step
    carried: Sequence[tuple[int, int | None]]
    #: slots whose values add up over the steps, and the sums
    summed: Sequence[int] = ()
    sums: list[Tensor] = field(default_factory=list)
    #: what states that the step loop gives lie in: to be kept as long as they are read
    memory: Tensor | None = None


class StepRunner:
    """One program on one target, for operands of one signature."""

    def __init__(self, program: Program, target: Target) -> None:
        self.program = program
        self.by_channel = runs_by_channel(program, target)
        self.prologue = [_runner(u, target) for u in program.prologue]
        self.units = [_runner(u, target) for u in program.units]
        #: slots whose values a step can write where it is told to
        self.written = {o for run in self.units for o in run.writes}
        #: the steps in C++, where that is possible; tried when a call has run two steps
        self.loop: StepLoop | None = None
        self.tried_loop = False

    def values(self) -> Values:
        return [None] * self.program.size

    def prepare(self, values: Values) -> None:
        for run in self.prologue:
            run(values, {})

    def run(self, values: Values, states: Sequence[Tensor], steps: Steps) -> list[Tensor]:
        """``states before the first step -> states after the last one``"""
        done = 0
        while done < len(steps.order):
            inner = steps.order[done:-1]  # (the last step backward reads the initial state, which lies somewhere else)
            if done == 2 and inner and not self.tried_loop:
                self.loop, self.tried_loop = step_loop(self, values, steps), True
            if done and inner and self.loop is not None:
                states = self.loop.run(values, states, steps, inner)
                done += len(inner)
            states = self._step(values, states, steps, steps.order[done])
            done += 1
        return list(states)

    def _step(self, values: Values, states: Sequence[Tensor], steps: Steps, t: int) -> list[Tensor]:
        for slot, stream in steps.streams:
            values[slot] = stream[t]
        for (slot, _), state in zip(steps.carried, states, strict=True):
            values[slot] = state
        now = steps.places.now(t)
        for run in self.units:
            run(values, now)
        steps.places.copy(values, t)
        if steps.sums:
            for total, slot in zip(steps.sums, steps.summed, strict=True):
                total.add_(values[slot])
        else:
            steps.sums += [values[slot].clone() for slot in steps.summed]
        return [
            zero(s.shape, s.dtype, s.device) if after is None else values[after]
            for (_, after), s in zip(steps.carried, states, strict=True)
        ]


def zero(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Without memory."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


# --------------------------------------------------------------------------------------------------------------- units
#
# ``unit(values, now)`` reads and writes values by slot; `now` holds where the series of this step go, for slots that the unit
# `writes` where it is told to.


def _runner(unit: Region | Call, target: Target) -> RegionRunner | CallRunner:
    return RegionRunner(unit, target) if isinstance(unit, Region) else CallRunner(unit)


#: Operands that are read as if they lay without gaps: `F.group_norm` sees to it, in a copy that a trace takes for an identity.
LAID_OUT: dict[object, tuple[int, ...]] = {aten.native_group_norm.default: (0,), aten.native_group_norm_backward.default: (0, 1)}


class CallRunner:
    """An op, run by the dispatcher as eager runs it."""

    def __init__(self, unit: Call) -> None:
        self.unit, self.output = unit, unit.output
        self.target: Callable[..., Any] = getattr(unit.target, "_op", unit.target)  # past the checks of `OpOverload.__call__`
        self.nested = any(not isinstance(a, Slot) and _has_slot(a) for a in unit.args) or bool(unit.kwargs)
        #: the overload that writes its result where it is told to
        self.into = None if self.nested else _out_variant(unit)
        self.slots = [(i, a.index) for i, a in enumerate(unit.args) if isinstance(a, Slot)]
        self.template: list[Any] = list(unit.args)
        self.laid_out = LAID_OUT.get(unit.target, ())
        self.writes = (unit.output,) if self.into is not None else ()

    def __call__(self, values: Values, now: dict[int, Tensor]) -> None:
        if self.nested:
            values[self.output] = self.target(*_fill(self.unit.args, values), **_fill(self.unit.kwargs, values))
            return
        filled = self.template.copy()
        for i, slot in self.slots:
            filled[i] = values[slot]
        for i in self.laid_out:
            filled[i] = _without_gaps(filled[i])
        place = now.get(self.output)
        values[self.output] = self.target(*filled) if place is None else self.into(*filled, out=place)  # type: ignore[misc]


def _without_gaps(value: Tensor) -> Tensor:
    is_channels_last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
    return value if is_channels_last else value.contiguous()


def _has_slot(value: object) -> bool:
    return any(isinstance(v, Slot) for v in tree_leaves(value))


def _out_variant(unit: Call) -> Callable[..., Any] | None:
    packet = getattr(unit.target, "overloadpacket", None)
    out = getattr(packet, "out", None) if "out" in getattr(packet, "overloads", list)() else None
    if out is None or len(out._schema.returns) != 1:
        return None
    ours = [(a.name, str(a.type)) for a in unit.target._schema.arguments]  # type: ignore[attr-defined]
    theirs = [(a.name, str(a.type)) for a in out._schema.arguments if not a.is_out]
    return out._op if ours == theirs else None  # type: ignore[no-any-return]


def _fill(value, values):  # type: ignore[no-untyped-def]
    if isinstance(value, Slot):
        return values[value.index]
    if isinstance(value, (list, tuple)):
        return type(value)(_fill(v, values) for v in value)
    if isinstance(value, dict):
        return {k: _fill(v, values) for k, v in value.items()}
    return value


class RegionRunner:
    """A region: a kernel bound for each way in which its operands lie in memory, most often one."""

    def __init__(self, unit: Region, target: Target) -> None:
        self.unit, self.target = unit, target
        self.writes = unit.outputs
        self.shape = torch.Size(unit.kernel.meta["shape"])
        self.known: dict[tuple[tuple[int, ...], ...], tuple[BoundKernel | None, list[ResultSpec]]] = {}
        #: the kernel of the last call; None where there is nothing to compute
        self.bound: BoundKernel | None = None

    def __call__(self, values: Values, now: dict[int, Tensor]) -> None:
        operands = [values[i] for i in self.unit.inputs]
        key = tuple(o.stride() for o in operands)
        if key not in self.known:
            self.known[key] = self._prepare(operands, now)
        bound, specs = self.known[key]
        self.bound = bound
        results = []
        for o, spec in zip(self.unit.outputs, specs, strict=True):
            result = now.get(o)
            results.append(spec.allocate(operands[0].device) if result is None else result)
        if bound is not None:
            bound([*operands, *results])
        for o, result in zip(self.unit.outputs, results, strict=True):
            values[o] = result

    def _prepare(self, operands: list[Tensor], now: dict[int, Tensor]) -> tuple[BoundKernel | None, list[ResultSpec]]:
        kernel = self.unit.kernel
        made = [torch.empty(self.shape, dtype=y.dtype, device=operands[0].device) for y in kernel.ys]
        results = [now.get(o, r) for o, r in zip(self.unit.outputs, made, strict=True)]
        bound = _bind(kernel, self.target, self.shape, operands, results)
        return bound, [ResultSpec.like(r) for r in made]


def _bind(
    kernel: Recurrence, target: Target, shape: torch.Size, operands: list[Tensor], results: list[Tensor]
) -> BoundKernel | None:
    """The region's kernel as a recurrence of one step: every operand and result gets a time dim of 1."""
    if shape.numel() == 0:
        return None
    n = len(kernel.xs)
    wide = [o.expand(shape).unsqueeze(0) for o in operands[:n]] + [o.expand(shape) for o in operands[n:]]
    wide += [r.unsqueeze(0) for r in results]
    timed = [True] * n + [False] * (len(operands) - n) + [True] * len(results)
    placement = place(shape, wide, timed)
    key = (target.name, "forward", placement.layout)
    compiled = kernel.kernels.get(key)
    if compiled is None:
        compiled = kernel.kernels[key] = target.kernel(kernel, "forward", placement.layout)
    return compiled.bind(wide, placement, 1)
