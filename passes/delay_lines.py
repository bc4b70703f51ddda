"""What comes out of a delay line is what went into it.

    line = zeros(D, N)                                       before = zeros(D, N)
    for t in range(T):                                       for t in range(T):
        v, s = step(v, x[t], line[k])              ->            v, s[t] = step(v, x[t], s[t - 1 - k])    (before[k - t] at first)
        line = cat([s[None], line[:-1]])
    return line                                              return stack([s[T - 1], s[T - 2], ..])

A line may be moved on by `roll`, as a window ``cat([line[1:], s[None]])``, or in place, ``line[1:] = line[:-1].clone()``, and be
filled in by ``line[0] = s`` (of which `passes/functionalize` has made values). Moved as a whole in every step it would be a state
of D steps, which no kernel holds; what it gives are results of earlier steps, which `reroll` finds like those of any loop.

Fires where a tensor is put together of a moved part of one that was put together itself (`passes/contents`). Does not fire: lines
that something writes into; reads of a whole line; lines that are read under `no_grad` for something with gradients; a series that
is moved once, `cat([zeros[None], x[:-1]])`, which is a series.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from snn_compile.ir.values import example, storage_key
from snn_compile.passes.concatenations import normalize_concatenations
from snn_compile.passes.contents import CLONE, ROLL, Content, Known, contents, join_dim, whole
from snn_compile.passes.effects import gains_gradients, memory_changed, sweeping, without_gradients
from snn_compile.passes.emit import behind, emit
from snn_compile.passes.parts import index_along, part_of


def delay_lines(gm: fx.GraphModule) -> int:
    """Rewrite `gm` (torch-level, with examples, functionalized) in place; gives how many reads are of what was put in."""
    lines = _Lines(gm.graph)
    if not lines.moved:
        return 0
    with sweeping(gm.graph):
        lines.drop_ends()
        read = sum(map(lines.read, list(gm.graph.nodes)))
    with sweeping(gm.graph):
        flattened = sum(map(lines.flatten, reversed(list(gm.graph.nodes))))
        normalize_concatenations(gm.graph)
    return read + flattened


class _Lines:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.moved = _moved(graph)
        self.changed = memory_changed(graph)
        self.off = without_gradients(graph)
        self.starts = self._starts()
        #: for `read`, which puts values into the places of what is known here
        self.known: Known = {}
        #: what `flatten` has passed by
        self.passed: set[fx.Node] = set()
        #: reads of what was put in, beside `x` itself
        self.made: dict[tuple[Content, bool], fx.Node] = {}

    def _starts(self) -> set[fx.Node]:
        """What lines are before they are moved, and nobody reads afterwards: the first step reads it as others read a line."""
        order = {n: i for i, n in enumerate(self.graph.nodes)}
        found: dict[fx.Node, int] = {}
        for node, dim in self.moved.items():
            for content in contents(whole(node, dim), dim):
                while not content.is_step and content.node not in self.moved:
                    found.setdefault(content.node, order[node])
                    if len(inner := contents(content, dim)) != 1:
                        break
                    content = inner[0]
        return {n for n, at in found.items() if max(order[user] for user in n.users) <= at}

    def drop_ends(self) -> None:
        """What the last step has moved on, and nobody reads."""
        for node in reversed(list(self.graph.nodes)):
            if node in self.moved and not node.users:
                self.graph.erase_node(node)
                del self.moved[node]

    def read(self, node: fx.Node) -> bool:
        """A step or a range that lies in one of the things that a line is put together of is read from there."""
        part = part_of(node)
        if part is None or not self._is_line(part.source, part.dim) or any(user.op == "output" for user in node.users):
            return False  # (a result that is a view of the line stays one)
        found, passed = Content(part.source, part.start, part.stop), [node, *node.all_input_nodes]
        while len(inner := self._inside(found, part.dim, self.known)) == 1:
            found = inner[0]
            passed.append(found.node)
        if found.node is part.source and found.node not in self.starts:
            return False
        return self._replace(node, passed, lambda: self._read(found, part.dim, part.is_step))

    def flatten(self, node: fx.Node) -> bool:
        """What is left of a line behind the last step, a move of a move, is put together at once."""
        if node in self.passed and not node.users:
            self.graph.erase_node(node)
            return False
        dim = self.moved.get(node)
        if dim is None or node in self.passed:
            return False
        found, passed = self._leaves(node, dim)
        self.passed.update(passed)
        if self.moved.keys().isdisjoint(passed[1:]):
            return False

        def together() -> fx.Node:
            pieces = [self._read(content, dim, False) for content in found]
            with self.graph.inserting_before(node):
                new = emit(self.graph, "call_function", torch.cat, (pieces, dim), {})
            new.meta = {**node.meta, "example_value": example(new)}
            return new

        is_flat = self._replace(node, [*passed, *(c.node for c in found)], together)
        if is_flat:
            self.graph.erase_node(node)
        return is_flat

    def _is_line(self, node: fx.Node, dim: int) -> bool:
        """It is moved, or a part of what is; or it is what a line is at first."""
        origin = _origin(Content(node, 0, 0))[0]
        return self.moved.get(origin) == dim or node in self.starts  # type: ignore[arg-type]

    def _inside(self, of: Content, dim: int, known: Known | None = None) -> list[Content]:
        """What a content is put together of; nothing where it is another join than a line."""
        is_line = self.moved.get(of.node) == dim or join_dim(of.node) is None
        return contents(of, dim, known) if is_line else []

    def _leaves(self, node: fx.Node, dim: int) -> tuple[list[Content], list[fx.Node]]:
        """What a line is put together of at last, further in as long as nobody else reads what is passed; and that."""
        leaves: list[Content] = []
        passed: dict[fx.Node, None] = {}
        waiting = [whole(node, dim)]
        while waiting:
            content = waiting.pop()
            inner = self._inside(content, dim) if not passed or passed.keys() >= content.node.users.keys() else []
            if inner:
                passed[content.node] = None
                waiting += reversed(inner)
            else:
                leaves.append(content)
        return leaves, list(passed)

    def _read(self, content: Content, dim: int, is_step: bool) -> fx.Node:
        """A content, with the dim or, of one step, without. It is read where it is made, for all steps that want it."""
        node, start = content.node, content.start
        if content.is_step == is_step and (is_step or content == whole(node, dim)):
            return node
        key = (content, is_step)
        if key not in self.made:
            index = index_along(dim, start if is_step else slice(start, content.stop))
            with self.graph.inserting_before(behind(node)):
                if content.is_step:
                    self.made[key] = emit(self.graph, "call_method", "unsqueeze", (node, dim), {})
                else:
                    self.made[key] = emit(self.graph, "call_function", operator.getitem, (node, index), {})
            self.made[key].meta = {**node.meta, "example_value": example(self.made[key])}
        return self.made[key]

    def _replace(self, node: fx.Node, passed: list[fx.Node], make: Callable[[], fx.Node]) -> bool:
        """Where nothing is written into, gradients go where they went, and nobody sees that it lies otherwise."""
        if not self.changed.isdisjoint(map(storage_key, passed)):
            return False
        if gains_gradients(node, passed, self.off):
            return False
        new = make()
        is_seen = any(user.op == "output" or user.target == "view" for user in node.users)
        if is_seen and example(new).stride() != example(node).stride():  # type: ignore[union-attr]
            return False
        node.replace_all_uses_with(new)
        return True


def _moved(graph: fx.Graph) -> dict[fx.Node, int]:
    """What is put together of what is put together, where at least one of them was moved on the way; and along which dim."""
    groups: dict[fx.Node, set[fx.Node]] = {}
    moving: list[fx.Node] = []
    dims: dict[fx.Node, int] = {}
    for node in graph.nodes:
        dim = join_dim(node)
        if dim is None:
            continue
        dims[node], group = dim, groups.setdefault(node, {node})
        for content in contents(whole(node, dim), dim):
            inner, is_part = _origin(content)
            if inner is None or dims.get(inner) != dim:
                continue
            if is_part or node.target in ROLL:
                moving.append(node)
            if groups[inner] is not group:
                small, group = sorted((group, groups[inner]), key=len)
                group |= small
                groups.update(dict.fromkeys(small, group))
    return {n: dims[n] for start in moving for n in groups[start]}


def _origin(content: Content) -> tuple[fx.Node | None, bool]:
    """What a content is of, or of a part or a copy of, and whether it is a part."""
    node, is_part = (None if content.is_step else content.node), False
    while node is not None:
        part = part_of(node)
        if part is not None and not part.is_step:
            node, is_part = part.source, True
        elif node.target in CLONE:
            node = node.args[0]  # type: ignore[assignment]
        else:
            return node, is_part
    return None, False
