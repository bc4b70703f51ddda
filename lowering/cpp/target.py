"""The CPU target: C++ that the compiler vectorises, on all cores."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from snn_compile.ir.recurrence import Recurrence
from snn_compile.lowering.cpp import compiler, direct_call
from snn_compile.lowering.cpp.codegen import generate
from snn_compile.lowering.cpp.plan import Plan, is_streamed, plan
from snn_compile.lowering.cpp.writer import KernelSource, Parameter
from snn_compile.lowering.launch import Direction, Kernel
from snn_compile.lowering.layout import Layout, Placement


class CppTarget:
    name = "cpp"

    def __init__(self) -> None:
        self._kernels: dict[KernelSource, Kernel] = {}
        #: what a recurrence was generated to before; a recurrence is not hashable, and lives as long as its op
        self._generated: dict[tuple[int, Direction, Layout], tuple[weakref.ref[Recurrence], Kernel]] = {}
        self._lock = threading.Lock()

    def missing(self) -> str | None:
        return compiler.missing()

    def source(self, recurrence: Recurrence, direction: Direction, layout: Layout) -> str:
        return generate(recurrence, direction, layout).text

    def kernel(self, recurrence: Recurrence, direction: Direction, layout: Layout) -> Kernel:
        key = (id(recurrence), direction, layout)
        known = self._generated.get(key)
        if known is not None and known[0]() is recurrence:
            return known[1]
        with self._lock:
            source = generate(recurrence, direction, layout)
            kernel = self._kernels.get(source)
            if kernel is None:
                kernel = self._kernels[source] = _CompiledKernel(source)
            gone = weakref.ref(recurrence, lambda _: self._generated.pop(key, None))
            self._generated[key] = (gone, kernel)
        return kernel

    def direct(self, namespace: str) -> direct_call.Direct | None:
        return direct_call.direct(namespace)


class _CompiledKernel:
    """A loaded kernel: gathers the arguments of a call."""

    def __init__(self, source: KernelSource) -> None:
        self.source = source
        self._library = compiler.load(source.text + _entry_by_arrays(source))  # keeps the function's code mapped
        self._function = getattr(self._library, f"{source.entry}_by_arrays")
        self._function.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self._function.restype = None
        self._reversed = frozenset(source.reversed)

    def bind(self, tensors: Sequence[Tensor], placement: Placement, steps: int) -> BoundCall:
        now = plan(self.source, placement.sizes, steps, torch.get_num_threads())
        pointers, numbers, scratch = [], [], 0
        for parameter in self.source.parameters:
            if parameter.kind == "pointer":
                i = parameter.tensor
                pointers.append((i, self._first_step(tensors[i], placement.time_strides[i], steps, i)))
            elif parameter.kind == "scratch":
                scratch = now.threads * now.scratch_bytes
            else:
                numbers.append(self._number(parameter, tensors, placement, steps, now))
        return BoundCall(self._function, tuple(pointers), tuple(numbers), scratch)

    def _number(self, parameter: Parameter, tensors: Sequence[Tensor], placement: Placement, steps: int, now: Plan) -> int:
        kind, i = parameter.kind, parameter.tensor
        if kind == "stride_t":
            return -placement.time_strides[i] if i in self._reversed else placement.time_strides[i]
        if kind == "stride":
            return placement.strides[i][parameter.dim]
        if kind == "size":
            return placement.sizes[parameter.dim]
        if kind == "steps":
            return steps
        if kind == "streaming":
            return self._is_streaming(tensors, min(now.block_lanes, placement.sizes[-1]))
        return getattr(now, kind)

    def _first_step(self, tensor: Tensor, stride_t: int, steps: int, i: int) -> int:
        """Bytes from the tensor's first element to that of the first step."""
        return (steps - 1) * stride_t * tensor.element_size() if i in self._reversed and steps else 0

    def _is_streaming(self, tensors: Sequence[Tensor], lanes: int) -> bool:
        results = [tensors[i] for i in self.source.streamed]
        bytes_of_results = sum(r.nbytes for r in results)
        return all(is_streamed(bytes_of_results, lanes * r.element_size()) for r in results)


class BoundCall:
    """A kernel and all of its arguments but the addresses."""

    def __init__(self, function: Any, pointers: tuple[tuple[int, int], ...], numbers: tuple[int, ...], scratch: int) -> None:
        #: ``function(addresses, numbers)``
        self.function = function
        self.address = ctypes.cast(function, ctypes.c_void_p).value or 0
        #: for each address, the position of its tensor and the bytes from there to the first element read or written
        self.pointers = pointers
        self.numbers = (ctypes.c_int64 * len(numbers))(*numbers)
        #: bytes of memory whose address follows the tensors' own
        self.scratch = scratch
        self._addresses = ctypes.c_void_p * (len(pointers) + 1)

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        addresses = self._addresses(*[tensors[i].data_ptr() + offset for i, offset in self.pointers])
        if self.scratch:
            scratch = allocate_scratch(self.scratch)
            addresses[-1] = scratch.data_ptr()
        self.function(addresses, self.numbers)


def _entry_by_arrays(source: KernelSource) -> str:
    """A second entry, of the same signature for every kernel: one array of addresses, one of numbers."""
    arguments, addresses, numbers = [], 0, 0
    for parameter in source.parameters:
        if parameter.kind in ("pointer", "scratch"):
            arguments.append(f"({parameter.declaration.rsplit(' ', 1)[0]})addresses[{addresses}]")
            addresses += 1
        else:
            arguments.append(f"numbers[{numbers}]")
            numbers += 1
    return f"""
extern "C" void {source.entry}_by_arrays(char* const* addresses, const int64_t* numbers) {{
  {source.entry}({", ".join(arguments)});
}}
"""


def allocate_scratch(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)
