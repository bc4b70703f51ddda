"""Recurrence -> the text of its forward kernel and of its backward kernel.

A program owns BLOCK lanes and runs all time steps for them; the states stay in registers.

The backward kernel keeps nothing of the forward pass. A first sweep runs the step again from the initial state and
leaves the state at the start of every segment of SEGMENT steps in scratch memory; then, segment by segment from the
last one, the states of one segment are recomputed into registers and the cotangents walk back over them. Where
T <= SEGMENT there is no first sweep, and where the backward step reads no state there are no segments at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import fx

from snn_compile.ir.recurrence import Recurrence
from snn_compile.lowering.layout import Layout
from snn_compile.lowering.ops import opmath
from snn_compile.lowering.triton import emit
from snn_compile.lowering.triton.emit import Emitter, Environment, Statement, Value
from snn_compile.lowering.triton.literals import TRITON_DTYPES
from snn_compile.lowering.triton.memory import Argument, Tensor, as_block, lane_arguments, lane_lines
from snn_compile.lowering.triton.names import RESERVED, Names, comment, identifier


@dataclass(frozen=True)
class KernelText:
    """A kernel's module and how to call it."""

    name: str
    source: str
    arguments: tuple[Argument, ...]
    #: dtypes of the tensors that are read or written lane by lane in every step
    streamed: tuple[torch.dtype, ...]
    #: dtypes of the values a segment keeps in registers for every step; empty where there are no segments
    kept: tuple[torch.dtype, ...] = ()

    @property
    def scratch(self) -> tuple[torch.dtype, ...]:
        """Dtypes of the scratch buffers, each ``[segments - 1, N]``."""
        return tuple(a.dtype for a in self.arguments if a.kind == "scratch" and a.dtype is not None)

    @property
    def accessed(self) -> tuple[torch.dtype, ...]:
        return self.streamed + self.scratch

    @property
    def segmented(self) -> bool:
        return bool(self.kept)


def generate(recurrence: Recurrence, direction: str, layout: Layout) -> KernelText:
    return (_Forward if direction == "forward" else _Backward)(recurrence, layout).generate()


class _Kernel:
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
            fixed = emit.invariant(nodes, consts)
            used = {i for n in nodes if n not in fixed for i in emit.inputs(n)} | set(emit.output_nodes(graph))
            emitter.emit(fixed, [n for n in fixed if n in used], named=True)
        lines = [f"{self.const_names[i]} = {self.consts[i].load('inside')}" for i in sorted(loaded)]
        return [*lines, *map(str, emitter.statements)], emitter.env

    # ------------------------------------------------------------------------------------------------------ text

    def assemble(self, body: list[str]) -> KernelText:
        """The module's text, with the arguments and index lines that the body uses."""
        offsets = [f"{t.lanes} = {t.offset}" for t in self.tensors if t.lanes not in ("", "lane")]
        body = _used([*lane_lines(self.layout), *offsets], body) + body
        text = "\n".join(body)
        arguments = [a for t in self.tensors for a in t.arguments if a.kind == "pointer"]
        arguments += [*self.scratch, *lane_arguments(self.layout)]
        arguments += [a for t in self.tensors for a in t.arguments if a.kind != "pointer"]
        arguments = [a for a in arguments if _mentions(text, a.name)]
        constants = ["BLOCK", "INDEX", *(["SEGMENT"] if _mentions(text, "SEGMENT") else [])]
        parameters = [str(a) for a in arguments] + [f"{c}: tl.constexpr" for c in constants]
        name = f"{identifier(self.recurrence.name)}_{self.direction}"
        header = ["import triton", "import triton.language as tl"]
        if _mentions(text, "libdevice"):
            header.append("from triton.language.extra import libdevice")
        helpers = [_helper(d, n) for d, n in emit.ROUNDING.items() if _mentions(text, n)]
        equations = [
            comment(f"{identifier(self.recurrence.name)}, {self.direction}"),
            *map(comment, self.recurrence.equations),
        ]
        signature = ["@triton.jit", f"def {name}(", *(f"    {p}," for p in parameters), "):"]
        kernel = [*signature, *(f"    {line}" if line else "" for line in body)]
        parts = ["\n".join(header), *helpers, "\n".join([*equations, *kernel])]
        streamed = tuple(t.dtype for t in self.tensors if t.timed and t.block and _mentions(text, t.pointer.name))
        return KernelText(name, "\n\n\n".join(parts) + "\n", tuple(arguments), streamed, self.kept)


class _Forward(_Kernel):
    direction = "forward"

    def generate(self) -> KernelText:
        r = self.recurrence
        ys = [self.tensor(_free(self.names, y.name, "seq"), y.dtype, timed=True, reverse=y.reverse) for y in r.ys]
        finals = {i: self.tensor(f"{c.name}_final", c.dtype) for i, c in enumerate(r.carries) if c.is_result}
        graph, n = r.step.graph, len(r.carries)
        placeholders = [p for p in graph.nodes if p.op == "placeholder"]
        results = emit.output_nodes(graph)
        states = _closure(set(finals), lambda live: _states_read(graph, _pick(results, live) + results[n:], n))
        wanted = _pick(results, states) + results[n:]
        nodes = emit.needed(graph, wanted)
        prelude, env = self.prelude([(graph, nodes)])

        emitter = Emitter(self.names.copy(), env)
        emitter.emit(nodes, [w for w in wanted if w is not None])
        for y, result in zip(ys, results[n:], strict=True):
            value = emitter.env[result]  # type: ignore[index]
            emitter.store(y.store(value.text, "inside"), value)
        updates = [(self.states[i], emitter.env[results[i]]) for i in states]  # type: ignore[index]
        step = _update(emitter.statements, updates)

        used = [i for i in range(len(self.xs)) if placeholders[n + i] in nodes]
        loop = [*self.load_inputs(used, "inside"), *map(str, step)]
        stores = [t.store(self.states[i], "inside") for i, t in finals.items()]
        return self.assemble(
            [*prelude, *self.load_states(states), "for t in range(T):", *_indent(loop or ["pass"]), *stores]
        )


class _Backward(_Kernel):
    direction = "backward"

    def __init__(self, recurrence: Recurrence, layout: Layout) -> None:
        super().__init__(recurrence, layout)
        r = recurrence
        assert r.backward is not None
        self.graph = r.backward.graph
        self.differentiable = [i for i, c in enumerate(r.carries) if c.differentiable]
        self.ct_ys = [
            self.tensor(f"grad_{y.name}", y.dtype, timed=True, reverse=y.reverse) for y in r.differentiable_ys
        ]
        self.ct_finals = {
            i: self.tensor(f"grad_{c.name}_final", c.dtype)
            for i, c in enumerate(r.carries)
            if c.is_result and c.differentiable
        }
        self.grad_inits = {
            i: self.tensor(f"grad_{c.name}_init", c.dtype) for i, c in enumerate(r.carries) if c.init_needs_grad
        }
        self.grad_xs = [
            self.tensor(_free(self.names, f"grad_{x.name}", "in"), x.dtype, timed=True, reverse=x.reverse)
            for x in r.xs
            if x.needs_grad
        ]
        self.grad_consts = [self.tensor(f"grad_{c.name}", opmath(c.dtype)) for c in r.consts if c.needs_grad]
        self.cts = {i: self.names.unique(f"grad_{r.carries[i].name}") for i in self.differentiable}
        self.ct_y_names = [self.names.unique(f"grad_{y.name}") for y in r.differentiable_ys]
        self.accumulators = [self.names.unique(f"grad_{c.name}") for c in r.consts if c.needs_grad]
        self._analyse()

    def _analyse(self) -> None:
        """Which cotangents are live, which nodes are needed, which states and inputs they read."""
        r, n, m = self.recurrence, len(self.recurrence.carries), len(self.recurrence.xs)
        placeholders = [p for p in self.graph.nodes if p.op == "placeholder"]
        results = emit.output_nodes(self.graph)
        d = len(self.differentiable)
        first_ct = n + m + len(r.consts)
        self.ct_placeholders = dict(zip(self.differentiable, placeholders[first_ct:], strict=False))
        self.ct_y_placeholders = placeholders[first_ct + d :]
        self.ct_results = dict(zip(self.differentiable, results[:d], strict=True))
        self.x_results, self.const_results = results[d : d + len(self.grad_xs)], results[d + len(self.grad_xs) :]

        def cotangents_read(live: set[int]) -> set[int]:
            nodes = emit.needed(self.graph, [*(self.ct_results[i] for i in live), *results[d:]])
            return {i for i, p in self.ct_placeholders.items() if p in nodes}

        self.live = _closure(set(self.grad_inits), cotangents_read)
        self.results = [*(self.ct_results[i] for i in self.live), *results[d:]]
        self.nodes = emit.needed(self.graph, self.results)
        self.states_read = [i for i in range(n) if placeholders[i] in self.nodes]
        self.xs_read = [i for i in range(m) if placeholders[n + i] in self.nodes]
        self.ct_ys_read = [i for i, p in enumerate(self.ct_y_placeholders) if p in self.nodes]
        # to recompute those states, the step may need others
        step = r.step.graph
        step_results = emit.output_nodes(step)
        self.recomputed = _closure(set(self.states_read), lambda live: _states_read(step, _pick(step_results, live), n))
        self.step_nodes = emit.needed(step, _pick(step_results, self.recomputed))
        step_placeholders = [p for p in step.nodes if p.op == "placeholder"]
        self.step_xs = [i for i in range(m) if step_placeholders[n + i] in self.step_nodes]

    def generate(self) -> KernelText:
        step = self.recurrence.step.graph
        lines, env = self.prelude([(step, self.step_nodes), (self.graph, self.nodes)])
        lines += self._start_cotangents()
        lines += self._segments(env) if self.states_read else self._plain_loop(env)
        lines += [t.store(self.cts[i], "inside") for i, t in self.grad_inits.items()]
        for tensor, name, result in zip(self.grad_consts, self.accumulators, self.const_results, strict=True):
            lines.append(tensor.store("0.0" if result is None else name, "inside"))
        return self.assemble(lines)

    def _start_cotangents(self) -> list[str]:
        lines = []
        for i in self.live:
            final = self.ct_finals.get(i)
            if final is None:
                dtype = TRITON_DTYPES[opmath(self.recurrence.carries[i].dtype)]
                lines.append(f"{self.cts[i]} = tl.zeros([BLOCK], {dtype})")
            else:
                lines.append(f"{self.cts[i]} = {as_block(final.value(final.load('inside')))}")
        for tensor, name, result in zip(self.grad_consts, self.accumulators, self.const_results, strict=True):
            if result is not None:
                lines.append(f"{name} = tl.zeros([BLOCK], {TRITON_DTYPES[tensor.dtype]})")
        return lines

    def _plain_loop(self, env: Environment) -> list[str]:
        """The backward step reads no state: nothing to recompute."""
        loop = [*self.load_inputs(self.xs_read, "inside"), *self._load_cotangents("inside")]
        loop += self._step_back(env, "inside")
        return ["for i in range(T):", *_indent(_with_position("t = T - 1 - i", loop))]

    def _segments(self, env: Environment) -> list[str]:
        """Everything that a segment reads is loaded ahead of its recurrence, so that the loads overlap."""
        starts = self._start_addresses()
        states = [self.states[i] for i in self.states_read]
        loaded = [self.x_names[i] for i in self.xs_read] + [self.ct_y_names[i] for i in self.ct_ys_read]
        steps = {name: self.names.unique(f"{name}_steps") for name in (*states, *loaded)}
        r = self.recurrence
        self.kept = tuple(r.carries[i].dtype for i in self.states_read) + tuple(r.xs[i].dtype for i in self.xs_read)
        self.kept += tuple(self.ct_ys[i].dtype for i in self.ct_ys_read)

        sweep = [*self.load_inputs(self.step_xs, "inside"), *self._recompute(env)]
        save = [f"tl.store({starts[i]}, {self.states[i]}, mask=inside)" for i in self.recomputed]
        again = self.load_inputs(sorted({*self.step_xs, *self.xs_read}), "live", "t < T") + self._load_cotangents(
            "live", "t < T"
        )
        again += [f"{all_steps} = {all_steps} + ({name},)" for name, all_steps in steps.items()]
        again += self._recompute(env)
        back = [f"{name} = {all_steps}[k]" for name, all_steps in steps.items()]
        back += self._step_back(env, "live", "t < T")
        position, live = "t = segment * SEGMENT + k", "live = inside & (t < T)"
        segment = [
            "# the states of this segment",
            *(f"{all_steps} = ()" for all_steps in steps.values()),
            "for k in tl.static_range(SEGMENT):",
            *_indent(_with_position(position, _with_position(live, again))),
            "# and back over them",
            "for k in tl.static_range(SEGMENT - 1, -1, -1):",
            *_indent(_with_position(position, _with_position(live, back))),
            *self._load_starts(starts),
        ]
        return [
            "# the states at the start of every segment",
            *self.load_states(self.recomputed),
            "segments = tl.cdiv(T, SEGMENT)",
            "for segment in range(segments - 1):",
            *_indent([*save, "for k in tl.static_range(SEGMENT):", *_indent(_with_position(position, sweep))]),
            "tl.debug_barrier()  # nobody reads a start that another thread stores",
            "for segment in range(segments - 1, -1, -1):",
            *_indent(segment),
        ]

    def _start_addresses(self) -> dict[int, str]:
        """Scratch memory for the start of every segment, one row a segment, for each state that is recomputed."""
        starts = {}
        for i in self.recomputed:
            name, dtype = self.names.unique(f"{self.states[i]}_start_ptr"), self.recurrence.carries[i].dtype
            self.scratch.append(Argument(name, "scratch", len(self.scratch), aligned=True, dtype=dtype))
            starts[i] = f"{name} + segment * N + lane"
        return starts

    def _load_starts(self, starts: dict[int, str]) -> list[str]:
        """The state at the start of the segment before this one, if there is one."""
        lines = []
        for i, address in starts.items():
            load = f"tl.load({address.replace('segment *', '(segment - 1) *')}, mask=inside & (segment > 0))"
            widen = ".to(tl.float32)" if self.recurrence.carries[i].dtype in emit.ROUNDING else ""
            lines.append(f"{self.states[i]} = {load}{widen}")
        return lines

    def _recompute(self, env: Environment) -> list[str]:
        """One step of the states, and nothing else."""
        step = self.recurrence.step.graph
        results = emit.output_nodes(step)
        emitter = Emitter(self.names.copy(), env)
        emitter.emit(self.step_nodes, [r for r in _pick(results, self.recomputed) if r is not None])
        updates = [(self.states[i], emitter.env[results[i]]) for i in self.recomputed]  # type: ignore[index]
        return [str(s) for s in _update(emitter.statements, updates)]

    def _load_cotangents(self, mask: str, in_range: str = "") -> list[str]:
        return [f"{self.ct_y_names[i]} = {self.ct_ys[i].load(mask, in_range=in_range)}" for i in self.ct_ys_read]

    def _step_back(self, env: Environment, mask: str, in_range: str = "") -> list[str]:
        """One step of the cotangents. Where a step may lie beyond T, `in_range` tells, and nothing changes there."""
        env = dict(env)
        for i in self.live:
            env[self.ct_placeholders[i]] = Value.variable(self.cts[i], self.recurrence.carries[i].dtype)
        for tensor, name, node in zip(self.ct_ys, self.ct_y_names, self.ct_y_placeholders, strict=True):
            env[node] = tensor.value(name)
        emitter = Emitter(self.names.copy(), env)
        emitter.emit(self.nodes, [r for r in self.results if r is not None])
        for tensor, result in zip(self.grad_xs, self.x_results, strict=True):
            value = _zero(tensor.dtype) if result is None else emitter.env[result]
            emitter.store(tensor.store(value.text, mask), value)
        for name, result in zip(self.accumulators, self.const_results, strict=True):
            if result is not None:
                value = emitter.env[result]
                text = f"tl.where({in_range}, {value.text}, 0.0)" if in_range else value.text
                emitter.store(f"{name} += {text}", value)
        updates = []
        for i in self.live:
            result = self.ct_results[i]
            value = _zero(self.recurrence.carries[i].dtype) if result is None else emitter.env[result]
            updates.append((self.cts[i], _only(in_range, value, self.cts[i])))
        return [str(s) for s in _update(emitter.statements, updates)]


# -------------------------------------------------------------------------------------------------------------- pieces


def _only(condition: str, value: Value, old: str) -> Value:
    if not condition or value.text == old:
        return value
    return replace(
        value, text=f"tl.where({condition}, {value.text}, {old})", block=True, number=None, uses=value.uses | {old}
    )


def _zero(dtype: torch.dtype) -> Value:
    return emit.number(0, dtype)


def _update(statements: Sequence[Statement], updates: Sequence[tuple[str, Value]]) -> list[Statement]:
    """`statements`, then all `updates` at once.

    An update whose value has a line of its own, after which nothing reads the old value, happens in that line.
    """
    statements, pending = list(statements), [(name, value) for name, value in updates if value.text != name]
    for name, value in list(pending):
        at = next((i for i, s in enumerate(statements) if s.target == value.text and value.block), None)
        if at is None:
            continue
        readers = [s.uses for s in statements[at + 1 :]] + [v.uses for n, v in pending if n != name]
        if any(name in uses for uses in readers):
            continue
        statements[at] = replace(statements[at], target=name)
        statements[at + 1 :] = [_rename(s, value.text, name) for s in statements[at + 1 :]]
        pending = [(n, _rename(v, value.text, name)) for n, v in pending if n != name]
    lines = [Statement(name, as_block(value), value.uses) for name, value in pending]
    if any(s.target in later.uses for i, s in enumerate(lines) for later in lines[i + 1 :]):
        together = ", ".join(s.target for s in lines), ", ".join(s.text for s in lines)
        lines = [Statement(*together, frozenset().union(*(s.uses for s in lines)))]
    return statements + lines


Text = TypeVar("Text", Statement, Value)


def _rename(what: Text, old: str, new: str) -> Text:
    if old not in what.uses:
        return what
    text, uses = re.sub(rf"\b{old}\b", new, what.text), what.uses - {old} | {new}
    return replace(what, text=text, uses=uses)


def _closure(start: set[int], read: Callable[[set[int]], set[int]]) -> list[int]:
    """All states that `start` depends on over any number of steps."""
    live = set(start)
    while True:
        more = live | read(live)
        if more == live:
            return sorted(live)
        live = more


def _states_read(graph: fx.Graph, results: Sequence[fx.Node | None], n: int) -> set[int]:
    nodes = emit.needed(graph, results)
    placeholders = [p for p in graph.nodes if p.op == "placeholder"]
    return {i for i in range(n) if placeholders[i] in nodes}


def _pick(results: Sequence[fx.Node | None], which: Iterable[int]) -> list[fx.Node | None]:
    return [results[i] for i in which]


def _free(names: Names, name: str, suffix: str) -> str:
    """`name`, or with a suffix where the kernel has another value of that name."""
    return f"{name}_{suffix}" if identifier(name) in names.taken else name


def _with_position(definition: str, lines: list[str]) -> list[str]:
    """`lines`, after the definition of a name if they use it."""
    return ([definition] if _mentions("\n".join(lines), definition.split(" = ")[0]) else []) + lines


def _indent(lines: Iterable[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def _mentions(text: str, name: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(name)}\b", text) is not None


def _used(candidates: list[str], body: list[str]) -> list[str]:
    """The assignments among `candidates` that the body, or a later one of them that is used, reads."""
    kept: list[str] = []
    for line in reversed(candidates):
        name = line.split(" = ")[0]
        if _mentions("\n".join([*kept, *body]), name):
            kept.insert(0, line)
    return kept


def _helper(dtype: torch.dtype, name: str) -> str:
    return (
        f"@triton.jit\ndef {name}(value):\n"
        f'    """Rounded as eager rounds the result of every op."""\n'
        f"    return value.to({TRITON_DTYPES[dtype]}).to(tl.float32)"
    )
