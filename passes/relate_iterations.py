"""How the iterations of a repeat relate: which operand comes from where, in every step (the proof behind `reroll`)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from snn_compile.ir.values import is_getitem, storage_key
from snn_compile.passes.autocast_regions import regions
from snn_compile.passes.effects import written
from snn_compile.passes.find_repeats import Repeat
from snn_compile.passes.functionalize import store
from snn_compile.passes.number_series import takes_number


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

    frame = (node.op, node.target, visit(node.args, 0), visit(node.kwargs, 0), regions(node))
    return Slots(leaves, frame)


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
            lines.append((n.op, "" if n.op == "placeholder" or inner else n.target, repr(args), inner))
        memo[id(module)] = hash(tuple(lines)), tuple(lines)
    return memo[id(module)]


# ----------------------------------------------------------------------------------------------------- operand relations


@dataclass
class Column:
    """One operand slot over all iterations: which relation holds, and for which positions of the run."""

    kind: str  # "const", "number", "numbers", "distance", "series"
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

    def reads_time(self) -> bool:
        """It is a loop over time, which reads ``x[t]``. (Layers of a deep network look alike, too.)"""
        return any(c.kind == "series" and c.step for row in self.columns for c in row)

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

    @functools.cached_property
    def _writes(self) -> dict[int | None, list[int]]:
        """Memory -> where it is written into."""
        places: dict[int | None, list[int]] = {}
        for place, node in enumerate(self.nodes):
            for operand in written(node):
                places.setdefault(storage_key(operand), []).append(place)
        return places

    @functools.cached_property
    def _made(self) -> dict[int, int]:
        """Memory -> the place of its first name; a graph's inputs have none."""
        given = {storage_key(n) for n in self.gm.graph.find_nodes(op="placeholder")}
        places: dict[int, int] = {}
        for place, node in enumerate(self.nodes):
            key = storage_key(node)
            if key is not None and key not in given:
                places.setdefault(key, place)
        return places

    def writes_in(self, places: range) -> Iterator[tuple[int | None, int, list[int]]]:
        """Memory that is written into at these places: its key, where it is made (-1: before all ops), and the writes."""
        for key, writes in self._writes.items():
            if inside := [w for w in writes if w in places]:
                yield key, self._made.get(key, -1), inside  # type: ignore[arg-type]

    def is_written(self, node: fx.Node, but_in: range = range(0)) -> bool:
        """Whether something writes into the node's memory, under whatever name, `but_in` these places."""
        key = storage_key(node)
        return key is not None and any(place not in but_in for place in self._writes.get(key, ()))

    # -------------------------------------------------------------------------------------------------- relations

    def relate(self, repeat: Repeat, may_numbers_change: bool = False) -> Run:
        """Find the relation of every slot, and the positions where all of them hold."""
        run = Run(self.nodes, repeat.start, repeat.stop, repeat.period, origin=repeat.start)
        columns, bounds = [], []
        for residue in range(repeat.period):
            positions = range(repeat.start + residue, repeat.stop, repeat.period)
            row = []
            for slot in range(len(self.slots[positions[0]].leaves)):
                column = self._classify(repeat, positions, slot)
                if may_numbers_change and self._changes(column, positions, slot):
                    column = Column("numbers", column.value)
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

    def numbers_change(self, repeat: Repeat) -> bool:
        """Whether some number is another one from step to step, where it may be."""
        for first in range(repeat.start, repeat.start + repeat.period):
            positions = range(first, repeat.stop, repeat.period)
            numbers = [(slot, v) for slot, v in enumerate(self.slots[first].leaves) if not isinstance(v, fx.Node)]
            if any(self._changes(Column("number", v), positions, slot) for slot, v in numbers):
                return True
        return False

    def _changes(self, column: Column, positions: range, slot: int) -> bool:
        """A number that is another one in some steps, in a place where a time series may stand for it."""
        if column.kind != "number" or not takes_number(self.nodes[positions[0]], self.slots[positions[0]].leaves, slot):
            return False
        return len({repr(self.slots[at].leaves[slot]) for at in positions}) > 1

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
        if column.kind == "numbers":
            return type(leaf) is type(column.value)
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
            # (an initial value, where the producer's place is before the run; what is there may only look like it)
            after = max(start, positions[i] - column.distance + 1)
            if column.kind == "distance" and self._is_initial(positions[i], slot, after):
                start = after
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
