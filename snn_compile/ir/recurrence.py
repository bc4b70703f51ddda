"""`Recurrence`: a time loop whose step is pointwise, ready to become one kernel.

    for t in range(T):
        (*carries, *ys[t]) = step(*carries, *(x[t] for x in xs), *consts)
    return ys, carries

Every value of the step is one scalar a *lane*; the lanes are the elements of the recurrence's shape ``S``, the broadcast
shape of all operands. An operand smaller than ``S`` is read through zero strides, so broadcasting costs nothing.

Operands are passed in the order ``inits, xs, consts``; results come back in the order ``ys, finals``.
The reverse recurrence (`Recurrence.backward`) takes the operands and the cotangents of the results, and yields the
gradients of those operands that need one: ``grad_inits, grad_xs, grad_consts``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from snn_compile.ir.values import shape_hint


@dataclass(frozen=True)
class Carry:
    """A value handed from step t to step t+1 (`carry` of `jax.lax.scan`); its initial value is an operand."""

    name: str
    dtype: torch.dtype
    #: a cotangent flows back through it, from step t+1 to step t
    differentiable: bool = False
    #: its initial value wants a gradient
    init_needs_grad: bool = False
    #: its value after the last step is a result
    is_result: bool = False


@dataclass(frozen=True)
class TimeSeries:
    """An operand read once a step, ``x[t]`` (or ``x[T-1-t]`` where `reverse`); dim 0 of the operand is time."""

    name: str
    dtype: torch.dtype
    needs_grad: bool = False
    reverse: bool = False


@dataclass(frozen=True)
class Const:
    """An operand that every step reads whole: a parameter, a buffer, a static input."""

    name: str
    dtype: torch.dtype
    needs_grad: bool = False
    #: a 0-d tensor: it does not take part in type promotion (PyTorch's rule for dimensionless tensors). Its gradient is,
    #: like every other, the contribution of each lane.
    is_scalar: bool = False


@dataclass(frozen=True)
class Output:
    """A value of every step, stored along a new dim `time_dim` of the result (as `torch.stack(values, time_dim)`)."""

    name: str
    dtype: torch.dtype
    time_dim: int = 0
    differentiable: bool = False
    #: stored at ``T-1-t``
    reverse: bool = False


class Signature:
    """What follows from ``carries, xs, consts, ys`` alone; operands come as ``inits, xs, consts``, results as ``ys, finals``."""

    carries: tuple[Carry, ...]
    xs: tuple[TimeSeries, ...]
    consts: tuple[Const, ...]
    ys: tuple[Output, ...]

    @property
    def operands(self) -> list[Carry | TimeSeries | Const]:
        """In the order in which step and backward take them."""
        return [*self.carries, *self.xs, *self.consts]

    @property
    def finals(self) -> tuple[Carry, ...]:
        return tuple(c for c in self.carries if c.is_result)

    @property
    def differentiable_carries(self) -> tuple[Carry, ...]:
        return tuple(c for c in self.carries if c.differentiable)

    @property
    def differentiable_ys(self) -> tuple[Output, ...]:
        return tuple(y for y in self.ys if y.differentiable)

    @property
    def needs_grad(self) -> list[bool]:
        """For each operand, whether it wants a gradient."""
        inits = [c.init_needs_grad for c in self.carries]
        return inits + [x.needs_grad for x in self.xs] + [c.needs_grad for c in self.consts]

    @property
    def differentiable(self) -> list[bool]:
        """For each result, whether a cotangent reaches it."""
        return [y.differentiable for y in self.ys] + [c.differentiable for c in self.finals]

    def split(self, operands: Sequence) -> tuple[Sequence, Sequence, Sequence]:  # type: ignore[type-arg]
        """``operands -> inits, xs, consts``"""
        n, m = len(self.carries), len(self.xs)
        return operands[:n], operands[n : n + m], operands[n + m :]


@dataclass
class Recurrence(Signature):
    """See the module's docstring.

    `step` and `backward` are graphs of functional ATen pointwise ops; ``meta["val"]`` of each node carries dtype and shape
    (``S`` or 0-d).

    ``step(*carries, *xs, *consts) -> (*next_carries, *ys)``

    ``backward(*carries, *xs, *consts, *ct_next_carries, *ct_ys) -> (*ct_carries, *grad_xs, *grad_consts)``
    where ``carries`` are those *before* the step, ``ct_next_carries``/``ct_carries`` run over the differentiable carries,
    ``ct_ys`` over the differentiable outputs, ``grad_xs``/``grad_consts`` over the operands that need a gradient. A result
    that is `None` is zero. `grad_consts` is the contribution of one step; the kernel sums it over t.
    """

    name: str
    carries: tuple[Carry, ...]
    xs: tuple[TimeSeries, ...]
    consts: tuple[Const, ...]
    ys: tuple[Output, ...]
    step: fx.GraphModule
    backward: fx.GraphModule | None = None
    #: lines of text: charge, fire, reset as equations (comments of the generated kernels, `explain`)
    equations: tuple[str, ...] = ()
    #: where the loop is in the user's code, for reports
    location: str = ""
    meta: dict = field(default_factory=dict)
    #: compiled kernels by target, direction and layout, so that a call looks them up without generating their text
    kernels: dict = field(default_factory=dict, repr=False, compare=False)
    #: prepared calls by target, direction, T, sizes and strides (`lowering.launch.Launch`)
    launches: dict = field(default_factory=dict, repr=False, compare=False)
    #: by direction: who answers later calls without Python (`lowering.launch.DirectCalls`)
    direct: dict = field(default_factory=dict, repr=False, compare=False)

    def shape(self, operands: Sequence[torch.Tensor]) -> torch.Size:
        """``S``: the broadcast of the initial values, of one step's inputs and of the constants."""
        first, last = len(self.carries), len(self.carries) + len(self.xs)
        shapes = [o.shape[1:] if first <= i < last else o.shape for i, o in enumerate(operands)]
        widest = max(shapes, key=len)
        if all(s == widest or not s for s in shapes):  # the usual case, and cheaper than PyTorch's own function
            return widest
        return torch.broadcast_shapes(*shapes)

    def shape_hint(self, operands: Sequence[torch.Tensor]) -> tuple[int, ...]:
        """`shape`, of examples whose sizes may be symbolic, without adding a guard."""
        inits, xs, consts = self.split(operands)
        return tuple(torch.broadcast_shapes(*(shape_hint(x)[1:] for x in xs), *map(shape_hint, (*inits, *consts))))

    def __call__(self, *operands: torch.Tensor, steps: int) -> tuple[torch.Tensor, ...]:
        """The meaning of the recurrence: run it step by step with eager ATen (not differentiable)."""
        shape = self.shape(operands)
        n_carries = len(self.carries)
        inits, xs, consts = self.split(operands)
        carries = [i.expand(shape) for i in inits]
        wide = [c if spec.is_scalar else c.expand(shape) for c, spec in zip(consts, self.consts, strict=True)]
        collected: list[list[torch.Tensor]] = [[] for _ in self.ys]
        for t in range(steps):
            now = [x[steps - 1 - t if spec.reverse else t].expand(shape) for x, spec in zip(xs, self.xs, strict=True)]
            out = self.step(*carries, *now, *wide)
            carries = list(out[:n_carries])
            for values, value in zip(collected, out[n_carries:], strict=True):
                values.append(value)
        ys = []
        for spec, values in zip(self.ys, collected, strict=True):
            values = values[::-1] if spec.reverse else values
            if values:
                ys.append(torch.stack([v.expand(shape) for v in values], spec.time_dim))
            else:
                device = operands[0].device if operands else None
                ys.append(torch.empty(_insert(shape, spec.time_dim, 0), dtype=spec.dtype, device=device))
        finals = [v.expand(shape).to(c.dtype) for v, c in zip(carries, self.carries, strict=True) if c.is_result]
        return (*ys, *finals)


def _insert(shape: Sequence[int], dim: int, size: int) -> tuple[int, ...]:
    dim = dim % (len(shape) + 1)
    return (*shape[:dim], size, *shape[dim:])
