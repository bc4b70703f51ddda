"""What the two directions of a kernel share: names, tensors, operand loads, the module around the body."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import fx

from snn_compile.ir.recurrence import Recurrence
from snn_compile.lowering.layout import Layout
from snn_compile.lowering.triton.analysis import inputs, invariant, output_nodes
from snn_compile.lowering.triton.emit import Emitter, Environment
from snn_compile.lowering.triton.memory import Argument, Tensor, as_block, lane_arguments, lane_lines
from snn_compile.lowering.triton.names import RESERVED, Names, identifier
from snn_compile.lowering.triton.text import KernelText, mentions, module_text, used
from snn_compile.lowering.triton.values import Value


class Kernel:
    """What the two directions share: names, tensors of the call, operand loads, and putting the text together."""

    direction = ""

    def __init__(self, recurrence: Recurrence, layout: Layout) -> None:
        self.recurrence, self.layout = recurrence, layout
        self.names = Names(RESERVED | {f"{what}_{d}" for what in ("index", "size") for d in range(layout.ndim)})
        self.tensors: list[Tensor] = []
        self.scratch: list[Argument] = []
        self.kept: tuple[torch.dtype, ...] = ()
        self.states = [self.names.unique(c.name) for c in recurrence.carries]
        self.inits = [self.tensor(f"{c.name}_init", c.dtype) for c in recurrence.carries]
        self.xs = [self.tensor(x.name, x.dtype, timed=True, reverse=x.reverse) for x in recurrence.xs]
        self.consts = [self.tensor(c.name, c.dtype, scalar=c.is_scalar) for c in recurrence.consts]
        self.x_names = [self.names.unique(x.name) for x in recurrence.xs]
        self.const_names = [self.names.unique(c.name) for c in recurrence.consts]

    def tensor(self, base: str, dtype: torch.dtype, **kw: bool) -> Tensor:
        """The next tensor of the call, in the order of `launch.Target`."""
        self.tensors.append(Tensor(self.names, base, len(self.tensors), dtype, self.layout, **kw))
        return self.tensors[-1]

    def generate(self) -> KernelText:
        raise NotImplementedError

    # -------------------------------------------------------------------------------------------------- operands

    def state_values(self, names: Sequence[str] | None = None) -> list[Value]:
        pairs = zip(names or self.states, self.recurrence.carries, strict=True)
        return [Value.variable(name, c.dtype) for name, c in pairs]

    def operand_environment(self, placeholders: Sequence[fx.Node]) -> Environment:
        """The operands of one step, ``carries, xs, consts``, as variables."""
        values = self.state_values()
        values += [x.value(name) for x, name in zip(self.xs, self.x_names, strict=True)]
        values += [c.value(name) for c, name in zip(self.consts, self.const_names, strict=True)]
        return dict(zip(placeholders, values, strict=False))

    def load_states(self, which: Iterable[int]) -> list[str]:
        lines = []
        for i in which:
            lines.append(f"{self.states[i]} = {as_block(self.inits[i].value(self.inits[i].load('inside')))}")
        return lines

    def load_inputs(self, which: Iterable[int], mask: str, in_range: str = "") -> list[str]:
        return [f"{self.x_names[i]} = {self.xs[i].load(mask, in_range=in_range)}" for i in which]

    def prelude(self, graphs: Sequence[tuple[fx.Graph, list[fx.Node]]]) -> tuple[list[str], Environment]:
        """Loads of the constants and everything that depends on them alone: once, before the loop.

        `graphs`: with each graph the nodes that the kernel needs of it.
        """
        emitter = Emitter(self.names, {})
        loaded: set[int] = set()
        first = len(self.states) + len(self.xs)
        for graph, nodes in graphs:
            placeholders = [n for n in graph.nodes if n.op == "placeholder"]
            consts = placeholders[first : first + len(self.consts)]
            loaded |= {i for i, c in enumerate(consts) if c in nodes}
            emitter.env.update(self.operand_environment(placeholders))
            fixed = invariant(nodes, consts)
            used = {i for n in nodes if n not in fixed for i in inputs(n)} | set(output_nodes(graph))
            emitter.emit(fixed, [n for n in fixed if n in used], named=True)
        lines = [f"{self.const_names[i]} = {self.consts[i].load('inside')}" for i in sorted(loaded)]
        return [*lines, *map(str, emitter.statements)], emitter.env

    # ------------------------------------------------------------------------------------------------------ text

    def assemble(self, body: list[str]) -> KernelText:
        """The module's text, with the arguments and index lines that the body uses."""
        offsets = [f"{t.lanes} = {t.offset}" for t in self.tensors if t.lanes not in ("", "lane")]
        body = used([*lane_lines(self.layout), *offsets], body) + body
        text = "\n".join(body)
        arguments = [a for t in self.tensors for a in t.arguments if a.kind == "pointer"]
        arguments += [*self.scratch, *lane_arguments(self.layout)]
        arguments += [a for t in self.tensors for a in t.arguments if a.kind != "pointer"]
        arguments = [a for a in arguments if mentions(text, a.name)]
        constants = ["BLOCK", "INDEX", *(["SEGMENT"] if mentions(text, "SEGMENT") else [])]
        name = identifier(self.recurrence.name)
        equations = [f"{name}, {self.direction}", *self.recurrence.equations]
        streamed = tuple(t.dtype for t in self.tensors if t.timed and t.block and mentions(text, t.pointer.name))
        kernel = module_text(f"{name}_{self.direction}", equations, arguments, constants, body)
        return replace(kernel, streamed=streamed, kept=self.kept)


def free(names: Names, name: str, suffix: str) -> str:
    """`name`, or with a suffix where the kernel has another value of that name."""
    return f"{name}_{suffix}" if identifier(name) in names.taken else name
