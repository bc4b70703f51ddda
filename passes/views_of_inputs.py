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
        views = views_back(result)
        source = views.pop()
        if not views or source.op != "placeholder" or not all(_is_view_of_one(n, source) for n in views):
            continue
        anew: dict[fx.Node, fx.Node] = {}
        with graph.inserting_before(output):
            for node in reversed(views):
                anew[node] = graph.node_copy(node, lambda n, anew=anew: anew.get(n, n))  # (of `unbind`: the same one)
                anew[node].meta["example_value"] = evaluate(anew[node])
        output.replace_input_with(result, anew[result])
        count += 1
    return count


def _is_view_of_one(node: fx.Node, source: fx.Node) -> bool:
    return storage_key(node) == storage_key(source) and node.all_input_nodes == list(node.args[:1]) and not is_write(node)
