"""A long loop becomes loops over stretches of time that hand their states on, so that inference stays within memory.

    y, v = loop(v0, x)      over T steps
    ->  y1, v1 = loop(v0, x[:c]);  y2, v2 = loop(v1, x[c:2c]);  …;  y = cat([y1, y2, …])

Time batching holds a layer's values of all steps of its loop at once, eager those of one step. Each stretch is then compiled as
any loop is; the kernels are the same (their number of steps is an operand).

Bytes are counted from the body. A step of eager holds the values that are still needed, at its worst point (`held_by_eager`). A
stretch of c steps may hold c times all that a layer of it reads or writes (`made_by_step`): memory that one layer is done with is
kept for the same layer of the next stretch, and Inductor may begin with the next one. What stays inside of a kernel is no memory.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence

import torch
from torch import fx

from snn_compile.ir.loop import Loop, LoopCarry
from snn_compile.ir.values import example, known_int
from snn_compile.passes.classify import OpInfo
from snn_compile.passes.emit import copy_of, emit, replace_by_results
from snn_compile.passes.loop_results import stacked_example

GIB = 1 << 30


def chunk_length(loop: Loop, infos: dict[fx.Node, OpInfo], option: str | int) -> int | None:
    """Steps of a stretch: `option`, or for ``"auto"`` as many as fit into max(2 x eager's peak, 1 GiB).

    None, which is all of them, where nobody knows yet how many there are.
    """
    steps = known_int(loop.length)
    if isinstance(option, int) or steps is None:
        return None if steps is None else option  # type: ignore[return-value]
    step, eager = made_by_step(infos), held_by_eager(loop, infos)
    stretches = math.ceil(steps * step / max(2 * eager, GIB))
    return math.ceil(steps / max(1, min(stretches, steps)))


def made_by_step(infos: dict[fx.Node, OpInfo]) -> int:
    """Bytes of a step's values that are memory when layers run over many steps at once: those that an op with a call touches."""
    readers = {n: [u for u in n.users if u in infos] for n in infos}
    return sum(_bytes(example(n)) for n, i in infos.items() if not i.pointwise or any(not infos[u].pointwise for u in readers[n]))


def held_by_eager(loop: Loop, infos: dict[fx.Node, OpInfo]) -> int:
    """The most bytes that the values of a step take at a time, each from its op to its last reader."""
    order = {n: i for i, n in enumerate(loop.body.graph.nodes)}
    change = [0] * (len(order) + 1)
    for node in infos:
        last = max((order[u] for u in node.users if u in infos), default=order[node])
        change[order[node]] += _bytes(example(node))
        change[last + 1] -= _bytes(example(node))
    return max(itertools.accumulate(change))


def _bytes(value: object) -> int:
    """Of a tensor with memory of its own; a view, a tuple and a symbolic size count as nothing."""
    if not isinstance(value, torch.Tensor) or value._is_view() or not all(isinstance(s, int) for s in value.shape):
        return 0
    return value.numel() * value.element_size()


def chunk_time(gm: fx.GraphModule, call: fx.Node, loop: Loop, length: int | None) -> list[tuple[fx.Node, Loop]]:
    """Replace `call` by calls over stretches of `length` steps (the last may be shorter); gives the new calls and loops."""
    total = known_int(loop.length)
    if length is None or total is None or length >= total or any(x.reverse for x in loop.xs) or any(y.reverse for y in loop.ys):
        return [(call, loop)]
    graph, n = gm.graph, len(loop.carries)
    inits, xs, consts = loop.split(call.args)
    carries, made, parts = list(inits), list[tuple[fx.Node, Loop]](), list[list[fx.Node]]()
    with graph.inserting_before(call):
        for start in range(0, total, length):
            steps = min(length, total - start)
            part = _part(loop, len(made), steps)
            gm.add_submodule(part.name, part)
            now = [emit(graph, "call_method", "narrow", (x, 0, start, steps), {}) for x in xs]
            node = graph.call_module(part.name, (*carries, *now, *consts))
            made.append((node, part))
            results = [_result(graph, node, i, value) for i, value in enumerate(_values(part))]
            parts.append(results)
            carries = results[len(loop.ys) : len(loop.ys) + n]
        ys = [emit(graph, "call_function", torch.cat, ([p[i] for p in parts], y.dim), {}) for i, y in enumerate(loop.ys)]
    last = [v for v, c in zip(carries, loop.carries, strict=True) if c.is_result]
    replace_by_results(call, [*ys, *last])
    for node in ys:
        if not node.users:
            graph.erase_node(node)
    delattr(gm, str(call.target))
    return made


def _part(loop: Loop, number: int, steps: int) -> Loop:
    """The loop over `steps` steps, all of whose states are results, with a body of its own."""
    carries = [LoopCarry(c.name, c.example, is_result=True) for c in loop.carries]
    return Loop(f"{loop.name}_part_{number}", steps, copy_of(loop.body), carries, loop.xs, loop.consts, loop.ys, loop.location)


def _values(part: Loop) -> Sequence[torch.Tensor]:
    """Examples of the results: outputs over time, then states."""
    ys = [stacked_example(y, part.length) for y in part.ys]
    return [*ys, *(c.example for c in part.carries)]


def _result(graph: fx.Graph, call: fx.Node, index: int, value: torch.Tensor) -> fx.Node:
    node = graph.call_function(operator.getitem, (call, index))
    node.meta["example_value"] = value
    return node
