"""A slice of one step is a step.

    x[0:1], x[1:2], x[2:3]     ->   x[0].unsqueeze(0), x[1].unsqueeze(0), x[2].unsqueeze(0)  (along any dim; `narrow`)
    x[0:b], x[b:2b], x[2b:3b]  ->   y = x.unflatten(0, (T, b)); y[0], y[1], y[2]                       (time before the batch)
    o[0:b] = s0; o[b:2b] = s1  ->   q0 = store(o.unflatten(0, (T, b)), 0, s0); q1 = store(q0, 1, s1); o = q1.flatten(0, 1)

so that what changes from step to step is one index, as `reroll` reads it. Does not fire: a tensor sliced so once only; slices
of another length, or that do not begin at a multiple of it; indices with more than slices in them; slices of several rows of a
tensor that is written into.
"""

from __future__ import annotations

import operator

from torch import fx

from snn_compile.ir.values import example, known_int
from snn_compile.passes.concatenations import pieces_of
from snn_compile.passes.effects import is_write
from snn_compile.passes.emit import behind, emit
from snn_compile.passes.functionalize import store
from snn_compile.passes.parts import Part, index_along, indexed, part_of


def index_steps(gm: fx.GraphModule) -> int:
    """Reads of a `gm` (torch-level, with examples), in place; gives how many slices became steps."""
    found: dict[tuple[fx.Node, int, int], list[tuple[fx.Node, int]]] = {}
    for node in gm.graph.nodes:
        part = part_of(node)  # (pieces of a `chunk` are told apart as they are)
        if part is not None and part.source is node.args[0] and (step := _step(part)) is not None:
            dim, t, width = step
            found.setdefault((part.source, dim, width), []).append((node, t))
    count = 0
    for (source, dim, width), slices in found.items():
        is_single = len({t for _, t in slices}) < 2
        if is_single or (width > 1 and (any(map(is_write, source.users)) or _was_joined(source, dim, width))):
            continue
        steps = source if width == 1 else _unflattened(gm.graph, source, dim, width)
        for node, t in slices:
            _replace(gm.graph, node, steps, dim, t, width)
            count += 1
    return count


def _was_joined(source: fx.Node, dim: int, width: int) -> bool:
    """``cat([v, i], 1)``: what `unwrap_steps` has left of it is taken apart behind `functionalize`."""
    joined = pieces_of(source)
    return joined is not None and joined[1] == dim and all(known_int(example(p).shape[dim]) == width for p in joined[0])  # type: ignore[union-attr]


def index_stores(gm: fx.GraphModule) -> int:
    """The same for writes that `functionalize` has made `store`; gives how many."""
    stores = [n for n in gm.graph.nodes if n.target is store and _is_of_several(n)]
    by_width: dict[fx.Node, tuple[fx.Node, int, int]] = {}  # a store -> the one that took its place, its dim and width
    for node in stores:
        buffer, index, value = node.args
        dim, t, width = _step(indexed(buffer, index))  # type: ignore[misc]
        before = by_width.get(buffer)  # type: ignore[arg-type]
        is_chained = before is not None and before[1:] == (dim, width)
        given = before[0] if is_chained else _unflattened(gm.graph, buffer, dim, width)  # type: ignore[index, arg-type]
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(store, (given, index_along(dim, t), value))
            new.meta = {**node.meta, "example_value": example(given)}
        by_width[node] = (new, dim, width)
    for node, (new, dim, _) in reversed(by_width.items()):
        if node.users:
            with gm.graph.inserting_before(node):
                flat = emit(gm.graph, "call_method", "flatten", (new, dim, dim + 1), {})
            node.replace_all_uses_with(flat)
        gm.graph.erase_node(node)
    return len(stores)


def _step(part: Part | None) -> tuple[int, int, int] | None:
    """``(dim, t, width)`` of ``x[:, t*width : (t + 1)*width]``"""
    if part is None or part.is_step:
        return None
    width, size = part.stop - part.start, known_int(example(part.source).shape[part.dim])  # type: ignore[union-attr]
    is_step = size is not None and width > 0 and part.start % width == 0 and (width == 1 or (width < size and size % width == 0))
    return (part.dim, part.start // width, width) if is_step else None


def _is_of_several(node: fx.Node) -> bool:
    """Whether a store, and another one before or behind it in its chain, write steps of the same length above 1."""
    here = _step(indexed(*node.args[:2]))
    if here is None or here[2] == 1:
        return False
    others = [node.args[0], *(u for u in node.users if u.args[0] is node)]
    steps = [_step(indexed(*o.args[:2])) for o in others if isinstance(o, fx.Node) and o.target is store]
    return any(s is not None and (s[0], s[2]) == (here[0], here[2]) for s in steps)


def _unflattened(graph: fx.Graph, source: fx.Node, dim: int, width: int) -> fx.Node:
    """A view of `source` behind its definition."""
    with graph.inserting_before(behind(source)):
        return emit(graph, "call_method", "unflatten", (source, dim, (example(source).shape[dim] // width, width)), {})


def _replace(graph: fx.Graph, node: fx.Node, steps: fx.Node, dim: int, t: int, width: int) -> None:
    with graph.inserting_before(node):
        made = [emit(graph, "call_function", operator.getitem, (steps, index_along(dim, t)), {})]
        if width == 1:
            made.append(emit(graph, "call_method", "unsqueeze", (made[0], dim), {}))
    for new in made:
        new.meta = {**node.meta, "example_value": new.meta["example_value"]}
    node.replace_all_uses_with(made[-1])
    graph.erase_node(node)
