"""Which part of a tensor a read takes, however it is written.

x[2], x[:, 2], x[..., 2], x.select(1, 2), x.unbind(1)[2]                   one step along a dim, without that dim
x[1:3], x[..., 1:3], x.narrow(0, 1, 2), x.chunk(2, 1)[0], x.split(n)[1]    a range along a dim
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from snn_compile.ir.values import example, is_getitem, known_int

_NARROW, _SELECT, _UNBIND = (("narrow", torch.narrow), ("select", torch.select), ("unbind", torch.unbind))
_PIECES = ("chunk", torch.chunk, "split", torch.split, "tensor_split", torch.tensor_split)


@dataclass(frozen=True)
class Part:
    """``source[start:stop]`` along `dim`, which is gone where `is_step`."""

    source: fx.Node
    dim: int
    start: int
    stop: int
    is_step: bool = False


def part_of(node: fx.Node) -> Part | None:
    """None where the read takes several parts, or all, or is not known when it is compiled."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if is_getitem(node) and isinstance(example(source), (tuple, list)):
        return _piece(source, node.args[1])
    value = example(source)
    if not isinstance(value, torch.Tensor):
        return None
    if is_getitem(node):
        return indexed(source, node.args[1])
    if node.target in _NARROW and len(node.args) == 4:
        return _part(source, value, node.args[1], node.args[2], node.args[3])
    if node.target in _SELECT and len(node.args) == 3:
        return _part(source, value, node.args[1], node.args[2])
    return None


def _part(source: fx.Node, value: torch.Tensor, dim: object, start: object, length: object = None) -> Part | None:
    if type(dim) is not int or type(start) is not int or type(length) not in (int, type(None)):
        return None
    size = known_int(value.shape[dim])
    if size is None:
        return None
    start += size if start < 0 else 0
    stop = start + (1 if length is None else length)  # type: ignore[operator]
    return Part(source, dim % value.dim(), start, stop, length is None) if 0 <= start <= stop <= size else None


def indexed(source: object, index: object) -> Part | None:
    """The part that ``source[index]`` is, of a tensor that is read or written into."""
    value, entries = example(source), list(index) if isinstance(index, tuple) else [index]
    if not isinstance(source, fx.Node) or not isinstance(value, torch.Tensor):
        return None
    if any(isinstance(i, (fx.Node, torch.Tensor, list)) or i is None for i in entries):
        return None
    if Ellipsis in entries:
        at = entries.index(Ellipsis)
        entries[at : at + 1] = [slice(None)] * (value.dim() - len(entries) + 1)
    found = [(dim, i) for dim, i in enumerate(entries) if i != slice(None)]
    if len(found) != 1:
        return None
    dim, entry = found[0]
    if not isinstance(entry, slice):
        return _part(source, value, dim, entry)
    size = known_int(value.shape[dim])
    if size is None or not all(type(i) in (int, type(None)) for i in (entry.start, entry.stop, entry.step)):
        return None
    start, stop, step = entry.indices(size)
    return _part(source, value, dim, start, max(stop - start, 0)) if step == 1 else None


def index_along(dim: int, entry: object) -> object:
    """The index of ``x[entry]``, ``x[:, entry]``, .."""
    return (*[slice(None)] * dim, entry) if dim else entry


def _piece(several: fx.Node, index: object) -> Part | None:
    """``chunk(x, 2, 1)[0]``"""
    source, pieces = several.args[0] if several.args else None, example(several)
    if type(index) is not int or not isinstance(source, fx.Node) or not isinstance(value := example(source), torch.Tensor):
        return None
    if several.target in _UNBIND:
        dim = several.args[1] if len(several.args) > 1 else several.kwargs.get("dim", 0)
        return _part(source, value, dim, index)
    dim = several.args[2] if len(several.args) > 2 else several.kwargs.get("dim", 0)
    if several.target not in _PIECES or type(dim) is not int:
        return None
    sizes = [known_int(p.shape[dim]) for p in pieces]  # type: ignore[attr-defined]
    if None in sizes:
        return None
    index %= len(sizes)
    return _part(source, value, dim, sum(sizes[:index]), sizes[index])  # type: ignore[arg-type]
