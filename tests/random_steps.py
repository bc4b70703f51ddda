"""Random recurrences: a step of random pointwise ops over random states, inputs and constants, as a plain Python loop.

`programs` draws them with hypothesis; `Program.loop` is what a user would write; `Program.operands` makes its tensors, in any
layout. Used by `tests/test_random_steps.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, fx

from tests.passes.capture import Spike

LAYOUTS = ("plain", "transposed", "sliced", "expanded")


def spike(u: Tensor) -> Tensor:
    """One node of a recorded graph, as `torch.compiler.allow_in_graph` makes it."""
    if isinstance(u, fx.Proxy):
        return u.tracer.create_proxy("call_function", spike, (u,), {})
    return Spike.apply(u)


def straight_through(u: Tensor) -> Tensor:
    soft = u.clamp(-0.5, 0.5)
    return soft + ((u >= 0).to(u.dtype) - soft).detach()


#: name -> function of three values and a number; those of `EXACT` are the same bits on every target
EXACT = {
    "add": lambda a, b, c, n: a + b,
    "sub": lambda a, b, c, n: a - b,
    "mul": lambda a, b, c, n: a * b,
    "leak": lambda a, b, c, n: a + (b - a) * n,
    "scale": lambda a, b, c, n: n * a,
    "shift": lambda a, b, c, n: a - n,
    "complement": lambda a, b, c, n: 1.0 - a,
    "halve": lambda a, b, c, n: a / 2.0,
    "divide": lambda a, b, c, n: a / (b.abs() + 1.0),
    "negate": lambda a, b, c, n: -a,
    "abs": lambda a, b, c, n: a.abs(),
    "square": lambda a, b, c, n: a.square(),
    "relu": lambda a, b, c, n: torch.relu(a),
    "clamp": lambda a, b, c, n: a.clamp(-abs(n), abs(n)),
    "minimum": lambda a, b, c, n: torch.minimum(a, b),
    "maximum": lambda a, b, c, n: torch.maximum(a, b),
    "where": lambda a, b, c, n: torch.where(a > n, b, c),
    "compare": lambda a, b, c, n: (a <= b).to(a.dtype),
    "both": lambda a, b, c, n: torch.where((a > n) & (b < n), c, a),
    "masked": lambda a, b, c, n: (a + b).masked_fill(a + b > 1.0, n),
    "detach": lambda a, b, c, n: a.detach(),
    "lerp": lambda a, b, c, n: a * n + b * (1.0 - n),
    "straight_through": lambda a, b, c, n: straight_through(a - n),
    "reset": lambda a, b, c, n: a * (1.0 - b.detach()),
}
#: eager's and the kernel's last bit may differ: only where eager itself runs the step
INEXACT = {
    "sigmoid": lambda a, b, c, n: torch.sigmoid(a),
    "tanh": lambda a, b, c, n: torch.tanh(a),
    "gauss": lambda a, b, c, n: torch.exp(-a.abs()),
    "root": lambda a, b, c, n: torch.sqrt(a.abs() + 1.0),
    "power": lambda a, b, c, n: a.pow(3),
}
OPAQUE = {"spike": lambda a, b, c, n: spike(a - n)}
OPS = {**EXACT, **INEXACT, **OPAQUE}


@dataclass(frozen=True)
class Operand:
    shape: tuple[int, ...]
    layout: str = "plain"
    needs_grad: bool = True

    def make(self, dtype: torch.dtype, scale: float, leading: tuple[int, ...] = ()) -> Tensor:
        """A tensor of this shape (behind `leading` dims) in this layout."""
        shape = (*leading, *self.shape)
        if self.layout == "transposed" and len(shape) > 1:
            value = torch.randn(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
        elif self.layout == "sliced" and shape:
            value = torch.randn(*shape[:-1], 2 * shape[-1] + 1)[..., 1::2]
        elif self.layout == "expanded" and self.shape:
            value = torch.randn(*shape[:-1], 1)
        else:
            value = torch.randn(shape)
        value = (value * scale).to(dtype)  # (keeps the strides)
        if self.layout == "expanded" and self.shape:
            value = value.expand(shape)
        if self.layout == "sliced" and shape:
            wide = torch.zeros(*shape[:-1], 2 * shape[-1] + 1, dtype=dtype)
            wide[..., 1::2] = value
            value = wide[..., 1::2]
        return value.detach().requires_grad_(self.needs_grad and dtype.is_floating_point)


@dataclass(frozen=True)
class State:
    start: str  # "tensor": an operand; "zeros", "scalar": made before the loop
    operand: Operand
    next: int
    bounded: bool


@dataclass(frozen=True)
class Program:
    dtype: torch.dtype
    shape: tuple[int, ...]
    states: tuple[State, ...]
    xs: tuple[Operand, ...]
    consts: tuple[Operand, ...]
    ops: tuple[tuple[str, int, int, int, float], ...]
    outs: tuple[int, ...]
    counter: bool = False
    steps: int = 3
    read: str = "index"  # how the loop reads x: "index", "unbind", "backwards"
    collect: str = "stack"  # what it does with its values: "stack", "stack_last", "sum"
    gives_states: bool = True
    seed: int = 0

    # ---------------------------------------------------------------------------------------------------------- meaning

    def step(self, states, xs, consts, count=None):  # type: ignore[no-untyped-def]
        """``-> next states, next count, values``"""
        pool = [*consts, *states, *xs]
        if count is not None:
            pool.append((count > 0).to(self.dtype) * pool[-1])
        for name, i, j, k, number in self.ops:
            pool.append(OPS[name](_pick(pool, i), _pick(pool, j), _pick(pool, k), number))
        following = []
        for state in self.states:
            value = _pick(pool, state.next)
            following.append(value.clamp(-3.0, 3.0) if state.bounded else value)
        if count is not None:
            count = torch.where(pool[-1] > 0.5, 3, count - 1).clamp(min=0)
        return following, count, [_pick(pool, o) for o in self.outs]

    def loop(self, *operands):  # type: ignore[no-untyped-def]
        """The loop as a user writes it."""
        states, xs, consts = self.split(operands)
        count = xs[0].new_zeros(self.shape, dtype=torch.int64) if self.counter else None
        if self.read == "unbind":
            xs = [x.unbind(0) for x in xs]
        collected: list[list[Tensor]] = [[] for _ in self.outs]
        for t in reversed(range(self.steps)) if self.read == "backwards" else range(self.steps):
            states, count, values = self.step(states, [x[t] for x in xs], consts, count)
            for series, value in zip(collected, values, strict=True):
                series.append(value)
        if self.collect == "sum":
            results = [sum(values) for values in collected]
        else:
            results = [torch.stack(values, -1 if self.collect == "stack_last" else 0) for values in collected]
        if self.gives_states:
            results += states
            results += [count] if count is not None else []
        return tuple(results)

    # --------------------------------------------------------------------------------------------------------- operands

    def operands(self, steps: int | None = None) -> list[Tensor]:
        """The tensors `loop` takes: initial states that are tensors, inputs, constants."""
        torch.manual_seed(self.seed)
        steps = self.steps if steps is None else steps
        tensors = [s.operand.make(self.dtype, 0.5) for s in self.states if s.start == "tensor"]
        tensors += [x.make(self.dtype, 2.0, (steps,)) for x in self.xs]
        return tensors + [c.make(self.dtype, 0.7) for c in self.consts]

    def split(self, operands):  # type: ignore[no-untyped-def]
        given = sum(s.start == "tensor" for s in self.states)
        tensors, xs, consts = iter(operands[:given]), operands[given : given + len(self.xs)], operands[given + len(self.xs) :]
        states = []
        for state in self.states:
            if state.start == "tensor":
                states.append(next(tensors))
            else:
                states.append(xs[0].new_zeros(state.operand.shape if state.start == "zeros" else ()))
        return states, list(xs), list(consts)


def _pick(pool: list, i: int):  # type: ignore[type-arg, no-untyped-def]
    """Counted from the youngest value."""
    return pool[-1 - i % len(pool)]


# ---------------------------------------------------------------------------------------------------------------- drawing


@st.composite
def programs(draw, ops=tuple(OPS), dtypes=(torch.float32, torch.float64), max_steps=40, direct=False):  # type: ignore[no-untyped-def]
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    index = st.integers(0, 30)

    def operand(full=False):  # type: ignore[no-untyped-def]
        kept = shape if full else _smaller(draw, shape)
        return Operand(kept, draw(st.sampled_from(LAYOUTS)), draw(st.booleans() if not full else st.just(True)))

    starts = ("tensor",) if direct else ("zeros", "scalar", "tensor")
    states = tuple(
        State(draw(st.sampled_from(starts)), operand(draw(st.booleans())), draw(index), draw(st.integers(0, 7)) > 0)
        for _ in range(draw(st.integers(1, 4)))
    )
    xs = (operand(True), *(operand() for _ in range(draw(st.integers(0, 1)))))
    consts = tuple(operand() for _ in range(draw(st.integers(0, 3))))
    number = st.sampled_from([0.5, -0.25, 0.9, 1.0, 0.1, 0.3])
    steps = draw(st.one_of(st.integers(2, 4), st.integers(2, 5), st.integers(1, 12), st.integers(1, max_steps)))
    most = max(3, 150 // steps)  # (the graph has one node an op and step)
    drawn = st.tuples(st.sampled_from(ops), index, index, index, number)
    return Program(
        dtype=draw(st.sampled_from(dtypes)),
        shape=shape,
        states=states,
        xs=xs,
        consts=consts,
        ops=tuple(draw(st.lists(drawn, min_size=3, max_size=min(25, most)))),
        outs=tuple(draw(st.lists(index, min_size=1, max_size=2))),
        counter=draw(st.integers(0, 4)) == 0,
        steps=steps,
        read=draw(st.sampled_from(("index", "unbind", "backwards"))),
        collect=draw(st.sampled_from(("stack", "stack_last", "sum"))),
        gives_states=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def _smaller(draw, shape):  # type: ignore[no-untyped-def]
    """A shape that broadcasts to `shape`."""
    kept = shape[draw(st.integers(0, len(shape))) :]
    return tuple(1 if draw(st.integers(0, 3)) == 0 else s for s in kept)
