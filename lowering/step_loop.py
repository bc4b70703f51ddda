"""A program of kernels, matrix products and views as instructions for the step loop in C++ (`lowering/cpp/interpreter`).

    r = mm(s, w); s, v = kernel(v, x, r)    ->    PRODUCT mm_out    r s w
                                                  KERNEL  lif_step  v x r s v  sizes...

The instructions are found by watching a step in Python: how its values lie in memory is how those of all later steps do. A
value that goes into a series is written there, as it is in Python; any other one is written by turns into pieces of memory
of which there are enough that a state outlives the step that replaces it.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from snn_compile.ir.stepped import Call, Region, Slot
from snn_compile.lowering.cpp import interpreter, spike_product
from snn_compile.lowering.cpp import target as cpp
from snn_compile.lowering.series import ALIGNMENT, Series

if TYPE_CHECKING:
    from snn_compile.lowering.launch import BoundKernel
    from snn_compile.lowering.step_runner import StepRunner, Steps, Values

aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default: "cpu_mm_out",
    aten.bmm.default: "cpu_bmm_out",
    aten.addmm.default: "cpu_addmm_out",
    aten.baddbmm.default: "cpu_baddbmm_out",
}


class Uncovered(Exception):
    """The program does something that the interpreter has no instruction for."""


def step_loop(runner: StepRunner, values: Values, steps: Steps) -> StepLoop | None:
    """The loop for steps like the one that left `values`, or None where it stays in Python."""
    torch_ = interpreter.torch_functions()
    if torch_ is None:
        return None
    try:
        return StepLoop(_Assembler(torch_, runner, values, steps))
    except Uncovered:
        return None


@dataclass
class SpikeProduct:
    """A product that may be a sum of rows of the weight (`lowering/cpp/spike_product`)."""

    weight: int
    #: the slot of the weight row by row in memory; null in a call whose weight is not finite
    rows: int
    plan: spike_product.Product
    pause: spike_product.Pause = field(default_factory=spike_product.Pause)

    def place(self, values: Values) -> tuple[interpreter.Place, Tensor]:
        weight = values[self.weight].contiguous()
        return interpreter.Place(weight.data_ptr() if spike_product.is_finite(weight) else 0, 0, 1), weight


class StepLoop:
    """A program's steps in C++, for operands of one signature."""

    def __init__(self, step: _Assembler) -> None:
        self._code = (ctypes.c_int64 * len(step.code.numbers))(*step.code.numbers)
        self._slots, self._copies, self._totals = step.slots, step.copies, step.totals
        self._moved, self._spike_products = step.moved, step.spike_products
        self._carried = (ctypes.c_int64 * (2 * len(step.moved)))(*(slot for pair in step.moved for slot in pair))
        #: slot, and where its value lies in a piece of temporary memory; bytes of a piece, and their number
        self._temporary, self._piece, self._pieces = step.temporary, step.piece, step.pieces

    def run(self, values: Values, states: Sequence[Tensor], steps: Steps, order: range) -> list[Tensor]:
        """``states before the steps of `order` -> states after them``"""
        torch_ = interpreter.torch_functions()
        assert torch_ is not None
        memory = cpp.allocate_scratch(max(1, self._piece * self._pieces))
        places = self._places(values, steps, order, memory.data_ptr())
        given = {slot: state for (slot, _), state in zip(steps.carried, states, strict=True)}
        at = (ctypes.c_void_p * self._slots)()
        weights = []
        for product in self._spike_products:
            places[product.rows], weight = product.place(values)
            weights.append(weight)
        for slot, state in given.items():
            places[slot] = interpreter.Place(state.data_ptr(), 0, 1)
        for slot, _ in self._moved:
            places[slot] = interpreter.Place()
            at[slot] = given[slot].data_ptr()
        code, count = self._code, len(order)
        run_steps = interpreter.load().run_steps
        if not run_steps(torch_.table, code, len(code), places, at, self._slots, self._carried, len(self._moved), count):
            raise RuntimeError("a matrix product of a time step failed; torch has said why on stderr")
        for slot, _ in self._moved:
            given[slot] = _tensor_at(at[slot] or 0, given[slot])
        steps.memory = memory
        return list(given.values())

    def _places(self, values: Values, steps: Steps, order: range, memory: int) -> ctypes.Array[interpreter.Place]:
        places = (interpreter.Place * self._slots)()
        for slot, value in enumerate(values):
            if isinstance(value, Tensor):
                places[slot] = interpreter.Place(value.data_ptr(), 0, 1)
        series: list[tuple[int, Series]] = [*steps.streams, *steps.places.direct.items()]
        series += [(copy, views) for copy, (_, views) in zip(self._copies, steps.places.copied, strict=True)]
        first, last, count = order[0], order[-1], len(order)
        for slot, views in series:
            start, end = views[first].data_ptr(), views[last].data_ptr()
            places[slot] = interpreter.Place(start, (end - start) // max(1, count - 1), count)
        for slot, total in zip(self._totals, steps.sums, strict=True):
            places[slot] = interpreter.Place(total.data_ptr(), 0, 1)
        for slot, offset in self._temporary:
            places[slot] = interpreter.Place(memory + offset, self._piece, self._pieces)
        return places


def _tensor_at(address: int, like: Tensor) -> Tensor:
    """Over memory that another tensor keeps."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    memory = (ctypes.c_char * (elements * like.element_size())).from_address(address)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(like.shape, like.stride())


class _Assembler:
    """Writes the instructions of one step."""

    def __init__(self, torch_: interpreter.Torch, runner: StepRunner, values: Values, steps: Steps) -> None:
        self.code = interpreter.Code(torch_)
        self.values, self.direct = values, steps.places.direct
        made = {o for u in runner.program.units for o in (u.outputs if isinstance(u, Region) else (u.output,))}
        #: slots whose values change from step to step
        self.varying = made | {slot for slot, _ in steps.streams} | {slot for slot, _ in steps.carried}
        self.spike_products: list[SpikeProduct] = []
        #: slots whose address is another one's: that one
        self.source: dict[int, int] = {}
        self.temporary: list[tuple[int, int]] = []
        self.piece = 0
        self.slots = len(values)
        self.copies = [self._new_slot() for _ in steps.places.copied]
        self.totals = [self._new_slot() for _ in steps.summed]
        for unit, run in zip(runner.program.units, runner.units, strict=True):
            if isinstance(unit, Region):
                self._region(unit, run.bound)  # type: ignore[union-attr]
            else:
                self._call(unit)
        for copy, (slot, views) in zip(self.copies, steps.places.copied, strict=True):
            self._op("copy_", (copy, 0, views[0]), (slot, 0, values[slot]))
        for total, slot in zip(self.totals, steps.summed, strict=True):
            self._add(total, slot)
        self.moved = [(before, after) for before, after in steps.carried if after is not None and after != before]
        for before, after in self.moved:
            if values[before].stride() != values[after].stride():
                raise Uncovered
        # a value lives in the step that writes it and in the next one, and longer where a state is handed on to another
        states = {before for before, _ in self.moved}
        self.pieces = 2 + sum(self._root(after) in states for _, after in self.moved)

    def _new_slot(self) -> int:
        self.slots += 1
        return self.slots - 1

    # ---------------------------------------------------------------------------------------------------------- units

    def _region(self, unit: Region, bound: BoundKernel | None) -> None:
        if not isinstance(bound, cpp.BoundCall) or bound.scratch:
            raise Uncovered
        for output in unit.outputs:
            self._give_memory(output)
        slots = [*unit.inputs, *unit.outputs]
        self.code.kernel(bound.address, [(slots[i], offset) for i, offset in bound.pointers], list(bound.numbers))

    def _call(self, unit: Call) -> None:
        operands = [a.index for a in unit.args if isinstance(a, Slot)]
        if unit.kwargs:
            raise Uncovered
        if unit.target in PRODUCTS and len(operands) == len(unit.args):
            self._product(PRODUCTS[unit.target], unit.output, operands)
        elif unit.target is aten.cat.default:
            self._concatenate(unit.output, *unit.args)  # type: ignore[arg-type]
        elif operands and (unit.target is operator.getitem or getattr(unit.target, "is_view", False)):
            self._view(unit, operands[0])
        else:
            raise Uncovered

    def _product(self, name: str, output: int, operands: Sequence[int]) -> None:
        self._give_memory(output)
        views = [(slot, 0, self.values[slot]) for slot in (output, *operands)]
        found = self._spike_product(*operands) if name in ("cpu_mm_out", "cpu_addmm_out") else None
        if found is None:
            self._op(name, *views)
            return
        self.spike_products.append(found)
        start = operands[0] if len(operands) == 3 else -1
        function = ctypes.cast(spike_product.load().sum_rows, ctypes.c_void_p).value or 0
        self.code.spike_product(
            (function, ctypes.addressof(found.plan), ctypes.addressof(found.pause)),
            (operands[-2], found.rows, start, output),
            name,
            *views,
        )

    def _spike_product(self, *operands: int) -> SpikeProduct | None:
        """Of values that were spikes in the step watched, and of a weight that is the same in all steps."""
        start, spikes, weight = (None, *map(self.values.__getitem__, operands))[-3:]
        if operands[-1] in self.varying or not spike_product.are_spikes(spikes):
            return None
        plan = spike_product.plan(spikes, weight, start)
        if plan is None:
            return None
        return SpikeProduct(operands[-1], self._new_slot(), plan)

    def _view(self, unit: Call, slot: int) -> None:
        """Another address; a copy, where a reshape has moved the elements."""
        made = self.values[unit.output]
        if isinstance(made, (list, tuple)):
            self.source[unit.output] = slot
            return
        if not isinstance(self.values[slot], Tensor):  # a part of what was split
            slot = self.source[slot]
        source = self.values[slot]
        if made.untyped_storage().data_ptr() != source.untyped_storage().data_ptr():
            self._give_memory(unit.output)
            self._op("copy_", (unit.output, 0, source.contiguous()), (slot, 0, source))
            return
        self.source[unit.output] = slot
        self.code.alias(unit.output, slot, made.data_ptr() - source.data_ptr())

    def _concatenate(self, output: int, parts: Sequence[Slot], dim: int = 0) -> None:
        self._give_memory(output)
        whole, start = self.values[output], 0
        for part in parts:
            value = self.values[part.index]
            if value.dtype != whole.dtype or value.dim() != whole.dim():
                raise Uncovered
            to = whole.narrow(dim, start, value.shape[dim])
            self._op("copy_", (output, to.data_ptr() - whole.data_ptr(), to), (part.index, 0, value))
            start += value.shape[dim]

    def _add(self, total: int, slot: int) -> None:
        value = self.values[slot]
        if value.dtype not in (torch.float32, torch.float64) or not value.is_contiguous():
            raise Uncovered
        self.code.add(total, slot, value)

    def _op(self, name: str, *views: tuple[int, int, Tensor]) -> None:
        if any(tensor.dtype not in self.code.torch.dtypes or tensor.numel() == 0 for _, _, tensor in views):
            raise Uncovered
        self.code.op(name, *views)

    # --------------------------------------------------------------------------------------------------------- memory

    def _give_memory(self, slot: int) -> None:
        value = self.values[slot]
        if slot in self.direct:
            return
        if not value.is_contiguous():
            raise Uncovered
        self.temporary.append((slot, self.piece))
        self.piece += -(-value.nbytes // ALIGNMENT) * ALIGNMENT

    def _root(self, slot: int) -> int:
        while slot in self.source:
            slot = self.source[slot]
        return slot
