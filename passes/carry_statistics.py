"""Running statistics that a batch norm in training mode updates every step become states of the loop.

    for t: h = charge(v, x[t]); y = batch_norm(h, mean, var, w, b, training=True); …       (writes mean and var, unseen)

    ->  for t: y, m, i = native_batch_norm(h, w, b); mean' = (1 - k)*mean + k*m; var' = (1 - k)*var + k*n/(n - 1)*(i**-2 - eps)
        mean.copy_(mean'); var.copy_(var')                                                 (once, after the loop)

The loop then writes nothing, and its step can be traced alone. The output is eager's bit for bit - it is the same op -, the
statistics agree to rounding.
"""

from __future__ import annotations

import operator
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from snn_compile.errors import Reject
from snn_compile.ir.loop import Loop, LoopCarry
from snn_compile.ir.values import example
from snn_compile.passes.fixed_batch_norm import arguments


def updates_statistics(node: fx.Node) -> bool:
    """A batch norm in training mode with running statistics."""
    return node.target is F.batch_norm and arguments(node)["training"] is True and arguments(node)["running_mean"] is not None


def why_not_carried(node: fx.Node, consts: Collection[fx.Node]) -> str | None:
    """The reason why no state can hold the statistics that a batch norm updates; `consts`: the loop's invariant operands."""
    given = arguments(node)
    if any(r not in consts or len(r.users) != 1 for r in (given["running_mean"], given["running_var"])):
        return "running statistics that a step uses more than once"
    return "a batch norm without momentum" if given["momentum"] is None else None


def carry_statistics(gm: fx.GraphModule, call: fx.Node, loop: Loop) -> None:
    """Rewrite `loop` and its call in place."""
    for node in [n for n in loop.body.graph.nodes if updates_statistics(n)]:
        given = arguments(node)
        for name, next_value in zip(("running_mean", "running_var"), _replace(loop, node, given), strict=True):
            _carry(gm, call, loop, given[name], next_value)
    loop.body.recompile()


def _replace(loop: Loop, node: fx.Node, given: dict[str, object]) -> tuple[fx.Node, fx.Node]:
    """Put the functional form in the node's place; gives the next running mean and variance."""
    consts = loop.placeholders()[len(loop.carries) + len(loop.xs) :]
    value = example(given["input"])
    if (why := why_not_carried(node, consts)) is not None:
        raise Reject(why, node=node.name, location=loop.location)
    count = value.numel() // value.shape[1]
    graph = loop.body.graph
    with graph.inserting_before(node):
        settings = (given["momentum"], given["eps"])
        normed = graph.call_function(
            torch.native_batch_norm, (given["input"], given["weight"], given["bias"], None, None, True, *settings)
        )
        parts = [graph.call_function(operator.getitem, (normed, i)) for i in range(3)]
        following = [
            graph.call_function(f, (given[name], part, *settings, count))
            for f, name, part in ((next_mean, "running_mean", parts[1]), (next_var, "running_var", parts[2]))
        ]
    parts[0].meta = dict(node.meta)
    for new, name in zip(following, ("running_mean", "running_var"), strict=True):
        new.meta = {"example_value": example(given[name])}
    node.replace_all_uses_with(parts[0])
    graph.erase_node(node)
    return following[0], following[1]


def next_mean(running: Tensor, mean: Tensor, momentum: float, eps: float, count: int) -> Tensor:
    """``(1 - momentum)*running + momentum*mean``"""
    return (1.0 - momentum) * running + momentum * mean.detach()


def next_var(running: Tensor, invstd: Tensor, momentum: float, eps: float, count: int) -> Tensor:
    """``(1 - momentum)*running + momentum*var``, with the unbiased variance from ``1/sqrt(var_biased + eps)``."""
    var = (invstd.detach() ** -2.0 - eps) * (count / (count - 1))
    return (1.0 - momentum) * running + momentum * var


def _carry(gm: fx.GraphModule, call: fx.Node, loop: Loop, placeholder: object, next_value: fx.Node) -> None:
    """Make an invariant operand a state whose last value is written back to it."""
    assert isinstance(placeholder, fx.Node)
    at = loop.placeholders().index(placeholder)
    first = len(loop.carries)
    spec = loop.consts.pop(at - first - len(loop.xs))
    buffer = call.args[at]
    last_carry = loop.placeholders()[first - 1] if first else None
    (last_carry or loop.body.graph._root).append(placeholder)
    others = [a for i, a in enumerate(call.args) if i != at]
    call.args = (*others[:first], buffer, *others[first:])
    output = loop.body.graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    output.args = ((*results[:first], next_value, *results[first:]),)
    value = example(buffer)
    loop.carries.append(LoopCarry(spec.name, value, is_result=True))
    position = len(loop.ys) + sum(c.is_result for c in loop.carries) - 1
    with gm.graph.inserting_after(call):
        final = gm.graph.call_function(operator.getitem, (call, position))
    with gm.graph.inserting_after(final):
        gm.graph.call_method("copy_", (buffer, final))
    final.meta = {"example_value": value}


def separate_saved_statistics(gm: fx.GraphModule) -> None:
    """A batch norm ahead of statistics that are written back once (a first step that differs) gets a copy of them.

    Autograd saves its statistics, and refuses what was written into since: `copy_` is seen, a batch norm's own update is not.
    """
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    for node in [n for n in order if updates_statistics(n)]:
        given = arguments(node)
        for buffer in (given["running_mean"], given["running_var"]):
            assert isinstance(buffer, fx.Node)
            writes = [u for u in buffer.users if u.target == "copy_" and u.args[0] is buffer]
            if not any(order.get(w, 0) > order[node] for w in writes):
                continue
            with gm.graph.inserting_before(node):
                own = gm.graph.call_method("clone", (buffer,))
            node.replace_input_with(buffer, own)
            with gm.graph.inserting_after(node):
                gm.graph.call_method("copy_", (buffer, own))
