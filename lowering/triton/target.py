"""The target `triton`: CUDA and ROCm devices.

A kernel is launched as a plain Triton kernel and never inlined by Inductor, which would drop `enable_fp_fusion=False`
and with it the exactness of the forward pass.
"""

from __future__ import annotations

import importlib.util
import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from snn_compile.ir.recurrence import Recurrence
from snn_compile.lowering.launch import BoundKernel, Direction, Kernel
from snn_compile.lowering.layout import Layout, Placement
from snn_compile.lowering.triton.codegen import generate
from snn_compile.lowering.triton.heuristics import lanes_and_steps, warps
from snn_compile.lowering.triton.load import load_module
from snn_compile.lowering.triton.memory import Argument
from snn_compile.lowering.triton.text import KernelText

#: Offsets at which 32-bit lane indices end.
_INT32_LANES = 1 << 31


class TritonTarget:
    """See `lowering.launch.Target`."""

    name = "triton"

    def __init__(self) -> None:
        self._texts: dict[int, tuple[weakref.ref[Recurrence], dict[tuple[Direction, Layout], Kernel]]] = {}
        self._functions: dict[KernelText, Function] = {}

    def missing(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if not torch.cuda.is_available():
            return "there is no CUDA or ROCm device"
        return None

    def source(self, recurrence: Recurrence, direction: Direction, layout: Layout) -> str:
        return generate(recurrence, direction, layout).source

    def direct(self, namespace: str) -> None:
        """Triton's launcher is Python."""

    def kernel(self, recurrence: Recurrence, direction: Direction, layout: Layout) -> Kernel:
        """Generated once a recurrence, direction and layout; compiled once a text: one source
        may serve several dtypes, and its scratch memory has theirs."""
        known = self._texts.get(id(recurrence))
        if known is None or known[0]() is not recurrence:
            known = weakref.ref(recurrence), {}
            self._texts[id(recurrence)] = known
            weakref.finalize(recurrence, self._texts.pop, id(recurrence), None)
        kernels = known[1]
        if (direction, layout) not in kernels:
            text = generate(recurrence, direction, layout)
            function = self._functions.setdefault(text, Function(text))
            kernels[direction, layout] = _Launcher(function)
        return kernels[direction, layout]


class Function:
    """The compiled forms of one text: for operands aligned to 16, and for any."""

    def __init__(self, text: KernelText) -> None:
        self.text = text

    @cached_property
    def _python(self) -> Callable[..., None]:
        return getattr(load_module(self.text.source), self.text.name).fn

    @cached_property
    def aligned(self) -> Any:
        return self._jit([a.name for a in self.text.arguments if not a.aligned])

    @cached_property
    def general(self) -> Any:
        return self._jit([a.name for a in self.text.arguments])

    def for_values(self, values: Sequence[Tensor | int]) -> Any:
        """The form for these arguments of the kernel."""
        is_aligned = all(_is_aligned(v) for a, v in zip(self.text.arguments, values, strict=True) if a.aligned)
        return self.aligned if is_aligned else self.general

    def _jit(self, unspecialized: list[str]) -> Any:
        import triton

        return triton.jit(self._python, do_not_specialize=unspecialized)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Launches go to this device's current stream."""
    is_current = device.type != "cuda" or device.index == torch.cuda.current_device()
    return nullcontext() if is_current else torch.cuda.device(device)


@dataclass(frozen=True)
class Launch:
    """One call of a kernel, ready to go."""

    function: Any
    programs: int
    values: list[Tensor | int]
    #: compile-time arguments, and how to compile
    constants: dict[str, Any]
    options: dict[str, Any]

    def __call__(self) -> None:
        self.function[(self.programs,)](*self.values, **self.constants, **self.options)


class _Launcher:
    """Fills in the run-time arguments of a call."""

    def __init__(self, function: Function) -> None:
        self.function = function

    def bind(self, tensors: Sequence[Tensor], placement: Placement, steps: int) -> BoundKernel:
        device, prepared = tensors[0].device, self.prepared(tensors, placement, steps)

        def call(tensors: Sequence[Tensor]) -> None:
            with on_device(device):
                prepared(tensors)()

        return call

    def prepared(self, tensors: Sequence[Tensor], placement: Placement, steps: int) -> Prepared:
        import triton.language as tl

        text, device, n = self.function.text, tensors[0].device, math.prod(placement.sizes)
        lanes, segment = lanes_and_steps(text.accessed, text.kept)
        options: dict[str, Any] = {"num_warps": warps(n), **compile_options()}
        block = lanes * options["num_warps"] * warp_size(device)
        constants: dict[str, Any] = {"BLOCK": block, "INDEX": tl.int64 if n > _INT32_LANES - block else tl.int32}
        segments = 0
        if text.segmented:
            constants["SEGMENT"] = segment
            segments = -(-steps // segment)
        numbers = [_number(a, placement, steps, n) for a in text.arguments]
        return Prepared(self.function, numbers, max(segments - 1, 0) * n, -(-n // block), constants, options)


@dataclass(frozen=True)
class Prepared:
    """A call but for its tensors: what is the same whenever they have these sizes and strides."""

    function: Function
    #: by argument; None: a tensor
    numbers: list[int | None]
    #: elements of each piece of scratch memory
    scratch: int
    programs: int
    constants: dict[str, Any]
    options: dict[str, Any]

    def __call__(self, tensors: Sequence[Tensor]) -> Launch:
        text, device = self.function.text, tensors[0].device
        values: list[Any] = list(self.numbers)
        for i, argument in enumerate(text.arguments):
            if argument.kind == "pointer":
                values[i] = tensors[argument.tensor]
            elif argument.kind == "scratch":
                values[i] = torch.empty(self.scratch, dtype=text.scratch[argument.tensor], device=device)
        return Launch(self.function.for_values(values), self.programs, values, self.constants, self.options)


def _number(argument: Argument, placement: Placement, steps: int, n: int) -> int | None:
    match argument.kind:
        case "pointer" | "scratch":
            return None
        case "T":
            return steps
        case "N":
            return n
        case "size":
            return placement.sizes[argument.dim]
        case "stride":
            return placement.strides[argument.tensor][argument.dim]
        case _:
            return placement.time_strides[argument.tensor]


def _is_aligned(value: Tensor | int) -> bool:
    return (value.data_ptr() if isinstance(value, Tensor) else value) % 16 == 0


@cache
def compile_options(hip: bool | None = None) -> dict[str, Any]:
    """No contraction, and denormals kept inside of the mathematical functions: both as in eager's kernels."""
    hip = torch.version.hip is not None if hip is None else hip
    options: dict[str, Any] = {"enable_fp_fusion": False}
    if not hip:
        from triton.backends.nvidia.compiler import CUDAOptions

        if hasattr(CUDAOptions, "enable_reflect_ftz"):
            options["enable_reflect_ftz"] = False
        if hasattr(CUDAOptions, "maxnreg"):
            options["maxnreg"] = 255  # else ptxas may spill to fit one more block
    return options


@cache
def warp_size(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32
