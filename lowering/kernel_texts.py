"""The text of a recurrence's kernels without running them, for `explain`, the dump and the logs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from snn_compile.ir.recurrence import Recurrence
from snn_compile.ir.stepped import Program, Region, SteppedRecurrence
from snn_compile.lowering import targets
from snn_compile.lowering.launch import BoundKernel, Direction, Kernel, Target, run_backward, run_forward
from snn_compile.lowering.layout import Layout, Placement


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


class _Skip:
    def bind(self, tensors: Sequence[Tensor], placement: Placement, steps: int) -> BoundKernel:
        return lambda tensors: None


def kernel_texts(recurrence: Recurrence, operands: Sequence[Tensor], steps: int) -> list[tuple[Direction, str]]:
    """``[(direction, source)]`` for operands laid out like `operands`, whose values do not matter."""
    device = operands[0].device
    meta = [torch.empty_strided(_sizes(o), _strides(o), dtype=o.dtype, device="meta") for o in operands]
    recorder = _Recorder(targets.for_device(device))
    plain = replace(recurrence, kernels={}, launches={})  # a recurrence remembers its compiled kernels
    with torch.no_grad():
        results = run_forward(plain, recorder, meta, steps)
        if plain.backward is not None:
            cotangents = [r for r, d in zip(results, plain.differentiable, strict=True) if d]
            run_backward(plain, recorder, meta, cotangents, steps)
    return recorder.texts


def stepped_texts(stepped: SteppedRecurrence, device: torch.device) -> list[tuple[Direction, str]]:
    """``[(direction, source)]`` of the kernels of a step, in the order they run."""
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


def _sizes(tensor: Tensor) -> list[int]:
    return [s if isinstance(s, int) else int(s.node.hint) for s in tensor.shape]


def _strides(tensor: Tensor) -> list[int]:
    return [s if isinstance(s, int) else int(s.node.hint) for s in tensor.stride()]
