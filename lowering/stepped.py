"""Running a `SteppedRecurrence`: its programs, once a step, over preallocated series.

`lowering/step_runner` runs the steps; here is what they read and write, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from snn_compile.ir.stepped import Program, Reduced, SteppedRecurrence
from snn_compile.lowering.by_channel import (
    ChannelCall,
    backward_by_channel,
    empty_result,
    forward_by_channel,
    runs_channels_last,
)
from snn_compile.lowering.cpp.spike_product import sum_outer
from snn_compile.lowering.launch import MOST_LAUNCHES, Target
from snn_compile.lowering.result_memory import allocate
from snn_compile.lowering.series import Before, Constant, Series, Slices
from snn_compile.lowering.step_runner import Places, StepRunner, Steps, zero

# ------------------------------------------------------------------------------------------------------------- forward


def kept_results(r: SteppedRecurrence) -> list[int]:
    """Results of a step, by position, that are given for the backward alone: states, then residuals. A history that is an output
    is not given twice."""
    own = [i for i, y in zip(r.history, r.shared, strict=True) if y is None]
    return [*own, *range(len(r.carries) + len(r.ys), len(r.results))]


def allocate_stepped(r: SteppedRecurrence, operands: Sequence[Tensor], steps: int) -> list[Tensor]:
    """Memory for what `run_stepped` gives: ``ys, finals, history, residuals``.

    All are contiguous, or whole values channels-last (`runs_channels_last`).
    """
    n, m = len(r.carries), len(r.ys)
    _, xs, _ = r.split(operands)
    device, channels_last = operands[0].device, runs_channels_last(r, xs)
    found = []
    for (shape, dtype), y in zip(r.results[n : n + m], r.ys, strict=True):
        d = y.time_dim % (len(shape) + 1)
        follows = channels_last and d == 0
        found.append(empty_result(r, (*shape[:d], steps, *shape[d:]), dtype, device, follows, timed=True))
    finals = [spec for spec, c in zip(r.results, r.carries, strict=False) if c.is_result]
    found += [empty_result(r, shape, dtype, device, channels_last) for shape, dtype in finals]
    kept = [r.results[i] for i in kept_results(r)]
    return found + [empty_result(r, (steps, *shape), dtype, device, channels_last, timed=True) for shape, dtype in kept]


def run_stepped(r: SteppedRecurrence, target: Target, operands: Sequence[Tensor], steps: int) -> list[Tensor]:
    """``operands -> ys, finals, history, residuals``; `history` holds the states *after* each step."""
    numbers, xs, consts = r.split(operands)
    inits: list[Tensor] = _whole_states(r, numbers)  # type: ignore[assignment]
    runner = _prepared(r, r.forward, target, "forward", operands)
    device = operands[0].device
    out: list[int] = r.forward.outputs  # type: ignore[assignment]  # (none is None: only a gradient may be zero)
    n, m = len(r.carries), len(r.ys)
    # (slot, series) of everything that is kept for each step
    results = [*range(n, n + m), *kept_results(r)]
    wanted = [out[i] for i in results]
    channels_last = runs_channels_last(r, xs)
    specs = [r.results[i] for i in results]
    kept = [empty_result(r, (steps, *shape), dtype, device, channels_last, timed=True) for shape, dtype in specs]
    reverse = [y.reverse for y in r.ys] + [False] * (len(kept) - m)
    values = runner.values()
    values[n + len(xs) : n + len(xs) + len(consts)] = consts
    runner.prepare(values)
    finals = None
    if runner.by_channel:
        places = list(zip(wanted, kept, reverse, strict=True))
        call = ChannelCall(r, "forward", target, channels_last)
        finals = forward_by_channel(call, inits, xs, values, places, steps)
        if finals is not None and all(y.time_dim == 0 for y in r.ys):
            call.answer_later(steps, operands, [*kept[:m], *finals, *kept[m:]])
    if finals is None:
        series = [Slices(x, spec.reverse) for x, spec in zip(xs, r.xs, strict=True)]
        views = [Slices(k, back) for k, back in zip(kept, reverse, strict=True)]
        plan = Steps(
            range(steps),
            list(enumerate(series, n)),
            Places(zip(wanted, views, strict=True), runner.written),
            list(enumerate(out[:n])),
        )
        carries = runner.run(values, inits, plan)
        finals = [_new(r, c, channels_last) for c, spec in zip(carries, r.carries, strict=True) if spec.is_result]
    ys = [k if y.time_dim == 0 else k.movedim(0, y.time_dim).contiguous() for k, y in zip(kept, r.ys, strict=False)]
    return [*ys, *finals, *kept[m:]]


def _new(r: SteppedRecurrence, state: Tensor, channels_last: bool) -> Tensor:
    """A result of its own, in the layout of results."""
    return empty_result(r, state.shape, state.dtype, state.device, channels_last).copy_(state)


def _whole_states(r: SteppedRecurrence, inits: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Initial states in the shape of states: a constant one is passed as a number."""
    shapes = [shape for shape, _ in r.results]
    return [i if i is None or i.shape == shape else i.expand(shape) for i, shape in zip(inits, shapes, strict=False)]


def kept_for_backward(r: SteppedRecurrence, results: Sequence[Tensor]) -> list[Tensor]:
    """``ys, finals, history, residuals -> history, residuals``, with those that are outputs in their place."""
    rest = iter(results[len(r.ys) + len(r.finals) :])
    return [*(next(rest) if y is None else results[y] for y in r.shared), *rest]


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


def allocate_stepped_gradients(
    r: SteppedRecurrence, operands: Sequence[Tensor | None], kept: Sequence[Tensor], steps: int
) -> list[Tensor]:
    """Memory for the gradients, in the order of the operands that want one, in their sizes."""
    inits, xs, consts = r.split(operands)
    channels_last = runs_channels_last(r, xs, kept)
    inits = [i for i, c in zip(inits, r.carries, strict=True) if c.init_needs_grad]
    xs = [x for x, spec in zip(xs, r.xs, strict=True) if spec.needs_grad]
    consts = [c for c, spec in zip(consts, r.consts, strict=True) if spec.needs_grad]
    found = [empty_result(r, i.shape, i.dtype, i.device, channels_last) for i in inits]
    found += [empty_result(r, x.shape, x.dtype, x.device, channels_last, timed=True) for x in xs]
    return found + [c.new_empty(c.shape) for c in consts]


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
    given = [*operands, *kept, *cotangents]
    inits = _whole_states(r, inits)
    operands = [*inits, *xs, *consts]
    runner = _prepared(r, program, target, "backward", [*operands, *kept, *cotangents])
    n, n_ops = len(r.carries), len(operands)
    values = runner.values()
    values[n + len(xs) : n_ops] = consts
    runner.prepare(values)
    ct_carries, whole_ys = _cotangents(r, device_of(operands), cotangents)
    channels_last = runs_channels_last(r, xs, kept)
    if runner.by_channel:
        call = ChannelCall(r, "backward", target, channels_last)
        gradients = backward_by_channel(call, operands, kept, values, (ct_carries, whole_ys), steps)
        if gradients is not None:
            if None not in r.reduced:  # (such a gradient is zero)
                call.answer_later(steps, given, gradients)
            return gradients
    # (the step that sees the initial state is not the first one here: the state must lie in memory like those after it)
    before = [(i, Before(_like_history(r, inits[i], channels_last), k)) for i, k in zip(r.history, kept, strict=False)]  # type: ignore[arg-type]
    read = [(n + j, x, spec) for j, (x, spec) in enumerate(zip(xs, r.xs, strict=True)) if x is not None]
    streams: list[tuple[int, Series]] = [(slot, Slices(x, spec.reverse)) for slot, x, spec in read]
    streams += before
    streams += [(n_ops + j, Slices(k)) for j, k in enumerate(kept[len(r.history) :])]
    ct_ys = _cotangents_of_steps(r, device_of(operands), whole_ys)
    first_ct = n_ops + r.n_residuals
    n_ct = len(ct_carries)
    streams += [(first_ct + n_ct + j, s) for j, s in enumerate(ct_ys)]
    outputs = program.outputs
    history = {i: (inits[i], k) for i, k in zip(r.history, kept, strict=False)}
    sink = _Gradients(r, operands, steps, outputs[n_ct:], dict(streams), history, runner.written, channels_last)
    carried = list(enumerate(outputs[:n_ct], first_ct))
    plan = Steps(range(steps)[::-1], streams, sink.places, carried, sink.summed, sink.sums)
    ct_carries = runner.run(values, ct_carries, plan)
    wanted = [ct for ct, c in zip(ct_carries, r.differentiable_carries, strict=True) if c.init_needs_grad]
    return [*(_new(r, g, channels_last) for g in wanted), *sink.results()]


def _like_history(r: SteppedRecurrence, init: Tensor, channels_last: bool) -> Tensor:
    return _new(r, init, True) if channels_last else init.contiguous()


def _cotangents(r: SteppedRecurrence, device: torch.device, cotangents: Sequence[Tensor | None]):  # type: ignore[no-untyped-def]
    """Of the carries after the last step (an absent one is zero, without memory), and of the outputs, time first, or None."""
    n_ys = len(r.differentiable_ys)
    finals = iter(cotangents[n_ys:])
    carries = []
    for spec, c in zip(r.results, r.carries, strict=False):
        if c.differentiable:
            ct = next(finals) if c.is_result else None
            carries.append(zero(*spec, device) if ct is None else ct)
    pairs = zip(cotangents[:n_ys], r.differentiable_ys, strict=True)
    return carries, [None if ct is None else ct.movedim(y.time_dim, 0) for ct, y in pairs]


def _cotangents_of_steps(r: SteppedRecurrence, device: torch.device, whole: Sequence[Tensor | None]) -> list[Series]:
    """The cotangents of the outputs, time first, as one a step; an absent one is zero, without memory."""
    n = len(r.carries)
    specs = [spec for spec, y in zip(r.results[n : n + len(r.ys)], r.ys, strict=True) if y.differentiable]
    return [
        Constant(zero(*spec, device)) if ct is None else Slices(ct, y.reverse)
        for spec, ct, y in zip(specs, whole, r.differentiable_ys, strict=True)
    ]


class _Gradients:
    """Collects the gradients of inputs (one a step) and of invariant operands (summed over the steps)."""

    def __init__(self, r, operands, steps, outputs, streams, history, written, channels_last) -> None:  # type: ignore[no-untyped-def]
        """`streams`: slots of the backward program that are fed step by step; `history`: of those, the states."""
        self.r, self.steps, self.streams, self.history = r, steps, streams, history
        _, xs, self.consts = r.split(operands)
        wanted = [(x, spec) for x, spec in zip(xs, r.xs, strict=True) if spec.needs_grad]
        slots = outputs[: len(wanted)]
        device = device_of(operands)
        self.whole = [empty_result(r, x.shape, x.dtype, device, channels_last, timed=True) for x, _ in wanted]
        for slot, gradient in zip(slots, self.whole, strict=True):
            if slot is None:  # no gradient of a step
                gradient.zero_()
        # what is multiplied or summed over all steps at the end; the gradient of an input may be just that
        given = zip(slots, self.whole, wanted, strict=True)
        self.series: dict[int, Tensor] = {slot: g for slot, g, (_, spec) in given if slot is not None and not spec.reverse}
        rest = [slot for slot in r.rows if slot not in self.series and slot not in streams]
        made = {slot: allocate((steps, *r.rows[slot][0]), r.rows[slot][1], device) for slot in rest}
        self.series |= made
        places = [(s, Slices(g, x.reverse)) for s, g, (_, x) in zip(slots, self.whole, wanted, strict=True) if s is not None]
        self.places = Places([*places, *((slot, Slices(g)) for slot, g in made.items())], written)
        self.summed = [way.a for way in r.reduced if way is not None and way.kind == "sum"]
        self.sums: list[Tensor] = []

    def results(self) -> list[Tensor]:
        wanted = [c for c, spec in zip(self.consts, self.r.consts, strict=True) if spec.needs_grad]
        sums = iter(self.sums)
        return [*self.whole, *(self._reduced(way, c, sums) for way, c in zip(self.r.reduced, wanted, strict=True))]

    def _reduced(self, way: Reduced | None, operand: Tensor, sums: Iterator[Tensor]) -> Tensor:
        if way is None or self.steps == 0:
            return torch.zeros_like(operand)
        if way.kind == "sum":
            return next(sums)
        if way.kind == "rows":
            return self._rows(way.a).sum(0).view(operand.shape)
        if way.b in self.history and way.a in self.series:  # states before each step: the initial one, and those after it
            init, after = self.history[way.b]
            a = self.series[way.a]
            first = torch.mm(a[0].t(), init)
            return first if self.steps == 1 else first.add_(_outer(a[1:].flatten(0, 1), after[:-1].flatten(0, 1)))
        return _outer(self._rows(way.a), self._rows(way.b)).view(operand.shape)

    def _rows(self, slot: int) -> Tensor:
        """The rows of all steps, as one matrix."""
        return (
            self.series[slot].flatten(0, 1)
            if slot in self.series
            else torch.cat([self.streams[slot][t] for t in range(self.steps)])
        )


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """``a.T @ b``; where one of them is few spikes, rows of the other one are summed."""
    if (rows := sum_outer(a, b)) is not None:
        return rows
    if (rows := sum_outer(b, a)) is not None:
        return rows.t().contiguous()
    return torch.mm(a.t(), b)
