"""Results that are views of the graph's inputs are taken behind everything else.

    for t: u = x[t]; …; return y, u      ->      for t: u = x[t]; …; return y, x[T - 1]

In a loop such a value would become one of the loop's own, and a write into the result would no longer reach the input.

Does not fire: where gradients are switched on and off; views whose sizes are symbolic; copies.
"""

from __future__ import annotations

from torch import fx

from snn_compile.ir.values import storage_key
from snn_compile.passes.effects import is_grad_switch, is_write
from snn_compile.passes.emit import evaluate
from snn_compile.passes.separate_results import views_back


def views_of_inputs(graph: fx.Graph) -> int:
    """Rewrite `graph` (torch-level, with examples) in place; gives how many results are views taken anew."""
    if any(is_grad_switch(n) for n in graph.nodes):
        return 0
    output, count = graph.output_node(), 0
    for result in output.all_input_nodes:
        if (views := views_of_input(result)) is not None:
            output.replace_input_with(result, taken_anew(views, output))
            count += 1
    return count


def views_of_input(result: fx.Node) -> list[fx.Node] | None:
    """The views, from the result back to the first one, by which it is made of an input of the graph; None where it is not."""
    views = views_back(result)
    source = views.pop()
    if not views or source.op != "placeholder" or not all(_is_view_of_one(n, source) for n in views):
        return None
    return views


def taken_anew(views: list[fx.Node], before: fx.Node) -> fx.Node:
    """What `views_of_input` has found, once more, before that node."""
    anew: dict[fx.Node, fx.Node] = {}
    with before.graph.inserting_before(before):
        for node in reversed(views):
            anew[node] = before.graph.node_copy(node, lambda n: anew.get(n, n))  # (of `unbind`: the same one)
            anew[node].meta["example_value"] = evaluate(anew[node])
    return anew[views[0]]


def _is_view_of_one(node: fx.Node, source: fx.Node) -> bool:
    return storage_key(node) == storage_key(source) and node.all_input_nodes == list(node.args[:1]) and not is_write(node)
