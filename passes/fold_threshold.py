"""A neuron with a normalised potential fires on the raw one, against a folded threshold: the form for spiking hardware.

    s = H((u - mean)/sqrt(var + eps)*w + b - c)
    ->  s = H(sign*u - threshold),   a = w/sqrt(var + eps), sign = sign(a), threshold = sign*((c - b)/a + mean)
        (a == 0: the neuron fires in every step, threshold = -inf, or in none, threshold = inf)

for any scale and shift that are constant over time (`snn_compile/ir/threshold`). sign and threshold, one a channel, are computed
once a call, outside of the kernel. Option ``fold_batch_norm="threshold"``; potentials within rounding of the threshold may fire
differently.

Refuses: gradients are wanted; the normalised potential is read by more than the comparison (carried on, a result): the network
would be another one.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from snn_compile.errors import Rejection
from snn_compile.ir.fire import op_name
from snn_compile.ir.recurrence import Const, Recurrence
from snn_compile.ir.threshold import AffineFire, affine_fires
from snn_compile.ir.values import example
from snn_compile.passes.trace_step import make_graph


def fold_threshold(gm: fx.GraphModule, call: fx.Node, recurrence: Recurrence) -> tuple[int, list[Rejection]]:
    """Rewrite the step of `recurrence`, which `call` stands for; gives how many were folded, and why others were not."""
    count, rejections = 0, []
    for found in affine_fires(recurrence):
        why_not = _why_not(recurrence, found)
        if why_not is not None:
            rejections.append(Rejection(why_not[0], found.fire.compared.name, recurrence.location, why_not[1]))
            continue
        _compare_with(recurrence, found, _add_constants(gm, call, recurrence, found))
        count += 1
    if count:
        recurrence.meta["thresholds_folded"] = count
        recurrence.step.graph.eliminate_dead_code()
        _drop_unread_constants(call, recurrence)
        recurrence.step.recompile()
    return count, rejections


def _why_not(recurrence: Recurrence, found: AffineFire) -> tuple[str, str] | None:
    """Reason and hint."""
    if recurrence.backward is not None:
        return "a threshold is not folded where gradients are wanted", "call the model under torch.no_grad()"
    if found.other_uses():
        return (
            "the normalised potential is carried on or read, so folding the threshold alone would change the network",
            "fold_batch_norm='exact' keeps it",
        )
    return None


# ---------------------------------------------------------------------------------------------- outside of the kernel


def _add_constants(gm: fx.GraphModule, call: fx.Node, recurrence: Recurrence, found: AffineFire) -> list[fx.Node]:
    """Compute sign and threshold before `call`, and hand them to the step; gives its new placeholders."""
    placeholders = [n for n in recurrence.step.graph.nodes if n.op == "placeholder"]
    values = [example(a) for a in call.args]

    def fold(*operands: Tensor) -> list[Tensor]:
        return _sign_and_threshold(found, dict(zip(placeholders, operands, strict=True)))

    traced = make_graph(fold, values, {})
    inputs = [n for n in traced.graph.nodes if n.op == "placeholder"]
    with gm.graph.inserting_before(call):
        new = gm.graph.graph_copy(traced.graph, dict(zip(inputs, call.args, strict=True)))  # type: ignore[arg-type]
    call.args = (*call.args, *new)  # type: ignore[misc]
    added: list[fx.Node] = []
    for name, value in zip(("sign", "threshold"), map(example, new), strict=True):  # type: ignore[arg-type]
        with recurrence.step.graph.inserting_after((placeholders + added)[-1]):
            placeholder = recurrence.step.graph.placeholder(f"const_{name}")
        lanes = found.potential.meta["val"]
        placeholder.meta = {"val": lanes.new_empty(lanes.shape if value.dim() else (), dtype=value.dtype), "user_name": name}
        recurrence.consts = (*recurrence.consts, Const(name, value.dtype, is_scalar=value.dim() == 0))
        added.append(placeholder)
    return added


def _sign_and_threshold(found: AffineFire, given: dict[fx.Node, Any]) -> list[Tensor]:
    """From the step's operands as they are, not stretched over the lanes: one value a channel."""

    def constant(node: Any) -> Any:
        if isinstance(node, fx.Node) and node not in given:
            given[node] = node.target(*map_arg(node.args, constant), **node.kwargs)  # type: ignore[operator]
        return given[node] if isinstance(node, fx.Node) else node

    slope: Any = 1.0
    offset: Any = 0.0
    inner = found.potential
    for node in found.chain:
        slope, offset = _apply(node, inner, slope, offset, constant)
        inner = node
    compared, limit = found.fire.compared, constant(found.fire.compared.args[1])
    margin, sign = limit - offset, torch.sign(slope)
    fires = getattr(operator, op_name(compared))(torch.zeros_like(margin), margin)
    always = torch.full_like(margin, -math.inf if op_name(compared) in ("ge", "gt") else math.inf)
    return [sign, torch.where(slope == 0, torch.where(fires, always, -always), margin / slope * sign)]


def _apply(node: fx.Node, inner: fx.Node, a: Any, b: Any, constant: Callable[[Any], Any]) -> tuple[Any, Any]:
    """``inner = a*u + b`` -> slope and offset of `node`, an affine op of it."""
    name, args = op_name(node), [None if arg is inner else constant(arg) for arg in node.args]
    if name == "neg":
        return -a, -b
    if name == "div":
        return a / args[1], b / args[1]
    if name == "addcmul":
        factor = args[1] if args[2] is None else args[2]
        return a * factor, b * factor + args[0]
    other = args[1] if args[0] is None else args[0]
    if name == "mul":
        return a * other, b * other
    if name == "add":
        return a, b + other
    is_minuend = (args[0] is None) == (name == "sub")  # u - c, and not c - u
    return (a, b - other) if is_minuend else (-a, other - b)


# ------------------------------------------------------------------------------------------------------ in the kernel


def _compare_with(recurrence: Recurrence, found: AffineFire, constants: list[fx.Node]) -> None:
    graph, compared = recurrence.step.graph, found.fire.compared
    sign, threshold = constants
    with graph.inserting_before(compared):
        signed = graph.call_function(torch.ops.aten.mul.Tensor, (found.potential, sign))
        new = graph.call_function(compared.target.overloadpacket.Tensor, (signed, threshold))  # type: ignore[union-attr]
    signed.meta = {"val": found.potential.meta["val"], "user_name": "potential"}
    new.meta = dict(compared.meta)
    compared.replace_all_uses_with(new)
    graph.erase_node(compared)


def _drop_unread_constants(call: fx.Node, recurrence: Recurrence) -> None:
    placeholders = [n for n in recurrence.step.graph.nodes if n.op == "placeholder"]
    first = len(recurrence.carries) + len(recurrence.xs)
    kept = [i for i, n in enumerate(placeholders) if i < first or n.users]
    recurrence.consts = tuple(recurrence.consts[i - first] for i in kept if i >= first)
    call.args = tuple(call.args[i] for i in kept)
    for node in (n for n in placeholders[first:] if not n.users):
        recurrence.step.graph.erase_node(node)
