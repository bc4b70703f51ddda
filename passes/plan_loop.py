"""One loop to be: its window of nodes, its body, its operands, and how it takes their place in the graph."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from snn_compile.errors import Reject
from snn_compile.ir.loop import Loop, LoopCarry, LoopConst, LoopInput, LoopOutput
from snn_compile.ir.values import base_name, example, shape_hint, user_line, user_location, value_name, wanting_grad
from snn_compile.passes.functionalize import is_grad_switch, is_write, store
from snn_compile.passes.loop_operands import (
    TimeSlices,
    series_name,
    slices_of_one,
    stackable,
    time_dim,
    unbound_source,
)
from snn_compile.passes.loop_results import rewire_output, stack_of, stacked_example
from snn_compile.passes.number_series import is_computed_wider, number_series
from snn_compile.passes.relate_iterations import Column, Graph, Run


@dataclass
class PlannedCarry:
    """The value `residue` produces, as seen `back` iterations later; `init` is what iteration 0 sees."""

    residue: int
    back: int
    init: object
    placeholder: fx.Node | None = None


class LoopPlan:
    """One loop to be: the window of nodes, its body, its operands, and how its values are used outside."""

    def __init__(self, view: Graph, run: Run, start: int, count: int) -> None:
        self.view, self.run, self.start, self.count = view, run, start, count
        self.period = run.period
        self.stop = start + count * run.period

    def node(self, residue: int, t: int) -> fx.Node:
        return self.view.nodes[self.start + t * self.period + residue]

    def exists(self, residue: int, t: int) -> bool:
        return self.start + t * self.period + residue < self.stop

    def _first(self) -> fx.Node:
        """The first op of a step that is of some place in the user's code: switches of autocast are not."""
        step = [self.node(residue, self.template) for residue in range(self.period)]
        return next(filter(user_location, step), step[0])

    def absorb_tail(self) -> None:
        """Take in a last iteration that lacks its dead end, where its values are collected like all others'."""
        tail = self.run.stop - self.stop
        if tail <= 0 or any(
            c.kind in ("series", "numbers") for r in range(tail, self.period) for c in self.run.column(self.start + r)
        ):
            return  # (there is no slice of x for what the last iteration lacks)
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
        self.template = 1 if self.count > 1 else 0
        self.growing = self._find_growing()
        self.carries: dict[tuple[int, int, object], PlannedCarry] = {}
        self.operands: list[object] = []
        self.inputs: list[tuple[LoopInput, object]] = []
        self.consts: dict[fx.Node, fx.Node] = {}
        self.body = fx.Graph()
        self.root: dict[str, torch.nn.Module] = {}
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

    def _find_growing(self) -> set[int]:
        """Values that have another shape in iteration 0, because a state starts smaller than it goes on."""
        growing = set()
        for residue in range(self.period):
            node = self.node(residue, self.template)
            wanted = _types(example(node))
            for t in range(self.count):
                if t == self.template or not self.exists(residue, t):
                    continue
                types = _types(example(self.node(residue, t)))
                if types == wanted:
                    continue
                if t > 0 or [d for _, d in types] != [d for _, d in wanted]:
                    raise Reject(
                        f"'{user_line(node) or node.name}' has another shape or dtype in step {t} than in the next",
                        node=node,
                        location=user_location(node),
                        hint="start the states in the shape and dtype that they have later",
                    )
                growing.add(residue)
        return growing

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
            new.meta = self._meta(residue)
            if any(c.kind == "numbers" for c in columns) and is_computed_wider(node, new.meta["example_value"].dtype):
                new = self._widen(new)
            if residue in self.growing:
                new.meta["grows"] = True
            self.values[residue] = new

    def _widen(self, node: fx.Node) -> fx.Node:
        """``x * c -> (x.float() * c).to(x.dtype)``: eager's half precision beside a number."""
        value = example(node)

        def convert(operand: fx.Node, dtype: torch.dtype) -> fx.Node:
            new = self.body.call_method("to", (operand, dtype))
            new.meta = {**operand.meta, "example_value": example(operand).to(dtype)}
            return new

        with self.body.inserting_before(node):
            for operand in node.all_input_nodes:
                if example(operand).dtype == value.dtype:
                    node.replace_input_with(operand, convert(operand, torch.float32))
        node.meta["example_value"] = value.float()
        return convert(node, value.dtype)

    def _meta(self, residue: int) -> dict:  # type: ignore[type-arg]
        """What is known of a value, for all iterations."""
        node = self.node(residue, self.template)
        others = (example(self.node(residue, t)) for t in range(self.count) if self.exists(residue, t))
        return {**node.meta, "example_value": wanting_grad(example(node), others)}

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
        if column.kind == "numbers":
            return self._numbers(residue, slot)
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
            self.consts[node] = self._placeholder(f"const_{series_name(node)}", {"example_value": example(node)})
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
        source = slices_of_one(column) or stackable(column, self._may_stack_given(column[0], self.node(residue, self.template)))
        if source is None:
            node = self.node(residue, self.template)
            what = f"'{user_line(node) or node.name}'"
            if all(isinstance(c, fx.Node) and isinstance(example(c), torch.nn.Parameter) for c in column):
                reason = f"{what} has weights of its own every time: layers, one after another, rather than steps"
            else:
                reason = f"operand {slot} of {what} is another tensor in every step"
            raise Reject(reason, node=node, location=user_location(node))
        value = self._series[key] = self._input(source, wanting_grad(*_first_and_rest(column)), base_name(column[0].name))  # type: ignore[union-attr]
        return value

    def _numbers(self, residue: int, slot: int) -> fx.Node:
        """A Python number that is another one in every iteration."""
        leaves = [self.view.slots[self.start + t * self.period + residue].leaves for t in range(self.count)]
        node = self.node(residue, self.template)
        if not self._reads_time():
            raise Reject("a Python number changes from step to step in what reads no time series", location=user_location(node))
        series = number_series(node, leaves[self.template], slot, [own[slot] for own in leaves])  # type: ignore[misc]
        if series.key not in self._series:
            self._series[series.key] = self._input(series, series.of_one_step, "number")
        return self._series[series.key]

    def _reads_time(self) -> bool:
        """It is a loop over time, which reads ``x[t]``. (Layers of a deep network look alike, too.)"""
        return any(c.kind == "series" and c.step for row in self.run.columns for c in row)

    def _may_stack_given(self, first: object, reader: fx.Node) -> bool:
        """Parameters of its own in every step: of a loop over time, and none larger than what is computed."""
        reads_time = self._reads_time()
        value, result = example(first), example(reader)
        sizes = [v.numel() if isinstance(v, torch.Tensor) else None for v in (value, result)]
        return reads_time and all(isinstance(n, int) for n in sizes) and sizes[0] <= sizes[1]  # type: ignore[operator]

    def _input(self, source: object, value: object, name: str) -> fx.Node:
        reverse = isinstance(source, TimeSlices) and source.step < 0
        spec = LoopInput(name, value, reverse)  # type: ignore[arg-type]
        placeholder = self._placeholder(f"x_{name}", {"example_value": value})
        self.inputs.append((spec, source))
        spec.placeholder = placeholder  # type: ignore[attr-defined]
        return placeholder

    def _emit_read(self, residue: int, node: fx.Node, columns: list[Column], series: list[Column]) -> None:
        """``x[t]``, ``x[:, t]``, ``x[..., t]``, ``x.select(d, t)`` of an invariant x."""
        source, value, unbound = unbound_source(columns[0].value)
        if columns[0].kind != "const" or len(series) != 1 or not isinstance(value, torch.Tensor):
            raise Reject(
                "an index that changes with t reads a value of the loop itself",
                node=node,
                location=user_location(node),
            )
        place = columns.index(series[0])
        leaves = self.view.slots[self.start + residue].leaves
        dim, rest = (unbound, ()) if unbound is not None else time_dim(node, leaves, place, value)
        first = self.view.slots[self.start + residue].leaves[place]
        slices = TimeSlices(source, dim, first, series[0].step, self.count)  # type: ignore[arg-type]
        slices.check(value)
        key = (source, dim, first, series[0].step)
        if key not in self._series:
            now = value.select(dim, 0)
            self._series[key] = self._input(slices, now, series_name(source))  # type: ignore[arg-type]
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
        dim, rest = time_dim(node, leaves, series[0], whole)
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
                carry = PlannedCarry(producer, distance, init)
                source = self.node(producer, self.template)
                self._check_init(carry, source)
                meta = self._meta(producer)
                meta["example_value"] = wanting_grad(meta["example_value"], [example(init)])
                carry.placeholder = self._placeholder(f"carry_{value_name(source)}", meta)
                self.carries[key] = carry
            node = self.carries[key].placeholder
        assert node is not None
        return node

    def _check_init(self, carry: PlannedCarry, source: fx.Node) -> None:
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
        loop_consts = [LoopConst(series_name(n), example(n)) for n in self.consts]
        self._sort_placeholders(extra)
        # (FX takes a method call for pure, even `counter.add_(1)`)
        self.body.eliminate_dead_code(is_impure_node=lambda n: n.is_impure() or is_write(n))
        body = fx.GraphModule(self.root, self.body, class_name="Body")
        place = user_location(self._first())
        return Loop(name, self.count, body, carries, loop_xs, loop_consts, [s for s, _ in self.outputs], place)

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
        self.carries[(residue, 1, "last")] = PlannedCarry(residue, 1, 0, placeholder)
        self.next.append(value)
        self.final_of[residue] = len(carries) - 1

    def _want_output(self, residue: int, dim: int, reverse: bool) -> None:
        value = example(self.values[residue])
        if not isinstance(value, torch.Tensor):
            raise Reject("a value of the loop that is not a tensor is used outside", node=self.node(residue, 0))
        if residue in self.growing:
            raise Reject(
                "a value that has another shape in the first step than in all others is used outside the loop",
                node=self.node(residue, 0),
                hint="start the states in the shape that they have later",
            )
        self.output_of[residue] = len(self.outputs)
        name = value_name(self.node(residue, self.template))
        self.outputs.append((LoopOutput(name, value, dim, reverse), residue))

    def _stack_dim(self, residue: int, by_step: dict[int, list[fx.Node]]) -> int:
        """The dim along which the steps' values are stacked, so that the loop lays them out that way."""
        value = example(self.values[residue])
        for user in by_step.get(0, ()):
            dim = stack_of(user)
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
            call.meta = {"stack_trace": self._first().meta.get("stack_trace", "")}
            results = {}
            for i, y in enumerate(loop.ys):
                results[i] = graph.call_function(operator.getitem, (call, i))
                results[i].meta = {"example_value": stacked_example(y, self.count)}
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

    def _initial(self, graph: fx.Graph, carry: PlannedCarry) -> fx.Node:
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
                rewire_output(graph, self, residue, loop.ys[index], results[index])

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


def _types(value: object) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the tensors in `value`."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    return [(shape_hint(v), v.dtype) for v in values if isinstance(v, torch.Tensor)]


def _first_and_rest(column: list[object]) -> tuple[object, list[object]]:
    first, *rest = map(example, column)
    return first, rest
