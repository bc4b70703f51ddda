"""The body of a loop to be: one iteration as a graph of its own, its operands, and what it hands to the next iteration."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from snn_compile.errors import Reject
from snn_compile.ir.loop import LoopInput
from snn_compile.ir.values import base_name, example, shape_key, user_line, user_location, value_name, wanting_grad
from snn_compile.passes.effects import has_effect
from snn_compile.passes.functionalize import store
from snn_compile.passes.loop_operands import (
    Source,
    TimeSlices,
    is_no_larger,
    series_name,
    slices_of_one,
    stackable,
    time_dim,
    unbound_source,
)
from snn_compile.passes.loop_window import Window
from snn_compile.passes.number_series import is_computed_wider, is_rounded_by, number_series
from snn_compile.passes.relate_iterations import Column

#: Of what reads no time series, and of what does.
OWN_WEIGHTS = "has weights of its own every time: layers, one after another, rather than steps"
STEPS_OWN_WEIGHTS = "has weights of its own in every step"


@dataclass
class Carry:
    """The value `residue` produces, as seen `back` iterations later; `init` is what iteration 0 sees."""

    residue: int
    back: int
    init: object
    placeholder: fx.Node
    #: the carry that hands over to this one; None where that is the value itself
    younger: fx.Node | None = None


class LoopBody:
    """Built from a `Window`; raises `Reject` where its iterations are not those of a loop."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self.graph = fx.Graph()
        #: what `get_attr` nodes of the graph read
        self.root: dict[str, torch.nn.Module] = {}
        #: the value of each node of the iteration, by residue
        self.values: dict[int, fx.Node] = {}
        #: by residue, the younger carry, and the initial value
        self.carries: dict[tuple[int, fx.Node | None, object], Carry] = {}
        self.inputs: list[tuple[LoopInput, Source, fx.Node]] = []
        self.consts: dict[fx.Node, fx.Node] = {}
        #: residue of ``out[t] = s`` -> dim, first index, reverse
        self.stores: dict[int, tuple[int, int, bool]] = {}
        self._series: dict[object, fx.Node] = {}
        if not window.run.reads_time():
            self._check_layers()
        for residue in range(window.period):
            self.values[residue] = self._emit(residue)
        #: what each carry is in the next iteration
        self.next = list(self._next_carries())

    def _check_layers(self) -> None:
        """Layers look alike, too: whatever else differs between them, the reason is that they are no steps."""
        window = self.window
        for residue in range(window.period):
            for slot, column in enumerate(window.columns(residue)):
                if column.kind == "series" and not column.step:
                    steps = (t for t in range(window.count) if window.exists(residue, t))
                    if all(_is_weight(window.leaves(residue, t)[slot]) for t in steps):
                        raise _own_weights(window.node(residue, window.template), OWN_WEIGHTS)

    def _emit(self, residue: int) -> fx.Node:
        window = self.window
        node, columns = window.node(residue, window.template), window.columns(residue)
        if node.target is store:
            return self._store(residue, node, columns)
        series = [c for c in columns if c.kind == "series" and c.step]
        if series:
            return self._read(residue, node, columns, series)
        leaves = iter([self._operand(residue, slot, c) for slot, c in enumerate(columns)])
        args, kwargs = self._refill(node, leaves)
        new = self.graph.create_node(node.op, node.target, args, kwargs, name=value_name(node))
        new.meta = window.meta(residue)
        if any(c.kind == "numbers" for c in columns) and is_computed_wider(node, new.meta["example_value"].dtype):
            new = self._widen(new)
        if residue in window.growing:
            new.meta["grows"] = True
        return new

    def _widen(self, node: fx.Node) -> fx.Node:
        """``x * c -> (x.float() * c).to(x.dtype)``: eager's half precision beside a number."""
        value = example(node)

        def convert(operand: fx.Node, dtype: torch.dtype) -> fx.Node:
            new = self.graph.call_method("to", (operand, dtype))
            new.meta = {**operand.meta, "example_value": example(operand).to(dtype)}
            return new

        with self.graph.inserting_before(node):
            for operand in node.all_input_nodes:
                if example(operand).dtype == value.dtype:
                    node.replace_input_with(operand, convert(operand, torch.float32))
        node.meta["example_value"] = value.float()
        return convert(node, value.dtype)

    def _refill(self, node: fx.Node, leaves: Iterator[object]) -> tuple[tuple, dict]:  # type: ignore[type-arg]
        """The node's arguments with its leaves replaced; the same walk as `read_slots`."""

        def visit(arg: object) -> object:
            if isinstance(arg, fx.Node):
                return self._attribute(arg) if arg in self.window.view.attributes else next(leaves)
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
            self.root[name] = getattr(self.window.view.gm, name)
        return self.graph.get_attr(name)

    # -------------------------------------------------------------------------------------------------------- operands

    def _operand(self, residue: int, slot: int, column: Column) -> object:
        if column.kind == "number":
            return column.value
        if column.kind == "const":
            return self._const(column.value)  # type: ignore[arg-type]
        if column.kind == "series":
            return self._separate_values(residue, slot)
        if column.kind == "numbers":
            return self._numbers(residue, slot)
        back = -((residue - column.distance) // self.window.period)
        producer = (residue - column.distance) % self.window.period
        return self.values[producer] if back == 0 else self._carry(residue, slot, producer, back)

    def _placeholder(self, name: str, meta: dict) -> fx.Node:  # type: ignore[type-arg]
        node = self.graph.placeholder(name)
        node.target = node.name  # the graph made the name unique, not the target
        node.meta = meta
        return node

    def _const(self, node: fx.Node) -> fx.Node:
        if node not in self.consts:
            self.consts[node] = self._placeholder(f"const_{series_name(node)}", {"example_value": example(node)})
        return self.consts[node]

    def _separate_values(self, residue: int, slot: int) -> fx.Node:
        """A different outside value in every iteration: slices of one `unbind`, or values to be stacked."""
        window = self.window
        node = window.node(residue, window.template)
        if not window.exists(residue, window.count - 1):
            raise Reject("the last iteration lacks an input", node=window.node(residue, 0))
        column = [window.leaves(residue, t)[slot] for t in range(window.count)]
        key = tuple(id(c) for c in column)
        if key not in self._series:
            source = slices_of_one(column) or stackable(column, self._may_stack_given(column[0], node))
            if source is None:
                raise _not_one_series(node, slot, column)
            first, *rest = map(example, column)
            self._series[key] = self._input(source, wanting_grad(first, rest), base_name(column[0].name))  # type: ignore[arg-type, attr-defined]
        return self._series[key]

    def _may_stack_given(self, first: object, reader: fx.Node) -> bool:
        """Parameters of its own in every step: of a loop over time, and none larger than what is computed."""
        return self.window.run.reads_time() and is_no_larger(example(first), example(reader))

    def _numbers(self, residue: int, slot: int) -> fx.Node:
        """A Python number that is another one in every iteration."""
        window = self.window
        leaves = [window.leaves(residue, t) for t in range(window.count)]
        node = window.node(residue, window.template)
        if not window.run.reads_time():
            raise Reject("a Python number changes from step to step in what reads no time series", location=user_location(node))
        series = number_series(node, leaves[window.template], slot, [own[slot] for own in leaves])  # type: ignore[misc]
        if series.key not in self._series:
            self._series[series.key] = self._input(series, series.of_one_step, "number")
        return self._series[series.key]

    def _input(self, source: Source, value: torch.Tensor, name: str) -> fx.Node:
        reverse = isinstance(source, TimeSlices) and source.step < 0
        placeholder = self._placeholder(f"x_{name}", {"example_value": value})
        self.inputs.append((LoopInput(name, value, reverse), source, placeholder))
        return placeholder

    def _read(self, residue: int, node: fx.Node, columns: list[Column], series: list[Column]) -> fx.Node:
        """``x[t]``, ``x[:, t]``, ``x[..., t]``, ``x.select(d, t)`` of an invariant x."""
        source, value, unbound = unbound_source(columns[0].value)
        if columns[0].kind != "const" or len(series) != 1 or not isinstance(value, torch.Tensor):
            raise Reject(
                "an index that changes with t reads a value of the loop itself",
                node=node,
                location=user_location(node),
            )
        place = columns.index(series[0])
        leaves = self.window.leaves(residue, 0)
        dim, rest = (unbound, ()) if unbound is not None else time_dim(node, leaves, place, value)
        slices = TimeSlices(source, dim, leaves[place], series[0].step, self.window.count)  # type: ignore[arg-type]
        slices.check(value)
        key = (source, dim, leaves[place], series[0].step)
        if key not in self._series:
            now = value.select(dim, 0)
            self._series[key] = self._input(slices, now, series_name(source))  # type: ignore[arg-type]
        new = self._series[key]
        if rest:
            new = self.graph.call_function(operator.getitem, (new, rest))
            new.meta = dict(node.meta)
        return new

    def _store(self, residue: int, node: fx.Node, columns: list[Column]) -> fx.Node:
        """``out[t] = s`` as a loop value: ``s`` is an output of the loop, stacked at the dim of t."""
        series = [i for i, c in enumerate(columns) if c.kind == "series" and c.step]
        buffer, value = columns[0], columns[-1]
        chained = buffer.kind == "distance" and buffer.distance == self.window.period
        whole = example(node)
        if len(series) != 1 or not chained or value.kind == "number" or not isinstance(whole, torch.Tensor):
            raise Reject("a write inside the loop is not out[t] = value", node=node, location=user_location(node))
        leaves = self.window.leaves(residue, 0)
        dim, rest = time_dim(node, leaves, series[0], whole)
        step = columns[series[0]].step
        if rest or abs(step) != 1:
            raise Reject("a write inside the loop is not one whole slice", node=node, location=user_location(node))
        self._check_stored(residue, len(columns) - 1, node)
        stored = self._operand(residue, len(columns) - 1, value)
        self.stores[residue] = (dim, leaves[series[0]], step < 0)  # type: ignore[assignment]
        target = whole.select(dim, 0)
        return self._as_slice(stored, target)  # type: ignore[arg-type]

    def _check_stored(self, residue: int, slot: int, node: fx.Node) -> None:
        """What is stored is collected behind the loop: by then it is what it was, and of one shape in all steps."""
        steps = (t for t in range(self.window.count) if self.window.exists(residue, t))
        values = [v for t in steps if isinstance(v := self.window.leaves(residue, t)[slot], fx.Node)]
        if any(map(self.window.view.is_written, values)):
            reason = "what a write inside the loop puts into a slice is itself written into"
            raise Reject(reason, node=node, location=user_location(node))
        if len({shape_key(v) for v in map(example, values) if isinstance(v, torch.Tensor)}) > 1:
            raise Reject("a write inside the loop is given values of several shapes", node=node, location=user_location(node))

    def _as_slice(self, stored: fx.Node, target: torch.Tensor) -> fx.Node:
        """What assignment does to a value: cast to the buffer's dtype and broadcast to the slice."""
        value = example(stored)
        assert isinstance(value, torch.Tensor)
        if value.dtype != target.dtype:
            new = self.graph.call_method("to", (stored, target.dtype))
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
        node: fx.Node | None = None
        source = self.window.node(producer, self.window.template)
        # a chain: the carry `back` steps old hands over to the one `back + 1` steps old
        for distance in range(1, back + 1):
            t = back - distance
            init = self.window.leaves(residue, t)[slot]
            key = (producer, node, init if isinstance(init, fx.Node) else repr(init))
            _check_init(init, source, self.window.node(residue, t), self.window.leaves(residue, t), slot)
            if key not in self.carries:
                meta = self.window.meta(producer)
                meta["example_value"] = wanting_grad(meta["example_value"], [example(init)])
                placeholder = self._placeholder(f"carry_{value_name(source)}", meta)
                self.carries[key] = Carry(producer, distance, init, placeholder, younger=node)
            node = self.carries[key].placeholder
        assert node is not None
        return node

    def _next_carries(self) -> Iterator[fx.Node]:
        """The producer's value, or for an older one the carry before it in the chain."""
        for carry in self.carries.values():
            if carry.residue in self.stores:
                raise Reject("a buffer that is written step by step is also read as a whole inside the loop")
            yield self.values[carry.residue] if carry.younger is None else carry.younger

    def add_carry(self, residue: int) -> Carry:
        """Of a value that no later iteration reads: its last one is wanted."""
        value = self.values[residue]
        placeholder = self._placeholder(f"last_{base_name(value.name)}", dict(value.meta))
        carry = self.carries[residue, None, "last"] = Carry(residue, 1, 0, placeholder)
        self.next.append(value)
        return carry

    # ------------------------------------------------------------------------------------------------------------ the whole

    def module(self, values: list[fx.Node]) -> fx.GraphModule:
        """``carries, xs, consts -> next carries, values``"""
        self.graph.output((*self.next, *values))
        anchor = self.graph._root
        carries = [c.placeholder for c in self.carries.values()]
        for placeholder in (*carries, *(p for _, _, p in self.inputs), *self.consts.values()):
            anchor.append(placeholder)
            anchor = placeholder
        self.graph.eliminate_dead_code(is_impure_node=has_effect)
        return fx.GraphModule(self.root, self.graph, class_name="Body")


def _not_one_series(node: fx.Node, slot: int, column: list[object]) -> Reject:
    if all(map(_is_weight, column)):
        return _own_weights(node, STEPS_OWN_WEIGHTS)
    what = f"operand {slot} of '{user_line(node) or node.name}'"
    return Reject(f"{what} is another tensor in every step", node=node, location=user_location(node))


def _is_weight(operand: object) -> bool:
    return isinstance(operand, fx.Node) and isinstance(example(operand), torch.nn.Parameter)


def _own_weights(node: fx.Node, reason: str) -> Reject:
    return Reject(f"'{user_line(node) or node.name}' {reason}", node=node, location=user_location(node))


def _check_init(start: object, source: fx.Node, reader: fx.Node, leaves: list[object], slot: int) -> None:
    """What a state is before the first iteration, where `reader` has it as operand `slot`, beside what it is after one."""
    value, init = example(source), example(start)
    where = {"node": source.name, "location": user_location(source)}
    if not isinstance(value, torch.Tensor):
        raise Reject("a value that is not a tensor is handed from step to step", **where)  # type: ignore[arg-type]
    if isinstance(init, torch.Tensor):
        if init.dtype != value.dtype:
            hint = "start it in the dtype it has later"
            raise Reject(f"a state starts as {init.dtype} and goes on as {value.dtype}", hint=hint, **where)  # type: ignore[arg-type]
    elif not isinstance(init, (int, float)) or isinstance(init, bool):
        raise Reject(f"a state starts as {init!r}", **where)  # type: ignore[arg-type]
    elif not _holds_exactly(value.dtype, init) and not is_rounded_by(reader, leaves, slot, value.dtype):
        hint = f"start it as a tensor: torch.full_like(x[0], {init!r})"
        raise Reject(f"a state starts as {init!r}, which {value.dtype} cannot hold exactly", hint=hint, **where)  # type: ignore[arg-type]


def _holds_exactly(dtype: torch.dtype, number: float) -> bool:
    if not dtype.is_floating_point:
        return isinstance(number, int)
    return float(torch.tensor(number, dtype=dtype)) == float(number)
