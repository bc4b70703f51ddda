"""Values computed under `no_grad` are detached, and the switches of the mode go.

    with no_grad(): r = f(s, x[t])           r = f(s.detach(), x[t].detach())
    with no_grad(): trace += s               trace += s.detach()                          where `trace` wants no gradient
    with no_grad(): v.clamp_(max=1)    ->    w = v.detach().clone(); w.clamp_(max=1)      where `v` wants one:
                                             v.copy_(straight_through(v, w))              the value of w, the gradient of v
    v.data.clamp_(max=1)                     as under no_grad; so is v.detach().clamp_(max=1)

Does not fire: regions that write into a tensor from outside of the graph, that hold another switch, or an op on several tensors
that were made in one call before.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator

from torch import Tensor, fx

from snn_compile.ir.values import example, is_getitem, storage_key
from snn_compile.passes.classify import AUTOGRAD_FUNCTION
from snn_compile.passes.effects import is_grad_switch, is_write
from snn_compile.passes.emit import emit


def detach_no_grad_regions(gm: fx.GraphModule) -> None:
    """Rewrite `gm` (torch-level, with examples) in place."""
    given = {storage_key(n) for n in gm.graph.nodes if n.op in ("placeholder", "get_attr")}
    _write_data(gm, given)
    switches = [n for n in gm.graph.nodes if is_grad_switch(n)]
    i = 0
    while i + 1 < len(switches):
        off, on = switches[i], switches[i + 1]
        is_region = off.args[0] is False and on.args[0] is True
        inside = dict.fromkeys(_between(off, on)) if is_region else {}
        if not is_region or not all(_can_be_detached(n, given) for n in inside):
            i += 1
            continue
        for node in inside:
            _detach(gm, node, inside)
        gm.graph.erase_node(off)
        gm.graph.erase_node(on)
        i += 2


def drop_idle_detaches(graph: fx.Graph) -> None:
    """``full.detach() -> full``: what is left of a loop's first step, where a state wants no gradient."""
    seen = {storage_key(n) for n in graph.nodes if any(u.op == "output" or is_write(u) for u in n.users)}
    for node in graph.find_nodes(op="call_method", target="detach"):
        operand = node.args[0]
        assert isinstance(operand, fx.Node)
        if not operand.all_input_nodes and storage_key(node) not in seen and not example(operand).requires_grad:  # type: ignore[attr-defined]
            node.replace_all_uses_with(operand)
            graph.erase_node(node)


def _write_data(gm: fx.GraphModule, given: set[int | None]) -> None:
    """``v.data``, where nothing but a write reads it, is ``v`` under `no_grad`."""
    for node in list(gm.graph.nodes):
        is_data = getattr(node.target, "__name__", node.target) in ("_get_data_attr", "detach")
        if not is_data or len(node.users) != 1 or len(node.all_input_nodes) != 1:
            continue
        (write,) = node.users
        if is_write(write) and not write.users and write.args[0] is node and _can_be_detached(write, given):
            write.replace_input_with(node, node.args[0])
            gm.graph.erase_node(node)
            _detach(gm, write, ())


def _between(off: fx.Node, on: fx.Node) -> Iterator[fx.Node]:
    node = off.next
    while node is not on:
        yield node
        node = node.next


def _can_be_detached(node: fx.Node, given: set[int | None]) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    if is_write(node):
        target = node.args[0] if node.args else None
        return isinstance(target, fx.Node) and "out" not in node.kwargs and storage_key(target) not in given
    return is_getitem(node) or not any(_holds_tensors(example(i)) for i in node.all_input_nodes)


def _holds_tensors(value: object) -> bool:
    return isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value)


def _detach(gm: fx.GraphModule, node: fx.Node, inside: Collection[fx.Node]) -> None:
    """`node`, which ran under `no_grad`, where gradients are on."""
    if is_getitem(node):  # (what is read of a series or of a call's results; the series is one for all steps)
        if _may_want_gradient(node):
            with gm.graph.inserting_after(node):
                detached = _detached(gm.graph, node, node)
            node.replace_all_uses_with(detached, delete_user_cb=lambda user: user is not detached)
        return
    target = node.args[0] if is_write(node) else None
    for operand in node.all_input_nodes:
        if operand is not target and operand not in inside and _may_want_gradient(operand):
            with gm.graph.inserting_before(node):
                node.replace_input_with(operand, _detached(gm.graph, operand, node))
    if isinstance(target, fx.Node) and example(target).requires_grad:  # type: ignore[attr-defined]
        _write_straight_through(gm, node, target)


def _may_want_gradient(node: fx.Node) -> bool:
    """Of what is computed, the first step's value may want none where those of all others do: it is detached like them."""
    value = example(node)
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point or node.target == "detach":
        return False
    return value.requires_grad or node.op in ("call_function", "call_method")


def _detached(graph: fx.Graph, node: fx.Node, reader: fx.Node) -> fx.Node:
    new = emit(graph, "call_method", "detach", (node,), {})
    new.meta = {**reader.meta, "example_value": new.meta["example_value"]}
    return new


def _write_straight_through(gm: fx.GraphModule, write: fx.Node, target: fx.Node) -> None:
    graph, place = gm.graph, write.meta
    with graph.inserting_before(write):
        fresh = emit(graph, "call_method", "clone", (_detached(graph, target, write),), {})
    write.replace_all_uses_with(target)
    write.update_arg(0, fresh)
    write.meta = {**place, "example_value": example(fresh)}
    forward, backward = (_body(gm, name) for name in ("forward", "backward"))
    with graph.inserting_after(write):
        call = graph.call_function(AUTOGRAD_FUNCTION, (forward, backward, target, fresh), dict(_DIFFERENTIABLE))
    value = example(target)
    call.meta = {**place, "example_value": (value,)}
    with graph.inserting_after(call):
        result = graph.call_function(operator.getitem, (call, 0))
    result.meta = {**place, "example_value": value}
    with graph.inserting_after(result):
        written = graph.call_method("copy_", (target, result))
    written.meta = {**place, "example_value": value}


#: What Dynamo tells of a function that saves nothing.
_DIFFERENTIABLE: dict[str, list[int]] = {"non_differentiable_idx": [], "saved_for_backward_idx": []}


def _body(gm: fx.GraphModule, which: str) -> fx.Node:
    """``forward(v, w) -> w`` or ``backward(grad) -> (grad, None)`` as an attribute of `gm`."""
    name = f"straight_through_{which}"
    if not hasattr(gm, name):
        graph = fx.Graph()
        if which == "forward":
            _, w = graph.placeholder("v"), graph.placeholder("w")
            graph.output(((graph.call_method("clone", (w,)),), ()))
        else:
            graph.output((graph.placeholder("grad"), None))
        gm.add_submodule(name, fx.GraphModule({}, graph))
    first = next(iter(gm.graph.nodes))
    with gm.graph.inserting_before(first):
        node = gm.graph.get_attr(name)
    node.meta["example_value"] = getattr(gm, name)
    return node
