"""One loop becomes several, in dependence order (loop distribution after Allen & Kennedy), and neighbours are fused.

    for t: a = linear(x[t]); s, v = lif(v, a); b = linear(s); z, u = lif(u, b)
    ->  for t: a[t] = linear(x[t])
        for t: s[t], v = lif(v, a[t])                  a strongly connected component: a recurrence
        for t: b[t] = linear(s[t])
        for t: z[t], u = lif(u, b[t])

The strongly connected components of the body's dependence graph (edges within an iteration, and from the next value of a
carry to its readers) are the smallest loops. Pointwise components of the same shape are then merged into the recurrence
next to them - consumers always, producers that feed nothing else - as long as no third loop would have to run in between.
Ops that write into the same tensor stay together, in the program's order.

A loop that is not pointwise joins the one recurrence it feeds where the caller says that one kernel can run both: a batch norm
in training mode, with statistics of each step, and the neuron behind it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx

from snn_compile.ir.loop import Loop, LoopCarry, LoopInput, LoopOutput
from snn_compile.ir.values import base_name, example, shape_hint, storage_key
from snn_compile.passes.classify import OpInfo, aliases
from snn_compile.passes.emit import replace_by_results
from snn_compile.passes.loop_results import stacked_example


@dataclass
class Group:
    """Nodes of the body that become one loop."""

    nodes: list[fx.Node]
    recurrent: bool
    pointwise: bool
    shape: tuple[int, ...] | None
    #: loops that are not pointwise have joined it
    is_joined: bool = False

    @property
    def is_kernel(self) -> bool:
        return self.recurrent and self.pointwise


#: Whether a group that is not pointwise may join the recurrence it feeds.
Joins = Callable[[Group, Group], bool]


# ------------------------------------------------------------------------------------------------------------- the groups


def find_groups(
    loop: Loop, infos: dict[fx.Node, OpInfo], ignore: Iterable[fx.Node] = (), joins: Joins | None = None
) -> list[Group]:
    """The loops that `loop` falls into, in an order that respects every dependence."""
    skipped = set(ignore)
    order = {n: i for i, n in enumerate(n for n in infos if n not in skipped)}
    graph = _dependences(loop, infos, order)
    components = [sorted(c, key=order.__getitem__) for c in nx.strongly_connected_components(graph)]
    groups = [_group(c, graph, infos) for c in components]
    return _fuse(groups, graph, order, joins)


def _group(nodes: list[fx.Node], graph: nx.DiGraph, infos: dict[fx.Node, OpInfo]) -> Group:
    recurrent = any(carried for _, _, carried in graph.subgraph(nodes).edges(data="carried"))
    shapes = {_shape(n) for n in nodes} - {None}
    pointwise = all(infos[n].pointwise for n in nodes) and len(shapes) == 1
    return Group(nodes, recurrent, pointwise, shapes.pop() if len(shapes) == 1 else None)


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    value = example(node)
    if isinstance(value, (tuple, list)):
        value = next((v for v in value if isinstance(v, torch.Tensor)), None)
    return shape_hint(value) if isinstance(value, torch.Tensor) else None


def carry_source(loop: Loop) -> dict[fx.Node, fx.Node]:
    """Carry placeholder -> the node that makes its next value, through chains of carries."""
    placeholders = loop.placeholders()[: len(loop.carries)]
    following = dict(zip(placeholders, loop.results()[0], strict=True))

    def root(node: fx.Node, seen: frozenset[fx.Node]) -> fx.Node:
        target = following[node]
        return root(target, seen | {node}) if target in following and target not in seen else target

    return {p: root(p, frozenset({p})) for p in placeholders}


def _dependences(loop: Loop, infos: dict[fx.Node, OpInfo], order: dict[fx.Node, int]) -> nx.DiGraph:
    source = carry_source(loop)
    graph = nx.DiGraph()
    graph.add_nodes_from(order)
    for node in order:
        for operand in node.all_input_nodes:
            producer = source.get(operand, operand)
            if producer in order:
                _add_edge(graph, producer, node, carried=operand in source)
                if not isinstance(example(producer), torch.Tensor):
                    _add_edge(graph, node, producer)  # an op and the getitems of its tuple are one thing
    _tie_writes(loop, infos, order, graph)
    return graph


def _add_edge(graph: nx.DiGraph, a: fx.Node, b: fx.Node, carried: bool = False) -> None:
    carried |= graph.has_edge(a, b) and graph.edges[a, b]["carried"]
    graph.add_edge(a, b, carried=carried)


def _tie_writes(loop: Loop, infos: dict[fx.Node, OpInfo], order: dict[fx.Node, int], graph: nx.DiGraph) -> None:
    """Everything that touches a tensor somebody writes into keeps its place relative to the write."""
    written = [w for info in infos.values() for w in info.writes]
    if not written:
        return
    groups = aliases([*loop.placeholders(), *infos])
    for target in written:
        same = next((g for g in groups.values() if target in g), [target])
        touching = [u for s in same for u in s.users if u in order] + [s for s in same if s in order]
        for a in touching[1:]:
            _add_edge(graph, touching[0], a)
            _add_edge(graph, a, touching[0])


# ----------------------------------------------------------------------------------------------------------------- fusion


def _fuse(groups: list[Group], graph: nx.DiGraph, order: dict[fx.Node, int], joins: Joins | None) -> list[Group]:
    of = {n: i for i, g in enumerate(groups) for n in g.nodes}
    dag = nx.DiGraph()
    dag.add_nodes_from(range(len(groups)))
    dag.add_edges_from((of[a], of[b]) for a, b in graph.edges if of[a] != of[b])
    merged = _Merger(groups, dag, lambda i: min(order[n] for n in groups[i].nodes))
    for i in merged.in_order():
        merged.join_producer(i)
    # (a group that has been merged away has left the dag)
    for i in reversed(merged.in_order()):
        merged.join_consumer(i)
    for i in reversed(merged.in_order() if joins is not None else []):
        merged.join_neuron(i, joins)
    return [groups[i] for i in merged.in_order()]


class _Merger:
    """Merging nodes of a dag of groups; a merge is legal where it makes no cycle."""

    def __init__(self, groups: list[Group], dag: nx.DiGraph, place) -> None:  # type: ignore[no-untyped-def]
        self.groups, self.dag, self.place = groups, dag, place

    def in_order(self) -> list[int]:
        return list(nx.lexicographical_topological_sort(self.dag, key=self.place))

    def join_producer(self, i: int) -> None:
        """A pointwise group joins the recurrence it reads from."""
        group = self.groups[i]
        if not group.pointwise:
            return
        producers = sorted(self.dag.predecessors(i), key=self.place, reverse=True)
        for p in producers:
            if self.groups[p].is_kernel and self.groups[p].shape == group.shape and self._legal(p, i):
                self._merge(p, i)
                return

    def join_consumer(self, i: int) -> None:
        """A pointwise group that feeds one recurrence only joins it; a smaller one is computed lane by lane there."""
        group = self.groups[i]
        if not group.pointwise or group.recurrent:
            return
        consumers = list(self.dag.successors(i))
        if len(consumers) != 1 or self._is_result(group):
            return
        consumer = self.groups[consumers[0]]
        if consumer.is_kernel and _broadcasts(group.shape, consumer.shape):
            self._merge(consumers[0], i)

    def join_neuron(self, i: int, joins: Joins) -> None:
        """A group that is not pointwise joins the one recurrence that reads it."""
        group, consumers = self.groups[i], list(self.dag.successors(i))
        if group.pointwise or group.recurrent or len(consumers) != 1 or self._is_result(group):
            return
        neuron = self.groups[consumers[0]]
        if (neuron.is_kernel or neuron.is_joined) and neuron.shape == group.shape and joins(group, neuron):
            self._merge(consumers[0], i)
            neuron.pointwise, neuron.is_joined = False, True

    @staticmethod
    def _is_result(group: Group) -> bool:
        return any(u.op == "output" for n in group.nodes for u in n.users)

    def _legal(self, a: int, b: int) -> bool:
        """No path from a to b through a third group."""
        return not any(s != b and nx.has_path(self.dag, s, b) for s in self.dag.successors(a))

    def _merge(self, into: int, other: int) -> None:
        a, b = self.groups[into], self.groups[other]
        a.nodes = sorted(a.nodes + b.nodes, key=_program_order(a.nodes + b.nodes))
        a.recurrent |= b.recurrent
        for p in list(self.dag.predecessors(other)):
            if p != into:
                self.dag.add_edge(p, into)
        for s in list(self.dag.successors(other)):
            if s != into:
                self.dag.add_edge(into, s)
        self.dag.remove_node(other)


def _broadcasts(small: tuple[int, ...] | None, large: tuple[int, ...] | None) -> bool:
    if small is None or large is None or len(small) > len(large):
        return False
    return all(s in (1, b) for s, b in zip(reversed(small), reversed(large), strict=False))


def _program_order(nodes: Sequence[fx.Node]):  # type: ignore[no-untyped-def]
    wanted = set(nodes)
    position = {n: i for i, n in enumerate(nodes[0].graph.nodes) if n in wanted}
    return position.__getitem__


# ---------------------------------------------------------------------------------------------------------------- building


def distribute(
    gm: fx.GraphModule, call: fx.Node, loop: Loop, infos: dict[fx.Node, OpInfo], joins: Joins | None = None
) -> list[tuple[fx.Node, Loop]]:
    """Replace `call` of `loop` by calls of one loop a group; gives them in order. Kernel groups are pointwise."""
    _materialise_results(loop, infos)
    groups = find_groups(loop, infos, joins=joins)
    splitter = _Splitter(gm, call, loop, groups)
    calls = [splitter.emit(i) for i in range(len(groups))]
    splitter.rewire()
    for (_, new), group in zip(calls, groups, strict=True):
        new.is_kernel, new.is_recurrent = group.is_kernel, group.recurrent
    given = {storage_key(p) for p in loop.placeholders()[len(loop.carries) :]}  # (no step writes into what one before has made)
    pure = [all(_changes_nothing_given(infos[n], given) for n in group.nodes) for group in groups]
    dead = [c for c, p in zip(reversed(calls), reversed(pure), strict=True) if p and _drop_unused(gm, c[0])]
    return [c for c in calls if c not in dead]


def _changes_nothing_given(info: OpInfo, given: set[int | None]) -> bool:
    """It is pure, or writes only into what the step has made itself."""
    written = set(map(storage_key, info.writes))
    return info.pure or bool(written and written.isdisjoint({*given, None}))


def _drop_unused(gm: fx.GraphModule, call: fx.Node) -> bool:
    """Erase results that nobody reads; and the loop, where that is all of them (a state that is recorded in vain)."""
    for user in list(call.users):
        for view in [v for v in user.users if v.target == "movedim" and not v.users]:
            gm.graph.erase_node(view)
        if not user.users:
            gm.graph.erase_node(user)
    if call.users:
        return False
    gm.graph.erase_node(call)
    delattr(gm, str(call.target))
    return True


def _materialise_results(loop: Loop, infos: dict[fx.Node, OpInfo]) -> None:
    """A result of the loop that is one of its inputs gets an op of its own, so that a group can own it."""
    output = loop.body.graph.output_node()
    n = len(loop.carries)
    results = list(output.args[0])  # type: ignore[arg-type]
    for i, node in enumerate(results):
        wanted = i >= n or loop.carries[i].is_result
        if wanted and node.op == "placeholder":
            with loop.body.graph.inserting_before(output):
                clone = loop.body.graph.call_method("clone", (node,))
            clone.meta = dict(node.meta)
            infos[clone] = OpInfo(pointwise=True)
            results[i] = clone
    output.args = (tuple(results),)


class _Splitter:
    """Builds one `Loop` a group and wires them to each other."""

    def __init__(self, gm: fx.GraphModule, call: fx.Node, loop: Loop, groups: list[Group]) -> None:
        self.gm, self.call, self.loop, self.groups = gm, call, loop, groups
        placeholders = loop.placeholders()
        n, m = len(loop.carries), len(loop.xs)
        self.operand: dict[fx.Node, fx.Node] = dict(zip(placeholders, call.args, strict=True))  # type: ignore[arg-type]
        self.carry = dict(zip(placeholders[:n], loop.carries, strict=True))
        self.x = dict(zip(placeholders[n : n + m], loop.xs, strict=True))
        self.const = dict(zip(placeholders[n + m :], loop.consts, strict=True))
        self.next = dict(zip(placeholders[:n], loop.results()[0], strict=True))
        self.values = loop.results()[1]
        self.group_of = {node: i for i, g in enumerate(groups) for node in g.nodes}
        self.series: dict[fx.Node, fx.Node] = {}  # body value -> its steps, time at dim 0, in the outer graph
        self.y_node: dict[int, fx.Node] = {}
        self.final_node: dict[fx.Node, fx.Node] = {}

    def emit(self, index: int) -> tuple[fx.Node, Loop]:
        builder = _GroupBuilder(self, self.groups[index], index)
        name = self.loop.name if len(self.groups) == 1 else f"{self.loop.name}_{index}"
        new = builder.build(name)
        if hasattr(self.gm, name):
            delattr(self.gm, name)
        self.gm.add_submodule(name, new)
        with self.gm.graph.inserting_before(self.call):
            node = self.gm.graph.call_module(name, tuple(builder.operands()))
            node.meta = dict(self.call.meta)
            self._take_results(node, new, builder)
        return node, new

    def _take_results(self, call: fx.Node, loop: Loop, builder: _GroupBuilder) -> None:
        def result(i: int, value: torch.Tensor) -> fx.Node:
            node = self.gm.graph.call_function(operator.getitem, (call, i))
            node.meta = {"example_value": value}
            return node

        for i, (spec, value, which) in enumerate(builder.outputs):
            stacked = stacked_example(spec, loop.length)
            node = result(i, stacked)
            if which is not None:
                self.y_node[which] = node
            if not spec.reverse and value not in self.series:
                if spec.dim != 0:
                    node = self.gm.graph.call_method("movedim", (node, spec.dim, 0))
                    node.meta = {"example_value": stacked.movedim(spec.dim, 0)}
                self.series[value] = node
        position = len(builder.outputs)
        for placeholder in builder.final_order:
            self.final_node[placeholder] = result(position, example(placeholder))  # type: ignore[arg-type]
            position += 1

    def needed_outside(self, node: fx.Node, index: int) -> bool:
        """Whether another group reads the value, in the same iteration or later."""
        readers = set(node.users) | {u for p, n in self._next_closure(node) for u in p.users}
        return any(self.group_of.get(u, index) != index for u in readers)

    def _next_closure(self, node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
        found, frontier = [], [node]
        while frontier:
            value = frontier.pop()
            for placeholder, n in self.next.items():
                if n is value and (placeholder, n) not in found:
                    found.append((placeholder, n))
                    frontier.append(placeholder)
        return found

    def rewire(self) -> None:
        """Uses of the old call's results become uses of the new ones."""
        results: list[fx.Node] = [self.y_node[i] for i in range(len(self.loop.ys))]
        results += [self.final_node[p] for p, c in self.carry.items() if c.is_result]
        replace_by_results(self.call, results)


class _GroupBuilder:
    def __init__(self, split: _Splitter, group: Group, index: int) -> None:
        self.split, self.group, self.index = split, group, index
        self.graph = fx.Graph()
        self.root: dict[str, object] = {}
        self.env: dict[fx.Node, fx.Node] = {}
        self.carries: dict[fx.Node, fx.Node] = {}  # old placeholder -> new
        self.xs: dict[fx.Node, fx.Node] = {}  # old placeholder or value of another group -> new
        self.consts: dict[fx.Node, fx.Node] = {}
        self.outputs: list[tuple[LoopOutput, fx.Node, int | None]] = []
        self.final_order: list[fx.Node] = []
        self.inits: list[fx.Node | None] = []

    def build(self, name: str) -> Loop:
        for node in self.group.nodes:
            new = self.graph.node_copy(node, self._argument)
            self.env[node] = new
        next_values = self._close_carries()
        carries = [self._carry_spec(p) for p in self.carries]
        next_values += self._finals(carries)
        self._outputs()
        values = [self.env[v] if v in self.env else self._argument(v) for _, v, _ in self.outputs]
        self.graph.output((*next_values, *values))
        self._sort_placeholders()
        body = fx.GraphModule(self.root, self.graph, class_name="Body")
        xs = [self._x_spec(old) for old in self.xs]
        consts = [self.split.const[old] for old in self.consts]
        loop = self.split.loop
        return Loop(name, loop.length, body, carries, xs, consts, [s for s, _, _ in self.outputs], loop.location)

    # ------------------------------------------------------------------------------------------------------- operands

    def _argument(self, node: fx.Node) -> fx.Node:
        if node in self.env:
            return self.env[node]
        if node.op == "get_attr":
            self.root.setdefault(str(node.target), getattr(self.split.loop.body, str(node.target)))
            return self.graph.get_attr(str(node.target))
        if node in self.split.carry:
            return self._placeholder(self.carries, node)
        if node in self.split.const:
            return self._placeholder(self.consts, node)
        return self._placeholder(self.xs, node)

    def _placeholder(self, kind: dict[fx.Node, fx.Node], old: fx.Node) -> fx.Node:
        if old not in kind:
            prefix = "" if old.op == "placeholder" else "x_"
            first = next(iter(self.graph.nodes), None)
            with self.graph.inserting_before(first) if first is not None else self.graph.inserting_after(None):
                new = self.graph.placeholder(f"{prefix}{base_name(old.name)}")
            new.target = new.name
            new.meta = dict(old.meta)
            kind[old] = new
        return kind[old]

    def _close_carries(self) -> list[fx.Node]:
        """Next values, which may bring in further operands (a delayed value of another group, a chain of carries)."""
        values: list[fx.Node] = []
        done: list[fx.Node] = []
        while len(done) < len(self.carries):
            old = list(self.carries)[len(done)]
            values.append(self._argument(self.split.next[old]))
            done.append(old)
        return values

    def _carry_spec(self, old: fx.Node) -> LoopCarry:
        spec = self.split.carry[old]
        own = self.split.group_of.get(self.split.next[old]) == self.index
        if spec.is_result and own:
            self.final_order.append(old)
        self.inits.append(self.split.operand[old])
        return LoopCarry(spec.name, spec.example, spec.is_result and own)

    def _finals(self, carries: list[LoopCarry]) -> list[fx.Node]:
        """Results that this group makes but does not carry: a carry nobody reads."""
        values = []
        for old, spec in self.split.carry.items():
            source = self.split.next[old]
            if spec.is_result and old not in self.carries and self.split.group_of.get(source) == self.index:
                self._placeholder(self.carries, old)
                carries.append(LoopCarry(spec.name, spec.example, True))
                self.final_order.append(old)
                self.inits.append(self.split.operand[old])
                values.append(self.env[source])
        return values

    def _outputs(self) -> None:
        for i, (spec, value) in enumerate(zip(self.split.loop.ys, self.split.values, strict=True)):
            if self.split.group_of.get(value) == self.index:
                self.outputs.append((spec, value, i))
        given = {v for s, v, _ in self.outputs if not s.reverse}
        for node in self.group.nodes:
            if node not in given and self.split.needed_outside(node, self.index):
                value = example(node)
                if isinstance(value, torch.Tensor):
                    self.outputs.append((LoopOutput(base_name(node.name), value), node, None))

    def _x_spec(self, old: fx.Node) -> LoopInput:
        if old in self.split.x:
            return self.split.x[old]
        return LoopInput(base_name(old.name), example(old))  # type: ignore[arg-type]

    def _sort_placeholders(self) -> None:
        anchor = self.graph._root
        for placeholder in (*self.carries.values(), *self.xs.values(), *self.consts.values()):
            anchor.append(placeholder)
            anchor = placeholder

    def operands(self) -> list[fx.Node]:
        xs = [self.split.operand[o] if o in self.split.operand else self.split.series[o] for o in self.xs]
        return [*self.inits, *xs, *(self.split.operand[c] for c in self.consts)]  # type: ignore[list-item]
