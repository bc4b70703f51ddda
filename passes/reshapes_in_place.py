"""What is reshaped in place has had another shape before.

    s = spike(v)                    [1, 3, 5]            s = spike(v)                     [3, 5]
    s.unsqueeze_(0)                 [1, 3, 5]     ->     s.unsqueeze_(0)               [1, 3, 5]
    out.append(s)

Dynamo keeps one fake tensor for a value and all that is written into it; where it is reshaped, it shows its last shape from the
first node on. Here a node gets the example of its own time, in the same memory; `passes/functionalize` asks for it as it goes
through the graph, when the operands have theirs.
"""

from __future__ import annotations

from torch import fx

from snn_compile.ir.values import example
from snn_compile.passes.effects import is_write
from snn_compile.passes.emit import evaluate

#: In-place methods that change nothing but sizes and strides.
RESHAPING = {"unsqueeze_", "squeeze_", "transpose_", "swapaxes_", "swapdims_", "t_"}


def _is_reshape(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target in RESHAPING


def nodes_reshaped(graph: fx.Graph) -> set[fx.Node]:
    """All nodes that share their example with one that is reshaped in place."""
    shared = {id(example(n)) for n in graph.nodes if _is_reshape(n)}
    return {n for n in graph.nodes if id(example(n)) in shared} if shared else set()


def date_example(node: fx.Node) -> None:
    """The example of `node` as it is when the node has run, given those of its operands before."""
    value = example(node)
    if _is_reshape(node):
        like = getattr(example(node.args[0]).detach(), str(node.target)[:-1])(*node.args[1:], **node.kwargs)
    else:
        like = example(node.args[0]) if is_write(node) else evaluate(node)
    new = value.detach().as_strided(like.shape, like.stride())
    node.meta["example_value"] = new.requires_grad_(value.requires_grad) if value.dtype.is_floating_point else new
