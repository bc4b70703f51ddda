"""What is taken out of what it was put into is itself.

    a.unsqueeze(0)[0]  ->  a          a[None].unbind(0)[0]  ->  a          stack([a, b])[1]  ->  b
    state = cat([v, i], 1); v, i = state.chunk(2, 1)  ->  v, i             stack([v, i], -1)[..., 0]  ->  v
    store(b, t, s)[t]  ->  s                                               store(store(b, t, a), t, s)  ->  store(b, t, s)

A layer for all steps that is called with one, states that are handed on in one tensor, or an op that `decompose` has inlined,
leave such pairs in the path of a state, where no kernel can hold them.

Does not fire: a tensor that something writes into, since a stack is a copy; what lies in memory otherwise than it did, where
that shows; parts that are results.
"""

from __future__ import annotations

import torch
from torch import fx

from snn_compile.ir.values import example, storage_key
from snn_compile.passes.concatenations import pieces_of, unsqueezed
from snn_compile.passes.contents import Content, contents, whole
from snn_compile.passes.effects import gains_gradients, memory_changed, sweeping, without_gradients
from snn_compile.passes.functionalize import store
from snn_compile.passes.parts import Part, part_of


def unwrap_steps(gm: fx.GraphModule) -> int:
    """Rewrite `gm` in place; gives how many values were unwrapped."""
    changed = memory_changed(gm.graph)
    off = without_gradients(gm.graph)
    count = 0
    with sweeping(gm.graph):
        for node in list(gm.graph.nodes):
            step = _unwrapped(node, changed, off)
            if step is not None:
                node.replace_all_uses_with(step)
                gm.graph.erase_node(node)
                count += 1
    _drop_overwritten(gm.graph)
    return count


def _unwrapped(node: fx.Node, changed: set[int | None], off: set[fx.Node]) -> fx.Node | None:
    """What `node` is, where that is a value taken out of its wrapping. `off`: nodes without gradients, whose values want none."""
    part = part_of(node)
    if part is None:
        return None
    if gains_gradients(node, (node, node.args[0], part.source), off):  # type: ignore[arg-type]
        return None
    if part.is_step and (step := unsqueezed(part.source, part.dim)) is not None:
        return step
    piece = _piece(part)
    if piece is None or {storage_key(part.source), storage_key(piece)} & changed:
        return None
    is_seen = any(user.op == "output" for user in node.users) and not (part.is_step and part.dim == 0)
    return None if is_seen or (_shows_layout(node) and not example(piece).is_contiguous()) else piece  # type: ignore[union-attr]


def _piece(part: Part) -> fx.Node | None:
    """The tensor that the part of a stack or of a concatenation was, or what was stored there last."""
    found = Content(part.source, part.start, part.stop)
    while _is_joined(found.node) and len(inner := contents(found, part.dim)) == 1:
        found = inner[0]
        if found.is_step or (not part.is_step and found == whole(found.node, part.dim)):
            return found.node if found.is_step == part.is_step else None
        if found.node.target is not store:
            return None
    return None


def _is_joined(node: fx.Node) -> bool:
    return node.target is store or node.target is torch.stack or pieces_of(node) is not None


def _drop_overwritten(graph: fx.Graph) -> None:
    """``store(store(b, t, a), t, s) -> store(b, t, s)``: what was read back in between is `a` itself."""
    for node in graph.nodes:
        if node.target is not store:
            continue
        buffer = node.args[0]
        while buffer.target is store and buffer.args[1] == node.args[1] and set(buffer.users) == {node}:
            node.update_arg(0, buffer.args[0])
            graph.erase_node(buffer)
            buffer = node.args[0]


def _shows_layout(node: fx.Node) -> bool:
    return any(user.op == "output" or user.target == "view" for user in node.users)
