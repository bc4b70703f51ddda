"""An ATen graph of one step -> a `Program` of regions and calls.

    addmm; mul; add; add; sub; ge; _to_copy; sub   ->   call addmm; region {mul, add, add, sub, ge, _to_copy, sub}

A pointwise op belongs to the region of its shape and its *level*, the number of calls on the longest way to it. A level is a
cut of the graph, so regions form no cycle. An op whose readers all belong to one later region moves there: its value then
never leaves the registers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import networkx as nx
import torch
from torch import fx

from snn_compile.ir.recurrence import Const, Output, Recurrence, TimeSeries
from snn_compile.ir.stepped import Call, Program, Region, Slot

aten = torch.ops.aten
VIEWS = {aten.view.default, aten._unsafe_view.default}
Supported = Callable[[fx.Node], bool]
#: (level, shape, is invariant): one region each
Key = tuple[int, tuple[int, ...], bool]


def split_step(gm: fx.GraphModule, results: Sequence[fx.Node | None], invariant: set[fx.Node], supported: Supported) -> Program:
    """`invariant`: placeholders that hold the same value in every step."""
    return _Splitter(gm, results, invariant, supported).program()


def is_pointwise(node: fx.Node, supported: Supported) -> bool:
    """Whether a region can hold the op: one tensor of the broadcast shape of its operands, at least one of them not 0-d."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.Tensor) or value.dim() == 0 or not supported(node):
        return False
    shapes = [tuple(n.meta["val"].shape) for n in node.all_input_nodes]
    return bool(shapes) and torch.broadcast_shapes(*shapes) == value.shape and not value.dtype.is_complex


def is_number(node: fx.Node) -> bool:
    """A 0-d constant made in the step (``full([], 0.)``): part of every region that reads it."""
    value = node.meta.get("val")
    made = node.op == "call_function" and not node.all_input_nodes
    return made and isinstance(value, torch.Tensor) and value.dim() == 0


class _Splitter:
    def __init__(self, gm: fx.GraphModule, results: Sequence[fx.Node | None], invariant: set[fx.Node], supported: Supported):
        self.gm, self.results, self.supported = gm, results, supported
        self.placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self.ops = [n for n in gm.graph.nodes if n.op == "call_function"]
        self.invariant = set(invariant)
        self.key: dict[fx.Node, Key] = {}
        self._find_invariant()
        self._find_levels()
        self._sink()
        self.slot = {n: i for i, n in enumerate([*self.placeholders, *self.ops])}

    def _find_invariant(self) -> None:
        for node in self.ops:
            if all(n in self.invariant for n in node.all_input_nodes):
                self.invariant.add(node)

    def _find_levels(self) -> None:
        self.level: dict[fx.Node, int] = dict.fromkeys(self.placeholders, 0)
        for node in self.ops:
            before = max((self.level[n] for n in node.all_input_nodes), default=0)
            pointwise = is_pointwise(node, self.supported)
            self.level[node] = before if pointwise else before + 1
            if pointwise:
                self.key[node] = (before, tuple(node.meta["val"].shape), node in self.invariant)

    def _sink(self) -> None:
        """An op all of whose readers are in one region joins it."""
        given = set(self.results)
        for node in reversed(self.ops):
            if node in self.key and node not in given:
                readers = {self.key.get(u) for u in node.users}
                if len(readers) == 1 and (reader := readers.pop()) is not None and reader[1:] == self.key[node][1:]:
                    self.key[node] = reader

    # -------------------------------------------------------------------------------------------------------- the program

    def program(self) -> Program:
        units: dict[object, list[fx.Node]] = {}
        for node in self.ops:
            if node in self.key or not is_number(node) or self._is_read_by_a_call(node):
                units.setdefault(self.key.get(node, node), []).append(node)
        of = {n: key for key, nodes in units.items() for n in nodes}
        order = nx.DiGraph()
        order.add_nodes_from(units)
        order.add_edges_from((of[o], of[n]) for n in of for o in n.all_input_nodes if o in of and of[o] != of[n])
        first = {key: self.slot[nodes[0]] for key, nodes in units.items()}
        prologue: list[Region | Call] = []
        rest: list[Region | Call] = []
        for key in nx.lexicographical_topological_sort(order, key=first.__getitem__):
            nodes = units[key]
            unit = self._region(nodes) if nodes[0] in self.key else self._call(nodes[0])
            (prologue if nodes[0] in self.invariant else rest).append(unit)
        outputs = [None if r is None else self.slot[r] for r in self.results]
        return Program(len(self.slot), len(self.placeholders), prologue, rest, outputs)

    def _is_read_by_a_call(self, node: fx.Node) -> bool:
        return node in self.results or any(u not in self.key for u in node.users)

    def _call(self, node: fx.Node) -> Call:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: Slot(self.slot[n]))  # type: ignore[arg-type, return-value]
        # clones are gone, and results of regions are contiguous: what was a view in the trace may be a copy here
        target = aten.reshape.default if node.target in VIEWS else node.target
        return Call(target, tuple(args), dict(kwargs), self.slot[node])  # type: ignore[arg-type]

    def _region(self, nodes: list[fx.Node]) -> Region:
        inside = set(nodes)
        graph, env = fx.Graph(), {}  # type: ignore[var-annotated]
        read = dict.fromkeys(o for n in nodes for o in n.all_input_nodes if o not in inside and not is_number(o))
        # a 0-d operand takes no part in type promotion and is no time series
        series, scalars = ([n for n in read if (n.meta["val"].dim() == 0) == is_0d] for is_0d in (False, True))
        for operand in (*series, *scalars):
            env[operand] = graph.placeholder(operand.name)
            env[operand].meta = dict(operand.meta)
        for node in nodes:
            for number in (o for o in node.all_input_nodes if is_number(o) and o not in env):
                env[number] = graph.node_copy(number)
            env[node] = graph.node_copy(node, env.__getitem__)
        written = [n for n in nodes if n in self.results or any(u not in inside for u in n.users)]
        graph.output([env[n] for n in written])
        kernel = Recurrence(
            "region",
            (),
            tuple(TimeSeries(_name(n), n.meta["val"].dtype) for n in series),
            tuple(Const(_name(n), n.meta["val"].dtype, is_scalar=True) for n in scalars),
            tuple(Output(_name(n), n.meta["val"].dtype) for n in written),
            fx.GraphModule(self.gm, graph, class_name="Region"),
            meta={"shape": tuple(nodes[0].meta["val"].shape)},
        )
        inputs = tuple(self.slot[n] for n in (*series, *scalars))
        return Region(kernel, inputs, tuple(self.slot[n] for n in written))


def _name(node: fx.Node) -> str:
    return str(node.meta.get("user_name") or node.name)
