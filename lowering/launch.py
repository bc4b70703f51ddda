"""Running a recurrence on a target: allocate the results, place all tensors in one index space, call the kernel.

The same allocation serves the kernels and their fake implementations, so the strides Inductor is told are those it gets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from snn_compile.ir.recurrence import Recurrence
from snn_compile.lowering.layout import Layout, Placement, place
from snn_compile.lowering.ops import opmath
from snn_compile.lowering.result_memory import THRESHOLD, settle

Direction = Literal["forward", "backward"]
#: ``bound(tensors)`` runs a kernel on tensors of the sizes, strides and dtypes it was bound for.
BoundKernel = Callable[[Sequence[Tensor]], None]
#: Sizes and strides of different calls that a recurrence remembers.
MOST_LAUNCHES = 64


class Kernel(Protocol):
    """A compiled kernel: any sizes, any strides of one `Layout`."""

    def bind(self, tensors: Sequence[Tensor], placement: Placement, steps: int) -> BoundKernel:
        """Work out everything about a call but the addresses. `tensors`: operands, then results, all of the whole shape."""


class Target(Protocol):
    """One kind of code to generate: `lowering/cpp`, `lowering/triton`.

    Tensors of a forward kernel: ``inits, xs, consts | ys, finals``; of a backward kernel: ``inits, xs, consts, ct_ys,
    ct_finals (both: the differentiable ones) | grad_inits, grad_xs, grad_consts (those that are needed)``.
    """

    name: str

    def missing(self) -> str | None:
        """What this machine lacks to compile for the target, in words; None where nothing is."""

    def source(self, recurrence: Recurrence, direction: Direction, layout: Layout) -> str:
        """The kernel's text: deterministic, no paths, no hashes."""

    def kernel(self, recurrence: Recurrence, direction: Direction, layout: Layout) -> Kernel:
        """Compile (or find in a cache) the kernel of that source."""

    def direct(self, namespace: str) -> Direct | None:
        """What answers calls of ops without Python; None where nothing does."""


class DirectCalls(Protocol):
    """The calls of one op that are answered without Python."""

    def add(
        self,
        steps: int,
        tensors: Sequence[Tensor | None],
        results: Sequence[ResultSpec],
        kernel: Any,
        copies: Mapping[int, int] = ...,
    ) -> None:
        """A later call with operands of the sizes and strides of `tensors` runs `kernel` on them and on new `results`.

        `copies`: for some of its addresses, how many copies of the number there (four bytes) the kernel is to find.
        """


class Direct(Protocol):
    """Whose kernels PyTorch's dispatcher calls without Python, for ops of one namespace."""

    def define(self, op: str, in_python: str, is_optional: Sequence[bool]) -> DirectCalls | None:
        """Calls of `op` that are not known yet go to the op `in_python`. None: there are too many."""

    def in_python(self, run: Callable[..., Any], fake: Callable[..., Any], results: int) -> Callable[..., Any]:
        """`run`, as what the op `in_python` is to be."""


# ---------------------------------------------------------------------------------------------------------- allocation


def _dense_like(tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor of `shape` that keeps the layout of `tensor` where that is dense and of this shape."""
    if tensor.shape == torch.Size(shape) and torch._prims_common.is_non_overlapping_and_dense_or_false(tensor):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=tensor.device)
    return torch.empty(shape, dtype=dtype, device=tensor.device)


def _layout_source(recurrence: Recurrence, operands: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """The operand whose layout a pointwise result takes over: the first one that has the whole shape."""
    first = len(recurrence.carries)
    for x in operands[first : first + len(recurrence.xs)]:
        if x.shape[1:] == shape and x.shape[0] != 0:
            return x[0]
    for operand in (*operands[:first], *operands[first + len(recurrence.xs) :]):
        if operand.shape == shape:
            return operand
    return operands[0].new_empty(shape)


def _stack_like(tensor: Tensor, steps: int, dim: int, dtype: torch.dtype) -> Tensor:
    """``torch.stack([tensor]*steps, dim)`` without values: contiguous, or channels-last where `tensor` is that."""
    d = dim % (tensor.dim() + 1)
    size = (*tensor.shape[:d], steps, *tensor.shape[d:])
    memory_format = torch._prims_common.suggest_memory_format(tensor)
    if d == tensor.dim() or memory_format == torch.contiguous_format:
        return torch.empty(size, dtype=dtype, device=tensor.device)
    joined = (*tensor.shape[:d], steps * tensor.shape[d], *tensor.shape[d + 1 :])  # eager concatenates, then views
    return torch.empty(joined, dtype=dtype, device=tensor.device, memory_format=memory_format).view(size)


def allocate_results(recurrence: Recurrence, operands: Sequence[Tensor], steps: int) -> list[Tensor]:
    """``ys`` with time at their own dim, as `torch.stack` gives them; ``finals`` in the operands' layout."""
    _check_dtypes(recurrence, operands)
    shape = recurrence.shape(operands)
    like = _dense_like(_layout_source(recurrence, operands, shape), shape, operands[0].dtype)
    results = [_stack_like(like, steps, y.time_dim, y.dtype) for y in recurrence.ys]
    return results + [_dense_like(like, shape, c.dtype) for c in recurrence.finals]


def _check_dtypes(recurrence: Recurrence, operands: Sequence[Tensor]) -> None:
    """A kernel would read other numbers than are there. (Asked as a graph is traced, and before a kernel is bound.)"""
    for operand, spec in zip(operands, recurrence.operands, strict=True):
        if operand.dtype != spec.dtype:
            raise TypeError(f"{recurrence.name}: '{spec.name}' is {operand.dtype}, and the kernel was made for {spec.dtype}")


def allocate_gradients(recurrence: Recurrence, operands: Sequence[Tensor], steps: int) -> list[Tensor]:
    """One gradient a needed operand, not yet summed over broadcast dims; constants accumulate in fp32 or wider."""
    shape = recurrence.shape(operands)
    n, m = len(recurrence.carries), len(recurrence.xs)
    inits, xs, consts = operands[:n], operands[n : n + m], operands[n + m :]
    gradients = [_dense_like(i, shape, c.dtype) for i, c in zip(inits, recurrence.carries, strict=True) if c.init_needs_grad]
    gradients += [
        _dense_like(x, (steps, *shape), spec.dtype) for x, spec in zip(xs, recurrence.xs, strict=True) if spec.needs_grad
    ]
    gradients += [
        _dense_like(c, shape, opmath(spec.dtype)) for c, spec in zip(consts, recurrence.consts, strict=True) if spec.needs_grad
    ]
    return gradients


# ------------------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class ResultSpec:
    """Size, layout and dtype of a result, to make the next one like it."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    #: of its memory
    nbytes: int

    @staticmethod
    def like(tensor: Tensor) -> ResultSpec:
        return ResultSpec(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.untyped_storage().nbytes())

    @property
    def is_large(self) -> bool:
        return self.nbytes >= THRESHOLD

    def allocate(self, device: torch.device) -> Tensor:
        result = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=device)
        return settle(result) if self.is_large else result


@dataclass(frozen=True)
class Launch:
    """What a call repeats of an earlier one with operands of the same sizes and strides: all but addresses.

    In a small network the work in Python before a kernel takes longer than the kernel; it is done once.
    """

    results: tuple[ResultSpec, ...]
    kernel: BoundKernel | None  # None: there is nothing to compute
    #: a zero of each absent cotangent, by position
    zeros: tuple[tuple[int, Tensor], ...] = ()

    def __call__(self, operands: Sequence[Tensor | None]) -> list[Tensor]:
        device = operands[0].device  # type: ignore[union-attr]
        results = [r.allocate(device) for r in self.results]
        if self.kernel is not None:
            tensors: list[Any] = [*operands, *results]
            for i, zero in self.zeros:
                tensors[i] = zero
            self.kernel(tensors)
        return results


def run_forward(recurrence: Recurrence, target: Target, operands: Sequence[Tensor], steps: int) -> list[Tensor]:
    """``operands -> ys, finals``; T = 0 gives empty outputs and the initial states."""
    key = (target.name, "forward", steps, *_signature(operands))
    launch = recurrence.launches.get(key)
    if launch is None:
        launch = _prepare_forward(recurrence, target, operands, steps)
        _remember(recurrence, key, launch, operands)
    return launch(operands)


def run_backward(
    recurrence: Recurrence,
    target: Target,
    operands: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    steps: int,
) -> list[Tensor]:
    """``operands, cotangents of the differentiable results -> gradients``; a cotangent of None is zero."""
    tensors = (*operands, *cotangents)
    key = (target.name, "backward", steps, *_signature(tensors))
    launch = recurrence.launches.get(key)
    if launch is None:
        launch = _prepare_backward(recurrence, target, operands, cotangents, steps)
        _remember(recurrence, key, launch, tensors)
    return launch(tensors)


def _signature(tensors: Sequence[Tensor | None]) -> list[object]:
    """Everything of a call that its launch depends on; dtypes are the recurrence's."""
    first = tensors[0]
    assert first is not None
    signature: list[object] = [torch.get_num_threads() if first.is_cpu else first.device]
    for tensor in tensors:
        signature += (None,) if tensor is None else (tensor.shape, tensor.stride())
    return signature


def _remember(recurrence: Recurrence, key: tuple[Any, ...], launch: Launch, tensors: Sequence[Tensor | None]) -> None:
    if len(recurrence.launches) >= MOST_LAUNCHES:  # sizes that change from call to call: none of them comes back
        recurrence.launches.clear()
    recurrence.launches[key] = launch
    _, direction, steps, *_ = key
    direct = recurrence.direct.get(direction)
    if direct is not None and launch.kernel is not None:
        direct.add(steps, tensors, launch.results, launch.kernel)


def _prepare_forward(recurrence: Recurrence, target: Target, operands: Sequence[Tensor], steps: int) -> Launch:
    shape = recurrence.shape(operands)
    results = allocate_results(recurrence, operands, steps)
    wide, timed = _widen_operands(recurrence, operands, shape)
    wide += [r.movedim(y.time_dim, 0) for r, y in zip(results, recurrence.ys, strict=False)]
    wide += results[len(recurrence.ys) :]
    timed += [True] * len(recurrence.ys) + [False] * len(recurrence.finals)
    kernel = _bind(recurrence, target, "forward", shape, wide, timed, steps)
    return Launch(tuple(map(ResultSpec.like, results)), kernel)


def _prepare_backward(
    recurrence: Recurrence,
    target: Target,
    operands: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    steps: int,
) -> Launch:
    shape = recurrence.shape(operands)
    gradients = allocate_gradients(recurrence, operands, steps)
    wide, timed = _widen_operands(recurrence, operands, shape)
    zeros = []
    outputs = recurrence.differentiable_ys
    finals = tuple(c for c in recurrence.finals if c.differentiable)
    specs: tuple[Any, ...] = (*outputs, *finals)
    for i, spec in enumerate(specs):
        ct = cotangents[i]
        is_y = i < len(outputs)
        if ct is None:  # no memory traffic: every stride is zero
            ct = torch.zeros((), dtype=spec.dtype, device=operands[0].device)
            zeros.append((len(wide), ct))
            ct = ct.expand((steps, *shape) if is_y else shape)
        elif is_y:
            ct = ct.movedim(outputs[i].time_dim, 0)
        wide.append(ct)
        timed.append(is_y)
    wide += gradients
    n_inits = sum(c.init_needs_grad for c in recurrence.carries)
    n_xs = sum(x.needs_grad for x in recurrence.xs)
    timed += [n_inits <= i < n_inits + n_xs for i in range(len(gradients))]
    kernel = _bind(recurrence, target, "backward", shape, wide, timed, steps)
    return Launch(tuple(map(ResultSpec.like, gradients)), kernel, tuple(zeros))


def _widen_operands(recurrence: Recurrence, operands: Sequence[Tensor], shape: torch.Size) -> tuple[list[Tensor], list[bool]]:
    first, last = len(recurrence.carries), len(recurrence.carries) + len(recurrence.xs)
    timed = [first <= i < last for i in range(len(operands))]
    wide = [_widen(o, shape, t) for o, t in zip(operands, timed, strict=True)]
    return wide, timed


def _widen(tensor: Tensor, shape: torch.Size, timed: bool) -> Tensor:
    if timed:
        if tensor.shape[1:] == shape:
            return tensor
        tensor = tensor.reshape(tensor.shape[0], *(1,) * (len(shape) + 1 - tensor.dim()), *tensor.shape[1:])
        return tensor.expand(tensor.shape[0], *shape)
    return tensor if tensor.shape == shape else tensor.expand(shape)


def _bind(
    recurrence: Recurrence,
    target: Target,
    direction: Direction,
    shape: torch.Size,
    tensors: list[Tensor],
    timed: list[bool],
    steps: int,
) -> BoundKernel | None:
    if shape.numel() == 0:
        return None
    placement = place(shape, tensors, timed)
    key = (target.name, direction, placement.layout)
    kernel = recurrence.kernels.get(key)
    if kernel is None:
        kernel = recurrence.kernels[key] = target.kernel(recurrence, direction, placement.layout)
    return kernel.bind(tensors, placement, steps)
