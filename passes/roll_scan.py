"""A `torch._higher_order_ops.scan` is a time loop that needs no rerolling.

    carry, y = scan(step, init, x)      ->      y, carry = loop(init, x)       with the step's graph as its body

So a loop of a thousand steps costs one trace of one step, and where its length is symbolic - time was declared dynamic, or a
second length has come - one compilation serves all lengths. (PyTorch has moved time to dim 0, and flipped a reversed series,
before the graph reaches a backend.)

A `scan` in which there is no recurrence to compile is unrolled, as Dynamo does with a loop in Python, since Inductor (torch
2.11 to 2.15) cannot compile a scan on CPU:

    carry, y = scan(step, init, x)      ->      c0, y0 = step(init, x[0]); c1, y1 = step(c0, x[1]); ...; y = stack([y0, y1, ...])

Does not fire, and the `scan` stays as it is for Inductor: a step that gives a number, a state or a series that is no tensor,
a length that is not even known when it is compiled (it depends on data); nothing to compile in a scan whose length the caller
declared dynamic.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from snn_compile.errors import Reject, Rejection
from snn_compile.ir.loop import Loop, LoopCarry, LoopConst, LoopInput, LoopOutput
from snn_compile.ir.values import base_name, example, is_getitem, known_int, size_key, user_location, wanting_grad
from snn_compile.passes.autocast_regions import name_regions, regions
from snn_compile.passes.effects import is_grad_switch, sweeping
from snn_compile.passes.functionalize import functionalize
from snn_compile.passes.loop_operands import series_name
from snn_compile.passes.specialize import (
    drop_unread_sizes,
    fold_sizes,
    replace_by_number,
    specialize_floats,
    specialize_length,
)
from snn_compile.passes.unroll import unroll


def roll_scans(
    gm: fx.GraphModule, why_not: Callable[[Loop], Rejection | None], min_steps: int = 2
) -> tuple[list[Loop], list[Rejection], int]:
    """Replace every `scan` by a `Loop`, where `why_not` has nothing against it, and by its steps where it has.

    Gives the loops, what was refused, and how many scans were replaced in either way.
    """
    loops, rejections, count = [], [], 0
    target = getattr(torch.ops.higher_order, "scan", None)
    with sweeping(gm.graph):
        for node in [n for n in gm.graph.nodes if n.op == "call_function" and target is not None and n.target is target]:
            try:
                loop, operands = _loop(gm, node)
            except Reject as reject:
                rejections.append(reject.rejection)
                continue
            is_short = loop.is_shorter(min_steps)
            refused = Rejection("a scan of one step", node.name, loop.location) if is_short else why_not(loop)
            if refused is None:
                _replace(gm, node, loop, operands)
                loops.append(loop)
            else:
                rejections.append(refused)
                length = specialize_length(loop.length)
                if length is None:
                    continue
                loop.length = length
                unroll(gm, _replace(gm, node, loop, operands), loop)
            count += 1
    if count:
        gm.recompile()
    return loops, rejections, count


def _loop(gm: fx.GraphModule, node: fx.Node) -> tuple[Loop, list[fx.Node]]:
    """The loop that a scan is, and its operands."""
    body, inits, xs, extra = node.args
    location = user_location(node)
    if any(not isinstance(example(o), Tensor) for o in (*inits, *xs)):  # type: ignore[misc]
        raise Reject("a scan with a state or a series that is no tensor", node=node.name, location=location)
    length = _length(node, [example(x) for x in xs], location)  # type: ignore[union-attr]
    inner = _specialized(getattr(gm, str(body.target)))  # type: ignore[union-attr]
    if not name_regions(inner.graph, regions(node)):
        raise Reject("a scan with a region of autocast that does not end in its step", node=node.name, location=location)
    if any(not isinstance(r, fx.Node) for r in _results(inner)):
        raise Reject("a scan whose step gives a number", node=node.name, location=location)
    n, m = len(inits), len(xs)  # type: ignore[arg-type]
    operands = [*inits, *xs, *_without_numbers(inner, n + m, extra)]  # type: ignore[misc, arg-type]
    placeholders = inner.graph.find_nodes(op="placeholder")
    for i, (placeholder, operand) in enumerate(zip(placeholders, operands, strict=True)):
        _take_example(placeholder, operand, is_series=n <= i < n + m)
    _spread_gradients(inner.graph, dict(zip(placeholders, _results(inner)[:n], strict=False)))
    functionalize(inner)
    read = {u.args[1] for u in node.users if is_getitem(u)}
    carries = [
        LoopCarry(_name(init), example(p), is_result=i in read)
        for i, (init, p) in enumerate(zip(inits, placeholders, strict=False))  # type: ignore[arg-type]
    ]
    series = [LoopInput(_name(x), example(p)) for x, p in zip(xs, placeholders[n : n + m], strict=True)]  # type: ignore[arg-type]
    consts = [LoopConst(_name(o), example(o)) for o in operands[n + m :]]
    ys = [LoopOutput(base_name(r.name), example(r)) for r in _results(inner)[n:]]
    return Loop(f"scan_{node.name}", length, inner, carries, series, consts, ys, location), operands


def _length(node: fx.Node, series: Sequence[Tensor], location: str) -> int | torch.SymInt:
    lengths = {size_key(x.shape[0]): x.shape[0] for x in series}
    if len(lengths) != 1 or any(free_unbacked_symbols(s) for s in lengths.values()):
        raise Reject("a scan of unknown length", node=node.name, location=location)
    (length,) = lengths.values()
    known = known_int(length)
    return length if known is None else known


def _results(body: fx.GraphModule) -> list[fx.Node]:
    """Next states, then outputs."""
    return list(body.graph.output_node().args[0])  # type: ignore[arg-type]


def _specialized(body: fx.GraphModule) -> fx.GraphModule:
    """A copy of the step, with what `specialize` does to the graph around it."""
    inner = fx.GraphModule(body, copy.deepcopy(body.graph))
    specialize_floats(inner)
    fold_sizes(inner)
    drop_unread_sizes(inner)
    return inner


def _without_numbers(inner: fx.GraphModule, first: int, extra: Sequence[object]) -> list[object]:
    """The operands behind the series without sizes that the step does not read, and without those that are known."""
    kept = []
    for placeholder, operand in zip(inner.graph.find_nodes(op="placeholder")[first:], extra, strict=True):
        value = example(operand)
        number = value if isinstance(value, (bool, float)) else known_int(value)
        if number is not None:
            replace_by_number(placeholder, number)
        if placeholder.users or not isinstance(value, (int, float, torch.SymInt)):
            kept.append(operand)
        else:
            inner.graph.erase_node(placeholder)
    inner.recompile()
    return kept


def _name(operand: object) -> str:
    return series_name(operand) if isinstance(operand, fx.Node) else "x"


def _take_example(placeholder: fx.Node, operand: object, is_series: bool) -> None:
    """The step was traced on stand-ins: the operands know whether they want a gradient."""
    value = example(operand)
    own = example(placeholder)
    if not isinstance(own, Tensor):
        placeholder.meta["example_value"] = value.select(0, 0) if is_series else value
    elif value.requires_grad and own.dtype.is_floating_point:
        placeholder.meta["example_value"] = own.detach().requires_grad_()


def _spread_gradients(graph: fx.Graph, following: dict[fx.Node, fx.Node]) -> None:
    """The step was traced on states that want no gradient yet. Those that come to want one do so in all that is made of them.

    `following`: for each state, its next value.
    """
    while True:
        is_enabled = True
        for node in graph.nodes:
            if is_grad_switch(node):
                is_enabled = bool(node.args[0])
            elif is_enabled and node.op in ("call_function", "call_method") and node.target not in ("detach", torch.detach):
                node.meta["example_value"] = _wanting(example(node), [example(n) for n in node.all_input_nodes])
        late = [p for p, n in following.items() if wanting_grad(example(p), [example(n)]) is not example(p)]
        if not late:
            return
        for placeholder in late:
            placeholder.meta["example_value"] = wanting_grad(example(placeholder), [example(following[placeholder])])


def _wanting(value: object, others: Sequence[object]) -> object:
    """`wanting_grad`, of the results of ops that have several, too."""
    flat = [v for o in others for v in (o if isinstance(o, (tuple, list)) else (o,))]
    if isinstance(value, (tuple, list)):
        return type(value)(wanting_grad(v, flat) for v in value)
    return wanting_grad(value, flat)


def _replace(gm: fx.GraphModule, node: fx.Node, loop: Loop, operands: Sequence[fx.Node]) -> fx.Node:
    """Put a call of `loop` in the place of the scan, and give it.

    Results of a scan are carries, then outputs; those of a loop are outputs, then the carries that are read.
    """
    count, name = 0, loop.name
    while hasattr(gm, name):
        count += 1
        name = f"{loop.name}_{count}"
    gm.add_submodule(name, loop)
    n = len(loop.carries)
    finals = [i for i, c in enumerate(loop.carries) if c.is_result]
    place = {n + i: i for i in range(len(loop.ys))} | {c: len(loop.ys) + k for k, c in enumerate(finals)}
    with gm.graph.inserting_before(node):
        call = gm.graph.call_module(name, tuple(operands))
        call.meta = {k: v for k, v in node.meta.items() if k != "example_value"}
        for user in list(node.users):
            new = gm.graph.call_function(operator.getitem, (call, place[user.args[1]]))  # type: ignore[index]
            new.meta = dict(user.meta)
            user.replace_all_uses_with(new)
            gm.graph.erase_node(user)
    gm.graph.erase_node(node)
    return call
