"""Operands of a rerolled loop that change with t: slices of one tensor, or separate values."""

from __future__ import annotations

import itertools
import operator
import sys
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import fx

from snn_compile.errors import Reject
from snn_compile.ir.names import given_name
from snn_compile.ir.values import base_name, example, is_getitem, known_int, shape_key, user_location


class Source(Protocol):
    """Where a series comes from."""

    def emit(self, graph: fx.Graph) -> fx.Node:
        """The operand, time at dim 0."""


@dataclass
class TimeSlices:
    """``source.select(dim, first + step*t)`` for t in range(count)"""

    source: fx.Node
    dim: int
    first: int
    step: int
    count: int

    def check(self, value: torch.Tensor) -> None:
        size = known_int(value.shape[self.dim])
        if size is not None and -size <= self.first < 0:
            self.first += size
        last = self.first + self.step * (self.count - 1)
        ends = range(size) if size is not None else range(sys.maxsize) if self.first >= 0 else range(-sys.maxsize, 0)
        if self.first not in ends or last not in ends:
            raise Reject("an index runs out of the tensor it reads", node=self.source)

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
class StackedValues:
    """T separate values; stacking copies them once."""

    values: list[fx.Node]

    def emit(self, graph: fx.Graph) -> fx.Node:
        node = graph.call_function(torch.stack, (list(self.values),))
        node.meta = {"example_value": torch.stack([example(v) for v in self.values])}  # type: ignore[misc]
        return node


def slices_of_one(column: list[object]) -> TimeSlices | None:
    """``x.unbind(d)[t]`` or ``x[t]`` made ahead of the loop, t in arithmetic progression."""
    if not all(is_getitem(c) and isinstance(c.args[1], int) for c in column):  # type: ignore[union-attr]
        return None
    sources = {c.args[0] for c in column}  # type: ignore[union-attr]
    indices = [c.args[1] for c in column]  # type: ignore[union-attr]
    steps = {b - a for a, b in itertools.pairwise(indices)}
    if len(sources) != 1 or len(steps) != 1 or steps == {0}:
        return None
    source, value, dim = unbound_source(sources.pop())
    if not isinstance(value, torch.Tensor):
        return None
    slices = TimeSlices(source, dim or 0, indices[0], steps.pop(), len(column))  # type: ignore[arg-type]
    slices.check(value)
    return slices


def unbound_source(source: object) -> tuple[object, object, int | None]:
    """``x.unbind(d)`` -> x, its example, d; anything else is itself."""
    if isinstance(source, fx.Node) and source.target in ("unbind", torch.unbind):
        dim = source.args[1] if len(source.args) > 1 else source.kwargs.get("dim", 0)
        value = example(source.args[0])
        if isinstance(dim, int) and isinstance(value, torch.Tensor):
            return source.args[0], value, dim % value.dim()
    return source, example(source), None


def stackable(column: list[object], may_be_given: bool = False) -> StackedValues | None:
    """Values computed before the loop; `may_be_given`: inputs and parameters, too."""
    values = [example(c) for c in column]
    kinds = ("call_function", "call_method", "placeholder", "get_attr") if may_be_given else ("call_function", "call_method")
    if not all(isinstance(c, fx.Node) and c.op in kinds for c in column):
        return None
    if not all(isinstance(v, torch.Tensor) for v in values):
        return None
    if len({(shape_key(v), v.dtype, v.device) for v in values}) != 1:  # type: ignore[union-attr]
        return None
    return StackedValues(column)  # type: ignore[arg-type]


def is_no_larger(value: object, result: object) -> bool:
    """A tensor of as many numbers as what is computed with it, or fewer, both known."""
    sizes = [v.numel() if isinstance(v, torch.Tensor) else None for v in (value, result)]
    return all(isinstance(n, int) for n in sizes) and sizes[0] <= sizes[1]  # type: ignore[operator]


def time_dim(node: fx.Node, leaves: list[object], place: int, value: torch.Tensor) -> tuple[int, tuple]:  # type: ignore[type-arg]
    """Which dim the changing index selects, and what remains of the index for the slice itself."""
    if node.target in ("select", torch.select):
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if isinstance(dim, int) and place == len(leaves) - 1:
            return dim % value.dim(), ()
        raise Reject("select along a dim that changes with t", node=node, location=user_location(node))
    index = node.args[1]
    if isinstance(index, int):
        return 0, ()
    if not isinstance(index, tuple) or any(not (isinstance(i, (int, slice)) or i in (Ellipsis, None)) for i in index):
        raise Reject("x is indexed by a tensor", node=node, location=user_location(node))
    # the changing leaf is number `place` among nodes and numbers; leaf 0 is the tensor
    seen = 0
    for where, item in enumerate(index):  # noqa: B007  (read after the loop)
        if isinstance(item, slice):
            seen += sum(isinstance(v, int) for v in (item.start, item.stop, item.step))
            continue
        if item in (Ellipsis, None):
            continue
        seen += 1
        if seen == place:
            break
    else:
        raise Reject("a slice moves with t", node=node, location=user_location(node))
    before, after = index[:where], index[where + 1 :]
    kept = [len(side) - side.count(None) for side in (before, after)]  # (a new axis is none of the series')
    dim = value.dim() - 1 - kept[1] if Ellipsis in before else kept[0]
    rest = (*before, *after)
    plain = all(i is Ellipsis or i == slice(None) for i in rest)
    return dim, () if plain else rest


def series_name(source: fx.Node) -> str:
    if source.op == "placeholder" and (given := given_name(source)):
        return given
    name = base_name(source.name)
    if source.op == "placeholder":
        name = name.removeprefix("l_").removesuffix("_")
        name = name.split("_parameters_")[-1].split("_buffers_")[-1]
    return name or "x"
