"""A result written into a tensor is a value first, and then a write like any other.

    torch.add(a, b, out=v)     ->     v.copy_(torch.add(a, b))

Does not fire: results of another size or dtype than the tensor's, several results.
"""

from __future__ import annotations

import torch
from torch import fx

from snn_compile.ir.values import example
from snn_compile.passes.emit import emit


def write_out(graph: fx.Graph) -> None:
    """Rewrite `graph` (torch-level, with examples) in place."""
    for node in list(graph.nodes):
        target = node.kwargs.get("out")
        held = example(target)
        if node.op != "call_function" or not isinstance(target, fx.Node) or not isinstance(held, torch.Tensor):
            continue
        with graph.inserting_before(node):
            value = emit(graph, "call_function", node.target, node.args, {k: v for k, v in node.kwargs.items() if k != "out"})
            made = example(value)
            if not isinstance(made, torch.Tensor) or (made.shape, made.dtype, made.device) != (
                held.shape,
                held.dtype,
                held.device,
            ):
                graph.erase_node(value)
                continue
            write = graph.call_method("copy_", (target, value))
        value.meta = {**node.meta, **value.meta}
        write.meta = {**node.meta, "example_value": held}
        node.replace_all_uses_with(write)
        graph.erase_node(node)
