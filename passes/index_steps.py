"""A slice of one step is a step.

    x[0:1], x[1:2], x[2:3]   ->   x[0].unsqueeze(0), x[1].unsqueeze(0), x[2].unsqueeze(0)          (along any dim)

so that what changes from step to step is one index, as `reroll` reads it. Does not fire: a tensor sliced so once only; indices
with more than slices in them.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from snn_compile.ir.values import example, is_getitem, known_int
from snn_compile.passes.emit import emit


def index_steps(gm: fx.GraphModule) -> int:
    """Rewrite `gm` (torch-level, with examples) in place; gives how many slices became steps."""
    found: dict[tuple[object, int], list[tuple[fx.Node, int]]] = {}
    for node in gm.graph.nodes:
        if (step := _step(node)) is not None:
            dim, t = step
            found.setdefault((node.args[0], dim), []).append((node, t))
    count = 0
    for (source, dim), slices in found.items():
        if len({t for _, t in slices}) < 2:
            continue
        for node, t in slices:
            _replace(gm.graph, node, source, dim, t)
            count += 1
    return count


def _step(node: fx.Node) -> tuple[int, int] | None:
    """``(dim, t)`` of ``x[:, t : t + 1]``"""
    value = example(node.args[0]) if is_getitem(node) else None
    if not isinstance(value, torch.Tensor):
        return None
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if not all(isinstance(i, slice) for i in index):
        return None
    narrow = [(d, i) for d, i in enumerate(index) if i != slice(None)]
    if len(narrow) != 1:
        return None
    dim, found = narrow[0]
    start = 0 if found.start is None else found.start
    size = known_int(value.shape[dim])
    if size is None or not all(isinstance(n, int) for n in (start, found.stop)) or found.step not in (None, 1):
        return None
    return (dim, start) if 0 <= start < size and found.stop == start + 1 else None


def _replace(graph: fx.Graph, node: fx.Node, source: object, dim: int, t: int) -> None:
    index = t if dim == 0 else (*[slice(None)] * dim, t)
    with graph.inserting_before(node):
        step = emit(graph, "call_function", operator.getitem, (source, index), {})
        new = emit(graph, "call_method", "unsqueeze", (step, dim), {})
    for made in (step, new):
        made.meta = {**node.meta, "example_value": made.meta["example_value"]}
    node.replace_all_uses_with(new)
    graph.erase_node(node)
