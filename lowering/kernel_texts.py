"""The text of a recurrence's kernels without running them, for `explain`, the dump and the logs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from snn_compile.ir.recurrence import Recurrence
from snn_compile.ir.stepped import Call, Program, Region, SteppedRecurrence
from snn_compile.lowering import targets
from snn_compile.lowering.by_channel import GpuChannelKernel
from snn_compile.lowering.channel_operand import Operand
from snn_compile.lowering.channel_program import is_by_channel
from snn_compile.lowering.cpp.channel_kernel import CpuChannelKernel
from snn_compile.lowering.launch import BoundKernel, Direction, Kernel, Target, run_backward, run_forward
from snn_compile.lowering.layout import Layout, Placement
from snn_compile.lowering.stepped import kept_for_backward, run_stepped, run_stepped_backward


class _Recorder:
    """A target that notes what it is asked for."""

    def __init__(self, target: Target) -> None:
        self.target, self.name = target, target.name
        self.texts: list[tuple[Direction, str]] = []

    def missing(self) -> str | None:
        return None

    def source(self, recurrence: Recurrence, direction: Direction, layout: Layout) -> str:
        return self.target.source(recurrence, direction, layout)

    def kernel(self, recurrence: Recurrence, direction: Direction, layout: Layout) -> Kernel:
        self.texts.append((direction, self.target.source(recurrence, direction, layout)))
        return _Skip()

    def direct(self, namespace: str) -> None:
        return None

    def note_channel_kernel(self, kernel: CpuChannelKernel | GpuChannelKernel, direction: Direction) -> _SkipChannels:
        return _SkipChannels(lambda operands: self.texts.append((direction, kernel.text(operands))))


@dataclass
class _SkipChannels:
    """In place of a kernel of `lowering/by_channel`."""

    note: Callable[[Sequence[Operand]], None]

    def run(self, operands: Sequence[Operand], steps: int) -> bool:
        self.note(operands)
        return True


class _Skip:
    def bind(self, tensors: Sequence[Tensor], placement: Placement, steps: int) -> BoundKernel:
        return lambda tensors: None


def kernel_texts(recurrence: Recurrence, operands: Sequence[Tensor], steps: int) -> list[tuple[Direction, str]]:
    """``[(direction, source)]`` for operands laid out like `operands`, whose values do not matter."""
    device = operands[0].device
    meta = [torch.empty_strided(_sizes(o), _strides(o), dtype=o.dtype, device="meta") for o in operands]
    recorder = _Recorder(targets.for_device(device))
    plain = replace(recurrence, kernels={}, launches={}, direct={})  # a recurrence remembers its compiled kernels
    with torch.no_grad():
        results = run_forward(plain, recorder, meta, steps)
        if plain.backward is not None:
            cotangents = [r for r, d in zip(results, plain.differentiable, strict=True) if d]
            run_backward(plain, recorder, meta, cotangents, steps)
    return recorder.texts


def stepped_texts(stepped: SteppedRecurrence, device: torch.device) -> list[tuple[Direction, str]]:
    """``[(direction, source)]`` of the kernels of a step, in the order they run, or of those that run all steps."""
    if is_by_channel(stepped.forward):
        return _channel_texts(stepped, device)
    programs: list[tuple[Direction, Program]] = [("forward", stepped.forward)]
    programs += [("backward", stepped.backward)] if stepped.backward is not None else []
    texts = []
    for direction, program in programs:
        for unit in program.units:
            if isinstance(unit, Region):
                shape = unit.kernel.meta["shape"]
                operands = [torch.empty((1, *shape), dtype=x.dtype, device=device) for x in unit.kernel.xs]
                operands += [torch.empty((), dtype=c.dtype, device=device) for c in unit.kernel.consts]
                texts += [(direction, text) for _, text in kernel_texts(unit.kernel, operands, 1)]
    return texts


def _channel_texts(stepped: SteppedRecurrence, device: torch.device) -> list[tuple[Direction, str]]:
    """Of a `SteppedRecurrence` that runs channel by channel: what two steps of it ask for, without values."""
    recorder = _Recorder(targets.for_device(device))
    plain = replace(
        stepped,
        forward=_forgetful(stepped.forward),
        backward=None if stepped.backward is None else _forgetful(stepped.backward),
        meta={},
    )
    assert stepped.step is not None
    examples = [n.meta["val"] for n in stepped.step.graph.find_nodes(op="placeholder")]
    inits, xs, consts = stepped.split(examples)
    steps = 2

    def memory(value: Tensor, *times: int) -> Tensor:
        strides = (*(value.numel() for _ in times), *value.stride())
        return torch.empty_strided((*times, *value.shape), strides, dtype=value.dtype, device=device)

    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        operands = [*map(memory, inits), *(memory(x, steps) for x in xs), *map(memory, consts)]
        results = run_stepped(plain, recorder, operands, steps)
        if plain.backward is not None:
            cotangents = [r for r, d in zip(results, plain.differentiable, strict=False) if d]
            run_stepped_backward(plain, recorder, operands, kept_for_backward(plain, results), cotangents, steps)
    return recorder.texts


def _forgetful(program: Program) -> Program:
    """With kernels that do not know what was compiled of them, so that none is remembered that is only noted."""

    def copied(units: Sequence[Region | Call]) -> list[Region | Call]:
        return [replace(u, kernel=replace(u.kernel, kernels={}, launches={})) if isinstance(u, Region) else u for u in units]

    return replace(program, prologue=copied(program.prologue), units=copied(program.units))


def _sizes(tensor: Tensor) -> list[int]:
    return [s if isinstance(s, int) else int(s.node.hint) for s in tensor.shape]


def _strides(tensor: Tensor) -> list[int]:
    return [s if isinstance(s, int) else int(s.node.hint) for s in tensor.stride()]
