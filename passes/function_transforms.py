"""A graph that `torch.func` transforms, or that differentiates a gradient of its own, goes to Inductor as it is.

Dynamo writes ``grad(f)(p)`` and ``vmap(f)(x)`` as switches of the mode in which all ops behind them run:

    _grad_increment_nesting(); q = _create_differentiable(p, 1); y = f(q); g = _autograd_grad(y, q); _grad_decrement_nesting()

Between the switches, a value is another thing than its example says - it has a batch dim that no shape shows, or wants a gradient
of a level that `requires_grad` does not know - so no rewrite of such code can be proved. And kernels have a backward, which has
none itself: a gradient that is differentiated (``create_graph=True``) needs the plain ops.
"""

from __future__ import annotations

import torch
from torch import fx

from snn_compile.errors import Rejection
from snn_compile.ir.values import user_location

_NESTING = "_increment_nesting"
_FIRST_ORDER = "for gradients of the first order, call `.backward()` on what the compiled function returns"


def why_transformed(graph: fx.Graph) -> Rejection | None:
    """Why the graph is left alone, if it is one of these."""
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        if node.op != "call_function":
            continue
        if name.endswith(_NESTING):
            transform = name.removesuffix(_NESTING).strip("_")
            reason = f"torch.func.{transform} runs inside of the compiled function"
            return Rejection(reason, node.name, user_location(node), _FIRST_ORDER if transform == "grad" else "")
        if node.target is torch.autograd.grad and _creates_graph(node):
            return Rejection("a gradient with create_graph=True is differentiated again", node.name, user_location(node))
    return None


def _creates_graph(node: fx.Node) -> bool:
    """The fifth parameter of `torch.autograd.grad`."""
    return bool(node.kwargs.get("create_graph", node.args[4:5] and node.args[4]))
