"""What is taken out of what it was put into is itself.

    a.unsqueeze(0)[0]  ->  a          a[None].unbind(0)[0]  ->  a          stack([a, b])[1]  ->  b
    state = cat([v, i], 1); v, i = state.chunk(2, 1)  ->  v, i             stack([v, i], -1)[..., 0]  ->  v

A layer for all steps that is called with one, states that are handed on in one tensor, or an op that `decompose` has inlined,
leave such pairs in the path of a state, where no kernel can hold them.

Does not fire: a tensor that something writes into, since a stack is a copy; what lies in memory otherwise than it did, where
that shows; parts that are results.
"""

from __future__ import annotations

import itertools

import torch
from torch import fx

from snn_compile.ir.values import example, is_getitem, known_int, storage_key
from snn_compile.passes.concatenations import pieces_of, stack_of
from snn_compile.passes.effects import memory_written, sweeping, without_gradients
from snn_compile.passes.parts import Part, part_of

_UNSQUEEZE = ("unsqueeze", torch.unsqueeze)


def unwrap_steps(gm: fx.GraphModule) -> int:
    """Rewrite `gm` in place; gives how many values were unwrapped."""
    changed = {key for n in gm.graph.nodes if n.op != "call_module" for key in memory_written(n)}
    off = without_gradients(gm.graph)
    count = 0
    with sweeping(gm.graph):
        for node in list(gm.graph.nodes):
            step = _unwrapped(node, changed, off)
            if step is not None:
                node.replace_all_uses_with(step)
                gm.graph.erase_node(node)
                count += 1
    return count


def _unwrapped(node: fx.Node, changed: set[int | None], off: set[fx.Node]) -> fx.Node | None:
    """What `node` is, where that is a value taken out of its wrapping. `off`: nodes without gradients, whose values want none."""
    part = part_of(node)
    if part is None:
        return None
    if not off.isdisjoint((node, node.args[0], part.source)) and not off.issuperset(node.users):
        return None
    if part.is_step and part.dim == _new_dim(part.source):
        return part.source.args[0]  # type: ignore[return-value]
    piece = _piece(part)
    if piece is None or {storage_key(part.source), storage_key(piece)} & changed:
        return None
    is_seen = any(user.op == "output" for user in node.users) and not (part.is_step and part.dim == 0)
    return None if is_seen or (_shows_layout(node) and not example(piece).is_contiguous()) else piece  # type: ignore[union-attr]


def _piece(part: Part) -> fx.Node | None:
    """The tensor that the part of a stack, or of a concatenation, was."""
    whole = example(part.source)
    assert isinstance(whole, torch.Tensor)
    joined = stack_of(part.source) if part.is_step else pieces_of(part.source)
    if joined is None or joined[1] % whole.dim() != part.dim:
        return None
    pieces, values = joined[0], [example(piece) for piece in joined[0]]
    if part.is_step:
        found = [part.start]
    else:
        if any(v.dim() != whole.dim() or v.dtype != whole.dtype for v in values):  # type: ignore[union-attr]
            return None
        sizes = [known_int(v.shape[part.dim]) for v in values]  # type: ignore[union-attr]
        if None in sizes:
            return None
        ends = itertools.accumulate(sizes, initial=0)  # type: ignore[arg-type]
        found = [i for i, at in enumerate(itertools.pairwise(ends)) if at == (part.start, part.stop)]
    is_same = len(found) == 1 and values[found[0]].dtype == whole.dtype  # type: ignore[union-attr]
    return pieces[found[0]] if is_same else None  # type: ignore[return-value]


def _new_dim(node: fx.Node) -> int | None:
    """The dim that ``a.unsqueeze(0)``, or ``a[None]``, has added."""
    if node.target in _UNSQUEEZE:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return dim % example(node).dim() if isinstance(dim, int) else None  # type: ignore[union-attr]
    return 0 if is_getitem(node) and node.args[1] is None else None


def _shows_layout(node: fx.Node) -> bool:
    return any(user.op == "output" or user.target == "view" for user in node.users)
