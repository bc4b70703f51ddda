"""Records that are concatenated become what a list of them would be.

    r1 = cat([r0, a[None]]); r2 = cat([r1, b[None]])   ->   r2 = cat([r0, a[None], b[None]])      (a record that grows)
    cat([empty(0, 5), a[None], b[None]])               ->   cat([a[None], b[None]])               (started empty)
    cat([a[None], b[None]])                            ->   stack([a, b])

A record that grows by a step is copied whole in every step, and is another tensor in each: no loop. Does not fire: a record that
is read on the way, pieces of another dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from snn_compile.ir.values import example, is_getitem

CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)


def normalize_concatenations(graph: fx.Graph) -> None:
    """Rewrite `graph` (torch-level, with examples) in place."""
    for node in list(graph.nodes):
        if (found := pieces_of(node)) is not None:
            given, dim = found
            pieces = [p for piece in given for p in _flat(piece, dim, node)]
            pieces = [p for p in pieces if not _is_empty(p, dim, node)] or pieces
            if pieces != given:
                _replace(graph, node, torch.cat, pieces, dim)
    for node in list(graph.nodes):
        if (found := pieces_of(node)) is not None:
            inner = [unsqueezed(_original(p), found[1]) for p in found[0]]
            if all(i is not None for i in inner):
                _replace(graph, node, torch.stack, inner, found[1])


def pieces_of(node: fx.Node) -> tuple[list[fx.Node], int] | None:
    """What a concatenation puts together, and along which dim."""
    whole = example(node)
    if node.op != "call_function" or node.target not in CONCATENATIONS or not isinstance(whole, torch.Tensor):
        return None
    tensors = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    if not isinstance(tensors, (list, tuple)) or not isinstance(dim, int) or "out" in node.kwargs:
        return None
    return list(tensors), dim % whole.dim()


def stack_of(node: fx.Node) -> tuple[list[object], int] | None:
    """``torch.stack(values, dim)`` -> values, dim"""
    if node.op != "call_function" or node.target is not torch.stack or "out" in node.kwargs:
        return None
    tensors = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if isinstance(tensors, (list, tuple)) and isinstance(dim, int):
        return list(tensors), dim
    return None


def _flat(piece: fx.Node, dim: int, whole: fx.Node) -> list[fx.Node]:
    found = pieces_of(piece)
    if found is None or found[1] != dim or set(piece.users) != {whole} or example(piece).dtype != example(whole).dtype:
        return [piece]
    return found[0]


def _is_empty(piece: fx.Node, dim: int, whole: fx.Node) -> bool:
    """Nothing along `dim`; `tensor([])` goes with tensors of any shape."""
    value = example(piece)
    return value.shape[0 if value.dim() == 1 else dim] == 0 and value.dtype == example(whole).dtype


def _replace(graph: fx.Graph, node: fx.Node, target: object, pieces: Sequence[object], dim: int) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(target, (list(pieces), dim))  # type: ignore[arg-type]
    new.meta = dict(node.meta)
    inner = [n for n in node.all_input_nodes if n not in new.all_input_nodes]
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    for old in inner:
        if not old.users and old.target in CONCATENATIONS:
            graph.erase_node(old)


def _original(node: fx.Node) -> object:
    """What a clone for one use alone is of."""
    return _original(node.args[0]) if node.target in ("clone", torch.clone) and len(node.users) == 1 else node  # type: ignore[arg-type]


def unsqueezed(node: object, dim: int) -> fx.Node | None:
    """``a`` where ``node`` is ``a.unsqueeze(dim)`` (or ``a[None]``, ``a[..., None]``)."""
    if not isinstance(node, fx.Node):
        return None
    if is_getitem(node):
        return node.args[0] if _new_dim(node.args[1], example(node)) == dim else None  # type: ignore[return-value]
    named = node.target == "unsqueeze" if node.op == "call_method" else node.target is torch.unsqueeze
    at = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    value = example(node)
    if named and isinstance(at, int) and isinstance(value, torch.Tensor) and at % value.dim() == dim:
        return node.args[0]  # type: ignore[return-value]
    return None


def _new_dim(index: object, value: object) -> int | None:
    """The dim that ``a[None]``, ``a[:, None]`` or ``a[..., None]`` adds, and nothing else."""
    entries = list(index) if isinstance(index, tuple) else [index]
    if sum(i is None for i in entries) != 1 or not isinstance(value, torch.Tensor):
        return None
    at = entries.index(None)
    rest = entries[:at] + entries[at + 1 :]
    if any(i is not Ellipsis and i != slice(None) for i in rest):
        return None
    return at if Ellipsis not in entries[:at] else value.dim() - len(entries[at:])
