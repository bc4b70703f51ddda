"""Running a `SteppedRecurrence` channel by channel, where its program and the memory layout allow it.

The results are those of `lowering/stepped`, which runs a program unit by unit; that module says what they are. On CPU they have
its bits, on GPUs statistics and what is normalised with them agree to rounding (`lowering/triton/by_channel`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from snn_compile.ir.stepped import Program, SteppedRecurrence
from snn_compile.ir.values import known_int
from snn_compile.lowering.channel_operand import Operand
from snn_compile.lowering.channel_program import Given, Unsupported, Wanted, examples_of, is_by_channel, whole_shape
from snn_compile.lowering.channels_last import arranged, empty_arranged, is_channels_last
from snn_compile.lowering.cpp.by_channel import generate
from snn_compile.lowering.cpp.channel_kernel import CpuChannelKernel
from snn_compile.lowering.cpp.names import identifier
from snn_compile.lowering.launch import Direction, Target
from snn_compile.lowering.triton import channel_kernel as triton
from snn_compile.lowering.triton.heuristics import fills_device

#: Steps of fewer values stay in the caches, where Inductor's unrolled loop is as fast or faster (measured on two cores).
FEWEST_VALUES = 1 << 16


def step_shape(r: SteppedRecurrence) -> torch.Size:
    """Of the whole values of a step, ``[N, C, *space]``."""
    return whole_shape(torch.Size(shape) for shape, _ in r.results)


def runs_channels_last(r: SteppedRecurrence, xs: Sequence[Tensor | None], kept: Sequence[Tensor] = ()) -> bool:
    """Whether the channels of whole results lie together: those of the first series do that is whole, or those that eager's batch
    norms see, which add up in another order then.

    `kept`: series that the forward made, in that layout.
    """
    shape = r.meta.get("whole", False)
    if shape is False:  # (asked in every call)
        may_be = is_by_channel(r.forward) and any(len(shape) > 1 for shape, _ in r.results)
        shape = r.meta["whole"] = step_shape(r) if may_be else None
    if shape is None:
        return False
    series = next((x for x in (*xs, *kept) if x is not None and x.shape[1:] == shape and x.shape[0]), None)
    if series is None or series.device.type != "cpu":
        return False
    return is_channels_last(series[0]) or normalises_channels_last(r)


def normalises_channels_last(r: SteppedRecurrence) -> bool:
    """In eager."""
    known = r.meta.get("normalises_channels_last")
    if known is None:  # (asked in every call)
        assert r.step is not None
        norms = r.step.graph.find_nodes(op="call_function", target=torch.ops.aten.native_batch_norm.default)
        known = r.meta["normalises_channels_last"] = any(is_channels_last(n.args[0].meta["val"]) for n in norms)
    return bool(known)


def empty_result(
    r: SteppedRecurrence,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    channels_last: bool = False,
    timed: bool = False,
) -> Tensor:
    """Memory for a result, of one step or of all of them; a whole one in the layout of whole values."""
    is_whole = channels_last and tuple(shape[timed:]) == step_shape(r)
    return empty_arranged(shape, dtype, device, is_whole, timed)


def suits_channels(value: Tensor) -> bool:
    """fp32, ``[N, C, *space]``; on CPU in steps too large for the caches, on GPUs with enough channels."""
    if value.device.type == "cuda":
        return _suits_gpu(value)
    if value.dtype != torch.float32 or value.device.type != "cpu" or value.dim() < 2:
        return False
    sizes = [known_int(s) for s in value.shape]
    return None not in sizes and value.numel() >= FEWEST_VALUES


def _suits_gpu(value: Tensor) -> bool:
    sizes = [known_int(s) for s in value.shape]
    if value.dtype != torch.float32 or value.dim() < 2 or None in sizes or 0 in sizes:
        return False
    return fills_device(value.numel() // value.shape[1], value.shape[1], triton.processors(value.device))


def runs_by_channel(program: Program, target: Target) -> bool:
    """Whether to ask for a kernel at all: most programs call matrix products."""
    return target.name in ("cpp", "triton") and is_by_channel(program)


class GpuChannelKernel:
    """The same for Triton; it takes operands of more layouts, which is found out in a call."""

    def __init__(self, kernel: triton.ChannelKernel) -> None:
        self.kernel = kernel

    def text(self, operands: Sequence[Operand]) -> str:
        """Raises `Unsupported`."""
        places = [o.place(self.kernel.shape) for o in operands]
        return self.kernel.text_for([p for p in places if p is not None], operands[0].tensor.device).source

    def run(self, operands: Sequence[Operand], steps: int) -> bool:
        places = [o.place(self.kernel.shape) for o in operands]
        known = [p for p in places if p is not None]
        if len(known) < len(places) or any(o.tensor.dtype != torch.float32 or o.tensor.numel() == 0 for o in operands):
            return False
        return self.kernel.run(known, [o.from_first_step() for o in operands], steps)


class ChannelCall:
    """What a kernel is given and what is wanted of it, with the tensors."""

    def __init__(self, r: SteppedRecurrence, direction: Direction, target: Target, channels_last: bool) -> None:
        self.r, self.direction, self.target, self.channels_last = r, direction, target, channels_last
        self.dim = len(step_shape(r))
        self.given: list[tuple[Given, list[Operand]]] = []
        self.wanted: list[tuple[Wanted, Operand]] = []
        #: that has run
        self.kernel: CpuChannelKernel | GpuChannelKernel | None = None

    def give(self, kind: str, slot: int, name: str, *operands: Operand, next: int | None = None) -> None:
        self.given.append((Given(slot, kind, name, next), list(operands)))

    def operand(self, value: Tensor, timed: bool = False, reverse: bool = False) -> Operand:
        """One that is read: on CPU copied where it does not lie in memory as all others do."""
        if self.target.name == "triton":
            return Operand(value, timed, reverse)
        tensor = arranged(value, self.dim, self.channels_last, timed)
        return Operand(tensor, timed, reverse, None if tensor is value else value)

    def give_constants(self, values: Sequence[Tensor | None], slots: Iterable[int]) -> None:
        """Constants of the recurrence, and what the prologue made of them."""
        first = len(self.r.carries) + len(self.r.xs)
        for i in slots:
            if isinstance(value := values[i], Tensor):
                known = i - first < len(self.r.consts)
                self.give("const", i, self.r.consts[i - first].name if known else "constant", self.operand(value))

    def want(self, kind: str, slot: int, operand: Operand) -> None:
        self.wanted.append((Wanted(slot, kind), operand))

    def run(self, steps: int) -> bool:
        """Fill what is wanted; False, and nothing is done, where the recurrence does not run so."""
        given, wanted = tuple(g for g, _ in self.given), tuple(w for w, _ in self.wanted)
        key = self.target.name, self.direction, self.channels_last, given, wanted
        known = self.r.meta.setdefault("by_channel", {})
        if key not in known:
            known[key] = self._kernel(given, wanted)
        kernel: CpuChannelKernel | GpuChannelKernel | None = known[key]
        if kernel is not None and steps > 0 and kernel.run(self._operands(), steps):
            self.kernel = kernel
        return self.kernel is not None

    def answer_later(self, steps: int, tensors: Sequence[Tensor | None], results: Sequence[Tensor]) -> None:
        """Have calls of the op like this one, of `tensors` with these `results`, answered without Python, where that can be."""
        direct = self.r.direct.get(self.direction)
        if direct is not None and isinstance(self.kernel, CpuChannelKernel):
            # (the cotangent of a state that is no result is zero)
            may_be_zero = [self.direction == "backward" and g.kind == "carry" for g, some in self.given for _ in some]
            may_be_zero += [False] * len(self.wanted)
            operands = list(zip(self._operands(), may_be_zero, strict=True))
            self.kernel.answer_later(direct, operands, steps, tensors, results)

    def _operands(self) -> list[Operand]:
        return [o for _, some in self.given for o in some] + [o for _, o in self.wanted]

    def _kernel(self, given: Sequence[Given], wanted: Sequence[Wanted]) -> CpuChannelKernel | GpuChannelKernel | None:
        is_backward = self.direction == "backward"
        program, gm = (self.r.backward, self.r.step_backward) if is_backward else (self.r.forward, self.r.step)
        assert program is not None and gm is not None
        name = f"{identifier(self.r.name)}_{self.direction}"
        with contextlib.suppress(Unsupported):
            kernel: CpuChannelKernel | GpuChannelKernel
            if self.target.name == "triton":
                kernel = GpuChannelKernel(triton.ChannelKernel(name, program, examples_of(gm), given, wanted, is_backward))
            else:
                source = generate(name, program, examples_of(gm), given, wanted, is_backward, self.channels_last)
                kernel = CpuChannelKernel(source)
            note: Callable[..., Any] | None = getattr(self.target, "note_channel_kernel", None)
            return kernel if note is None else note(kernel, self.direction)
        return None


def forward_by_channel(
    call: ChannelCall,
    inits: Sequence[Tensor],
    xs: Sequence[Tensor],
    values: Sequence[Tensor | None],
    kept: Sequence[tuple[int, Tensor, bool]],
    steps: int,
) -> list[Tensor] | None:
    """Fill `kept` - ``(slot, series, reverse)`` - and give the final states; None where that is not possible.

    `values`: what is known before the first step, by slot: constants and what the prologue made.
    """
    r = call.r
    n, first = len(r.carries), len(r.carries) + len(r.xs)
    for i, (carry, init) in enumerate(zip(r.carries, inits, strict=True)):
        call.give("carry", i, carry.name, call.operand(init), next=r.forward.outputs[i])
    for j, (spec, x) in enumerate(zip(r.xs, xs, strict=True)):
        call.give("series", n + j, spec.name, call.operand(x, True, spec.reverse))
    call.give_constants(values, range(first, len(values)))
    for slot, series, reverse in kept:
        call.want("series", slot, Operand(series, True, reverse))
    finals = []
    for i, (carry, (shape, dtype)) in enumerate(zip(r.carries, r.results, strict=False)):
        if carry.is_result:
            finals.append(empty_result(r, shape, dtype, inits[i].device, call.channels_last))
            call.want("final", i, Operand(finals[-1]))
    return finals if call.run(steps) else None


def backward_by_channel(
    call: ChannelCall,
    operands: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    values: Sequence[Tensor | None],
    cotangents: tuple[Sequence[Tensor], Sequence[Tensor | None]],
    steps: int,
) -> list[Tensor] | None:
    """The gradients, or None where that is not possible. `cotangents`: of the carries, and of the outputs, time first."""
    r, channels_last = call.r, call.channels_last
    assert r.backward is not None
    inits, xs, consts = r.split(operands)
    outputs, n_ct = r.backward.outputs, len(cotangents[0])
    _give_backward(call, inits, xs, kept, values, cotangents)
    first_ct, grads = len(operands) + r.n_residuals, []
    for k, (ct, carry) in enumerate(zip(cotangents[0], r.differentiable_carries, strict=True)):
        if carry.init_needs_grad:
            grads.append(empty_result(r, ct.shape, ct.dtype, ct.device, channels_last))
            call.want("final", first_ct + k, Operand(grads[-1]))
    wanting = [(x, spec) for x, spec in zip(xs, r.xs, strict=True) if spec.needs_grad]
    for (x, spec), slot in zip(wanting, outputs[n_ct:], strict=False):
        if slot is None:
            return None
        grads.append(empty_result(r, x.shape, x.dtype, x.device, channels_last, timed=True))
        call.want("series", slot, Operand(grads[-1], True, spec.reverse))
    for const, way in zip((c for c, s in zip(consts, r.consts, strict=True) if s.needs_grad), r.reduced, strict=True):
        grads.append(torch.zeros(const.shape, dtype=const.dtype, device=const.device))
        if way is not None and way.kind != "sum":
            return None
        if way is not None:
            call.want("sum", way.a, Operand(grads[-1]))
    return grads if call.run(steps) else None


def _give_backward(
    call: ChannelCall,
    inits: Sequence[Tensor],
    xs: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    values: Sequence[Tensor | None],
    cotangents: tuple[Sequence[Tensor], Sequence[Tensor | None]],
) -> None:
    r, (ct_carries, ct_ys) = call.r, cotangents
    n, n_ops = len(r.carries), len(r.carries) + len(r.xs) + len(r.consts)
    first_ct = n_ops + r.n_residuals
    for i, after in zip(r.history, kept, strict=False):
        call.give("before", i, r.carries[i].name, call.operand(after, True), call.operand(inits[i]))
    for j, (spec, x) in enumerate(zip(r.xs, xs, strict=True)):
        if x is not None:
            call.give("series", n + j, spec.name, call.operand(x, True, spec.reverse))
    for j, residual in enumerate(kept[len(r.history) :]):
        call.give("series", n_ops + j, "kept", call.operand(residual, True))
    for k, (ct, carry) in enumerate(zip(ct_carries, r.differentiable_carries, strict=True)):
        assert r.backward is not None
        call.give("carry", first_ct + k, f"grad_{carry.name}", call.operand(ct), next=r.backward.outputs[k])
    for k, (ct_y, y) in enumerate(zip(ct_ys, r.differentiable_ys, strict=True), len(ct_carries)):
        series = [] if ct_y is None else [call.operand(ct_y, True, y.reverse)]
        call.give("series" if series else "zero", first_ct + k, f"grad_{y.name}", *series)
    after_inputs = first_ct + len(ct_carries) + len(ct_ys)
    call.give_constants(values, [*range(n + len(r.xs), n_ops), *range(after_inputs, len(values))])
