"""The nodes of a graph that are the iterations of one loop to be."""

from __future__ import annotations

import functools
from collections import defaultdict

import torch
from torch import fx

from snn_compile.errors import Reject
from snn_compile.ir.values import example, shape_hint, storage_key, user_line, user_location, wanting_grad
from snn_compile.passes.effects import has_effect, is_grad_switch
from snn_compile.passes.relate_iterations import Column, Graph, Run


class Window:
    """`count` iterations of `period` nodes each, from the node at `start` on; `residue`: a node's place in its iteration."""

    def __init__(self, view: Graph, run: Run, start: int, count: int) -> None:
        self.view, self.run, self.start, self.count = view, run, start, count
        self.period = run.period
        self.stop = start + count * run.period

    @property
    def template(self) -> int:
        """The iteration that stands for all: the first one may see states that start as numbers."""
        return 1 if self.count > 1 else 0

    def node(self, residue: int, t: int) -> fx.Node:
        return self.view.nodes[self.start + t * self.period + residue]

    def exists(self, residue: int, t: int) -> bool:
        """The last iteration may lack its dead end."""
        return self.start + t * self.period + residue < self.stop

    def last(self, residue: int) -> int:
        return self.count - 1 if self.exists(residue, self.count - 1) else self.count - 2

    def leaves(self, residue: int, t: int) -> list[object]:
        """The operands of a node."""
        return self.view.slots[self.start + t * self.period + residue].leaves

    def columns(self, residue: int) -> list[Column]:
        """How each of them changes from iteration to iteration."""
        return self.run.column(self.start + residue)

    def meta(self, residue: int) -> dict:  # type: ignore[type-arg]
        """What is known of a value, for all iterations."""
        node = self.node(residue, self.template)
        others = (example(self.node(residue, t)) for t in range(self.count) if self.exists(residue, t))
        return {**node.meta, "example_value": wanting_grad(example(node), others)}

    def representative(self) -> fx.Node:
        """The first op of a step that is of some place in the user's code: what passes have added may not be."""
        step = [self.node(residue, self.template) for residue in range(self.period)]
        return next(filter(user_location, step), step[0])

    def absorb_tail(self) -> None:
        """Take in a last iteration that lacks its dead end, where its values are collected like all others'."""
        tail = self.run.stop - self.stop
        if tail <= 0 or any(c.kind in ("series", "numbers") for r in range(tail, self.period) for c in self.columns(r)):
            return  # (there is no slice of x for what the last iteration lacks)
        if any(has_effect(self.node(r, self.template)) for r in range(tail, self.period)):
            return  # (a write into what the last iteration has made is not dead)
        for residue in range(tail):
            outside = [
                any(self.view.position.get(u, 1 << 60) >= self.run.stop for u in self.node(residue, t).users)
                for t in range(self.count)
            ]
            last = self.view.nodes[self.stop + residue]
            if all(outside) and any(self.view.position.get(u, 1 << 60) >= self.run.stop for u in last.users):
                self.stop, self.count = self.run.stop, self.count + 1
                return

    @functools.cached_property
    def uses(self) -> dict[int, dict[int, list[fx.Node]]]:
        """Uses of the iterations' values by nodes outside of the window, by residue and iteration."""
        window = range(self.start, self.stop)
        uses: dict[int, dict[int, list[fx.Node]]] = {}
        for position in window:
            node = self.view.nodes[position]
            if is_grad_switch(node):
                raise Reject("the loop switches gradients on and off around a write", location=user_location(node))
            outside = [u for u in node.users if self.view.position.get(u, -1) not in window]
            if outside:
                t, residue = divmod(position - self.start, self.period)
                uses.setdefault(residue, {})[t] = outside
        return uses

    def is_written_later(self, residue: int) -> bool:
        """Whether what some iteration gives is written into outside of the window."""
        own = range(self.start, self.stop)
        return any(self.view.is_written(self.node(residue, t), own) for t in range(self.count) if self.exists(residue, t))

    def check_writes(self) -> None:
        """Steps may write into what they have made themselves, and into memory from outside of the loop that they read alike.

        Then the order within a step is all that counts. `passes/functionalize` has made values of all other writes it could.
        """
        own = range(self.start, self.stop)
        written = {key: (made, writes) for key, made, writes in self.view.writes_in(own)}
        names = self._names({key for key, (made, _) in written.items() if made not in own})
        for key, (made, writes) in written.items():
            step = (made - self.start) // self.period
            others = [w for w in writes if (w - self.start) // self.period != step] if made in own else []
            if others:
                raise self._no_write(others[0], "writes into what an earlier step has made")
            if len(names[key]) > 1:
                raise self._no_write(writes[0], "writes into memory that some steps read under another name")

    def _names(self, memories: set[int | None]) -> dict[int | None, set[frozenset[tuple[int, int]]]]:
        """Which operands of a step lie in each of these memories: for every way in which a whole step reads it, one set."""
        found: dict[int | None, set[frozenset[tuple[int, int]]]] = defaultdict(set)
        for t in range(self.count) if memories else ():
            read: dict[int | None, list[tuple[int, int]]] = defaultdict(list)
            for residue in range(self.period if self.exists(self.period - 1, t) else 0):
                for slot, leaf in enumerate(self.leaves(residue, t)):
                    if isinstance(leaf, fx.Node) and (key := storage_key(leaf)) in memories:
                        read[key].append((residue, slot))
            for key, places in read.items():
                found[key].add(frozenset(places))
        return found

    def _no_write(self, place: int, reason: str) -> Reject:
        node = self.view.nodes[place]
        hint = "make a new value instead, as in v = torch.where(s > 0, 0.0, v)"
        return Reject(f"'{user_line(node) or node.name}' {reason}", node=node, location=user_location(node), hint=hint)

    @functools.cached_property
    def growing(self) -> set[int]:
        """Residues of values that have another shape in iteration 0, because a state starts smaller than it goes on."""
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


def _types(value: object) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the tensors in `value`."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    return [(shape_hint(v), v.dtype) for v in values if isinstance(v, torch.Tensor)]
