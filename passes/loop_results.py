"""Uses of a rerolled loop's values: a stack of all steps is the output itself, any other use reads its slice."""

from __future__ import annotations

import operator

import torch
from torch import fx

from snn_compile.errors import VerificationError
from snn_compile.ir.loop import LoopOutput
from snn_compile.ir.values import example
from snn_compile.passes.concatenations import stack_of
from snn_compile.passes.loop_window import Window


def stacked_example(y: LoopOutput, count: int | torch.SymInt) -> torch.Tensor:
    """``torch.stack([value] * count, dim)``; of a symbolic count, a tensor laid out like it."""
    value = y.example
    if not isinstance(count, int):
        assert y.dim == 0, "a scan stacks in front"
        two = torch.stack([value] * 2)
        return two.new_empty_strided((count, *value.shape), two.stride()).requires_grad_(value.requires_grad)
    return value.unsqueeze(y.dim).repeat_interleave(1, 0) if count == 1 else torch.stack([value] * count, y.dim)


def rewire_output(graph: fx.Graph, window: Window, residue: int, y: LoopOutput, ys: fx.Node) -> None:
    """``stack([q0, …, q(T-1)], d)`` is the output itself; any other use reads its slice."""
    steps = {window.node(residue, t): t for t in range(window.count) if window.exists(residue, t)}
    users: dict[fx.Node, None] = {}
    for by_step in window.uses[residue].values():
        users.update(dict.fromkeys(by_step))
    for user in list(users):
        stacked = stack_of(user)
        is_own = stacked is not None and window.view.is_written(user)  # (memory that only the stack has)
        if stacked is not None and not is_own and _replace_stack(graph, window, user, *stacked, steps, y, ys):
            continue
        for node, t in steps.items():
            if user in node.users:
                with graph.inserting_before(user):
                    user.replace_input_with(node, _slice(graph, ys, y, t))


def _slice(graph: fx.Graph, ys: fx.Node, y: LoopOutput, t: int) -> fx.Node:
    node = graph.call_function(operator.getitem, (ys, t if y.dim == 0 else (*(slice(None),) * y.dim, t)))
    node.meta = {"example_value": y.example}
    return laid_out(graph, node, y.example) if y.dim else node


def laid_out(graph: fx.Graph, node: fx.Node, like: object) -> fx.Node:
    """A part of all steps' values, or these with time at another dim, as the value that it stands for: a `view` may follow."""
    if isinstance(like, torch.Tensor) and like.is_contiguous():
        node = graph.call_method("contiguous", (node,))
        node.meta = {"example_value": like}
    return node


def _replace_stack(
    graph: fx.Graph,
    window: Window,
    user: fx.Node,
    values: list[object],
    dim: int,
    steps: dict[fx.Node, int],
    y: LoopOutput,
    ys: fx.Node,
) -> bool:
    """Replace a `stack` that holds consecutive steps in order; values before and after them are concatenated."""
    inside = [i for i, v in enumerate(values) if v in steps]
    if not inside or inside != list(range(inside[0], inside[-1] + 1)):
        return False
    first, last = inside[0], inside[-1]
    times = [steps[v] for v in values[first : last + 1]]  # type: ignore[index]
    if times != list(range(times[0], times[0] + len(times))):
        return False
    dim = dim % (y.example.dim() + 1)
    with graph.inserting_before(user):
        node = ys
        if len(times) != window.count:  # (the last iteration may have had no such value: its dead tail was added)
            node = graph.call_method("narrow", (node, y.dim, times[0], len(times)))
            node.meta = {"example_value": example(ys).narrow(y.dim, times[0], len(times))}  # type: ignore[union-attr]
        if dim != y.dim:
            node = graph.call_method("movedim", (node, y.dim, dim))
            node.meta = {}
        if first > 0 or last < len(values) - 1:
            parts: list[object] = [node]
            if first > 0:
                parts.insert(0, graph.call_function(torch.stack, (values[:first], dim)))
            if last < len(values) - 1:
                parts.append(graph.call_function(torch.stack, (values[last + 1 :], dim)))
            node = graph.call_function(torch.cat, (parts, dim))
        elif node is not ys:
            node = laid_out(graph, node, example(user))
        node.meta = node.meta if node is ys else {**node.meta, "example_value": example(user)}
    new, old = example(node), example(user)
    if isinstance(new, torch.Tensor) and isinstance(old, torch.Tensor) and new.shape != old.shape:
        raise VerificationError(f"'{user.name}' of {tuple(old.shape)} was replaced by {tuple(new.shape)}")
    user.replace_all_uses_with(node)
    graph.erase_node(user)
    return True
