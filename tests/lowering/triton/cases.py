"""Recurrences under test: bodies, their signatures, operands in awkward layouts, and references in eager."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from snn_compile.ir.recurrence import Carry, Const, Output, Recurrence, TimeSeries
from snn_compile.lowering.ops import is_supported
from snn_compile.passes.trace_step import trace_step


class Sigmoid(torch.autograd.Function):
    """Heaviside with the derivative of a sigmoid."""

    @staticmethod
    def forward(ctx, x, alpha):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.alpha = alpha
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(ctx.alpha * x)
        return grad * (1 - s) * s * ctx.alpha, None


def lif(v: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    h = v + (x - v) / 2.0
    s = Sigmoid.apply(h - 1.0, 4.0)
    return h * (1 - s), s


def detached_lif(v: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    h = v + (x - v) / 2.0
    s = Sigmoid.apply(h - 1.0, 4.0)
    return h - s.detach(), s


def parametric(v: Tensor, x: Tensor, tau: Tensor, threshold: Tensor) -> tuple[Tensor, ...]:
    h = v + (x - v) / tau
    s = Sigmoid.apply(h - threshold * 2, 4.0)
    return h * (1 - s), s


def synaptic(i: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    i = i * 0.875 + x
    h = v * 0.75 + i
    s = Sigmoid.apply(h - 1.0, 4.0)
    return i, h - s * 0.5, s, h


def refractory(v: Tensor, resting: Tensor, count: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    h = torch.where(resting, 0.0, v * 0.5 + x)
    s = Sigmoid.apply(h - 1.0, 4.0)
    fired = s > 0.5
    count = torch.where(fired, 3, torch.clamp(count - 1, min=0)).to(count.dtype)
    return h * (1 - s), count > 0, count, s


def delayed(a: Tensor, b: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    v = v * 0.5 + a
    return b, x, v, v * b


def integrator(v: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    v = v * 0.5 + x
    return v, v


@dataclass(frozen=True)
class Case:
    body: Callable[..., tuple[Tensor, ...]]
    carries: tuple[Carry, ...]
    xs: tuple[TimeSeries, ...]
    consts: tuple[Const, ...] = ()
    outputs: tuple[str, ...] = ("s",)


def _state(name: str, dtype: torch.dtype = torch.float32, grad: bool = True) -> Carry:
    return Carry(name, dtype, init_needs_grad=grad, is_result=True)


X = (TimeSeries("x", torch.float32, needs_grad=True),)
CASES: dict[str, Case] = {
    "lif": Case(lif, (_state("v"),), X),
    "detached_lif": Case(detached_lif, (_state("v"),), X),
    "parametric": Case(
        parametric,
        (_state("v"),),
        X,
        (
            Const("tau", torch.float32, needs_grad=True, is_scalar=True),
            Const("threshold", torch.float32, needs_grad=True),
        ),
    ),
    "synaptic": Case(synaptic, (_state("i"), _state("v")), X, (), ("s", "h")),
    "refractory": Case(
        refractory,
        (_state("v"), _state("resting", torch.bool, grad=False), _state("count", torch.int64, grad=False)),
        X,
    ),
    "delayed": Case(delayed, (_state("a"), _state("b"), _state("v")), X, (), ("y",)),
    "integrator": Case(integrator, (_state("v"),), X, (), ("v",)),
}


def recurrence(case: Case, dtype: torch.dtype = torch.float32, *, time_dim: int = 0, reverse: bool = False) -> Recurrence:
    def cast(what):  # type: ignore[no-untyped-def]
        return replace(what, dtype=dtype) if what.dtype == torch.float32 else what

    result = trace_step(
        case.body,
        name=case.body.__name__,
        carries=[cast(c) for c in case.carries],
        xs=[replace(cast(x), reverse=reverse) for x in case.xs],
        consts=[cast(c) for c in case.consts],
        ys=[Output(name, dtype, time_dim, reverse=reverse) for name in case.outputs],
        shape=(2, 3, 4),
        supported=is_supported,
    )
    return result


# ------------------------------------------------------------------------------------------------------------ operands


def operands(rec: Recurrence, shape: Sequence[int], steps: int, layout: str, device: str = "cpu") -> list[Tensor]:
    """Random operands; `layout` is how they lie in memory."""
    torch.manual_seed(steps * 1000 + sum(shape))
    inits = [_random(shape, c.dtype) for c in rec.carries]
    xs = [_random((steps, *shape), x.dtype) * 2 for x in rec.xs]
    consts = [_random(() if c.is_scalar else shape[-1:], c.dtype).abs() + 1 for c in rec.consts]
    if layout == "strided":
        xs = [torch.stack([x, x + 1], -1)[..., 0] for x in xs]
        inits = [torch.stack([i, i], 0)[1] for i in inits]
    elif layout == "transposed":  # time innermost but one, as [B, T, C]
        xs = [x.movedim(0, -1).contiguous().movedim(-1, 0) for x in xs]
    elif layout == "channels_last":
        xs = [x.movedim(1, -1).contiguous().movedim(-1, 1) for x in xs]
        consts = [c if c.dim() == 0 else _random((shape[0], *(1,) * (len(shape) - 1)), c.dtype).abs() + 1 for c in consts]
    elif layout == "broadcast":
        inits = [i.flatten()[0] for i in inits[:1]] + inits[1:]
        xs = [x[:, :1] for x in xs]
    elif layout == "unaligned":
        xs = [torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x) if x.numel() else x for x in xs]
    return [o.to(device) for o in (*inits, *xs, *consts)]


def _random(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if dtype == torch.bool:
        return torch.rand(shape) < 0.3
    return (torch.randn(shape) * 2).to(dtype)


# ---------------------------------------------------------------------------------------------------------- references


def autograd(rec: Recurrence, case: Case, given: Sequence[Tensor], cotangents: Sequence[Tensor], steps: int) -> list[Tensor]:
    """Gradients of the eager loop, one per operand that needs one, in the operand's own shape."""
    shape = rec.shape(given)
    needs = [c.init_needs_grad for c in rec.carries] + [s.needs_grad for s in (*rec.xs, *rec.consts)]
    leaves = [g.detach().requires_grad_(n) for g, n in zip(given, needs, strict=True)]
    n, m = len(rec.carries), len(rec.xs)
    carries = [c.expand(shape) for c in leaves[:n]]
    consts = [c if spec.is_scalar else c.expand(shape) for c, spec in zip(leaves[n + m :], rec.consts, strict=True)]
    ys: list[list[Tensor]] = [[] for _ in rec.ys]
    for t in range(steps):
        xs = [x[steps - 1 - t if s.reverse else t].expand(shape) for x, s in zip(leaves[n : n + m], rec.xs, strict=True)]
        out = case.body(*carries, *xs, *consts)
        carries = list(out[:n])
        for y, value in zip(ys, out[n:], strict=True):
            y.append(value)
    results = [torch.stack(y[::-1] if s.reverse else y, s.time_dim) for y, s in zip(ys, rec.ys, strict=True) if s.differentiable]
    results += [c for c, s in zip(carries, rec.carries, strict=True) if s.is_result and s.differentiable]
    wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
    grads = torch.autograd.grad(results, wanted, list(cotangents), allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True)]


def walk_back(rec: Recurrence, given: Sequence[Tensor], cotangents: Sequence[Tensor], steps: int) -> list[Tensor]:
    """What the backward kernel has to compute: `rec.backward` run step by step, last step first."""
    assert rec.backward is not None
    shape = rec.shape(given)
    n, m = len(rec.carries), len(rec.xs)
    wide = [g.expand(shape) for g in given[:n]]
    consts = [g if c.is_scalar else g.expand(shape) for g, c in zip(given[n + m :], rec.consts, strict=True)]
    before, inputs = [], []
    for t in range(steps):
        xs = [x[steps - 1 - t if s.reverse else t].expand(shape) for x, s in zip(given[n : n + m], rec.xs, strict=True)]
        before.append(wide)
        inputs.append(xs)
        wide = list(rec.step(*wide, *xs, *consts)[:n])
    ys = [s for s in rec.ys if s.differentiable]
    ct_ys, ct_finals = list(cotangents[: len(ys)]), list(cotangents[len(ys) :])
    cts = [ct_finals.pop(0) if c.is_result else torch.zeros(shape, dtype=c.dtype) for c in rec.differentiable_carries]
    grad_xs = [torch.zeros((steps, *shape), dtype=x.dtype) for x in rec.xs if x.needs_grad]
    sums = [torch.zeros(shape, dtype=torch.promote_types(c.dtype, torch.float32)) for c in rec.consts if c.needs_grad]
    timed = [s for s in rec.xs if s.needs_grad]
    for t in reversed(range(steps)):
        now = [c.select(s.time_dim, steps - 1 - t if s.reverse else t) for c, s in zip(ct_ys, ys, strict=True)]
        out = rec.backward(*before[t], *inputs[t], *consts, *cts, *now)
        values = [
            torch.zeros(shape, dtype=v.dtype) if o is None else o for o, v in zip(out, [*cts, *grad_xs, *sums], strict=True)
        ]
        cts = values[: len(cts)]
        for g, s, value in zip(grad_xs, timed, values[len(cts) :], strict=False):
            g[steps - 1 - t if s.reverse else t] = value
        for total, value in zip(sums, values[len(cts) + len(grad_xs) :], strict=True):
            total += value
    inits = [ct for ct, c in zip(cts, rec.differentiable_carries, strict=True) if c.init_needs_grad]
    return [*inits, *grad_xs, *sums]
