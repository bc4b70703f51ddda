"""What a tensor that was put together holds along a dim, in order.

cat([a, b])            a, b                        roll(x, 1)                            x[-1:], x[:-1]
stack([a, b])          a, b, as steps              store(x, 2, a)                        x[:2], a as a step, x[3:]
x[2:5], x.clone()      x[2:5], x                   a.unsqueeze(0)                        a as a step
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from snn_compile.ir.values import example, known_int, shape_key
from snn_compile.passes.concatenations import pieces_of, stack_of, unsqueezed
from snn_compile.passes.functionalize import store
from snn_compile.passes.parts import Part, indexed, part_of

ROLL, CLONE = ("roll", torch.roll), ("clone", torch.clone)


@dataclass(frozen=True)
class Content:
    """``node[start:stop]`` along some dim; or `node` as one step, which has not this dim."""

    node: fx.Node
    start: int
    stop: int
    is_step: bool = False


#: What nodes hold along a dim, while a graph is not rewritten.
Known = dict[tuple[fx.Node, int], list[Content]]


def contents(of: Content, dim: int, known: Known | None = None) -> list[Content]:
    """What lies in ``of``; nothing where that is not known."""
    if of.is_step:
        return []
    known, key = {} if known is None else known, (of.node, dim)
    if key not in known:
        value = example(of.node)
        is_known = isinstance(value, torch.Tensor) and known_int(value.shape[dim]) is not None
        known[key] = next(filter(None, (form(of.node, value, dim) for form in _FORMS)), []) if is_known else []  # type: ignore[arg-type]
    found, at = [], 0
    for inner in known[key]:
        size = inner.stop - inner.start
        start, stop = max(of.start - at, 0), min(of.stop - at, size)
        if start < stop:
            found.append(inner if inner.is_step else Content(inner.node, inner.start + start, inner.start + stop))
        at += size
    return [] if any(inner.node is of.node for inner in found) else found


def whole(node: fx.Node, dim: int) -> Content:
    return Content(node, 0, known_int(example(node).shape[dim]))  # type: ignore[union-attr, arg-type]


def join_dim(node: fx.Node) -> int | None:
    """Along which dim, of a known size, `node` puts tensors together, or moves one."""
    joined, stored, rolled = pieces_of(node), _stored(node), _rolled(node)
    dim = joined[1] if joined is not None else stored.dim if stored is not None else rolled[0] if rolled is not None else None
    return dim if dim is not None and known_int(example(node).shape[dim]) is not None else None  # type: ignore[union-attr]


def _of_part(node: fx.Node, value: torch.Tensor, dim: int) -> list[Content]:
    part = part_of(node)
    return [Content(part.source, part.start, part.stop)] if part is not None and part.dim == dim and not part.is_step else []


def _of_pieces(node: fx.Node, value: torch.Tensor, dim: int) -> list[Content]:
    joined = pieces_of(node)
    if joined is None or joined[1] != dim or not all(_is_like(p, value, value.dim()) for p in joined[0]):
        return []
    sizes = [known_int(example(p).shape[dim]) for p in joined[0]]  # type: ignore[union-attr]
    return [] if None in sizes else [Content(p, 0, n) for p, n in zip(joined[0], sizes, strict=True)]  # type: ignore[arg-type]


def _of_stack(node: fx.Node, value: torch.Tensor, dim: int) -> list[Content]:
    stacked = stack_of(node)
    if stacked is None or stacked[1] % value.dim() != dim or not all(_is_like(p, value, value.dim() - 1) for p in stacked[0]):
        return []
    return [Content(p, 0, 1, is_step=True) for p in stacked[0]]  # type: ignore[arg-type]


def _of_store(node: fx.Node, value: torch.Tensor, dim: int) -> list[Content]:
    """(What is stored may be a number, or smaller than its place: then the store itself is what lies there.)"""
    part = _stored(node)
    if part is None or part.dim != dim:
        return []
    given, length = node.args[2], part.stop - part.start
    shape = list(shape_key(value))
    shape[dim : dim + 1] = [] if part.is_step else [length]
    is_whole = _is_like(given, value, len(shape)) and list(shape_key(example(given))) == shape  # type: ignore[arg-type]
    middle = Content(given, 0, length, part.is_step) if is_whole else Content(node, part.start, part.stop)  # type: ignore[arg-type]
    around = Content(part.source, 0, part.start), Content(part.source, part.stop, known_int(value.shape[dim]))  # type: ignore[arg-type]
    return [c for c in (around[0], middle, around[1]) if c.start < c.stop]


def _of_roll(node: fx.Node, value: torch.Tensor, dim: int) -> list[Content]:
    rolled = _rolled(node)
    if rolled is None or rolled[0] != dim:
        return []
    source, size = node.args[0], known_int(value.shape[dim])
    at = size - rolled[1] % max(size, 1)  # type: ignore[operator, type-var]
    return [c for c in (Content(source, at, size), Content(source, 0, at)) if c.start < c.stop]  # type: ignore[arg-type]


def _of_copy(node: fx.Node, value: torch.Tensor, dim: int) -> list[Content]:
    return [whole(node.args[0], dim)] if node.target in CLONE else []  # type: ignore[arg-type]


def _of_step(node: fx.Node, value: torch.Tensor, dim: int) -> list[Content]:
    step = unsqueezed(node, dim)
    return [Content(step, 0, 1, is_step=True)] if step is not None else []


_FORMS = (_of_store, _of_stack, _of_pieces, _of_part, _of_roll, _of_copy, _of_step)


def _is_like(node: object, whole: torch.Tensor, dims: int) -> bool:
    value = example(node)
    return isinstance(value, torch.Tensor) and (value.dim(), value.dtype, value.device) == (dims, whole.dtype, whole.device)


def _stored(node: fx.Node) -> Part | None:
    """The part that a store puts something into."""
    return indexed(*node.args[:2]) if node.target is store else None


def _rolled(node: fx.Node) -> tuple[int, int] | None:
    """``x.roll(shift, dim)`` -> dim, shift"""
    if node.target not in ROLL:
        return None
    shift = node.args[1] if len(node.args) > 1 else node.kwargs.get("shifts")
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dims")
    shift, dim = (v[0] if isinstance(v, (tuple, list)) and len(v) == 1 else v for v in (shift, dim))
    return (dim % example(node).dim(), shift) if type(shift) is int and type(dim) is int else None  # type: ignore[union-attr]
