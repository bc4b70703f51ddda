"""A planned loop takes the place of its iterations in the graph.

h_0 = …; s_0 = …; h_1 = …; s_1 = …; y = stack([s_0, s_1, …])    ->    s, v = loop(inits, xs, consts); y = s
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from snn_compile.ir.values import example
from snn_compile.passes.functionalize import store
from snn_compile.passes.loop_body import Carry
from snn_compile.passes.loop_results import rewire_output, stacked_example
from snn_compile.passes.plan_loop import LoopPlan


def replace_by_loop(plan: LoopPlan) -> fx.Node:
    """Gives the loop's call."""
    loop, window = plan.loop, plan.window
    gm, graph = window.view.gm, window.view.gm.graph
    gm.add_submodule(loop.name, loop)
    with graph.inserting_after(window.view.nodes[window.stop - 1]):
        anchor = graph.call_function(operator.getitem, (0, 0))  # a place to insert before
    with graph.inserting_before(anchor):
        operands = [_initial(graph, c) for c in plan.body.carries.values()]
        operands += [source.emit(graph) for _, source, _ in plan.body.inputs]
        operands += list(plan.body.consts)
        call = graph.call_module(loop.name, tuple(operands))
        call.meta = {"stack_trace": window.representative().meta.get("stack_trace", "")}
        outputs, finals = _results(graph, plan, call)
        _rewire(graph, plan, outputs, finals)
    graph.erase_node(anchor)
    for position in range(window.stop - 1, window.start - 1, -1):
        node = window.view.nodes[position]
        if not node.users:
            graph.erase_node(node)
    return call


def _initial(graph: fx.Graph, carry: Carry) -> fx.Node:
    if isinstance(carry.init, fx.Node):
        return carry.init
    value = example(carry.placeholder)
    assert isinstance(value, torch.Tensor)
    node = graph.call_function(torch.full, ((), carry.init), {"dtype": value.dtype, "device": value.device})
    node.meta = {"example_value": value.new_empty(()).detach()}
    return node


def _results(graph: fx.Graph, plan: LoopPlan, call: fx.Node) -> tuple[list[fx.Node], dict[int, fx.Node]]:
    """The loop's outputs, and its final carries by their place among the carries."""
    wanted = [i for i, carry in enumerate(plan.loop.carries) if carry.is_result]
    values = [stacked_example(y, plan.window.count) for y in plan.loop.ys] + [plan.loop.carries[i].example for i in wanted]
    results = []
    for position, value in enumerate(values):
        results.append(graph.call_function(operator.getitem, (call, position)))
        results[-1].meta = {"example_value": value}
    outputs = results[: len(plan.loop.ys)]
    return outputs, dict(zip(wanted, results[len(outputs) :], strict=True))


def _rewire(graph: fx.Graph, plan: LoopPlan, outputs: list[fx.Node], finals: dict[int, fx.Node]) -> None:
    for residue, index in plan.final_of.items():
        _replace_last(plan, residue, finals[index], only_results=residue in plan.output_of)
    for residue, index in plan.output_of.items():
        if residue in plan.body.stores:
            _replace_last(plan, residue, _stored(graph, plan, residue, outputs[index]))
        else:
            rewire_output(graph, plan.window, residue, plan.loop.ys[index], outputs[index])


def _replace_last(plan: LoopPlan, residue: int, new: fx.Node, only_results: bool = False) -> None:
    """What the last iteration's value was used for; `only_results`: as a result of the graph."""
    last = plan.window.count - 1
    node = plan.window.node(residue, last)
    for user in plan.window.uses[residue][last]:
        if only_results and user.op != "output":
            continue
        user.replace_input_with(node, new)


def _stored(graph: fx.Graph, plan: LoopPlan, residue: int, ys: fx.Node) -> fx.Node:
    """``out`` after the loop: the stacked values where they cover it, else the rest of the buffer with them in it."""
    window, (dim, first, reverse) = plan.window, plan.body.stores[residue]
    node = window.node(residue, window.count - 1)
    size = example(node).shape[dim]  # type: ignore[union-attr]
    low = first - window.count + 1 if reverse else first
    low = low % size if isinstance(size, int) else low
    if isinstance(size, int) and window.count == size and low == 0:
        return ys
    buffer = window.leaves(residue, 0)[0]
    index = (*(slice(None),) * dim, slice(low, low + window.count))
    new = graph.call_function(store, (buffer, index, ys))  # type: ignore[arg-type]
    new.meta = dict(node.meta)
    return new
