"""The tensors of a kernel, and how one lane of them is read and written."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from snn_compile.ir.recurrence import Recurrence
from snn_compile.lowering.cpp.literals import HALVES, stored
from snn_compile.lowering.cpp.names import Names
from snn_compile.lowering.launch import Direction
from snn_compile.lowering.layout import Layout
from snn_compile.lowering.ops import opmath


@dataclass(frozen=True)
class TensorArgument:
    """`x_data` with `x_stride_t`, `x_stride_row`, `x_stride_lane` as far as the layout does not settle them."""

    index: int
    stem: str
    role: str
    dtype: torch.dtype
    timed: bool
    inner: int
    ndim: int
    is_result: bool
    #: time runs backwards in memory: the caller passes the last step's address and a negated stride
    reverse: bool = False

    @property
    def prefix(self) -> str:
        """The part of its names that it shares with no other tensor: `x`, `v_init`."""
        return self.stem if self.role == "data" else f"{self.stem}_{self.role}"

    @property
    def pointer(self) -> str:
        return f"{self.stem}_{self.role}"

    @property
    def row(self) -> str:
        return f"{self.prefix}_row"

    @property
    def element(self) -> str:
        return stored(self.dtype) if self.is_result else f"const {stored(self.dtype)}"

    def stride(self, dim: int) -> str:
        last = {self.ndim - 1: "lane", self.ndim - 2: "row"}
        return f"{self.prefix}_stride_{last.get(dim, dim)}"

    def row_address(self) -> str:
        """Where the lanes of this row (and step) begin."""
        terms = [self.pointer]
        if self.timed:
            terms.append(f"t * {self.prefix}_stride_t")
        indices = [f"at_{d}" for d in range(self.ndim - 2)] + ["row"] * (self.ndim > 1)
        terms += [f"{index} * {self.stride(d)}" for d, index in enumerate(indices)]
        if self.inner:
            terms.append("first" if self.inner == 1 else f"first * {self.stride(self.ndim - 1)}")
        return " + ".join(terms)

    def at(self, row: str) -> str:
        """The element of the lane."""
        if self.inner == 0:
            return f"*{row}"
        return f"{row}[lane]" if self.inner == 1 else f"{row}[lane * {self.stride(self.ndim - 1)}]"

    def load(self) -> str:
        return self.load_from(self.row)

    def load_from(self, row: str) -> str:
        element = self.at(row)
        return f"load_{HALVES[self.dtype]}({element})" if self.dtype in HALVES else element

    def store(self, value: str, row: str | None = None) -> str:
        converted = f"store_{HALVES[self.dtype]}({value})" if self.dtype in HALVES else value
        return f"{self.at(row or self.row)} = {converted};"


@dataclass(frozen=True)
class Tensors:
    """All of one kernel, by what they are; the order of `lowering/launch.py`."""

    inits: list[TensorArgument]
    xs: list[TensorArgument]
    consts: list[TensorArgument]
    # forward
    ys: list[TensorArgument]
    finals: dict[int, TensorArgument]
    # backward; by the position of the carry, of the series, of the constant
    ct_ys: list[TensorArgument]
    ct_finals: dict[int, TensorArgument]
    grad_inits: dict[int, TensorArgument]
    grad_xs: list[TensorArgument]
    grad_consts: dict[int, TensorArgument]

    def all(self) -> list[TensorArgument]:
        every = [*self.inits, *self.xs, *self.consts, *self.ys, *self.finals.values(), *self.ct_ys]
        every += [*self.ct_finals.values(), *self.grad_inits.values(), *self.grad_xs, *self.grad_consts.values()]
        return every


def tensors_of(recurrence: Recurrence, direction: Direction, layout: Layout, stems: Names) -> Tensors:
    count = 0

    def argument(stem: str, role: str, dtype: torch.dtype, timed: bool, is_result: bool, reverse: bool = False):  # type: ignore[no-untyped-def]
        nonlocal count
        count += 1
        inner = layout.inner[count - 1]
        return TensorArgument(count - 1, stem, role, dtype, timed, inner, layout.ndim, is_result, reverse)

    carries = [stems.unique(c.name) for c in recurrence.carries]
    x_stems = [stems.unique(x.name) for x in recurrence.xs]
    w_stems = [stems.unique(w.name) for w in recurrence.consts]
    inits = [argument(s, "init", c.dtype, False, False) for s, c in zip(carries, recurrence.carries, strict=True)]
    xs = [argument(s, "data", x.dtype, True, False, x.reverse) for s, x in zip(x_stems, recurrence.xs, strict=True)]
    consts = [argument(s, "data", w.dtype, False, False) for s, w in zip(w_stems, recurrence.consts, strict=True)]
    if direction == "forward":
        ys = [argument(stems.unique(y.name), "data", y.dtype, True, True, y.reverse) for y in recurrence.ys]
        finals = {i: argument(carries[i], "final", c.dtype, False, True) for i, c in enumerate(recurrence.carries) if c.is_result}
        return Tensors(inits, xs, consts, ys, finals, [], {}, {}, [], {})

    ct_ys = [
        argument(stems.unique(f"grad_{y.name}"), "data", y.dtype, True, False, y.reverse) for y in recurrence.differentiable_ys
    ]
    grads = {i: stems.unique(f"grad_{c.name}") for i, c in enumerate(recurrence.carries) if c.differentiable}
    ct_finals = {
        i: argument(grads[i], "final", c.dtype, False, False)
        for i, c in enumerate(recurrence.carries)
        if c.is_result and c.differentiable
    }
    grad_inits = {
        i: argument(grads[i], "init", c.dtype, False, True) for i, c in enumerate(recurrence.carries) if c.init_needs_grad
    }
    grad_xs = [
        argument(stems.unique(f"grad_{x.name}"), "data", x.dtype, True, True, x.reverse) for x in recurrence.xs if x.needs_grad
    ]
    grad_consts = {
        i: argument(stems.unique(f"grad_{w.name}"), "data", opmath(w.dtype), False, True)
        for i, w in enumerate(recurrence.consts)
        if w.needs_grad
    }
    return Tensors(inits, xs, consts, [], {}, ct_ys, ct_finals, grad_inits, grad_xs, grad_consts)
