"""`Loop`: T equal iterations of a torch-level body, rolled up again. T may be symbolic: one loop for all lengths.

    carries = inits
    for t in range(length):
        (*carries, *values) = body(*carries, *(x[t] for x in xs), *consts)
        for y in ys: y.append(values[...])
    return (stack(y) for y in ys), carries

A `Loop` sits in the outer graph as a `call_module` node whose operands are ``inits, xs, consts`` and whose results are
``ys, finals``. It is callable and differentiable: running it is its meaning, so that every pass can be tested by running
the graph before and after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from snn_compile.ir.values import count_text, known_int


@dataclass
class LoopCarry:
    name: str
    #: example of the carried value (a fake tensor): dtype, shape, requires_grad
    example: Tensor
    #: the value after the last iteration is a result of the loop
    is_result: bool = False


@dataclass
class LoopInput:
    """A time series: dim 0 of the operand is time; iteration t reads ``x[T-1-t]`` where `reverse`."""

    name: str
    example: Tensor
    reverse: bool = False


@dataclass
class LoopConst:
    name: str
    example: object


@dataclass
class LoopOutput:
    """``torch.stack([value of iteration t for t in range(T)], dim)``, back to front where `reverse`."""

    name: str
    example: Tensor
    dim: int = 0
    reverse: bool = False


class Loop(nn.Module):
    """See the module's docstring. Placeholders of `body`: carries, xs, consts; output: next carries, values (one a `y`)."""

    def __init__(
        self,
        name: str,
        length: int | torch.SymInt,
        body: fx.GraphModule,
        carries: Sequence[LoopCarry],
        xs: Sequence[LoopInput],
        consts: Sequence[LoopConst],
        ys: Sequence[LoopOutput],
        location: str = "",
    ) -> None:
        super().__init__()
        self.name, self.length, self.body, self.location = name, length, body, location
        self.carries, self.xs, self.consts, self.ys = list(carries), list(xs), list(consts), list(ys)
        #: recurrent and pointwise: can be one kernel (found by passes/distribute)
        self.is_kernel = False
        #: a state goes from step to step
        self.is_recurrent = False

    def split(self, operands: Sequence) -> tuple[Sequence, Sequence, Sequence]:  # type: ignore[type-arg]
        """``operands -> inits, xs, consts``"""
        n, m = len(self.carries), len(self.xs)
        return operands[:n], operands[n : n + m], operands[n + m :]

    def forward(self, *operands):  # type: ignore[no-untyped-def]
        carries, xs, consts = self.split(operands)
        n = len(carries)
        # (a symbolic length would become that of the first call)
        length = self.length if isinstance(self.length, int) else len(xs[0])
        collected: list[list[Tensor]] = [[] for _ in self.ys]
        for t in range(length):
            now = [x[length - 1 - t if s.reverse else t] for x, s in zip(xs, self.xs, strict=True)]
            out = self.body(*carries, *now, *consts)
            carries = out[:n]
            for values, value in zip(collected, out[n:], strict=True):
                values.append(value)
        ys = [torch.stack(v[::-1] if y.reverse else v, y.dim) for y, v in zip(self.ys, collected, strict=True)]
        return (*ys, *(v for v, c in zip(carries, self.carries, strict=True) if c.is_result))

    def is_shorter(self, steps: int) -> bool:
        """Whether the loop is known to have fewer steps."""
        known = known_int(self.length)
        return known is not None and known < steps

    # ----------------------------------------------------------------------------------------------- access to the body

    def placeholders(self) -> list[fx.Node]:
        return [n for n in self.body.graph.nodes if n.op == "placeholder"]

    def results(self) -> tuple[list[fx.Node], list[fx.Node]]:
        """``(next carries, values)`` as nodes of the body."""
        out = list(self.body.graph.output_node().args[0])  # type: ignore[arg-type]
        return out[: len(self.carries)], out[len(self.carries) :]

    def __str__(self) -> str:
        lines = [f"loop {self.name} over {count_text(self.length)} steps" + (f" at {self.location}" if self.location else "")]
        for kind, items in (("carry", self.carries), ("x", self.xs), ("const", self.consts), ("y", self.ys)):
            lines += [f"  {kind} {i.name}: {_type(i.example)}" for i in items]
        lines += [f"  {line.strip()}" for line in str(self.body.graph).splitlines()[1:]]
        return "\n".join(lines)


def _type(example: object) -> str:
    if isinstance(example, Tensor):
        return f"{str(example.dtype).removeprefix('torch.')}{list(example.shape)}"
    return type(example).__name__


def verify(loop: Loop) -> None:
    """Raise `VerificationError` where a loop breaks a rule of the IR; run after every pass in tests."""
    from snn_compile.errors import VerificationError

    n_in = len(loop.carries) + len(loop.xs) + len(loop.consts)
    if len(loop.placeholders()) != n_in:
        raise VerificationError(f"{loop.name}: {len(loop.placeholders())} placeholders for {n_in} operands")
    out = loop.body.graph.output_node().args[0]
    if not isinstance(out, (tuple, list)) or len(out) != len(loop.carries) + len(loop.ys):
        raise VerificationError(f"{loop.name}: the body gives {out}, not the next carries and the outputs")
    if loop.is_shorter(1):
        raise VerificationError(f"{loop.name}: length {loop.length}")
    loop.body.graph.lint()


def loop_calls(gm: fx.GraphModule) -> list[tuple[fx.Node, Loop]]:
    """The calls of loops in a graph, and the loops."""
    calls = gm.graph.find_nodes(op="call_module")
    return [(c, loop) for c in calls if isinstance(loop := getattr(gm, str(c.target)), Loop)]
