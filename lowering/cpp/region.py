"""The part of a graph that one lane loop computes, and how far out of the time loop each value of it can be computed.

for t: for row: for lane: v = v * sigmoid(w) * exp(-dt)        (w a row of parameters, dt a number)

->  exp(-dt) once a kernel, sigmoid(w) once a lane (or a row, where it has but one w) into an array, the rest once a step and lane
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import fx

from snn_compile.lowering.cpp.emit import Emitter, Text, is_expensive, levels, needed, results, wanted_name
from snn_compile.lowering.cpp.literals import HELD
from snn_compile.lowering.cpp.names import Names
from snn_compile.lowering.cpp.numbering import Numbering
from snn_compile.lowering.cpp.tensors import TensorArgument
from snn_compile.lowering.cpp.writer import Writer

#: Where a value is computed: once a kernel, once a row, once a lane, once a step and lane.
KERNEL, ROW, LANE, STEP = range(4)

EMPTY: Mapping[fx.Node, str] = {}


class Invariants:
    """The values that do not change over time; one for all graphs of a kernel, so that equal ones are computed once."""

    def __init__(self, names: Names) -> None:
        self.names = names
        self.values: dict[int, Text] = {}
        self.arrays: dict[int, str] = {}
        self.numbering = Numbering()


class Region:
    """See the module's docstring.

    `wanted` are results of the graph, `extra` more of its nodes. `names` has the value of each placeholder, `constants`
    those that all steps share. `given` are nodes that are not computed but loaded, as placeholders are.
    """

    def __init__(
        self,
        writer: Writer,
        graph: fx.Graph,
        wanted: Iterable[int],
        names: Sequence[str],
        constants: Mapping[int, TensorArgument],
        invariants: Invariants,
        extra: Sequence[fx.Node] = (),
        given: Iterable[fx.Node] = (),
    ) -> None:
        self.writer, self.invariants = writer, invariants
        returned = results(graph)
        self.results = {i: returned[i] for i in wanted}
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        self.names = dict(zip(placeholders, names, strict=True))
        self.positions = {n: i for i, n in enumerate(placeholders)}
        self.constants = {n: constants[i] for n, i in self.positions.items() if i in constants}
        self.extra, self.given = list(extra), set(given)
        nodes = needed(graph, [*self.results.values(), *extra])
        self.level = levels(nodes, {n: self._level_of(n) for n in placeholders})
        self.hoisted = self._find_hoisted(nodes)
        self.in_lanes = self._closure([*self.results.values(), *extra])
        self.hoisted = [n for n in self.hoisted if n in self.in_lanes]
        read = {*self.in_lanes, *self._closure(self.hoisted, stop=lambda node: False)}
        self.kernel_nodes = needed(graph, [n for n in read if self.level[n] == KERNEL])
        self.kernel_values: dict[fx.Node, Text] = {}

    def _level_of(self, placeholder: fx.Node) -> int:
        tensor = self.constants.get(placeholder)
        if tensor is None:
            return STEP
        if tensor.inner:
            return LANE
        return KERNEL if self.writer.layout.ndim == 1 or placeholder.meta["val"].dim() == 0 else ROW

    def _placeholders(self, nodes: Iterable[fx.Node], level: int) -> list[fx.Node]:
        return [n for n in nodes if n.op == "placeholder" and self.level[n] == level]

    def _find_hoisted(self, nodes: Sequence[fx.Node]) -> list[fx.Node]:
        """The values of a row or lane that do not change over time, are not free, and that the steps read."""
        costly: set[fx.Node] = set()
        for node in nodes:
            if self.level[node] not in (ROW, LANE) or node.op == "placeholder":
                continue
            if is_expensive(node) or any(i in costly for i in node.all_input_nodes):
                costly.add(node)
        returned = set(self.results.values())
        return [n for n in nodes if n in costly and (n in returned or any(self.level.get(u) == STEP for u in n.users))]

    def _closure(self, wanted: Iterable[object], stop: Callable[[fx.Node], bool] | None = None) -> list[fx.Node]:
        """The nodes computed in a lane loop for `wanted`, and the outer values that they read, in order."""
        stop = stop or (lambda node: node in self.hoisted or node in self.given)
        found: set[fx.Node] = set()
        stack = [n for n in wanted if isinstance(n, fx.Node)]
        while stack:
            node = stack.pop()
            if node in found:
                continue
            found.add(node)
            if self.level[node] >= ROW and not stop(node):
                stack += node.all_input_nodes
        return [n for n in self.level if n in found]

    def _number(self, node: fx.Node) -> int:
        return self.invariants.numbering.number(node, self.names)

    def reads(self, position: int) -> bool:
        """Whether the lane loop reads this placeholder."""
        return any(self.positions.get(n) == position for n in self.in_lanes)

    # ------------------------------------------------------------------------------------------------------- emission

    def emit_kernel_values(self) -> None:
        """At the top of the function: numbers and dimensionless tensors."""
        emitter = Emitter(self.invariants.names, self.kernel_values, self.writer.helpers, is_scalar=True)
        for node in self.kernel_nodes:
            number = self._number(node)
            if number in self.invariants.values:
                self.kernel_values[node] = self.invariants.values[number]
                continue
            if node.op == "placeholder":
                tensor = self.constants[node]
                self.load(emitter, node, self.names[node], tensor.load_from(tensor.pointer))
            else:
                read_further_in = any(self.level.get(u, KERNEL) > KERNEL for u in node.users)
                kept = [node] if read_further_in or node in self.results.values() else []
                self.writer.line(*emitter.statements([node], kept))
            self.invariants.values[number] = self.kernel_values[node]

    def emit_hoisted(self) -> None:
        """At the top of a block: the arrays of `hoisted`."""
        arrays = self.invariants.arrays
        missing = [n for n in self.hoisted if self._number(n) not in arrays]
        if not missing:
            return
        nodes = self._closure(missing, stop=lambda node: False)
        for node in missing:
            stem = self.writer.stems.unique(self.invariants.names.copy().unique(wanted_name(node)))
            of_row = self.level[node] == ROW
            name, dtype = f"{stem}_{'rows' if of_row else 'lanes'}", node.meta["val"].dtype
            arrays[self._number(node)] = self.writer.row_array(name, dtype) if of_row else self.writer.array(name, dtype)
        of_rows, of_lanes = ([n for n in missing if self.level[n] == level] for level in (ROW, LANE))
        with self.writer.rows(self._tensors(nodes)):
            emitter = self._emit_rows(nodes, of_rows, set())
            for node in of_rows:
                self.writer.line(f"{self._element(node)} = {emitter.values[node].code};")
            if of_lanes:
                with self.writer.lanes():
                    self._emit_lanes(emitter, nodes, {}, of_lanes, set())
                    for node in of_lanes:
                        self.writer.line(f"{self._element(node)} = {emitter.values[node].code};")

    def _element(self, node: fx.Node) -> str:
        """Of the array of a hoisted value."""
        array = self.invariants.arrays[self._number(node)]
        return f"{array}[row - first_row]" if self.level[node] == ROW else self.writer.here(array)

    def tensors(self) -> list[TensorArgument]:
        """The constants that the rows of the lane loop need pointers to."""
        return self._tensors(self.in_lanes)

    def emit_rows(self) -> Emitter:
        return self._emit_rows(self.in_lanes, (), set(self.hoisted))

    def emit_lanes(self, emitter: Emitter, loads: Mapping[int, str], given: Mapping[fx.Node, str] = EMPTY) -> None:
        """Inside the lane loop: load what changes over time (`loads` by position, `given`), compute the results."""
        for node in self.in_lanes:
            if node in given and node.op != "placeholder":
                self.load(emitter, node, emitter.names.unique(wanted_name(node)), given[node])
        self._emit_lanes(emitter, self.in_lanes, loads, self.extra, set(self.hoisted))

    def value(self, emitter: Emitter, result: int, dtype) -> str:  # type: ignore[no-untyped-def]
        return emitter.value(self.results[result], dtype)

    def _tensors(self, nodes: Iterable[fx.Node]) -> list[TensorArgument]:
        return [self.constants[n] for n in nodes if n in self.constants and self.level[n] in (ROW, LANE)]

    def _emit_rows(self, nodes: Sequence[fx.Node], kept: Sequence[fx.Node], from_arrays: set[fx.Node]) -> Emitter:
        emitter = Emitter(self.invariants.names.copy(), dict(self.kernel_values), self.writer.helpers)
        for node in self._placeholders(nodes, ROW):
            self.load(emitter, node, self.names[node], self.constants[node].load())
        for node in (n for n in nodes if n in from_arrays and self.level[n] == ROW):
            self.load(emitter, node, emitter.names.unique(wanted_name(node)), self._element(node))
        row_nodes = [n for n in nodes if self.level[n] == ROW and n.op != "placeholder" and n not in from_arrays]
        returned = {*self.results.values(), *kept}
        read = [n for n in row_nodes if n in returned or any(self.level.get(u, ROW) > ROW for u in n.users)]
        self.writer.line(*emitter.statements(row_nodes, read))
        return emitter

    def _emit_lanes(
        self,
        emitter: Emitter,
        nodes: Sequence[fx.Node],
        loads: Mapping[int, str],
        kept: Iterable[fx.Node],
        from_arrays: set[fx.Node],
    ) -> None:
        for node in nodes:
            if self.level[node] < LANE or (node.op != "placeholder" and node not in from_arrays):
                continue
            if node in from_arrays:
                self.load(emitter, node, emitter.names.unique(wanted_name(node)), self._element(node))
            else:
                tensor = self.constants.get(node)
                self.load(emitter, node, self.names[node], tensor.load() if tensor else loads[self.positions[node]])
        loaded = from_arrays | self.given
        computed = [n for n in nodes if self.level[n] >= LANE and n.op != "placeholder" and n not in loaded]
        self.writer.line(*emitter.statements(computed, kept))

    def load(self, emitter: Emitter, node: fx.Node, name: str, code: str) -> None:
        dtype = node.meta["val"].dtype
        self.writer.line(f"const {HELD[dtype]} {name} = {code};")
        emitter.values[node] = Text(name, dtype)
