"""The CPU target: C++ that the compiler vectorises, on all cores."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from snn_compile.ir.recurrence import Recurrence
from snn_compile.lowering.cpp import compiler
from snn_compile.lowering.cpp.codegen import generate
from snn_compile.lowering.cpp.plan import STREAM_BYTES, Plan, plan
from snn_compile.lowering.cpp.writer import KernelSource, Parameter
from snn_compile.lowering.launch import BoundKernel, Direction, Kernel
from snn_compile.lowering.layout import Layout, Placement

_C_TYPES = {"pointer": ctypes.c_void_p, "scratch": ctypes.c_void_p, "streaming": ctypes.c_bool}


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


class _CompiledKernel:
    """A loaded kernel: gathers the arguments of a call."""

    def __init__(self, source: KernelSource) -> None:
        self.source = source
        self._library = compiler.load(source.text)  # keeps the function's code mapped
        self._function = getattr(self._library, source.entry)
        self._function.argtypes = [_C_TYPES.get(p.kind, ctypes.c_int64) for p in source.parameters]
        self._function.restype = None
        self._reversed = frozenset(source.reversed)

    def bind(self, tensors: Sequence[Tensor], placement: Placement, steps: int) -> BoundKernel:
        now = plan(self.source, placement.sizes, steps, torch.get_num_threads())
        template, pointers, scratch_at = [], [], -1
        for slot, parameter in enumerate(self.source.parameters):
            if parameter.kind == "pointer":
                i = parameter.tensor
                pointers.append((slot, i, self._first_step(tensors[i], placement.time_strides[i], steps, i)))
            elif parameter.kind == "scratch":
                scratch_at = slot
            template.append(self._argument(parameter, tensors, placement, steps, now))
        size = now.threads * now.scratch_bytes if scratch_at >= 0 else 0
        function = self._function

        def call(tensors: Sequence[Tensor]) -> None:
            arguments = template.copy()
            for slot, i, offset in pointers:
                arguments[slot] = tensors[i].data_ptr() + offset
            if size:
                scratch = allocate_scratch(size)
                arguments[scratch_at] = scratch.data_ptr()
            function(*arguments)

        return call

    def _argument(self, parameter: Parameter, tensors: Sequence[Tensor], placement: Placement, steps: int, now: Plan) -> int:
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
            return self._is_streaming(tensors, now)
        if kind in ("pointer", "scratch"):
            return 0  # known when it is called
        return getattr(now, kind)

    def _first_step(self, tensor: Tensor, stride_t: int, steps: int, i: int) -> int:
        """Bytes from the tensor's first element to that of the first step."""
        return (steps - 1) * stride_t * tensor.element_size() if i in self._reversed and steps else 0

    def _is_streaming(self, tensors: Sequence[Tensor], now: Plan) -> bool:
        total = sum(tensors[i].numel() * tensors[i].element_size() for i in self.source.streamed)
        return total >= STREAM_BYTES and now.block_lanes >= 256


def allocate_scratch(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)
