"""T equal iterations become one `Loop` (loop rerolling).

    h0 = v + (x[0] - v)/2; s0 = h0 >= 1; v0 = h0*(1 - s0)          s, v = loop(v, x)
    h1 = v0 + (x[1] - v0)/2; s1 = h1 >= 1; v1 = h1*(1 - s1)   ->       body(v, x_t): h = v + (x_t - v)/2
    …                                                                        …; return v', s_t
    s = stack([s0, s1, …])

The traced iterations of a Python loop are a tandem repeat of ops. A repeat becomes a loop only when every operand of every
iteration is proven to be one of

- the same value in all iterations (an invariant),
- a value of the same iteration, or of the iteration d before (a carry; d > 1 makes a chain of carries),
- slice t of one tensor, read forwards or backwards (a time series), or a value of its own made before the loop.

Iterations at either end that do not fit are peeled: they stay as they are. A last iteration that lacks its dead tail is
taken in. Nothing is recognised by name; equality of `autograd_function_apply` bodies is equality of their content.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from snn_compile.errors import Reject, Rejection
from snn_compile.ir.loop import Loop, LoopCarry, LoopConst, LoopInput, LoopOutput
from snn_compile.ir.values import base_name, example, is_getitem, user_line, user_location, value_name
from snn_compile.passes.find_repeats import Repeat, find_repeats
from snn_compile.passes.functionalize import is_grad_switch, is_write, store

Accept = Callable[[Loop], "Rejection | None"]

#: Look-alikes that are no loops are given up after this many, so that rerolling stays cheap beside tracing.
MAX_REJECTIONS = 64


# ---------------------------------------------------------------------------------------------------------------- slots


@dataclass
class Slots:
    """The leaves of a node's arguments that may differ between iterations, and the rest as a hashable frame."""

    leaves: list[object]
    frame: object


def read_slots(node: fx.Node, attributes: dict[fx.Node, object]) -> Slots:
    """Nodes and numbers are leaves; shapes, dtypes, keywords' structure and submodules are part of the frame."""
    leaves: list[object] = []

    def visit(arg: object, depth: int) -> object:
        if isinstance(arg, fx.Node):
            if arg in attributes:
                return ("body", attributes[arg])
            leaves.append(arg)
            return "%"
        if isinstance(arg, (list, tuple)):
            return (type(arg).__name__, *(visit(a, depth + 1) for a in arg))
        if isinstance(arg, dict):
            return tuple((k, visit(v, depth + 1)) for k, v in sorted(arg.items()))
        if isinstance(arg, slice):
            return ("slice", visit(arg.start, depth + 1), visit(arg.stop, depth + 1), visit(arg.step, depth + 1))
        if isinstance(arg, (int, float)) and not isinstance(arg, bool):
            leaves.append(arg)
            return "%"
        return repr(arg)

    frame = (node.op, _target_key(node.target), visit(node.args, 0), visit(node.kwargs, 0))
    return Slots(leaves, frame)


def _target_key(target: object) -> object:
    return target if isinstance(target, str) else id(target)


def submodule_key(module: object, memo: dict[int, object]) -> object:
    """Content of a graph module, so that two copies of one `autograd.Function` body are equal."""
    if not isinstance(module, fx.GraphModule):
        return id(module)
    if id(module) not in memo:
        numbers = {n: i for i, n in enumerate(module.graph.nodes)}
        lines = []
        for n in module.graph.nodes:
            args = fx.node.map_arg((n.args, tuple(sorted(n.kwargs.items()))), lambda m: f"%{numbers[m]}")
            inner = submodule_key(getattr(module, n.target), memo) if n.op == "get_attr" and "." not in n.target else ""
            lines.append((n.op, "" if n.op == "placeholder" else _target_key(n.target), repr(args), inner))
        memo[id(module)] = hash(tuple(lines)), tuple(lines)
    return memo[id(module)]


# ----------------------------------------------------------------------------------------------------- operand relations


@dataclass
class Column:
    """One operand slot over all iterations: which relation holds, and for which positions of the run."""

    kind: str  # "const", "number", "distance", "series"
    value: object = None
    distance: int = 0
    step: int = 0


@dataclass
class Run:
    """A repeat whose operand relations hold in positions ``[start, stop)``."""

    nodes: Sequence[fx.Node]
    start: int
    stop: int
    period: int
    columns: list[list[Column]] = field(default_factory=list)  # by residue relative to `origin`
    origin: int = 0

    def column(self, position: int) -> list[Column]:
        return self.columns[(position - self.origin) % self.period]


class Graph:
    """The view of one FX graph that rerolling works on: positions, slots, tokens."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        memo: dict[int, object] = {}
        self.attributes = {
            n: submodule_key(getattr(gm, n.target), memo)
            for n in gm.graph.nodes
            if n.op == "get_attr" and isinstance(getattr(gm, n.target, None), fx.GraphModule)
        }
        self.nodes = [n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
        self.position = {n: i for i, n in enumerate(self.nodes)}
        self.slots = [read_slots(n, self.attributes) for n in self.nodes]
        ids: dict[object, int] = {}
        self.tokens = [ids.setdefault(s.frame, len(ids)) for s in self.slots]

    # -------------------------------------------------------------------------------------------------- relations

    def relate(self, repeat: Repeat) -> Run:
        """Find the relation of every slot, and the positions where all of them hold."""
        run = Run(self.nodes, repeat.start, repeat.stop, repeat.period, origin=repeat.start)
        columns, bounds = [], []
        for residue in range(repeat.period):
            positions = range(repeat.start + residue, repeat.stop, repeat.period)
            row = []
            for slot in range(len(self.slots[positions[0]].leaves)):
                column = self._classify(repeat, positions, slot)
                row.append(column)
                bounds.append((positions, slot, column))
            columns.append(row)
        run.columns = columns
        for positions, slot, column in bounds:
            run.start, run.stop = self._narrow(run, positions, slot, column)
        return run

    def _classify(self, repeat: Repeat, positions: range, slot: int) -> Column:
        """The relation that holds in the middle of the run (its ends may be peeled)."""
        middle = len(positions) // 2
        leaf, before = (self.slots[positions[i]].leaves[slot] for i in (middle, middle - 1))
        if isinstance(leaf, fx.Node):
            if leaf is before:
                return Column("const", leaf)
            at = self.position.get(leaf)
            if at is None or at < repeat.start:  # made before the loop, another one for each step
                return Column("series")
            return Column("distance", distance=positions[middle] - at)
        step = leaf - before if type(leaf) is int and type(before) is int else 0
        if step and self._is_index(self.nodes[positions[middle]]):
            return Column("series", leaf - step * middle, step=step)  # type: ignore[operator]
        return Column("number", leaf)

    @staticmethod
    def _is_index(node: fx.Node) -> bool:
        return is_getitem(node) or node.target is store or node.target in ("select", torch.select)

    def _holds(self, positions: range, i: int, slot: int, column: Column) -> bool:
        position = positions[i]
        leaf = self.slots[position].leaves[slot]
        if column.kind == "const":
            return leaf is column.value
        if column.kind == "number":
            return type(leaf) is type(column.value) and repr(leaf) == repr(column.value)
        if column.kind == "distance":
            return isinstance(leaf, fx.Node) and self.position.get(leaf) == position - column.distance
        if column.step:
            return type(leaf) is int and leaf == column.value + column.step * i  # type: ignore[operator]
        return isinstance(leaf, fx.Node) and self.position.get(leaf, -1) < positions[0]

    def _narrow(self, run: Run, positions: range, slot: int, column: Column) -> tuple[int, int]:
        """Shrink ``[start, stop)`` to where the column holds. A producer before the run is an initial value there."""
        start, stop = run.start, run.stop
        middle = len(positions) // 2
        if column.kind == "const":  # an invariant is made before the loop
            start = max(start, self.position.get(column.value, -1) + 1)  # type: ignore[arg-type]
        for i in range(middle, -1, -1):
            if positions[i] < start:
                break
            if self._holds(positions, i, slot, column):
                continue
            if column.kind == "distance" and positions[i] - column.distance < start and self._is_initial(
                positions[i], slot, start
            ):
                continue
            start = max(start, positions[i] + 1)
            break
        for i in range(middle, len(positions)):
            if positions[i] >= stop:
                break
            if not self._holds(positions, i, slot, column):
                stop = min(stop, positions[i])
                break
        return start, stop

    def _is_initial(self, position: int, slot: int, start: int) -> bool:
        leaf = self.slots[position].leaves[slot]
        return not isinstance(leaf, fx.Node) or self.position.get(leaf, -1) < start


# ------------------------------------------------------------------------------------------------------------- rerolling


def reroll(gm: fx.GraphModule, accept: Accept, min_length: int = 2) -> tuple[list[Loop], list[Rejection]]:
    """Replace loops of `gm` by `Loop` submodules; `accept` says why a verified loop should stay unrolled (or None)."""
    loops: list[Loop] = []
    rejections: dict[tuple[str, int], Rejection] = {}
    while (found := _first_loop(gm, accept, min_length, f"loop_{len(loops)}", rejections)) is not None:
        loops.append(found)
    if loops:
        _drop_unused_bodies(gm)
        gm.graph.lint()
        gm.recompile()
    return loops, list(rejections.values())


def _drop_unused_bodies(gm: fx.GraphModule) -> None:
    """The bodies of the surrogate calls that went into a loop; each of them would be recompiled with `gm`."""
    for node in [n for n in gm.graph.nodes if n.op == "get_attr" and not n.users]:
        gm.graph.erase_node(node)
    gm.delete_all_unused_submodules()


def _first_loop(
    gm: fx.GraphModule, accept: Accept, min_length: int, name: str, rejections: dict[tuple[str, int], Rejection]
) -> Loop | None:
    """The repeat that covers most of the graph and is a loop, replaced in the graph; what was refused is remembered."""
    view = Graph(gm)
    for repeat in find_repeats(view.tokens):
        key = (view.nodes[repeat.start].name, repeat.period)
        if key in rejections or len(rejections) >= MAX_REJECTIONS:
            continue
        try:
            plan = _plan(view, repeat, min_length)
            loop = plan.build(name)
        except Reject as r:
            rejections[key] = r.rejection
            continue
        reason = accept(loop)
        if reason is not None:
            rejections[key] = reason
            continue
        plan.replace(loop)
        return loop
    return None


def _plan(view: Graph, repeat: Repeat, min_length: int) -> _Plan:
    run = view.relate(repeat)
    if run.stop - run.start < min_length * run.period:
        node = view.nodes[repeat.start]
        raise Reject(
            f"{repeat.count} look-alike groups of {repeat.period} ops are not iterations of one loop: "
            f"{_why(view, repeat, run)}",
            node=node,
            location=user_location(node),
        )
    return _best_rotation(view, run, min_length)


def _why(view: Graph, repeat: Repeat, run: Run) -> str:
    """The operand that broke the pattern, in words."""
    position = min(max(run.stop, repeat.start), repeat.stop - 1)
    node = view.nodes[position]
    numbers = [v for v in view.slots[position].leaves if not isinstance(v, fx.Node)]
    before = view.slots[max(position - repeat.period, 0)].leaves
    changed = [v for v, b in zip(view.slots[position].leaves, before, strict=False) if v is not b]
    if numbers and any(not isinstance(c, fx.Node) for c in changed):
        return f"a Python number changes from step to step in '{user_line(node) or node.format_node()}'"
    return f"operands of '{user_line(node) or node.name}' do not follow one rule over the steps"


def _best_rotation(view: Graph, run: Run, min_length: int) -> _Plan:
    """Where an iteration begins: as many iterations as possible, then as few carries as possible, then early."""
    crossing = _crossings(run)
    plans = []
    for offset in range(run.period):
        count = (run.stop - run.start - offset) // run.period
        if count < min_length:
            break
        plan = _Plan(view, run, run.start + offset, count)
        plan.absorb_tail()
        plans.append((-plan.count, crossing[(plan.start - run.origin) % run.period], offset, plan))
    return min(plans, key=lambda p: p[:3])[3]  # (the caller saw `min_length` whole iterations)


def _crossings(run: Run) -> list[int]:
    """For each residue as the first of an iteration: how many values are handed to a later iteration."""
    p = run.period
    crossings = []
    for first in range(p):
        carried: dict[int, int] = {}
        for residue in range(p):
            for column in run.columns[residue]:
                if column.kind != "distance":
                    continue
                place = (residue - first) % p
                producer = place - column.distance
                iterations_back = -(producer // p)
                if iterations_back > 0:
                    key = producer % p
                    carried[key] = max(carried.get(key, 0), iterations_back)
        crossings.append(sum(carried.values()))
    return crossings


@dataclass
class _Carry:
    """The value `residue` produces, as seen `back` iterations later; `init` is what iteration 0 sees."""

    residue: int
    back: int
    init: object
    placeholder: fx.Node | None = None


class _Plan:
    """One loop to be: the window of nodes, its body, its operands, and how its values are used outside."""

    def __init__(self, view: Graph, run: Run, start: int, count: int) -> None:
        self.view, self.run, self.start, self.count = view, run, start, count
        self.period = run.period
        self.stop = start + count * run.period

    def node(self, residue: int, t: int) -> fx.Node:
        return self.view.nodes[self.start + t * self.period + residue]

    def exists(self, residue: int, t: int) -> bool:
        return self.start + t * self.period + residue < self.stop

    def absorb_tail(self) -> None:
        """Take in a last iteration that lacks its dead end, where its values are collected like all others'."""
        tail = self.run.stop - self.stop
        if tail <= 0 or any(c.step for r in range(tail, self.period) for c in self.run.column(self.start + r)):
            return  # (there is no slice of x for a read that the last iteration lacks)
        for residue in range(tail):
            outside = [
                any(self.view.position.get(u, 1 << 60) >= self.run.stop for u in self.node(residue, t).users)
                for t in range(self.count)
            ]
            last = self.view.nodes[self.stop + residue]
            if all(outside) and any(self.view.position.get(u, 1 << 60) >= self.run.stop for u in last.users):
                self.stop, self.count = self.run.stop, self.count + 1
                return

    # ------------------------------------------------------------------------------------------------------ building

    def build(self, name: str) -> Loop:
        self._collect_uses()
        self.carries: dict[tuple[int, int, object], _Carry] = {}
        self.operands: list[object] = []
        self.inputs: list[tuple[LoopInput, object]] = []
        self.consts: dict[fx.Node, fx.Node] = {}
        self.body = fx.Graph()
        self.root: dict[str, torch.nn.Module] = {}
        self.template = 1 if self.count > 1 else 0
        self.values: dict[int, fx.Node] = {}
        self._series: dict[object, fx.Node] = {}
        self._stores: dict[int, tuple[int, int, bool]] = {}  # residue of a store -> (dim, first index, reverse)
        self._emit_body()
        self._close_carries()
        return self._make_loop(name)

    def _collect_uses(self) -> None:
        """Uses of the loop's values by nodes outside the window, by residue and iteration."""
        window = range(self.start, self.stop)
        self.uses: dict[int, dict[int, list[fx.Node]]] = {}
        for position in window:
            node = self.view.nodes[position]
            if is_grad_switch(node):
                raise Reject("the loop switches gradients on and off around a write", location=user_location(node))
            outside = [u for u in node.users if self.view.position.get(u, -1) not in window]
            if outside:
                t, residue = divmod(position - self.start, self.period)
                self.uses.setdefault(residue, {})[t] = outside

    def _emit_body(self) -> None:
        for residue in range(self.period):
            node = self.node(residue, self.template)
            columns = self.run.column(self.start + residue)
            if node.target is store:
                self._emit_store(residue, node, columns)
                continue
            series = [c for c in columns if c.kind == "series" and c.step]
            if series:
                self._emit_read(residue, node, columns, series)
                continue
            leaves = iter([self._operand(residue, slot, c) for slot, c in enumerate(columns)])
            args, kwargs = self._refill(node, leaves)
            new = self.body.create_node(node.op, node.target, args, kwargs, name=value_name(node))
            new.meta = dict(node.meta)
            self.values[residue] = new

    def _refill(self, node: fx.Node, leaves) -> tuple[tuple, dict]:  # type: ignore[no-untyped-def, type-arg]
        """The node's arguments with its leaves replaced; the same walk as `read_slots`."""

        def visit(arg: object) -> object:
            if isinstance(arg, fx.Node):
                return self._attribute(arg) if arg in self.view.attributes else next(leaves)
            if isinstance(arg, (list, tuple)):
                items = [visit(a) for a in arg]
                return items if isinstance(arg, list) else tuple(items)
            if isinstance(arg, dict):
                # read_slots walks keywords in sorted order
                walked = {k: visit(arg[k]) for k in sorted(arg)}
                return {k: walked[k] for k in arg}
            if isinstance(arg, slice):
                return slice(visit(arg.start), visit(arg.stop), visit(arg.step))
            if isinstance(arg, (int, float)) and not isinstance(arg, bool):
                return next(leaves)
            return arg

        return visit(node.args), visit(dict(node.kwargs))  # type: ignore[return-value]

    def _attribute(self, node: fx.Node) -> fx.Node:
        name = str(node.target)
        if name not in self.root:
            self.root[name] = getattr(self.view.gm, name)
        new = self.body.get_attr(name)
        return new

    def _operand(self, residue: int, slot: int, column: Column) -> object:
        if column.kind == "number":
            return column.value
        if column.kind == "const":
            return self._const(column.value)  # type: ignore[arg-type]
        if column.kind == "series":
            return self._separate_values(residue, slot)
        back = -((residue - column.distance) // self.period)
        producer = (residue - column.distance) % self.period
        return self.values[producer] if back == 0 else self._carry(residue, slot, producer, back)

    def _placeholder(self, name: str, meta: dict) -> fx.Node:  # type: ignore[type-arg]
        node = self.body.placeholder(name)
        node.target = node.name  # the graph made the name unique, not the target
        node.meta = meta
        return node

    def _const(self, node: fx.Node) -> fx.Node:
        if node not in self.consts:
            self.consts[node] = self._placeholder(f"const_{_series_name(node)}", {"example_value": example(node)})
        return self.consts[node]

    def _separate_values(self, residue: int, slot: int) -> fx.Node:
        """A different outside value in every iteration: slices of one `unbind`, or values to be stacked."""
        column = [
            self.view.slots[self.start + t * self.period + residue].leaves[slot]
            for t in range(self.count)
            if self.exists(residue, t)
        ]
        if len(column) < self.count:
            raise Reject("the last iteration lacks an input", node=self.node(residue, 0))
        key = tuple(id(c) for c in column)
        if key in self._series:
            return self._series[key]
        source = _slices_of_one(column) or _stackable(column)
        if source is None:
            node = self.node(residue, self.template)
            raise Reject(
                f"operand {slot} of '{user_line(node) or node.name}' is another tensor in every step",
                node=node,
                location=user_location(node),
            )
        value = self._series[key] = self._input(source, example(column[0]), base_name(column[0].name))  # type: ignore[union-attr]
        return value

    def _input(self, source: object, value: object, name: str) -> fx.Node:
        reverse = isinstance(source, _Slices) and source.step < 0
        spec = LoopInput(name, value, reverse)  # type: ignore[arg-type]
        placeholder = self._placeholder(f"x_{name}", {"example_value": value})
        self.inputs.append((spec, source))
        spec.placeholder = placeholder  # type: ignore[attr-defined]
        return placeholder

    def _emit_read(self, residue: int, node: fx.Node, columns: list[Column], series: list[Column]) -> None:
        """``x[t]``, ``x[:, t]``, ``x[..., t]``, ``x.select(d, t)`` of an invariant x."""
        source, value, unbound = _unbound(columns[0].value)
        if columns[0].kind != "const" or len(series) != 1 or not isinstance(value, torch.Tensor):
            raise Reject(
                "an index that changes with t reads a value of the loop itself",
                node=node,
                location=user_location(node),
            )
        place = columns.index(series[0])
        leaves = self.view.slots[self.start + residue].leaves
        dim, rest = (unbound, ()) if unbound is not None else _time_dim(node, leaves, place, value)
        first = self.view.slots[self.start + residue].leaves[place]
        slices = _Slices(source, dim, first, series[0].step, self.count)  # type: ignore[arg-type]
        slices.check(value)
        key = (source, dim, first, series[0].step)
        if key not in self._series:
            now = value.select(dim, 0)
            self._series[key] = self._input(slices, now, _series_name(source))  # type: ignore[arg-type]
        new = self._series[key]
        if rest:
            new = self.body.call_function(operator.getitem, (new, rest))
            new.meta = dict(node.meta)
        self.values[residue] = new

    def _emit_store(self, residue: int, node: fx.Node, columns: list[Column]) -> None:
        """``out[t] = s`` as a loop value: ``s`` is an output of the loop, stacked at the dim of t."""
        series = [i for i, c in enumerate(columns) if c.kind == "series" and c.step]
        buffer, value = columns[0], columns[-1]
        chained = buffer.kind == "distance" and buffer.distance == self.period
        whole = example(node)
        if len(series) != 1 or not chained or value.kind == "number" or not isinstance(whole, torch.Tensor):
            raise Reject("a write inside the loop is not out[t] = value", node=node, location=user_location(node))
        leaves = self.view.slots[self.start + residue].leaves
        dim, rest = _time_dim(node, leaves, series[0], whole)
        step = columns[series[0]].step
        if rest or abs(step) != 1:
            raise Reject("a write inside the loop is not one whole slice", node=node, location=user_location(node))
        stored = self._operand(residue, len(columns) - 1, value)
        self._stores[residue] = (dim, leaves[series[0]], step < 0)  # type: ignore[assignment]
        target = whole.select(dim, 0)
        self.values[residue] = self._as_slice(stored, target)  # type: ignore[arg-type]

    def _as_slice(self, stored: fx.Node, target: torch.Tensor) -> fx.Node:
        """What assignment does to a value: cast to the buffer's dtype and broadcast to the slice."""
        value = example(stored)
        assert isinstance(value, torch.Tensor)
        if value.dtype != target.dtype:
            new = self.body.call_method("to", (stored, target.dtype))
            new.meta = dict(stored.meta)
            value = value.to(target.dtype)
            new.meta["example_value"] = value
            stored = new
        if value.shape != target.shape:
            raise Reject("a value is broadcast into the slice it is written to", node=stored.name)
        return stored

    # -------------------------------------------------------------------------------------------------------- carries

    def _carry(self, residue: int, slot: int, producer: int, back: int) -> fx.Node:
        """The placeholder of the value that `producer` made `back` iterations ago."""
        inits = [self.view.slots[self.start + t * self.period + residue].leaves[slot] for t in range(back)]
        node: fx.Node | None = None
        # a chain: the carry `back` steps old hands over to the one `back + 1` steps old
        for distance in range(1, back + 1):
            init = inits[back - distance]
            key = (producer, distance, init if isinstance(init, fx.Node) else repr(init))
            if key not in self.carries:
                carry = _Carry(producer, distance, init)
                source = self.node(producer, self.template)
                carry.placeholder = self._placeholder(f"carry_{value_name(source)}", dict(source.meta))
                self._check_init(carry, source)
                self.carries[key] = carry
            node = self.carries[key].placeholder
        assert node is not None
        return node

    def _check_init(self, carry: _Carry, source: fx.Node) -> None:
        value, init = example(source), example(carry.init)
        where = {"node": source.name, "location": user_location(source)}
        if not isinstance(value, torch.Tensor):
            raise Reject("a value that is not a tensor is handed from step to step", **where)  # type: ignore[arg-type]
        if isinstance(init, torch.Tensor):
            if init.dtype != value.dtype:
                raise Reject(
                    f"a state starts as {init.dtype} and goes on as {value.dtype}",
                    hint="start it in the dtype it has later",
                    **where,  # type: ignore[arg-type]
                )
        elif isinstance(init, (int, float)) and not isinstance(init, bool):
            exact = not value.dtype.is_floating_point or float(torch.tensor(init, dtype=value.dtype)) == float(init)
            if not exact or (isinstance(init, float) and not value.dtype.is_floating_point):
                raise Reject(f"a state starts as {init!r}, which {value.dtype} cannot hold exactly", **where)  # type: ignore[arg-type]
        else:
            raise Reject(f"a state starts as {init!r}", **where)  # type: ignore[arg-type]

    def _close_carries(self) -> None:
        """The next value of each carry: the producer's, or for an older one the carry before it in the chain."""
        self.next: list[fx.Node] = []
        for producer, distance, _ in self.carries:
            if producer in self._stores:
                raise Reject("a buffer that is written step by step is also read as a whole inside the loop")
            if distance == 1:
                self.next.append(self.values[producer])
                continue
            younger = [c for c in self.carries.values() if (c.residue, c.back) == (producer, distance - 1)]
            if len(younger) != 1:
                raise Reject("a value from several steps ago starts from more than one initial value")
            self.next.append(younger[0].placeholder)  # type: ignore[arg-type]

    # ----------------------------------------------------------------------------------------------------------- results

    def _make_loop(self, name: str) -> Loop:
        self.outputs: list[tuple[LoopOutput, int]] = []  # spec, residue
        self.output_of: dict[int, int] = {}
        placeholders = [c.placeholder for c in self.carries.values()]
        carries = [LoopCarry(base_name(p.name.removeprefix("carry_")), example(p)) for p in placeholders]
        self.final_of: dict[int, int] = {}
        extra: list[fx.Node] = []
        for residue, by_step in sorted(self.uses.items()):
            last_only = set(by_step) == {self._last(residue)} and residue not in self._stores
            if last_only and self._last(residue) == self.count - 1:
                self._want_final(residue, carries, extra)
            elif residue in self._stores:
                if set(by_step) != {self.count - 1}:
                    raise Reject("a buffer is used before the loop has filled it")
                self._want_output(residue, *self._stores[residue][::2])
            else:
                self._want_output(residue, self._stack_dim(residue, by_step), False)
        values = [self.values[r] for _, r in self.outputs]
        self.body.output((*self.next, *values))
        loop_xs = [spec for spec, _ in self.inputs]
        loop_consts = [LoopConst(_series_name(n), example(n)) for n in self.consts]
        self._sort_placeholders(extra)
        # (FX takes a method call for pure, even `counter.add_(1)`)
        self.body.eliminate_dead_code(is_impure_node=lambda n: n.is_impure() or is_write(n))
        body = fx.GraphModule(self.root, self.body, class_name="Body")
        first = self.node(0, self.template)
        loop = Loop(name, self.count, body, carries, loop_xs, loop_consts, [s for s, _ in self.outputs], user_location(first))
        return loop

    def _last(self, residue: int) -> int:
        return self.count - 1 if self.exists(residue, self.count - 1) else self.count - 2

    def _want_final(self, residue: int, carries: list[LoopCarry], extra: list[fx.Node]) -> None:
        for i, carry in enumerate(self.carries.values()):
            if carry.residue == residue and carry.back == 1:
                carries[i].is_result = True
                self.final_of[residue] = i
                return
        # the last value of something that is not carried: a carry nobody reads
        value = self.values[residue]
        placeholder = self._placeholder(f"last_{base_name(value.name)}", dict(value.meta))
        extra.append(placeholder)
        carries.append(LoopCarry(base_name(value.name), example(value), is_result=True))  # type: ignore[arg-type]
        self.carries[(residue, 1, "last")] = _Carry(residue, 1, 0, placeholder)
        self.next.append(value)
        self.final_of[residue] = len(carries) - 1

    def _want_output(self, residue: int, dim: int, reverse: bool) -> None:
        value = example(self.values[residue])
        if not isinstance(value, torch.Tensor):
            raise Reject("a value of the loop that is not a tensor is used outside", node=self.node(residue, 0))
        self.output_of[residue] = len(self.outputs)
        name = value_name(self.node(residue, self.template))
        self.outputs.append((LoopOutput(name, value, dim, reverse), residue))

    def _stack_dim(self, residue: int, by_step: dict[int, list[fx.Node]]) -> int:
        """The dim along which the steps' values are stacked, so that the loop lays them out that way."""
        value = example(self.values[residue])
        for user in by_step.get(0, ()):
            dim = _stack_of(user)
            if dim is not None and isinstance(value, torch.Tensor):
                return dim[1] % (value.dim() + 1)
        return 0

    def _sort_placeholders(self, extra: list[fx.Node]) -> None:
        order = [c.placeholder for c in self.carries.values()]
        order += [spec.placeholder for spec, _ in self.inputs]  # type: ignore[attr-defined]
        order += list(self.consts.values())
        anchor = self.body._root
        for placeholder in order:
            anchor.append(placeholder)  # type: ignore[arg-type]
            anchor = placeholder  # type: ignore[assignment]

    # --------------------------------------------------------------------------------------------------------- replacing

    def replace(self, loop: Loop) -> None:
        gm, graph = self.view.gm, self.view.gm.graph
        gm.add_submodule(loop.name, loop)
        last = self.view.nodes[self.stop - 1]
        with graph.inserting_after(last):
            anchor = graph.call_function(operator.getitem, (0, 0))  # a place to insert before
        with graph.inserting_before(anchor):
            operands = [self._initial(graph, c) for c in self.carries.values()]
            operands += [source.emit(graph) for _, source in self.inputs]  # type: ignore[attr-defined]
            operands += list(self.consts)
            call = graph.call_module(loop.name, tuple(operands))
            call.meta = {"stack_trace": self.node(0, self.template).meta.get("stack_trace")}
            results = {}
            for i, y in enumerate(loop.ys):
                results[i] = graph.call_function(operator.getitem, (call, i))
                results[i].meta = {"example_value": _stacked_example(y, self.count)}
            finals = {}
            position = len(loop.ys)
            for i, carry in enumerate(loop.carries):
                if carry.is_result:
                    finals[i] = graph.call_function(operator.getitem, (call, position))
                    finals[i].meta = {"example_value": carry.example}
                    position += 1
            self._rewire(graph, loop, results, finals)
        graph.erase_node(anchor)
        for position in range(self.stop - 1, self.start - 1, -1):
            node = self.view.nodes[position]
            if not node.users:
                graph.erase_node(node)

    def _initial(self, graph: fx.Graph, carry: _Carry) -> fx.Node:
        if isinstance(carry.init, fx.Node):
            return carry.init
        value = example(carry.placeholder)
        assert isinstance(value, torch.Tensor)
        node = graph.call_function(torch.full, ((), carry.init), {"dtype": value.dtype, "device": value.device})
        node.meta = {"example_value": value.new_empty(()).detach()}
        return node

    def _rewire(self, graph: fx.Graph, loop: Loop, results: dict, finals: dict) -> None:  # type: ignore[type-arg]
        for residue, index in self.final_of.items():
            node = self.node(residue, self.count - 1)
            for user in self.uses[residue][self.count - 1]:
                user.replace_input_with(node, finals[index])
        for residue, index in self.output_of.items():
            if residue in self._stores:
                self._rewire_store(graph, loop, residue, results[index])
            else:
                _rewire_output(graph, self, residue, loop.ys[index], results[index])

    def _rewire_store(self, graph: fx.Graph, loop: Loop, residue: int, ys: fx.Node) -> None:
        """``out`` after the loop: the stacked values where they cover it, else the rest of the buffer with them in it."""
        dim, first, reverse = self._stores[residue]
        whole = example(self.node(residue, self.count - 1))
        size = whole.shape[dim]  # type: ignore[union-attr]
        low = first - self.count + 1 if reverse else first
        low = low % size if isinstance(size, int) else low
        if isinstance(size, int) and self.count == size and low == 0:
            new = ys
        else:
            buffer = self.view.slots[self.start + residue].leaves[0]
            index = (*(slice(None),) * dim, slice(low, low + self.count))
            new = graph.call_function(store, (buffer, index, ys))
            new.meta = dict(self.node(residue, self.count - 1).meta)
        node = self.node(residue, self.count - 1)
        for user in self.uses[residue][self.count - 1]:
            user.replace_input_with(node, new)


# ------------------------------------------------------------------------------------------------- operands of the loop


@dataclass
class _Slices:
    """``source.select(dim, first + step*t)`` for t in range(count)"""

    source: fx.Node
    dim: int
    first: int
    step: int
    count: int

    def check(self, value: torch.Tensor) -> None:
        size = value.shape[self.dim]
        if isinstance(size, int):
            first = self.first % size if -size <= self.first < size else self.first
            last = first + self.step * (self.count - 1)
            if not (0 <= first < size and 0 <= last < size):
                raise Reject("an index runs out of the tensor it reads", node=self.source)
            self.first = first

    def emit(self, graph: fx.Graph) -> fx.Node:
        """The operand: time at dim 0, just the steps that are read, in memory order (a view, never a copy)."""
        node, value = self.source, example(self.source)
        assert isinstance(value, torch.Tensor)

        def call(name: str, *args: object) -> None:
            nonlocal node, value
            node = graph.call_method(name, (node, *args))
            value = getattr(value, name)(*args)
            node.meta = {"example_value": value}

        if self.dim != 0:
            call("movedim", self.dim, 0)
        low = min(self.first, self.first + self.step * (self.count - 1))
        span = abs(self.step) * (self.count - 1) + 1
        if not (low == 0 and value.shape[0] == span):
            call("narrow", 0, low, span)
        if abs(self.step) != 1:
            index = slice(None, None, abs(self.step))
            node = graph.call_function(operator.getitem, (node, index))
            node.meta = {"example_value": value[index]}
        return node


@dataclass
class _Stacked:
    """T separate values; stacking copies them once."""

    values: list[fx.Node]

    def emit(self, graph: fx.Graph) -> fx.Node:
        node = graph.call_function(torch.stack, (list(self.values),))
        node.meta = {"example_value": torch.stack([example(v) for v in self.values])}  # type: ignore[misc]
        return node


def _slices_of_one(column: list[object]) -> _Slices | None:
    """``x.unbind(d)[t]`` or ``x[t]`` made ahead of the loop, t in arithmetic progression."""
    if not all(is_getitem(c) and isinstance(c.args[1], int) for c in column):  # type: ignore[union-attr]
        return None
    sources = {c.args[0] for c in column}  # type: ignore[union-attr]
    indices = [c.args[1] for c in column]  # type: ignore[union-attr]
    steps = {b - a for a, b in itertools.pairwise(indices)}
    if len(sources) != 1 or len(steps) != 1 or steps == {0}:
        return None
    source, value, dim = _unbound(sources.pop())
    if not isinstance(value, torch.Tensor):
        return None
    slices = _Slices(source, dim or 0, indices[0], steps.pop(), len(column))  # type: ignore[arg-type]
    slices.check(value)
    return slices


def _unbound(source: object) -> tuple[object, object, int | None]:
    """``x.unbind(d)`` -> x, its example, d; anything else is itself."""
    if isinstance(source, fx.Node) and source.target in ("unbind", torch.unbind):
        dim = source.args[1] if len(source.args) > 1 else source.kwargs.get("dim", 0)
        value = example(source.args[0])
        if isinstance(dim, int) and isinstance(value, torch.Tensor):
            return source.args[0], value, dim % value.dim()
    return source, example(source), None


def _stackable(column: list[object]) -> _Stacked | None:
    values = [example(c) for c in column]
    if not all(isinstance(c, fx.Node) and c.op in ("call_function", "call_method") for c in column):
        return None
    if not all(isinstance(v, torch.Tensor) for v in values):
        return None
    if len({(tuple(v.shape), v.dtype, v.device) for v in values}) != 1:  # type: ignore[union-attr]
        return None
    return _Stacked(column)  # type: ignore[arg-type]


def _time_dim(node: fx.Node, leaves: list[object], place: int, value: torch.Tensor) -> tuple[int, tuple]:  # type: ignore[type-arg]
    """Which dim the changing index selects, and what remains of the index for the slice itself."""
    if node.target in ("select", torch.select):
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if isinstance(dim, int) and place == len(leaves) - 1:
            return dim % value.dim(), ()
        raise Reject("select along a dim that changes with t", node=node, location=user_location(node))
    index = node.args[1]
    if isinstance(index, int):
        return 0, ()
    if not isinstance(index, tuple) or any(not (isinstance(i, (int, slice)) or i is Ellipsis) for i in index):
        raise Reject("x is indexed by a tensor or a new axis", node=node, location=user_location(node))
    # the changing leaf is number `place` among nodes and numbers; leaf 0 is the tensor
    seen = 0
    for where, item in enumerate(index):  # noqa: B007  (read after the loop)
        if isinstance(item, slice):
            seen += sum(isinstance(v, int) for v in (item.start, item.stop, item.step))
            continue
        if item is Ellipsis:
            continue
        seen += 1
        if seen == place:
            break
    else:
        raise Reject("a slice moves with t", node=node, location=user_location(node))
    before, after = index[:where], index[where + 1 :]
    dim = value.dim() - 1 - len(after) if Ellipsis in before else len(before)
    rest = (*before, *after)
    plain = all(i is Ellipsis or i == slice(None) for i in rest)
    return dim, () if plain else rest


def _series_name(source: fx.Node) -> str:
    name = base_name(source.name)
    if source.op == "placeholder":
        name = name.removeprefix("l_").removesuffix("_")
        name = name.split("_parameters_")[-1].split("_buffers_")[-1]
    return name or "x"


# --------------------------------------------------------------------------------------------------- uses of the results


def _stack_of(node: fx.Node) -> tuple[list[object], int] | None:
    """``torch.stack(values, dim)`` -> values, dim"""
    if node.op != "call_function" or node.target is not torch.stack or "out" in node.kwargs:
        return None
    tensors = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if isinstance(tensors, (list, tuple)) and isinstance(dim, int):
        return list(tensors), dim
    return None


def _stacked_example(y: LoopOutput, count: int) -> torch.Tensor:
    value = y.example
    return value.unsqueeze(y.dim).repeat_interleave(1, 0) if count == 1 else torch.stack([value] * count, y.dim)


def _rewire_output(graph: fx.Graph, plan: _Plan, residue: int, y: LoopOutput, ys: fx.Node) -> None:
    """``stack([q0, …, q(T-1)], d)`` is the output itself; any other use reads its slice."""
    steps = {plan.node(residue, t): t for t in range(plan.count) if plan.exists(residue, t)}
    users: dict[fx.Node, None] = {}
    for by_step in plan.uses[residue].values():
        users.update(dict.fromkeys(by_step))
    for user in list(users):
        stacked = _stack_of(user)
        if stacked is not None and _replace_stack(graph, user, *stacked, steps, y, ys):
            continue
        for node, t in steps.items():
            if user in node.users:
                with graph.inserting_before(user):
                    user.replace_input_with(node, _slice(graph, ys, y, t))


def _slice(graph: fx.Graph, ys: fx.Node, y: LoopOutput, t: int) -> fx.Node:
    node = graph.call_function(operator.getitem, (ys, t if y.dim == 0 else (*(slice(None),) * y.dim, t)))
    node.meta = {"example_value": y.example}
    return node


def _replace_stack(
    graph: fx.Graph,
    user: fx.Node,
    values: list[object],
    dim: int,
    steps: dict[fx.Node, int],
    y: LoopOutput,
    ys: fx.Node,
) -> bool:
    """Replace a `stack` that holds consecutive steps in order; values before and after them are concatenated."""
    inside = [i for i, v in enumerate(values) if v in steps]
    if not inside or inside != list(range(inside[0], inside[-1] + 1)):
        return False
    first, last = inside[0], inside[-1]
    times = [steps[v] for v in values[first : last + 1]]  # type: ignore[index]
    if times != list(range(times[0], times[0] + len(times))):
        return False
    dim = dim % (y.example.dim() + 1)
    with graph.inserting_before(user):
        node = ys
        if len(times) != len(steps):
            node = graph.call_method("narrow", (node, y.dim, times[0], len(times)))
            node.meta = {"example_value": example(ys).narrow(y.dim, times[0], len(times))}  # type: ignore[union-attr]
        if dim != y.dim:
            node = graph.call_method("movedim", (node, y.dim, dim))
            node.meta = {}
        if first > 0 or last < len(values) - 1:
            parts: list[object] = [node]
            if first > 0:
                parts.insert(0, graph.call_function(torch.stack, (values[:first], dim)))
            if last < len(values) - 1:
                parts.append(graph.call_function(torch.stack, (values[last + 1 :], dim)))
            node = graph.call_function(torch.cat, (parts, dim))
        node.meta = node.meta if node is ys else {**node.meta, "example_value": example(user)}
    user.replace_all_uses_with(node)
    graph.erase_node(user)
    return True
