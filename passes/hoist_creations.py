"""Constant tensors are made once, before everything else.

    y = conv(x[0]); v = zeros_like(y)            ->   v = full((4, 8, 8), 0.0); y = conv(x[0])
    w0 = w * tensor(3.0); w1 = w * tensor(3.0)   ->   c = tensor(3.0); w0 = w * c; w1 = w * c

A state that starts inside the first step (``if v is None: v = torch.zeros_like(y)``) makes that step differ from all others.
A tensor filled with one number depends on another only by shape, so it can be made first; equal ones are one tensor. So are the
results of equal calls without tensors, of which every step would else have another one.

Does not fire: symbolic shapes, tensors that are written into or that the graph gives back, uninitialised memory, random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from snn_compile.ir.values import example, storage_key
from snn_compile.passes.effects import has_effect, written
from snn_compile.passes.merge_views import is_view

LIKE: dict[object, Callable[[fx.Node], Any]] = {
    torch.zeros_like: lambda n: 0,
    torch.ones_like: lambda n: 1,
    torch.full_like: lambda n: n.args[1] if len(n.args) > 1 else n.kwargs.get("fill_value"),
    torch.zeros: lambda n: 0,
    torch.ones: lambda n: 1,
    torch.full: lambda n: n.args[1] if len(n.args) > 1 else n.kwargs.get("fill_value"),
    "new_zeros": lambda n: 0,
    "new_ones": lambda n: 1,
}


def hoist_creations(gm: fx.GraphModule) -> None:
    """Rewrite `gm` in place."""
    made: dict[object, fx.Node] = {}
    memory: set[int | None] = set()  # (of what is another tensor now)
    front = next((n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr")), None)
    for node in list(gm.graph.nodes):
        number = _number(node)
        value = example(node)
        if number is None and front is not None and _is_call_without_tensors(node) and _is_plain(node, value):
            first = made.setdefault((_function(node.target), repr(node.args), repr(sorted(node.kwargs.items()))), node)
            if first is not node:
                node.replace_all_uses_with(first)
                gm.graph.erase_node(node)
            elif node is not front:
                front.prepend(node)
            continue
        if number is None or not _is_plain(node, value) or not all(isinstance(s, int) for s in value.shape) or front is None:
            continue
        memory_format = _memory_format(value)
        if memory_format is None:
            continue
        key = (tuple(value.shape), repr(number), value.dtype, value.device, memory_format)
        if key not in made:
            with gm.graph.inserting_before(front):
                made[key] = _create(gm.graph, value, number, memory_format)
        memory.add(storage_key(node))
        node.replace_all_uses_with(made[key])
        if node is front:
            front = node.next
        gm.graph.erase_node(node)
    _move_views(gm.graph, set(made.values()), memory)


def _move_views(graph: fx.Graph, sources: set[fx.Node], memory: set[int | None]) -> None:
    """Examples of what is a view of an equal tensor now: passes tell by them what shares memory."""
    for node in graph.nodes:
        if is_view(node) and node.args[0] in sources and storage_key(node) in memory:
            value = example(node)
            node.meta["example_value"] = example(node.args[0]).as_strided(value.shape, value.stride(), value.storage_offset())
            sources.add(node)


def _is_call_without_tensors(node: fx.Node) -> bool:
    """``torch.tensor(3.0)``, ``torch.arange(5)``, a function of NumPy on sizes."""
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and not node.all_input_nodes and not name.startswith("empty") and not has_effect(node)


def _function(target: object) -> object:
    """Dynamo wraps a function of NumPy anew in every call."""
    return (type(target), target.f) if hasattr(target, "f") else target


def _number(node: fx.Node) -> int | float | bool | None:
    rule = LIKE.get(node.target) if node.op in ("call_function", "call_method") else None
    number = rule(node) if rule is not None else None
    return number if isinstance(number, (int, float, bool)) else None


def _is_plain(node: fx.Node, value: object) -> bool:
    if not isinstance(value, torch.Tensor) or value.requires_grad or value.layout is not torch.strided:
        return False
    if "out" in node.kwargs or node.kwargs.get("requires_grad"):
        return False
    return _stays_as_made(node)


def _stays_as_made(node: fx.Node) -> bool:
    """Whether nothing writes into its memory, through views neither, and no result of the graph lies there."""
    key, names = storage_key(node), [node]
    for name in names:
        for user in name.users:
            if user.op == "output" or name in written(user):
                return False
            if storage_key(user) == key or isinstance(example(user), (tuple, list)):
                names.append(user)
    return True


def _memory_format(value: torch.Tensor) -> torch.memory_format | None:
    formats = [torch.contiguous_format]
    formats += [torch.channels_last] if value.dim() == 4 else [torch.channels_last_3d] if value.dim() == 5 else []
    return next((f for f in formats if value.is_contiguous(memory_format=f)), None)


def _create(graph: fx.Graph, value: torch.Tensor, number: float, memory_format: torch.memory_format) -> fx.Node:
    options = {"dtype": value.dtype, "device": value.device}
    node = graph.call_function(torch.full, (tuple(value.shape), number), options)
    node.meta = {"example_value": value}
    if memory_format is not torch.contiguous_format:
        node = graph.call_method("contiguous", (node,), {"memory_format": memory_format})
        node.meta = {"example_value": value}
    return node


def number_of(node: fx.Node) -> int | float | bool | None:
    """The number that a new tensor is filled with, whatever its size; None for any other node, and where it is written into."""
    return _number(node) if _is_plain(node, example(node)) else None


def inline_creations(body: fx.GraphModule, operands: dict[fx.Node, object]) -> list[fx.Node]:
    """Constants of a loop that are tensors of one number become part of its body; gives their placeholders.

    for t: v = where(s, ones, v)   ->   for t: v = where(s, full_like(v, 1), v)
    """
    inlined = []
    like = next((p for p in operands if p.op == "placeholder" and p.users), None)
    for placeholder, operand in operands.items():
        number = number_of(operand) if isinstance(operand, fx.Node) and operand.target is torch.full else None
        value = example(placeholder)
        if number is None or like is None or like is placeholder or example(like).shape != value.shape:
            continue
        if not _stays_as_made(placeholder):
            continue
        with body.graph.inserting_before(next(n for n in body.graph.nodes if n.op != "placeholder")):
            new = body.graph.call_function(torch.full_like, (like, number), {"dtype": value.dtype})
        new.meta = dict(placeholder.meta)
        placeholder.replace_all_uses_with(new)
        inlined.append(placeholder)
    return inlined
