"""What a loop carries or reads in vain is gone from it.

    for t: a = v.T; u = x[t] * 2; v = 0.9 * v + z[t]; out.append(v)     ->      for t: v = 0.9 * v + z[t]; out.append(v)

Code whose value nobody wants is in all iterations alike, so that it is found with them, and its operands would be the loop's.

Does not fire: states whose last value is a result; what has an effect; time series where their length is the only one there is.
"""

from __future__ import annotations

from torch import fx

from snn_compile.ir.loop import Loop
from snn_compile.passes.effects import has_effect


def drop_unread(call: fx.Node, loop: Loop) -> int:
    """Rewrite `loop` and its `call` in place; gives how many operands are gone."""
    placeholders, (following, values) = loop.placeholders(), loop.results()
    wanted = _wanted(loop)
    n, m = len(loop.carries), len(loop.xs)
    kept = [p in wanted or (n <= i < n + m and not isinstance(loop.length, int)) for i, p in enumerate(placeholders)]
    if all(kept):
        return 0
    loop.carries, loop.xs, loop.consts = (
        [spec for spec, keep in zip(specs, kept[start:], strict=False) if keep]
        for specs, start in ((loop.carries, 0), (loop.xs, n), (loop.consts, n + m))
    )
    graph = loop.body.graph
    graph.output_node().args = ((*(v for v, keep in zip(following, kept, strict=False) if keep), *values),)
    graph.eliminate_dead_code(is_impure_node=has_effect)
    for placeholder, keep in zip(placeholders, kept, strict=True):
        if not keep:
            graph.erase_node(placeholder)
    loop.body.recompile()
    call.args = tuple(operand for operand, keep in zip(call.args, kept, strict=True) if keep)
    return kept.count(False)


def _wanted(loop: Loop) -> set[fx.Node]:
    """The nodes of the body that a result of the loop, or an effect, depends on."""
    following, values = loop.results()
    next_of = dict(zip(loop.placeholders(), following, strict=False))
    todo = [*values, *(v for v, carry in zip(following, loop.carries, strict=True) if carry.is_result)]
    todo += [p for p, carry in zip(loop.placeholders(), loop.carries, strict=False) if carry.is_result]
    todo += [node for node in loop.body.graph.nodes if node.op not in ("placeholder", "output") and has_effect(node)]
    wanted: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node not in wanted:
            wanted.add(node)
            todo += node.all_input_nodes
            todo += [next_of[node]] if node in next_of else []
    return wanted
