"""A `Loop` that nothing could be made of becomes T copies of its body again.

y, v = loop(v, x)   ->   h0 = …x[0]…; h1 = …x[1]…; …; y = stack([s0, s1, …])
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from snn_compile.ir.loop import Loop
from snn_compile.ir.values import example, is_getitem
from snn_compile.passes.emit import attribute
from snn_compile.passes.functionalize import is_alias, store


def unroll(gm: fx.GraphModule, call: fx.Node, loop: Loop) -> None:
    """Inline `loop`, whose length is a number, at `call` and drop both."""
    graph, length = gm.graph, loop.length
    assert isinstance(length, int)
    inits, xs, consts = loop.split(call.args)
    carries = list(inits)
    placeholders = loop.placeholders()
    steps: list[list[fx.Node]] = []
    with graph.inserting_before(call):
        for t in range(length):
            now = [(x, length - 1 - t if s.reverse else t) for x, s in zip(xs, loop.xs, strict=True)]
            env = _Step(gm, loop, dict(zip(placeholders, (*carries, *now, *consts), strict=True)))
            for node in loop.body.graph.nodes:
                if node.op in ("call_function", "call_method", "call_module"):
                    env.values[node] = graph.node_copy(node, env)
            next_carries, values = loop.results()
            carries = [env(n) for n in next_carries]
            steps.append([env(n) for n in values])
        results = [_stack(graph, y, [s[i] for s in steps]) for i, y in enumerate(loop.ys)]
    results += [v for v, c in zip(carries, loop.carries, strict=True) if c.is_result]
    for user in list(call.users):
        _replace(graph, user, results[user.args[1]])  # type: ignore[index]
    graph.erase_node(call)
    for node in results:
        if not node.users and node.target is torch.stack:
            graph.erase_node(node)
    delattr(gm, str(call.target))


@dataclass
class _Step:
    """The values of one iteration; a slice of a series, known as (series, t), is read where it is first needed: a view made
    before another one of its tensor is given values that want a gradient may not be written into afterwards."""

    gm: fx.GraphModule
    loop: Loop
    values: dict[fx.Node, object]

    def __call__(self, node: fx.Node) -> fx.Node:
        if node not in self.values:
            return attribute(self.gm, self.loop, node)
        value = self.values[node]
        if isinstance(value, tuple):
            value = self.values[node] = _read(self.gm.graph, *value)
        return value  # type: ignore[return-value]


def _read(graph: fx.Graph, x: fx.Node, t: int) -> fx.Node:
    if x.target is torch.stack and len(x.args) == 1:
        return x.args[0][t]  # type: ignore[index, return-value]
    node = graph.call_function(operator.getitem, (x, t))
    value = example(x)
    node.meta = {"example_value": value[t]} if isinstance(value, torch.Tensor) else {}
    return node


def _stack(graph: fx.Graph, y, values: list[fx.Node]) -> fx.Node:  # type: ignore[no-untyped-def]
    values = values[::-1] if y.reverse else values
    node = graph.call_function(torch.stack, (values, y.dim) if y.dim else (values,))
    node.meta = {"example_value": torch.stack([y.example] * len(values), y.dim)}
    return node


def _replace(graph: fx.Graph, user: fx.Node, result: fx.Node) -> None:
    """Uses of one result; slices of a stack are the stacked values."""
    if result.target is torch.stack and len(result.args) == 1:
        for reader in list(user.users):
            if is_getitem(reader) and isinstance(reader.args[1], int):
                value = result.args[0][reader.args[1]]  # type: ignore[index]
                if _is_contiguous(reader) and not _is_contiguous(value):  # (a part of another value: a `view` may follow)
                    continue
                reader.replace_all_uses_with(value)
                graph.erase_node(reader)
    user.replace_all_uses_with(result)
    graph.erase_node(user)


def _is_contiguous(node: fx.Node) -> bool:
    value = example(node)
    return isinstance(value, torch.Tensor) and value.is_contiguous()


def restore_writes(gm: fx.GraphModule, is_kernel: Callable[[fx.Node], bool]) -> None:
    """``b1 = store(b, i, s)`` -> ``b[i] = s`` where nobody reads the old ``b``, or a view of it, afterwards.

    A kernel's backward reads its operands afterwards: they are saved, and autograd refuses those that were written into. (All
    other ops read what they read in the code as it was written, where the write was allowed.)
    """
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    views = {n for n in order if is_alias(n)}
    for node in list(gm.graph.nodes):
        if node.target is not store:
            continue
        buffer, index, value = node.args
        if buffer.op == "placeholder" or any(order.get(u, 0) > order[node] or is_kernel(u) for u in _readers(buffer, views)):
            continue
        with gm.graph.inserting_before(node):
            gm.graph.call_function(operator.setitem, (buffer, index, value))
        node.replace_all_uses_with(buffer)
        gm.graph.erase_node(node)


def _readers(buffer: fx.Node, views: set[fx.Node]) -> Iterator[fx.Node]:
    for user in buffer.users:
        yield user
        if user in views:
            yield from _readers(user, views)
