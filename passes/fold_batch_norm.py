"""A batch norm with fixed statistics, in a neuron, becomes one multiply-add a lane.

    for t: h = charge(v, x[t]); y = batch_norm(h, mean, var, w, b, training=False); s = H(y - threshold); …
    ->  scale, shift = w/sqrt(var + eps), b - mean*scale           in the kernel, before its time loop
        for t: h = charge(v, x[t]); y = h*scale + shift; s = H(y - threshold); …

so that a neuron with batch norm of its potential is one kernel, at the cost of a plain one: scale and shift stay in registers.
Batch norms beside a neuron join its kernel the same way. The result is eager's bit for bit: on CPU its batch norm is that
multiply-add, rounded once, for a potential without gaps in memory. Whether it is on the device at hand is tried out.

Does not fire: training mode, statistics that change with t or want a gradient, dtypes of less than 32 bits, a device on which
the trial fails.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from snn_compile.ir.loop import Loop
from snn_compile.ir.values import example
from snn_compile.passes.classify import IsPointwiseOp, classify
from snn_compile.passes.distribute import find_groups
from snn_compile.passes.emit import emit
from snn_compile.passes.fixed_batch_norm import arguments, is_fixed_batch_norm, scale_and_shift
from snn_compile.passes.hoist import find_invariant


def fold_batch_norm(loop: Loop, is_pointwise_op: IsPointwiseOp) -> int:
    """Rewrite the body of `loop`; gives the number of batch norms folded."""
    consts = set(loop.placeholders()[len(loop.carries) + len(loop.xs) :])
    fixed = {n for n in loop.body.graph.nodes if is_fixed_batch_norm(n, consts)}
    if not fixed:
        return 0
    infos = classify(loop, is_pointwise_op)
    groups = find_groups(loop, infos, ignore=find_invariant(loop, infos))
    found = [n for g in groups if g.is_kernel for n in g.nodes if n in fixed]
    for node in found:
        with loop.body.graph.inserting_before(node):
            new = _multiply_add(loop.body.graph, node)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        loop.body.graph.erase_node(node)
    loop.body.recompile()
    return len(found)


def _multiply_add(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """``addcmul(shift, x, scale)``, scale and shift with a dim of 1 for every dim behind the channels."""
    given = arguments(node)
    space = (1,) * (example(given["input"]).dim() - 2)

    def channels(name: str) -> fx.Node | None:
        value = given[name]
        return emit(graph, "call_method", "reshape", (value, (-1, *space)), {}, name) if value is not None and space else value

    def call(function: Callable[..., Tensor], *args: object, name: str, **kwargs: object) -> fx.Node:
        return emit(graph, "call_function", function, args, kwargs, name)

    mean, var, weight, bias = map(channels, ("running_mean", "running_var", "weight", "bias"))
    scale, shift = scale_and_shift(call, mean, var, weight, bias, given["eps"])
    return graph.call_function(torch.addcmul, (shift, given["input"], scale))
