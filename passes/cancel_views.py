"""Views that give back what they were made of are gone, and what is left of them at a state's start is made before the steps.

    v.movedim(-1, -1)                        ->      v
    v = u.movedim(1, -1).movedim(-1, 1)      ->      v = u
    for t: m = v.movedim(1, -1); m = 0.9*m + x[t].movedim(1, -1); v = m.movedim(-1, 1)
                                             ->      m = v.movedim(1, -1); for t: m = 0.9*m + x[t].movedim(1, -1)

A layer that works along its last dim, whichever that is outside, turns its state there and back in every step: no kernel could
hold it.

Does not fire: tensors that are written into; where gradients are switched on and off.
"""

from __future__ import annotations

from torch import Tensor, fx

from snn_compile.ir.values import example, size_key, storage_key
from snn_compile.passes.effects import is_grad_switch, written
from snn_compile.passes.merge_views import is_view


def cancel_views(graph: fx.Graph) -> int:
    """Rewrite `graph` (torch-level, with examples) in place; gives how many views are gone."""
    if any(is_grad_switch(n) for n in graph.nodes):
        return 0
    touched = {storage_key(operand) for n in graph.nodes for operand in written(n)}
    front = next((n for n in graph.nodes if n.op not in ("placeholder", "get_attr")), None)
    count = 0
    for node in list(graph.nodes):
        if not is_view(node) or touched & {storage_key(node), storage_key(node.args[0])}:
            continue
        same = _same_before(node)
        if same is not None:
            front = node.next if node is front else front
            node.replace_all_uses_with(same)
            graph.erase_node(node)
            count += 1
        elif _is_made_before(node.args[0]) and front is not None and node is not front:  # type: ignore[arg-type]
            (front if node.args[0].op in ("placeholder", "get_attr") else node.args[0].next).prepend(node)  # type: ignore[union-attr]
    return count


def _same_before(node: fx.Node) -> fx.Node | None:
    """What the node is a view of, or that is, and looks the same."""
    wanted, source = _look(node), node
    while is_view(source):
        source = source.args[0]  # type: ignore[assignment]
        if _look(source) == wanted:
            return source
    return None


def _look(node: fx.Node) -> object:
    value = example(node)
    assert isinstance(value, Tensor)
    sizes = (*map(size_key, value.shape), *map(size_key, value.stride()), size_key(value.storage_offset()))
    return value.dim(), sizes, value.requires_grad, value.is_conj(), storage_key(node)


def _is_made_before(node: fx.Node) -> bool:
    """Before the first step: an input of the graph, or a tensor of one number."""
    return node.op in ("placeholder", "get_attr") or not node.all_input_nodes
