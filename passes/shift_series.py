"""A value of an earlier step is a time series that starts later.

    for t: y[t] = linear(before); before = x[t]      ->      d = cat([before[None], x[:-1]]);   for t: y[t] = linear(d[t])

So a layer behind a delay line - axonal and synaptic delays, a window of steps - runs once for all steps, like any other layer
(`passes/batch_time`). A delay of more steps is a chain of them.

Does not fire: in a recurrence (whose kernel keeps what it needs of earlier steps in registers); a first value of another shape or
dtype; a delayed value whose last one is wanted; a series that is read backwards.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from snn_compile.ir.loop import Loop, LoopInput
from snn_compile.ir.values import example, shape_key
from snn_compile.passes.emit import emit


def shift_series(gm: fx.GraphModule, call: fx.Node, loop: Loop) -> int:
    """Rewrite `loop`, which is no recurrence, and its `call` in place; gives the number of carries that became series."""
    count = 0
    while (place := _delayed(call, loop)) is not None:
        _shift(gm.graph, call, loop, place)
        count += 1
    if count:
        loop.body.recompile()
    return count


def _delayed(call: fx.Node, loop: Loop) -> int | None:
    """The place of a carry that hands on what an input of the loop was one step ago."""
    placeholders = loop.placeholders()
    n = len(loop.carries)
    forward = {p for p, x in zip(placeholders[n:], loop.xs, strict=False) if not x.reverse}
    for i, (carry, following) in enumerate(zip(loop.carries, loop.results()[0], strict=True)):
        if following in forward and placeholders[i].users and not carry.is_result:
            first, later = example(call.args[i]), example(following)
            if isinstance(first, torch.Tensor) and (shape_key(first), first.dtype) == (shape_key(later), later.dtype):
                return i
    return None


def _shift(graph: fx.Graph, call: fx.Node, loop: Loop, i: int) -> None:
    placeholders, n, m = loop.placeholders(), len(loop.carries), len(loop.xs)
    results = list(loop.body.graph.output_node().args[0])  # type: ignore[arg-type]
    args = list(call.args)
    with graph.inserting_before(call):
        series = args[placeholders.index(results.pop(i))]
        first = emit(graph, "call_method", "unsqueeze", (args.pop(i), 0), {})
        others = emit(graph, "call_function", operator.getitem, (series, slice(None, -1)), {})
        args.insert(n - 1 + m, emit(graph, "call_function", torch.cat, ([first, others],), {}))
    call.args = tuple(args)
    placeholders[n + m - 1].append(placeholders[i])
    loop.body.graph.output_node().args = (tuple(results),)
    carry = loop.carries.pop(i)
    loop.xs.append(LoopInput(carry.name, carry.example))
