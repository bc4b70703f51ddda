"""Running a `SteppedRecurrence`: its programs, once a step, over preallocated series.

A region is a kernel of the recurrence's target; everything about its call but the addresses is worked out once: in the
first step, whose states may lie in memory in another way, and in the second, for all that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from snn_compile.ir.recurrence import Recurrence
from snn_compile.ir.stepped import Call, Program, Reduced, Region, Slot, SteppedRecurrence
from snn_compile.lowering.by_channel import backward_by_channel, forward_by_channel, runs_by_channel
from snn_compile.lowering.launch import MOST_LAUNCHES, BoundKernel, ResultSpec, Target
from snn_compile.lowering.layout import place
from snn_compile.lowering.result_memory import allocate

#: ``unit(values, now)``: read and write values by slot; `now` holds where the series of this step go
Run = Callable[[list, dict[int, Tensor]], None]


class StepRunner:
    """One program on one target, for operands of one signature."""

    def __init__(self, program: Program, target: Target) -> None:
        self.program = program
        self.by_channel = runs_by_channel(program, target)
        self.prologue = [_runner(u, target) for u in program.prologue]
        self.first = [_runner(u, target) for u in program.units]
        self.later = [_runner(u, target) for u in program.units]
        #: slots that a step writes; operands and what the prologue made keep their value
        self.written = {o for u in program.units for o in (u.outputs if isinstance(u, Region) else (u.output,))}

    def values(self) -> list:  # type: ignore[type-arg]
        return [None] * self.program.size

    def prepare(self, values: list) -> None:  # type: ignore[type-arg]
        for run in self.prologue:
            run(values, {})

    def step(self, values: list, now: dict[int, Tensor], is_first: bool) -> None:  # type: ignore[type-arg]
        for run in self.first if is_first else self.later:
            run(values, now)


def _runner(unit: Region | Call, target: Target) -> Run:
    return _region_runner(unit, target) if isinstance(unit, Region) else _call_runner(unit)


def _call_runner(unit: Call) -> Run:
    target: Callable[..., Any] = getattr(unit.target, "_op", unit.target)  # past the checks of `OpOverload.__call__`
    args, kwargs, output = unit.args, unit.kwargs, unit.output
    nested = any(not isinstance(a, Slot) and _has_slot(a) for a in args) or bool(kwargs)
    into = _out_variant(unit)
    places = [(i, a.index) for i, a in enumerate(args) if isinstance(a, Slot)]
    template = list(args)

    def run(values: list, now: dict[int, Tensor]) -> None:  # type: ignore[type-arg]
        filled = template.copy()
        for i, slot in places:
            filled[i] = values[slot]
        place_ = now.get(output)
        if place_ is None:
            values[output] = target(*filled)
        elif into is not None:
            values[output] = into(*filled, out=place_)
        else:
            values[output] = place_.copy_(target(*filled))

    def run_nested(values: list, now: dict[int, Tensor]) -> None:  # type: ignore[type-arg]
        values[output] = target(*_fill(args, values), **_fill(kwargs, values))
        if output in now:
            now[output].copy_(values[output])

    return run_nested if nested else run


def _has_slot(value: object) -> bool:
    return any(isinstance(v, Slot) for v in tree_leaves(value))


def _out_variant(unit: Call) -> Callable[..., Any] | None:
    """The overload that writes its result where it is told to, if the op has one."""
    packet = getattr(unit.target, "overloadpacket", None)
    out = getattr(packet, "out", None) if "out" in getattr(packet, "overloads", list)() else None
    if out is None or len(out._schema.returns) != 1:
        return None
    ours = [(a.name, str(a.type)) for a in unit.target._schema.arguments]  # type: ignore[attr-defined]
    theirs = [(a.name, str(a.type)) for a in out._schema.arguments if not a.is_out]
    return out._op if ours == theirs else None  # type: ignore[no-any-return]


def _fill(value, values):  # type: ignore[no-untyped-def]
    if isinstance(value, Slot):
        return values[value.index]
    if isinstance(value, (list, tuple)):
        return type(value)(_fill(v, values) for v in value)
    if isinstance(value, dict):
        return {k: _fill(v, values) for k, v in value.items()}
    return value


def _region_runner(unit: Region, target: Target) -> Run:
    kernel, inputs, outputs = unit.kernel, unit.inputs, unit.outputs
    shape = torch.Size(kernel.meta["shape"])
    known: list[tuple[BoundKernel | None, list[ResultSpec]]] = []  # at most one; another thread may have added its own

    def prepare(operands: list[Tensor], now: dict[int, Tensor]) -> tuple[BoundKernel | None, list[ResultSpec]]:
        made = [torch.empty(shape, dtype=y.dtype, device=operands[0].device) for y in kernel.ys]
        results = [now.get(o, r) for o, r in zip(outputs, made, strict=True)]
        known.append((_bind(kernel, target, shape, operands, results), [ResultSpec.like(r) for r in made]))
        return known[0]

    def run(values: list, now: dict[int, Tensor]) -> None:  # type: ignore[type-arg]
        operands = [values[i] for i in inputs]
        bound, specs = known[0] if known else prepare(operands, now)
        results = []
        for o, spec in zip(outputs, specs, strict=True):
            result = now.get(o)
            results.append(spec.allocate(operands[0].device) if result is None else result)
        if bound is not None:
            bound([*operands, *results])
        for o, result in zip(outputs, results, strict=True):
            values[o] = result

    return run


def _bind(
    kernel: Recurrence, target: Target, shape: torch.Size, operands: list[Tensor], results: list[Tensor]
) -> BoundKernel | None:
    """The region's kernel as a recurrence of one step: every operand and result gets a time dim of 1."""
    if shape.numel() == 0:
        return None
    n = len(kernel.xs)
    wide = [o.expand(shape).unsqueeze(0) for o in operands[:n]] + [o.expand(shape) for o in operands[n:]]
    wide += [r.unsqueeze(0) for r in results]
    timed = [True] * n + [False] * (len(operands) - n) + [True] * len(results)
    placement = place(shape, wide, timed)
    key = (target.name, "forward", placement.layout)
    compiled = kernel.kernels.get(key)
    if compiled is None:
        compiled = kernel.kernels[key] = target.kernel(kernel, "forward", placement.layout)
    return compiled.bind(wide, placement, 1)


class Places:
    """Where the series of a step go: a value is written into its first place, and copied into every other one.

    What no step writes - an operand, a value of the prologue - is copied, too.
    """

    def __init__(self, wanted: Iterable[tuple[int, Sequence[Tensor]]], written: set[int]) -> None:
        self.direct: dict[int, Sequence[Tensor]] = {}
        self.copied: list[tuple[int, Sequence[Tensor]]] = []
        for slot, views in wanted:
            if slot in self.direct or slot not in written:
                self.copied.append((slot, views))
            else:
                self.direct[slot] = views

    def now(self, t: int) -> dict[int, Tensor]:
        return {slot: views[t] for slot, views in self.direct.items()}

    def copy(self, values: list, t: int) -> None:  # type: ignore[type-arg]
        for slot, views in self.copied:
            views[t].copy_(values[slot])


# ------------------------------------------------------------------------------------------------------------- forward


def result_specs(r: SteppedRecurrence, steps: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Sizes and dtypes of what `run_stepped` gives: ``ys, finals, history, residuals``, all contiguous.

    A history that is one of the outputs is not given twice.
    """
    n, m = len(r.carries), len(r.ys)
    found = []
    for (shape, dtype), y in zip(r.results[n : n + m], r.ys, strict=True):
        d = y.time_dim % (len(shape) + 1)
        found.append(((*shape[:d], steps, *shape[d:]), dtype))
    found += [spec for spec, c in zip(r.results, r.carries, strict=False) if c.is_result]
    kept = [r.results[i] for i, y in zip(r.history, r.shared, strict=True) if y is None] + list(r.results[n + m :])
    return found + [((steps, *shape), dtype) for shape, dtype in kept]


def run_stepped(r: SteppedRecurrence, target: Target, operands: Sequence[Tensor], steps: int) -> list[Tensor]:
    """``operands -> ys, finals, history, residuals``; `history` holds the states *after* each step."""
    numbers, xs, consts = r.split(operands)
    inits: list[Tensor] = _whole_states(r, numbers)  # type: ignore[assignment]
    runner = _prepared(r, r.forward, target, "forward", operands)
    device = operands[0].device
    out: list[int] = r.forward.outputs  # type: ignore[assignment]  # (none is None: only a gradient may be zero)
    n, m = len(r.carries), len(r.ys)
    # (slot, series) of everything that is kept for each step
    own = [i for i, y in zip(r.history, r.shared, strict=True) if y is None]
    shapes = [*r.results[n : n + m], *(r.results[i] for i in own), *r.results[n + m :]]
    wanted = [*out[n : n + m], *(out[i] for i in own), *out[n + m :]]
    kept = [allocate((steps, *shape), dtype, device) for shape, dtype in shapes]
    reverse = [y.reverse for y in r.ys] + [False] * (len(kept) - m)
    values = runner.values()
    values[n + len(xs) : n + len(xs) + len(consts)] = consts
    runner.prepare(values)
    finals = None
    if runner.by_channel:
        finals = forward_by_channel(r, inits, xs, values, list(zip(wanted, kept, reverse, strict=True)), steps)
    if finals is None:
        series = [_steps_of(x, spec.reverse) for x, spec in zip(xs, r.xs, strict=True)]
        views = [_steps_of(k, back) for k, back in zip(kept, reverse, strict=True)]
        places = Places(zip(wanted, views, strict=True), runner.written)
        carries = list(inits)
        for t in range(steps):
            values[:n] = carries
            values[n : n + len(series)] = [s[t] for s in series]
            runner.step(values, places.now(t), t == 0)
            places.copy(values, t)
            carries = [values[o] for o in out[:n]]
        finals = [c.clone() for c, spec in zip(carries, r.carries, strict=True) if spec.is_result]
    ys = [k if y.time_dim == 0 else k.movedim(0, y.time_dim).contiguous() for k, y in zip(kept, r.ys, strict=False)]
    return [*ys, *finals, *kept[m:]]


def _whole_states(r: SteppedRecurrence, inits: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Initial states in the shape of states: a constant one is passed as a number."""
    shapes = [shape for shape, _ in r.results]
    return [i if i is None or i.shape == shape else i.expand(shape) for i, shape in zip(inits, shapes, strict=False)]


def kept_for_backward(r: SteppedRecurrence, results: Sequence[Tensor]) -> list[Tensor]:
    """``ys, finals, history, residuals -> history, residuals``, with those that are outputs in their place."""
    rest = iter(results[len(r.ys) + len(r.finals) :])
    return [*(next(rest) if y is None else results[y] for y in r.shared), *rest]


def _steps_of(x: Tensor, reverse: bool) -> Sequence[Tensor]:
    return x.unbind(0)[::-1] if reverse else x.unbind(0)


def device_of(tensors: Sequence[Tensor | None]) -> torch.device:
    return next(t.device for t in tensors if t is not None)


def _prepared(
    r: SteppedRecurrence, program: Program, target: Target, direction: str, tensors: Sequence[Tensor | None]
) -> StepRunner:
    threads = torch.get_num_threads()
    key = (target.name, direction, threads, *(None if t is None else (t.shape, t.stride(), t.device) for t in tensors))
    known = r.meta.setdefault("runners", {})
    if key not in known:
        if len(known) >= MOST_LAUNCHES:
            known.clear()
        known[key] = StepRunner(program, target)
    return known[key]  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------------------ backward


def gradient_specs(r: SteppedRecurrence, operands: Sequence[Tensor]) -> list[Tensor]:
    """The operands that want a gradient, in order: gradients have their sizes."""
    inits, xs, consts = r.split(operands)
    wanted = [i for i, c in zip(inits, r.carries, strict=True) if c.init_needs_grad]
    wanted += [x for x, spec in zip(xs, r.xs, strict=True) if spec.needs_grad]
    return wanted + [c for c, spec in zip(consts, r.consts, strict=True) if spec.needs_grad]


def run_stepped_backward(
    r: SteppedRecurrence,
    target: Target,
    operands: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    steps: int,
) -> list[Tensor]:
    """``operands; history, residuals; cotangents of the differentiable ys and finals -> gradients``

    An operand that `r.reads` leaves out may be None.
    """
    program = r.backward
    assert program is not None
    inits, xs, consts = r.split(operands)
    inits = _whole_states(r, inits)
    operands = [*inits, *xs, *consts]
    runner = _prepared(r, program, target, "backward", [*operands, *kept, *cotangents])
    n, n_ops = len(r.carries), len(operands)
    values = runner.values()
    values[n + len(xs) : n_ops] = consts
    runner.prepare(values)
    ct_carries, whole_ys = _cotangents(r, device_of(operands), cotangents)
    if runner.by_channel:
        gradients = backward_by_channel(r, operands, kept, values, (ct_carries, whole_ys), steps)
        if gradients is not None:
            return gradients
    # (the step that sees the initial state is not the first one here: the state must lie in memory like those after it)
    before = [(i, [inits[i].contiguous(), *k.unbind(0)[:-1]]) for i, k in zip(r.history, kept, strict=False)]  # type: ignore[union-attr]
    given = [(n + j, x, spec) for j, (x, spec) in enumerate(zip(xs, r.xs, strict=True)) if x is not None]
    streams: list[tuple[int, Sequence[Tensor]]] = [(slot, _steps_of(x, spec.reverse)) for slot, x, spec in given]
    streams += before
    streams += [(n_ops + j, k.unbind(0)) for j, k in enumerate(kept[len(r.history) :])]
    ct_ys = _cotangents_of_steps(r, device_of(operands), whole_ys, steps)
    first_ct = n_ops + r.n_residuals
    n_ct = len(ct_carries)
    streams += [(first_ct + n_ct + j, s) for j, s in enumerate(ct_ys)]
    outputs = program.outputs
    history = {i: (inits[i], k) for i, k in zip(r.history, kept, strict=False)}
    sink = _Gradients(r, operands, steps, outputs[n_ct:], dict(streams), history, runner.written)
    for t in reversed(range(steps)):
        for slot, stream in streams:
            values[slot] = stream[t]
        values[first_ct : first_ct + n_ct] = ct_carries
        runner.step(values, sink.places.now(t), t == steps - 1)
        ct_carries = [
            _zero(ct.shape, ct.dtype, ct.device) if o is None else values[o] for o, ct in zip(outputs, ct_carries, strict=False)
        ]
        sink.take(values, t)
    wanted = [ct for ct, c in zip(ct_carries, r.differentiable_carries, strict=True) if c.init_needs_grad]
    return [*(g.clone() for g in wanted), *sink.results()]


def _cotangents(r: SteppedRecurrence, device: torch.device, cotangents: Sequence[Tensor | None]):  # type: ignore[no-untyped-def]
    """Of the carries after the last step (an absent one is zero, without memory), and of the outputs, time first, or None."""
    n_ys = len(r.differentiable_ys)
    finals = iter(cotangents[n_ys:])
    carries = []
    for spec, c in zip(r.results, r.carries, strict=False):
        if c.differentiable:
            ct = next(finals) if c.is_result else None
            carries.append(_zero(*spec, device) if ct is None else ct)
    pairs = zip(cotangents[:n_ys], r.differentiable_ys, strict=True)
    return carries, [None if ct is None else ct.movedim(y.time_dim, 0) for ct, y in pairs]


def _cotangents_of_steps(
    r: SteppedRecurrence, device: torch.device, whole: Sequence[Tensor | None], steps: int
) -> list[Sequence[Tensor]]:
    """The cotangents of the outputs, time first, as one a step; an absent one is zero, without memory."""
    n = len(r.carries)
    specs = [spec for spec, y in zip(r.results[n : n + len(r.ys)], r.ys, strict=True) if y.differentiable]
    return [
        [_zero(*spec, device)] * steps if ct is None else _steps_of(ct, y.reverse)
        for spec, ct, y in zip(specs, whole, r.differentiable_ys, strict=True)
    ]


def _zero(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


class _Gradients:
    """Collects the gradients of inputs (one a step) and of invariant operands (summed over the steps)."""

    def __init__(self, r, operands, steps, outputs, streams, history, written) -> None:  # type: ignore[no-untyped-def]
        """`streams`: slots of the backward program that are fed step by step; `history`: of those, the states."""
        self.r, self.steps, self.streams, self.history = r, steps, streams, history
        _, xs, self.consts = r.split(operands)
        wanted = [(x, spec) for x, spec in zip(xs, r.xs, strict=True) if spec.needs_grad]
        slots = outputs[: len(wanted)]
        new = torch.zeros if None in slots else torch.empty  # (no gradient of a step: zero)
        device = device_of(operands)
        self.whole = [new(x.shape, dtype=x.dtype, device=device) for x, _ in wanted]
        # what is multiplied or summed over all steps at the end; the gradient of an input may be just that
        given = zip(slots, self.whole, wanted, strict=True)
        self.series: dict[int, Tensor] = {slot: g for slot, g, (_, spec) in given if slot is not None and not spec.reverse}
        rest = [slot for slot in r.rows if slot not in self.series and slot not in streams]
        made = {slot: torch.empty((steps, *r.rows[slot][0]), dtype=r.rows[slot][1], device=device) for slot in rest}
        self.series |= made
        places = [(s, _steps_of(g, x.reverse)) for s, g, (_, x) in zip(slots, self.whole, wanted, strict=True) if s is not None]
        self.places = Places([*places, *((slot, g.unbind(0)) for slot, g in made.items())], written)
        self.sums: dict[int, Tensor] = {}

    def take(self, values: list, t: int) -> None:  # type: ignore[type-arg]
        self.places.copy(values, t)
        for i, way in enumerate(self.r.reduced):
            if way is not None and way.kind == "sum":
                value = values[way.a]
                self.sums[i] = value.clone() if i not in self.sums else self.sums[i].add_(value)

    def results(self) -> list[Tensor]:
        wanted = [c for c, spec in zip(self.consts, self.r.consts, strict=True) if spec.needs_grad]
        return [*self.whole, *(self._reduced(i, way, c) for i, (way, c) in enumerate(zip(self.r.reduced, wanted, strict=True)))]

    def _reduced(self, i: int, way: Reduced | None, operand: Tensor) -> Tensor:
        if way is None or self.steps == 0:
            return torch.zeros_like(operand)
        if way.kind == "sum":
            return self.sums[i]
        if way.kind == "rows":
            return self._rows(way.a).sum(0).view(operand.shape)
        if way.b in self.history and way.a in self.series:  # states before each step: the initial one, and those after it
            init, after = self.history[way.b]
            a = self.series[way.a]
            first = torch.mm(a[0].t(), init)
            return first if self.steps == 1 else first.addmm_(a[1:].flatten(0, 1).t(), after[:-1].flatten(0, 1))
        return torch.mm(self._rows(way.a).t(), self._rows(way.b)).view(operand.shape)

    def _rows(self, slot: int) -> Tensor:
        """The rows of all steps, as one matrix."""
        return self.series[slot].flatten(0, 1) if slot in self.series else torch.cat(list(self.streams[slot]))
