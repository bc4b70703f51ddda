"""Tensors of a call as addresses in the text of a kernel: one pointer each, run-time strides, lanes decoded once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from snn_compile.lowering.layout import Layout
from snn_compile.lowering.ops import opmath
from snn_compile.lowering.triton.literals import TRITON_DTYPES
from snn_compile.lowering.triton.names import Names, identifier
from snn_compile.lowering.triton.values import ROUNDING, Value


@dataclass(frozen=True)
class Argument:
    """A run-time argument of a kernel, and where a call finds it."""

    name: str
    #: "pointer", "scratch", "T", "N", "size", "stride", "time_stride"; in `by_channel`, "lane_stride" of a group of tensors
    kind: str
    #: position of the tensor among those of the call
    tensor: int = 0
    #: of a size or a stride; of the scratch memory of `by_channel`, how many values of a step it holds
    dim: int = 0
    #: worth a kernel compiled for multiples of 16 (of bytes, for a pointer), because accesses then are 128 bits wide
    aligned: bool = False
    #: of a pointer
    dtype: torch.dtype | None = None

    def __str__(self) -> str:
        return f"{self.name}: tl.int64" if self.kind in ("N", "stride", "time_stride") else self.name


class Tensor:
    """One tensor of the call."""

    def __init__(
        self,
        names: Names,
        base: str,
        position: int,
        dtype: torch.dtype,
        layout: Layout,
        *,
        timed: bool = False,
        reverse: bool = False,
        scalar: bool = False,
    ) -> None:
        self.dtype = dtype
        self.timed, self.reverse = timed, reverse
        inner = 0 if scalar else layout.inner[position]
        outer = () if scalar else range(layout.ndim - 1)
        self.block = bool(outer) or inner != 0
        wide = inner == 1
        base = names.unique(f"{identifier(base)[:40]}_ptr").removesuffix("_ptr")
        self.pointer = Argument(f"{base}_ptr", "pointer", position, aligned=wide, dtype=dtype)
        self.time_stride = Argument(names.unique(f"{base}_stride_t"), "time_stride", position, aligned=wide)
        dims = [*outer, layout.ndim - 1] if inner == -1 else list(outer)
        self.strides = [Argument(names.unique(f"{base}_stride_{d}"), "stride", position, d, aligned=wide) for d in dims]
        terms = [f"index_{s.dim} * {s.name}" for s in self.strides]
        if wide:
            terms.append(f"index_{layout.ndim - 1}" if outer else "lane")
        elif layout.ndim == 1:
            terms = [t.replace("index_0", "lane") for t in terms]
        self.offset = " + ".join(terms)
        #: the name of the offset, where it takes a line to compute
        self.lanes = self.offset if self.offset in ("", "lane") else names.unique(f"{base}_lanes")

    @property
    def arguments(self) -> list[Argument]:
        return [self.pointer, self.time_stride, *self.strides]

    def address(self, t: str = "t") -> str:
        terms = [self.pointer.name]
        if self.timed:
            terms.append(f"({f'T - 1 - {t}' if self.reverse else t}) * {self.time_stride.name}")
        terms += [self.lanes] if self.lanes else []
        return " + ".join(terms).replace("(t)", "t")

    def load(self, mask: str, *, in_range: str = "") -> str:
        """`mask` holds for a lane, `in_range` (if any) for the step: a tensor without lanes needs only that."""
        mask = mask if self.block else in_range
        text = f"tl.load({self.address()}{f', mask={mask}' if mask else ''})"
        return f"{text}.to(tl.float32)" if self.dtype in ROUNDING else text

    def store(self, value: str, mask: str) -> str:
        return f"tl.store({self.address()}, {value}, mask={mask})"

    def value(self, name: str) -> Value:
        return Value.variable(name, self.dtype, block=self.block)


def as_block(value: Value, shape: str = "[BLOCK]") -> str:
    """The text of a value with one element a lane, or of another shape."""
    if value.number is not None:
        return f"tl.full({shape}, {value.text}, {TRITON_DTYPES[opmath(value.dtype)]})"
    return value.text if value.block else f"tl.broadcast_to({value.text}, {shape})"


def lane_lines(layout: Layout) -> list[str]:
    """The lane index of every element of the block, and the index of every merged dim, innermost fastest."""
    lines = ["lane = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)", "inside = lane < N"]
    if layout.ndim == 1:
        return lines
    rest = "lane"
    for d in range(layout.ndim - 1, 0, -1):
        lines.append(f"index_{d} = {rest} % size_{d}")
        rest = f"{rest} // size_{d}" if d == 1 else f"({rest} // size_{d})"
    return [*lines, f"index_0 = {rest}"]


def lane_arguments(layout: Layout) -> list[Argument]:
    innermost = layout.ndim - 1
    sizes = [Argument(f"size_{d}", "size", dim=d, aligned=d == innermost) for d in range(1, layout.ndim)]
    return [Argument("T", "T"), Argument("N", "N", aligned=True), *sizes]
